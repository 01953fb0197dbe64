//! GroupNorm, with SiLU behind it where a VAE has one.
//!
//! The pictures of a VAE are the largest tensors there are, so statistics, scale, shift and SiLU are
//! taken while a group is at hand, and in the input's own memory where the caller allows it.

use candle_core::{DType, Result, Tensor};
use mmgp_quant::Weights;
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::nn::cuda;
use crate::nn::{
    activation::silu,
    cpu,
    norms::{is_f32_cpu, sum},
};

/// Values that are held in f32 at once on other devices, if a group is not larger: 32 MiB.
const SPAN: usize = 8 << 20;

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
        #[cfg(feature = "cuda")]
        if let Some(kernels) = self.kernels(x, false) {
            return kernels.forward(x);
        }
        self.run(x.copy()?, |v| v, Ok)
    }

    /// The same in the memory of `x`, which must be the caller's own: whoever else holds a clone of
    /// it sees the change.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn in_place(&self, x: Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(kernels) = self.kernels(&x, false) {
            let x = x.contiguous()?;
            kernels.in_place(&x)?;
            return Ok(x);
        }
        self.run(x, |v| v, Ok)
    }

    /// The same with SiLU behind it: `[batch, channels, …]` to the same shape.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(kernels) = self.kernels(x, true) {
            return kernels.forward(x);
        }
        self.silu_in_place(x.copy()?)
    }

    /// The same with SiLU behind it, [in place](Self::in_place).
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn silu_in_place(&self, x: Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(kernels) = self.kernels(&x, true) {
            let x = x.contiguous()?;
            kernels.in_place(&x)?;
            return Ok(x);
        }
        self.run(x, silu, |y| y.silu())
    }

    /// The GPU's kernels, if they are used for `x`.
    #[cfg(feature = "cuda")]
    fn kernels(&self, x: &Tensor, silu: bool) -> Option<cuda::GroupNorm<'_>> {
        let Self { weight, bias, groups, eps } = self;
        let norm = cuda::GroupNorm { weight, bias, groups: *groups, eps: *eps, silu };
        cuda::take(&[x, weight, bias]).then_some(norm)
    }

    fn run(
        &self,
        x: Tensor,
        kernel: impl Fn(f32) -> f32 + Send + Sync,
        then: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let of_group = channels / self.groups;
        if self.weight.dims() != [channels] {
            candle_core::bail!("group norm: {:?} for {:?}", x.dims(), self.weight.dims());
        }
        if !is_f32_cpu(&x) {
            return self.composed(&x.contiguous()?, SPAN, then);
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

impl GroupNorm {
    /// In the memory of `x`, contiguous, as many groups at a time as have `limit` values: statistics
    /// are in f32, of which the whole picture is never held.
    fn composed(
        &self,
        x: &Tensor,
        limit: usize,
        then: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let of_group = channels / self.groups;
        let plane = x.elem_count() / (batch * channels).max(1);
        if plane == 0 || x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let line = x.dims().get(2..).and_then(<[usize]>::last).copied().unwrap_or(1);
        let all = x.reshape((batch * self.groups, of_group, plane))?;
        let per_channel = |t: &Tensor| t.to_dtype(DType::F32)?.reshape((self.groups, of_group, 1));
        let (weight, bias) = (per_channel(&self.weight)?, per_channel(&self.bias)?);
        let count = (limit / (of_group * plane)).clamp(1, self.groups);
        for item in 0..batch {
            for first in (0..self.groups).step_by(count) {
                let count = count.min(self.groups - first);
                let at = item * self.groups + first;
                let y = all.narrow(0, at, count)?.to_dtype(DType::F32)?;
                // Means of lines, then of those: short sums keep digits and run side by side.
                let mean = |t: &Tensor| {
                    let lines = t.reshape((count, of_group * plane / line, line))?.mean(2)?;
                    lines.mean_keepdim(1)?.unsqueeze(2)
                };
                let y = y.broadcast_sub(&mean(&y)?)?;
                let deviation = (mean(&y.sqr()?)? + self.eps)?.sqrt()?;
                let scale = weight.narrow(0, first, count)?.broadcast_div(&deviation)?;
                let y = y.broadcast_mul(&scale)?;
                let y = then(y.broadcast_add(&bias.narrow(0, first, count)?)?)?;
                all.slice_set(&y.to_dtype(x.dtype())?, 0, at)?;
            }
        }
        Ok(x.clone())
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
        near(&ours.in_place(x.copy()?)?, &want)?;
        near(&ours.forward_silu(&x)?, &want.silu()?)?;
        near(
            &ours.silu_in_place(x.transpose(2, 3)?.contiguous()?)?,
            &want.transpose(2, 3)?.silu()?,
        )?;
        for limit in [1, 300, SPAN] {
            near(&ours.composed(&x.copy()?, limit, Ok)?, &want)?;
            near(&ours.composed(&x.copy()?, limit, |y| y.silu())?, &want.silu()?)?;
        }
        let half = ours.forward(&x.to_dtype(DType::BF16)?)?;
        assert_eq!(half.dtype(), DType::BF16);
        let error = (half.to_dtype(DType::F32)? - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(error < 0.08, "{error}"); // 2⁻⁸ of values up to 20
        let wrong = rand(&[2, 6, 5, 7])?;
        assert!(ours.forward(&wrong).is_err());
        assert!(GroupNorm::new(&weights, 5, 12, 1e-6).is_err());
        Ok(())
    }
}
