//! Embeddings of scalars: the sinusoids of a timestep, and the two-layer perceptrons behind them.

use candle_core::{DType, Result, Tensor};
use mmgp_quant::{Bias, Linear, Weights};

use crate::nn::Activation;

/// Sinusoids of `t` `[batch]`: `[batch, width]`, the cosines of t · 10000^(−j / (width/2)) for j from
/// 0, then their sines ([DDPM](https://arxiv.org/abs/2006.11239) with the halves as FLUX has them).
///
/// The frequencies are rounded to f32 where torch rounds them, because an argument near 1000 shows it.
///
/// # Errors
/// A tensor that is not one-dimensional; an odd width.
pub fn timestep_embedding(t: &Tensor, width: usize) -> Result<Tensor> {
    if width % 2 != 0 {
        candle_core::bail!("timestep embedding of odd width {width}");
    }
    let half = width / 2;
    let values = t.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let mut out = Vec::with_capacity(values.len() * width);
    let log = -(10000f64.ln()) as f32;
    let rates: Vec<f32> =
        (0..half).map(|j| f64::from(log * j as f32 / half as f32).exp() as f32).collect();
    for t in &values {
        out.extend(rates.iter().map(|r| f64::from(t * r).cos() as f32));
        out.extend(rates.iter().map(|r| f64::from(t * r).sin() as f32));
    }
    Tensor::from_vec(out, (values.len(), width), t.device())
}

/// Linear, activation, linear, as `linear_1` and `linear_2`.
#[derive(Debug)]
pub struct Mlp {
    first: Linear,
    activation: Activation,
    second: Linear,
}

impl Mlp {
    /// Asks for `linear_1` `[width, inputs]` and `linear_2` `[width, width]` with biases.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(
        weights: &Weights,
        inputs: usize,
        width: usize,
        activation: Activation,
    ) -> mmgp_quant::Result<Self> {
        let first = weights.pp("linear_1").linear(inputs, width, Bias::Yes)?;
        let second = weights.pp("linear_2").linear(width, width, Bias::Yes)?;
        Ok(Self { first, activation, second })
    }

    /// `[…, inputs]` to `[…, width]`.
    ///
    /// # Errors
    /// An input of another width; weights that are not leased.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&self.activation.apply(&self.first.forward(x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn cosines_come_first() -> Result<()> {
        let t = Tensor::new(&[0f32, 1000.], &Device::Cpu)?;
        let e = timestep_embedding(&t, 6)?.to_vec2::<f32>()?;
        assert_eq!(e[0], [1., 1., 1., 0., 0., 0.]);
        let rate = 10000f64.powf(-1. / 3.);
        for (got, want) in [(e[1][0], 1000f64.cos()), (e[1][4], (1000. * rate).sin())] {
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
        }
        assert!(timestep_embedding(&t, 5).is_err());
        Ok(())
    }
}
