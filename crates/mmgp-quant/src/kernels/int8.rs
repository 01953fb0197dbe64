//! The int8 kernels of the CPU: rows to codes and scales, and back.
//!
//! Symmetric, one scale per row: `scale = amax / 127` in f32, rounded once to the weight's dtype, 0
//! becomes 1; `code = clamp(round half to even (w / scale), −128, 127)` in f32, by the rounded scale.
//! A code is the low byte of the two's complement number. The largest magnitude is found as the
//! largest integer among the bits without their signs, which also finds NaN and infinity: a row
//! that holds one has no scale and is refused.

use half::{bf16, f16};
use rayon::prelude::*;

use super::isa::Isa;

/// What rows become codes of: the largest magnitude, which becomes the scale's multiple, and the rule for one row.
pub(super) trait Encoding {
    /// The code of the largest magnitude, as a number.
    const MOST: f32;

    /// The codes of `row` by its scale.
    fn encode<T: Real>(row: &[T], scale: f32, codes: &mut [u8]);
}

/// Whole numbers from −128 to 127.
struct Whole;

impl Encoding for Whole {
    const MOST: f32 = 127.;

    #[inline(always)]
    fn encode<T: Real>(row: &[T], scale: f32, codes: &mut [u8]) {
        encode(row, scale, codes);
    }
}

/// Elements that one task quantizes; at least a row.
const TASK: usize = 1 << 17;

/// A floating-point dtype that is quantized to int8: bf16, f16 and f32.
pub trait Real: sealed::Element {}

impl Real for bf16 {}
impl Real for f16 {}
impl Real for f32 {}

/// A NaN or an infinity where a finite weight was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// The row that holds it.
    pub row: usize,
    /// Its place in the row.
    pub column: usize,
}

/// Quantizes `weight` `[rows, inputs]` on all threads of the current pool: `codes` `[rows, inputs]`,
/// int8 as bytes, and one of `scales` for each row.
///
/// Rows do not depend on each other, so any split of a weight gives the same bytes. The slices must
/// agree in their rows; what one has too much is left as it is.
///
/// # Errors
/// The first row that holds a NaN or an infinity.
pub fn quantize<T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    quantize_all::<Whole, T>(weight, inputs, codes, scales)
}

/// Rows to the codes of `E` on all threads of the current pool.
pub(super) fn quantize_all<E: Encoding, T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    let isa = Isa::detected();
    in_tasks(weight, inputs, codes, scales, |weight, codes, scales| {
        quantize_with::<E, T>(isa, weight, inputs, codes, scales)
    })
}

/// Has `quantize` make codes and scales of some rows at a time, on all threads of the current pool.
pub(super) fn in_tasks<T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
    quantize: impl Fn(&[T], &mut [u8], &mut [T]) -> Result<(), NotFinite> + Sync,
) -> Result<(), NotFinite> {
    if inputs == 0 {
        return quantize(weight, codes, scales);
    }
    let rows = (TASK / inputs).max(1);
    let weight = weight.par_chunks(rows * inputs);
    let result = weight
        .zip(codes.par_chunks_mut(rows * inputs))
        .zip(scales.par_chunks_mut(rows))
        .enumerate()
        .find_map_first(|(task, ((weight, codes), scales))| {
            let fault = quantize(weight, codes, scales).err()?;
            Some(NotFinite { row: fault.row + task * rows, ..fault })
        });
    result.map_or(Ok(()), Err)
}

/// [`quantize`] on the calling thread.
///
/// # Errors
/// The first row that holds a NaN or an infinity.
pub fn quantize_rows<T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    quantize_with::<Whole, T>(Isa::detected(), weight, inputs, codes, scales)
}

pub(super) fn quantize_with<E: Encoding, T: Real>(
    isa: Isa,
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    debug_assert_eq!((weight.len(), weight.len()), (codes.len(), scales.len() * inputs));
    if inputs == 0 {
        scales.fill(T::round(1.));
        return Ok(());
    }
    let rows = weight.chunks_exact(inputs).zip(codes.chunks_exact_mut(inputs)).zip(scales);
    for (row, ((weight, codes), scale)) in rows.enumerate() {
        let amax = isa.run(|| amax(weight));
        if amax >= T::INFINITY {
            let column = weight.iter().position(|w| w.magnitude() >= T::INFINITY).unwrap_or(0);
            return Err(NotFinite { row, column });
        }
        *scale = scale_of(T::of_magnitude(amax).widen(), E::MOST);
        let scale = scale.widen();
        isa.run(|| E::encode(weight, scale, codes));
    }
    Ok(())
}

/// The weights that `codes` `[rows, inputs]` stand for: `code · scale` in f32, rounded once to the dtype of
/// `weight`.
pub fn decode<S: Real, T: Real>(codes: &[u8], inputs: usize, scales: &[S], weight: &mut [T]) {
    decode_with(codes, inputs, scales, weight, expand_row);
}

