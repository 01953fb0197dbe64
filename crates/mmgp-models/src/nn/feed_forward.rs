//! The feed-forward part of a block under diffusers' names.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Input, Linear, Weights};

use crate::nn::Activation;

/// Linear to four times the width, activation, linear back, as `net.0.proj` and `net.2`.
#[derive(Debug)]
pub struct FeedForward {
    up: Linear,
    activation: Activation,
    down: Linear,
}

impl FeedForward {
    /// Asks for `net.0.proj` `[4 · width, width]` and `net.2` `[width, 4 · width]` with biases.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(
        weights: &Weights,
        width: usize,
        activation: Activation,
    ) -> mmgp_quant::Result<Self> {
        Ok(Self {
            up: weights.pp("net.0.proj").linear(width, 4 * width, Bias::Yes)?,
            activation,
            down: weights.pp("net.2").linear(4 * width, width, Bias::Yes)?,
        })
    }

    /// `[…, width]` to the same shape.
    ///
    /// # Errors
    /// An input of another width; weights that are not leased.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_input(x.into())
    }

    /// The same of either kind of input, which is let go when it was read.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_input(&self, x: Input) -> Result<Tensor> {
        let up = self.activation.of(&self.up, &x)?;
        drop(x);
        self.down.forward(&up)
    }

    /// The layer that reads the input.
    pub fn up(&self) -> &Linear {
        &self.up
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::MemorySource;

    use super::*;

    #[test]
    fn the_activation_stands_between_the_products() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let source = MemorySource::new(&dev)
            .with("net.0.proj.weight", Tensor::new(&[[1f32], [-1.], [2.], [0.]], &dev)?)
            .with("net.0.proj.bias", Tensor::new(&[0f32, 0., 0., 5.], &dev)?)
            .with("net.2.weight", Tensor::new(&[[1f32, 10., 100., 1000.]], &dev)?)
            .with("net.2.bias", Tensor::new(&[0.25f32], &dev)?);
        let ff = FeedForward::new(&Weights::new(source), 1, Activation::Relu)?;
        let y = ff.forward(&Tensor::new(&[[3f32], [-3.]], &dev)?)?;
        assert_eq!(y.to_vec2::<f32>()?, [[5603.25], [5030.25]]);
        Ok(())
    }
}
