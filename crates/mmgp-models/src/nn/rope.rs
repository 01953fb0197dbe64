//! Rotary position embedding over several axes, as FLUX turns its queries and keys
//! ([RoFormer](https://arxiv.org/abs/2104.09864), one stretch of the head for each axis).
//!
//! Tables are computed in f64 and rounded once, as diffusers does: positions of long sequences times
//! frequencies would lose digits in f32.

use candle_core::{DType, Device, Result, Tensor};

use crate::nn::cpu;

/// The cosines and sines of a token sequence.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// The tables of tokens at `ids` `[tokens, axes.len()]` (f32, a row gives a token's position on
    /// each axis), where axis `i` turns `axes[i]` values of a head, an even number: pair `j` of it by
    /// the angle position · θ^(−2j / axes\[i\]).
    ///
    /// # Errors
    /// Ids of another width, odd axes.
    pub fn new(ids: &Tensor, axes: &[usize], theta: f64, device: &Device) -> Result<Self> {
        let (tokens, given) = ids.dims2()?;
        if given != axes.len() || axes.iter().any(|d| d % 2 != 0) {
            candle_core::bail!("rope: positions on {given} axes for axes {axes:?}");
        }
        let ids = ids.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        let half = axes.iter().sum::<usize>() / 2;
        let mut cos = Vec::with_capacity(tokens * half);
        let mut sin = Vec::with_capacity(tokens * half);
        let rates: Vec<Vec<f64>> = axes
            .iter()
            .map(|&d| (0..d / 2).map(|j| 1. / theta.powf((2 * j) as f64 / d as f64)).collect())
            .collect();
        for position in &ids {
            for (&at, rates) in position.iter().zip(&rates) {
                for rate in rates {
                    let (s, c) = (f64::from(at) * rate).sin_cos();
                    cos.push(c as f32);
                    sin.push(s as f32);
                }
            }
        }
        let cos = Tensor::from_vec(cos, (tokens, half), device)?;
        Ok(Self { cos, sin: Tensor::from_vec(sin, (tokens, half), device)? })
    }

    /// The tables of `count` tokens from `first` on.
    ///
    /// # Errors
    /// Tokens that there are not.
    pub fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, first, count)?, sin: self.sin.narrow(0, first, count)? })
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.cos.dims().first().copied().unwrap_or(0)
    }

    /// Turns the pairs of neighbours of `x` `[batch, heads, tokens, d]`: (a, b) becomes
    /// (a cos − b sin, b cos + a sin).
    ///
    /// # Errors
    /// Another number of tokens or width.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        // In f32 whatever the dtype of `x`: the tables would lose digits in bf16.
        let turned = x.to_dtype(DType::F32)?.contiguous()?;
        candle_nn::rotary_emb::rope_i(&turned, &self.cos, &self.sin)?.to_dtype(x.dtype())
    }

    /// `(cos, sin)`, each `[tokens, d / 2]` row by row.
    pub(crate) fn with_tables<R>(&self, f: impl FnOnce(&[f32], &[f32]) -> Result<R>) -> Result<R> {
        cpu::read(&self.cos, |cos| cpu::read(&self.sin, |sin| f(cos, sin)))
    }

    /// Cosines and sines, each `[tokens, d / 2]`, f32.
    #[cfg(feature = "cuda")]
    pub(crate) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Half the width of a head.
    pub(crate) fn half(&self) -> usize {
        self.cos.dims().get(1).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_turn_by_position_times_rate() -> Result<()> {
        let dev = Device::Cpu;
        let ids = Tensor::new(&[[0f32, 3., 0.], [0., 4000., 7.]], &dev)?;
        let rope = Rope::new(&ids, &[2, 4, 2], 10000., &dev)?;
        assert_eq!(rope.tokens(), 2);
        let x = Tensor::ones((1, 1, 2, 8), DType::F32, &dev)?;
        let y = rope.apply(&x)?.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
        let angles = |p: [f64; 3]| [p[0], p[1], p[1] / 100., p[2]];
        for (y, p) in y.iter().zip([[0., 3., 0.], [0., 4000., 7.]]) {
            for (pair, angle) in y.chunks(2).zip(angles(p)) {
                let (s, c) = f64::sin_cos(angle);
                assert!((f64::from(pair[0]) - (c - s)).abs() < 3e-7, "{pair:?} {angle}");
                assert!((f64::from(pair[1]) - (c + s)).abs() < 3e-7, "{pair:?} {angle}");
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let dev = Device::Cpu;
        let ids = Tensor::zeros((2, 3), DType::F32, &dev)?;
        assert!(Rope::new(&ids, &[2, 4], 10000., &dev).is_err());
        assert!(Rope::new(&ids, &[2, 3, 2], 10000., &dev).is_err());
        Ok(())
    }
}