/// [`decode`] of codes that `expand` makes a row of numbers of, by its scale.
pub(super) fn decode_with<S: Real, T: Real>(
    codes: &[u8],
    inputs: usize,
    scales: &[S],
    weight: &mut [T],
    expand: impl Fn(Isa, &[u8], f32, &mut [f32]) + Sync,
) {
    let isa = Isa::detected();
    let inputs = inputs.max(1);
    let tasks = codes.par_chunks(inputs).zip(weight.par_chunks_mut(inputs)).zip(scales);
    tasks.for_each_init(Vec::new, |wide, ((codes, weight), scale)| {
        wide.resize(codes.len(), 0f32);
        expand(isa, codes, scale.widen(), wide);
        weight.iter_mut().zip(&*wide).for_each(|(to, &from)| *to = T::round(from));
    });
}

/// Rows of codes as f32, for products: `code · scale` in f32.
pub(crate) fn expand(codes: &[u8], inputs: usize, scales: &[f32], out: &mut [f32]) {
    let isa = Isa::detected();
    let inputs = inputs.max(1);
    for ((codes, out), &scale) in codes.chunks(inputs).zip(out.chunks_mut(inputs)).zip(scales) {
        expand_row(isa, codes, scale, out);
    }
}

pub(super) fn expand_row(isa: Isa, codes: &[u8], scale: f32, out: &mut [f32]) {
    isa.run(|| {
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = f32::from(code as i8) * scale;
        }
    });
}

/// The scale that makes `amax` the code `most`.
pub(super) fn scale_of<T: Real>(amax: f32, most: f32) -> T {
    let scale = T::round(amax / most);
    if scale.widen() == 0. { T::round(1.) } else { scale }
}

#[inline(always)]
pub(super) fn amax<T: Real>(row: &[T]) -> T::Magnitude {
    row.iter().fold(T::ZERO, |amax, w| amax.max(w.magnitude()))
}

#[inline(always)]
pub(super) fn encode<T: Real>(row: &[T], scale: f32, codes: &mut [u8]) {
    // 1.5 · 2^23: the sum has no room for a fraction, so adding it rounds half to even, and leaves
    // the number in the low bits, negative ones as their two's complement.
    const ROUND: f32 = 12_582_912.;
    for (code, w) in codes.iter_mut().zip(row) {
        // Clamping before rounding is the same, since the limits are whole numbers.
        let quotient = w.widen() / scale;
        let quotient = if quotient > -128. { quotient } else { -128. };
        let quotient = if quotient < 127. { quotient } else { 127. };
        *code = (quotient + ROUND).to_bits() as u8;
    }
}

mod sealed {
    use half::{bf16, f16};

