//! The noise of a torch generator on the CPU, so that a seed draws what it draws in diffusers.
//!
//! torch fills 16 values at a time from 16 uniform numbers of 24 bits by the Box-Muller transform;
//! where the length is no multiple of 16, the last 16 values are drawn anew. Fewer than 16 values it
//! draws one by one in f64 from 53-bit numbers.

use rayon::prelude::*;

/// `len` values of the standard normal distribution, as
/// `torch.randn(len, generator=torch.Generator("cpu").manual_seed(seed))` gives them, to the last
/// bits of an f32. torch reads the low 32 bits of the seed.
pub fn torch_normal(seed: u64, len: usize) -> Vec<f32> {
    TorchGenerator::new(seed).normal(len)
}

/// A `torch.Generator("cpu")`, for pipelines that draw more than once.
pub struct TorchGenerator {
    engine: Mt19937,
    /// The second value of a pair of which one was drawn.
    spare: Option<f64>,
}

impl TorchGenerator {
    /// The state after `manual_seed(seed)`, of which torch reads the low 32 bits.
    pub fn new(seed: u64) -> Self {
        Self { engine: Mt19937::new(seed as u32), spare: None }
    }

    /// The next `torch.randn(len)` in f32.
    pub fn normal(&mut self, len: usize) -> Vec<f32> {
        if len < 16 {
            return (0..len).map(|_| self.one() as f32).collect();
        }
        let engine = &mut self.engine;
        let mut uniform = || (engine.next() & 0x00ff_ffff) as f32 / (1 << 24) as f32;
        let mut values: Vec<f32> = (0..len).map(|_| uniform()).collect();
        values.par_chunks_exact_mut(16).for_each(box_muller);
        if !len.is_multiple_of(16) {
            let last = &mut values[len - 16..];
            last.fill_with(uniform);
            box_muller(last);
        }
        values
    }

    /// Goes on as if [`normal`](Self::normal) had been asked for `len` values.
    pub fn skip(&mut self, len: usize) {
        if len < 16 {
            for _ in 0..len {
                self.one();
            }
            return;
        }
        let again = if len.is_multiple_of(16) { 0 } else { 16 };
        for _ in 0..len + again {
            self.engine.next();
        }
    }

    fn one(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let mut uniform = || {
            let high = u64::from(self.engine.next());
            let bits = high << 32 | u64::from(self.engine.next());
            (bits & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
        };
        let (angle, radius) = (uniform(), uniform());
        let radius = (-2. * (-radius).ln_1p()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * angle).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }
}

/// Turns 16 uniform numbers into 16 normal ones: the first half gives radii, the second angles.
fn box_muller(values: &mut [f32]) {
    let (radii, angles) = values.split_at_mut(8);
    for (a, b) in radii.iter_mut().zip(angles) {
        let radius = (-2. * f64::from(1. - *a).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * f64::from(*b)).sin_cos();
        (*a, *b) = ((radius * cos) as f32, (radius * sin) as f32);
    }
}

/// The Mersenne Twister of Matsumoto and Nishimura (1998).
struct Mt19937 {
    state: [u32; 624],
    at: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [seed; 624];
        for i in 1..624 {
            let last: u32 = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ last >> 30).wrapping_add(i as u32);
        }
        Self { state, at: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.at == 624 {
            for i in 0..624 {
                let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % 624] & 0x7fff_ffff;
                let twist = if y & 1 == 0 { 0 } else { 0x9908_b0df };
                self.state[i] = self.state[(i + 397) % 624] ^ y >> 1 ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_is_mt19937() {
        let mut engine = Mt19937::new(5489);
        // The 10000th number of the default seed, which the C++ standard gives.
        let last = (0..10_000).map(|_| engine.next()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn values_are_those_that_torch_prints() {
        let near = |got: &[f32], want: &[f32]| {
            assert!(got.len() >= want.len());
            for (g, w) in got.iter().zip(want) {
                assert!((g - w).abs() < 6e-5, "{got:?} {want:?}");
            }
        };
        near(&torch_normal(0, 5), &[1.5410, -0.2934, -2.1788, 0.5684, -1.0845]);
        near(&torch_normal(42, 6), &[0.3367, 0.1288, 0.2345, 0.2303, -1.1229, -0.1863]);
        near(&torch_normal(42, 16), &[1.9269, 1.4873, 0.9007, -2.1055]);
        assert_eq!(torch_normal(42 + (1 << 32), 20), torch_normal(42, 20));
    }

    #[test]
    fn a_generator_goes_on_where_it_was() {
        let mut generator = TorchGenerator::new(42);
        let pieces = [generator.normal(3), generator.normal(1), generator.normal(2)].concat();
        assert_eq!(pieces, torch_normal(42, 6));
        let mut generator = TorchGenerator::new(42);
        let pieces = [generator.normal(16), generator.normal(32)].concat();
        assert_eq!(pieces, torch_normal(42, 48));
    }

    #[test]
    fn what_is_skipped_is_as_if_it_was_drawn() {
        for len in [0, 1, 3, 15, 16, 17, 48, 1000] {
            let (mut drawing, mut skipping) = (TorchGenerator::new(3), TorchGenerator::new(3));
            drawing.normal(len);
            skipping.skip(len);
            assert_eq!(drawing.normal(19), skipping.normal(19), "{len}");
        }
    }

    #[test]
    fn a_tail_redraws_the_last_sixteen() {
        let (whole, longer) = (torch_normal(7, 32), torch_normal(7, 35));
        assert_eq!(longer.len(), 35);
        assert_eq!(whole[..16], longer[..16]);
        assert_eq!(whole[16..19], longer[16..19]);
        assert!(whole[19..] != longer[19..32]);
        assert!(torch_normal(1, 0).is_empty());
    }
}
