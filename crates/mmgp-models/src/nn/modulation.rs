//! The vectors that condition a block of a diffusion transformer
//! ([Scalable Diffusion Models with Transformers](https://arxiv.org/abs/2212.09748), adaLN).

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Linear, SharedInput, Weights};

use crate::nn::contiguous;

/// `N` vectors of a block (shifts, scales, gates), one product of the activated timestep's vector.
#[derive(Debug)]
pub struct Modulation<const N: usize> {
    linear: Linear,
    width: usize,
}

impl<const N: usize> Modulation<N> {
    /// Asks for `linear` `[N · width, inputs]` with bias.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(weights: &Weights, inputs: usize, width: usize) -> mmgp_quant::Result<Self> {
        let linear = weights.pp("linear").linear(inputs, N * width, Bias::Yes)?;
        Ok(Self { linear, width })
    }

    /// `N` vectors `[batch, width]` from SiLU of the timestep's vector, `[batch, inputs]`.
    ///
    /// # Errors
    /// An input of another width; weights that are not leased.
    pub fn forward(&self, activated: &SharedInput) -> Result<[Tensor; N]> {
        let all = activated.through(&self.linear)?;
        let mut parts = Vec::with_capacity(N);
        for i in 0..N {
            parts.push(contiguous(&all.narrow(1, i * self.width, self.width)?)?);
        }
        parts.try_into().map_err(|_| candle_core::Error::msg("modulation"))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::MemorySource;

    use super::*;

    #[test]
    fn vectors_come_in_the_order_of_rows() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let source = MemorySource::new(&dev)
            .with("linear.weight", Tensor::new(&[[1f32], [2.], [3.], [4.]], &dev)?)
            .with("linear.bias", Tensor::new(&[0f32, 0., 0.5, 0.5], &dev)?);
        let modulation = Modulation::<2>::new(&Weights::new(source), 1, 2)?;
        let [a, b] = modulation.forward(&SharedInput::new(Tensor::new(&[[1f32], [-1.]], &dev)?))?;
        assert_eq!(a.to_vec2::<f32>()?, [[1., 2.], [-1., -2.]]);
        assert_eq!(b.to_vec2::<f32>()?, [[3.5, 4.5], [-2.5, -3.5]]);
        Ok(())
    }
}
