//! Rotary position embedding ([RoFormer](https://arxiv.org/abs/2104.09864)): over several axes, as
//! diffusion transformers turn their queries and keys (one stretch of the head for each axis), and
//! along a text, as language models do.
//!
//! Tables are computed in f64 and rounded once, as diffusers does: positions of long sequences times
//! frequencies would lose digits in f32.

use candle_core::{DType, Device, Result, Tensor};

use crate::nn::cpu;

/// Which values of a head of width `d` turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// 2j and 2j + 1.
    Neighbours,
    /// j and j + d / 2, as the checkpoints of language models are laid out.
    Halves,
}

/// The cosines and sines of a token sequence.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
    pairs: Pairs,
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
        Self::of_tables(cos, sin, (tokens, half), Pairs::Neighbours, device)
    }

    /// The tables of `tokens` tokens of a text at positions 0, 1, …: pair `j` of [`Pairs::Halves`] turns
    /// by position · `rates[j]`.
    ///
    /// Angles are rounded to f32, as transformers has them.
    ///
    /// # Errors
    /// None of its own.
    pub fn of_text(tokens: usize, rates: &[f32], device: &Device) -> Result<Self> {
        let mut cos = Vec::with_capacity(tokens * rates.len());
        let mut sin = Vec::with_capacity(tokens * rates.len());
        for position in 0..tokens {
            for rate in rates {
                let (s, c) = f64::from(position as f32 * rate).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        Self::of_tables(cos, sin, (tokens, rates.len()), Pairs::Halves, device)
    }

    fn of_tables(
        cos: Vec<f32>,
        sin: Vec<f32>,
        shape: (usize, usize),
        pairs: Pairs,
        device: &Device,
    ) -> Result<Self> {
        let cos = Tensor::from_vec(cos, shape, device)?;
        Ok(Self { cos, sin: Tensor::from_vec(sin, shape, device)?, pairs })
    }

    /// The tables of `count` tokens from `first` on.
    ///
    /// # Errors
    /// Tokens that there are not.
    pub fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        let part = |table: &Tensor| table.narrow(0, first, count);
        Ok(Self { cos: part(&self.cos)?, sin: part(&self.sin)?, pairs: self.pairs })
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.cos.dims().first().copied().unwrap_or(0)
    }

    /// Turns the pairs of `x` `[batch, heads, tokens, d]`: (a, b) becomes
    /// (a cos − b sin, b cos + a sin).
    ///
    /// # Errors
    /// Another number of tokens or width.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        // In f32 whatever the dtype of `x`: the tables would lose digits in bf16.
        let turned = x.to_dtype(DType::F32)?.contiguous()?;
        let turned = match self.pairs {
            Pairs::Neighbours => candle_nn::rotary_emb::rope_i(&turned, &self.cos, &self.sin)?,
            Pairs::Halves => candle_nn::rotary_emb::rope(&turned, &self.cos, &self.sin)?,
        };
        turned.to_dtype(x.dtype())
    }

    /// Turns the pairs of one head `row`, given its token's cosines and sines.
    #[inline]
    pub(crate) fn turn_row(pairs: Pairs, row: &mut [f32], cos: &[f32], sin: &[f32]) {
        let turns = cos.iter().zip(sin);
        match pairs {
            Pairs::Neighbours => {
                for (pair, (c, s)) in row.chunks_exact_mut(2).zip(turns) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            }
            Pairs::Halves => {
                let (first, second) = row.split_at_mut(row.len() / 2);
                for ((a, b), (c, s)) in first.iter_mut().zip(second).zip(turns) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    }

    /// Which values turn together.
    pub(crate) fn pairs(&self) -> Pairs {
        self.pairs
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
    fn halves_turn_by_position_times_rate() -> Result<()> {
        let dev = Device::Cpu;
        let rates = [1f32, 0.25, 0.01];
        let rope = Rope::of_text(40, &rates, &dev)?;
        assert_eq!((rope.tokens(), rope.half(), rope.pairs()), (40, 3, Pairs::Halves));
        let x = Tensor::arange(1f32, 1. + 40. * 6., &dev)?.reshape((1, 1, 40, 6))?;
        let rows = |t: &Tensor| t.squeeze(0)?.squeeze(0)?.to_vec2::<f32>();
        for (at, (x, y)) in rows(&x)?.iter().zip(rows(&rope.apply(&x)?)?).enumerate() {
            for (j, rate) in rates.iter().enumerate() {
                let (s, c) = (at as f64 * f64::from(*rate)).sin_cos();
                let (a, b) = (f64::from(x[j]), f64::from(x[j + 3]));
                for (got, want) in [(y[j], a * c - b * s), (y[j + 3], b * c + a * s)] {
                    assert!((f64::from(got) - want).abs() < 1e-4, "{at} {j}: {got} {want}"); // of 300
                }
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