    /// What the kernels ask of a dtype.
    pub trait Element: Copy + Send + Sync + 'static {
        /// The bits without the sign, which order as the magnitudes do.
        type Magnitude: Copy + Ord + Send;
        const ZERO: Self::Magnitude;
        /// The magnitude of infinity; that of every NaN is larger.
        const INFINITY: Self::Magnitude;
        fn magnitude(&self) -> Self::Magnitude;
        fn of_magnitude(magnitude: Self::Magnitude) -> Self;
        /// Exact.
        fn widen(&self) -> f32;
        /// To nearest, half to even.
        fn round(wide: f32) -> Self;
    }

    impl Element for bf16 {
        type Magnitude = i16;
        const ZERO: i16 = 0;
        const INFINITY: i16 = 0x7f80;

        #[inline(always)]
        fn magnitude(&self) -> i16 {
            (self.to_bits() & 0x7fff) as i16
        }

        fn of_magnitude(magnitude: i16) -> Self {
            Self::from_bits(magnitude as u16)
        }

        #[inline(always)]
        fn widen(&self) -> f32 {
            f32::from_bits(u32::from(self.to_bits()) << 16)
        }

        fn round(wide: f32) -> Self {
            Self::from_f32(wide)
        }
    }

    impl Element for f16 {
        type Magnitude = i16;
        const ZERO: i16 = 0;
        const INFINITY: i16 = 0x7c00;

        #[inline(always)]
        fn magnitude(&self) -> i16 {
            (self.to_bits() & 0x7fff) as i16
        }

        fn of_magnitude(magnitude: i16) -> Self {
            Self::from_bits(magnitude as u16)
        }

        /// Without a call or a branch, so that loops over it become vector code: a normal number gets
        /// the exponent's new bias; a subnormal one is put below the one bit of 0.5 and 0.5 taken off.
        #[inline(always)]
        fn widen(&self) -> f32 {
            let bits = u32::from(self.to_bits());
            let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
            let subnormal = (f32::from_bits(magnitude | 0x3f00_0000) - 0.5).to_bits();
            let rebias = if magnitude >= 0x7c00 { 0x7000_0000 } else { 0x3800_0000 };
            let normal = (magnitude << 13) + rebias;
            f32::from_bits(sign | if magnitude < 0x400 { subnormal } else { normal })
        }

        fn round(wide: f32) -> Self {
            Self::from_f32(wide)
        }
    }

    impl Element for f32 {
        type Magnitude = i32;
        const ZERO: i32 = 0;
        const INFINITY: i32 = 0x7f80_0000;

        #[inline(always)]
        fn magnitude(&self) -> i32 {
            (self.to_bits() & 0x7fff_ffff) as i32
        }

        fn of_magnitude(magnitude: i32) -> Self {
            Self::from_bits(magnitude as u32)
        }

        #[inline(always)]
        fn widen(&self) -> f32 {
            *self
        }

        fn round(wide: f32) -> Self {
            wide
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The rule as it is written, one weight at a time.
    fn by_the_rule<T: Real>(row: &[T]) -> (Vec<u8>, f32) {
        let amax = row.iter().fold(0f32, |m, w| m.max(w.widen().abs()));
        let scale = T::round(amax / 127.).widen();
        let scale = if scale == 0. { 1. } else { scale };
        let code = |w: &T| ((w.widen() / scale).round_ties_even().clamp(-128., 127.)) as i8 as u8;
        (row.iter().map(code).collect(), scale)
    }

    fn check<T: Real + PartialEq + std::fmt::Debug>(weight: &[T], inputs: usize) {
        let rows = weight.len() / inputs;
        for isa in Isa::available() {
            let (mut codes, mut scales) = (vec![9; weight.len()], vec![T::round(9.); rows]);
            quantize_with::<Whole, T>(isa, weight, inputs, &mut codes, &mut scales).unwrap();
            let mut wide = vec![0f32; inputs];
            for (row, weight) in weight.chunks(inputs).enumerate() {
                let (expected, scale) = by_the_rule(weight);
                let codes = &codes[row * inputs..][..inputs];
                assert_eq!(codes, expected, "{isa:?}");
                assert_eq!(scales[row].widen(), scale, "{isa:?}");
                expand_row(isa, codes, scale, &mut wide);
                let expanded = |&code: &u8| f32::from(code as i8) * scale;
                assert_eq!(wide, codes.iter().map(expanded).collect::<Vec<_>>(), "{isa:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_variant_follows_the_rule(
            values in prop::collection::vec(-3f32..3., 1..400),
            inputs in 1usize..90,
            power in -30i32..20,
        ) {
            let inputs = inputs.min(values.len());
            let values: Vec<f32> = values.iter().map(|v| v * 2f32.powi(power)).collect();
            let whole = values.len() / inputs * inputs;
            let values = &values[..whole];
            check(values, inputs);
            check(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), inputs);
            if power < 14 {
                check(&values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), inputs);
            }
        }

        #[test]
        fn half_precision_is_widened_exactly(bits: u16) {
            let value = f16::from_bits(bits);
            let (ours, theirs) = (sealed::Element::widen(&value), value.to_f32());
            prop_assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()));
        }
    }

    #[test]
    fn zeros_get_scale_one_and_what_is_not_finite_is_found() {
        let (mut codes, mut scales) = ([9; 4], [9f32; 2]);
        quantize(&[0., -0., 1e-45, 0.], 2, &mut codes, &mut scales).unwrap();
        assert_eq!((codes, scales), ([0; 4], [1.; 2]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let fault = quantize(&[0., 1., 2., bad], 2, &mut codes, &mut scales).unwrap_err();
            assert_eq!(fault, NotFinite { row: 1, column: 1 });
        }
    }

    #[test]
    fn decoding_rounds_once_to_the_dtype_of_the_weight() {
        let (scales, mut weight) = ([bf16::from_f32(0.0123)], [bf16::ZERO; 3]);
        decode(&[127, 0x80, 3], 3, &scales, &mut weight);
        let expected = [127f32, -128., 3.].map(|c| bf16::from_f32(c * scales[0].to_f32()));
        assert_eq!(weight, expected);
    }

    /// `cargo test --release -p mmgp-quant -- --ignored --nocapture speed`
    #[test]
    #[ignore = "prints a speed, asserts nothing"]
    fn speed() {
        let weight: Vec<bf16> = (0..64 << 20)
            .map(|i: u32| bf16::from_f32(i.wrapping_mul(2654435761) as f32 - 2e9))
            .collect();
        let inputs = 4096;
        let (mut codes, mut copy) = (vec![0u8; weight.len()], weight.clone());
        let mut scales = vec![bf16::ZERO; weight.len() / inputs];
        let mut best = [f64::MAX; 2];
        for _ in 0..7 {
            let begun = std::time::Instant::now();
            copy.par_chunks_mut(TASK)
                .zip(weight.par_chunks(TASK))
                .for_each(|(to, from)| to.copy_from_slice(from));
            best[0] = best[0].min(begun.elapsed().as_secs_f64());
            let begun = std::time::Instant::now();
            quantize(&weight, inputs, &mut codes, &mut scales).unwrap();
            best[1] = best[1].min(begun.elapsed().as_secs_f64());
        }
        let speed = best.map(|s| (weight.len() * 2) as f64 / s * 1e-9);
        println!("memcpy {:.1} GB/s, bf16 to int8 {:.1} GB/s", speed[0], speed[1]);
    }
}
