//! GroupNorm, with SiLU behind it where a VAE has one.
//!
//! The pictures of a VAE are the largest tensors there are, so statistics, scale, shift and SiLU are
//! taken while a group is at hand, and in the input's own memory where the caller allows it.

use candle_core::{Result, Tensor};
use mmgp_quant::Weights;
use rayon::prelude::*;

use crate::nn::{
    activation::silu,
    cpu,
    norms::{is_f32_cpu, plain_norm, sum},
};

/// GroupNorm ([Group Normalization](https://arxiv.org/abs/1803.08494)) over `[batch, channels, …]`.
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Asks for `weight` and `bias` `[channels]`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; groups that do not divide the channels.
    pub fn new(
        weights: &Weights,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> mmgp_quant::Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(mmgp_quant::Error::Invalid(format!(
                "group norm `{}`: {channels} channels in {groups} groups",
                weights.prefix()
            )));
        }
        let weight = weights.tensor(&[channels], "weight")?;
        Ok(Self { weight, bias: weights.tensor(&[channels], "bias")?, groups, eps })
    }

    /// `[batch, channels, …]` to the same shape.
    ///
    /// # Errors
    /// Another number of channels; weights that are not leased.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x.copy()?, |v| v, Ok)
    }

    /// The same with SiLU behind it: `[batch, channels, …]` to the same shape.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.silu_in_place(x.copy()?)
    }

    /// The same in the memory of `x`, which must be the caller's own: whoever else holds a clone of
    /// it sees the change.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn silu_in_place(&self, x: Tensor) -> Result<Tensor> {
        self.run(x, silu, |y| y.silu())
    }

    fn run(
        &self,
        x: Tensor,
        kernel: impl Fn(f32) -> f32 + Send + Sync,
        then: impl FnOnce(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let of_group = channels / self.groups;
        if self.weight.dims() != [channels] {
            candle_core::bail!("group norm: {:?} for {:?}", x.dims(), self.weight.dims());
        }
        if !is_f32_cpu(&x) {
            let y = x.reshape((batch * self.groups, ()))?;
            let y = plain_norm(&y, self.eps)?.reshape((batch, channels, ()))?;
            let y = y.broadcast_mul(&self.weight.reshape((1, channels, 1))?)?;
            let y = y.broadcast_add(&self.bias.reshape((1, channels, 1))?)?;
            return then(y.reshape(x.shape())?);
        }
        let x = x.contiguous()?;
        let plane = x.elem_count() / (batch * channels).max(1);
        let span = plane * of_group;
        if span == 0 {
            return Ok(x);
        }
        let group = |i: usize, x: &mut [f32], weight: &[f32], bias: &[f32]| {
            let mean = (sum(x, |v| v) / span as f64) as f32;
            let variance = sum(x, |v| (v - mean) * (v - mean)) / span as f64;
            let inverse = 1. / (variance + self.eps).sqrt();
            let first = i % self.groups * of_group;
            for (channel, x) in x.chunks_exact_mut(plane).enumerate() {
                let scale = (inverse * f64::from(weight[first + channel])) as f32;
                let shift = bias[first + channel];
                x.iter_mut().for_each(|v| *v = kernel((*v - mean) * scale + shift));
            }
        };
        cpu::read(&self.weight, |weight| {
            cpu::read(&self.bias, |bias| {
                cpu::update(&x, |x| {
                    let groups = x.par_chunks_exact_mut(span).enumerate();
                    groups.for_each(|(i, x)| group(i, x, weight, bias));
                })
            })
        })?;
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::MemorySource;

    use super::*;

    fn near(a: &Tensor, b: &Tensor) -> Result<()> {
        assert_eq!(a.dims(), b.dims());
        let worst = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 2e-5, "{worst}"); // of values up to 20
        Ok(())
    }

    #[test]
    fn groups_equal_candle() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0.5f32, 1.5, s, &dev);
        let (w, b, x) = (rand(&[12])?, rand(&[12])?, rand(&[2, 12, 5, 7])?);
        let source = MemorySource::new(&dev).with("weight", w.clone()).with("bias", b.clone());
        let weights = Weights::new(source);
        let ours = GroupNorm::new(&weights, 3, 12, 1e-6)?;
        let theirs = candle_nn::GroupNorm::new(w, b, 12, 3, 1e-6)?;
        let want = candle_nn::Module::forward(&theirs, &x)?;
        near(&ours.forward(&x)?, &want)?;
        near(&ours.forward_silu(&x)?, &want.silu()?)?;
        near(
            &ours.silu_in_place(x.transpose(2, 3)?.contiguous()?)?,
            &want.transpose(2, 3)?.silu()?,
        )?;
        let wrong = rand(&[2, 6, 5, 7])?;
        assert!(ours.forward(&wrong).is_err());
        assert!(GroupNorm::new(&weights, 5, 12, 1e-6).is_err());
        Ok(())
    }
}
