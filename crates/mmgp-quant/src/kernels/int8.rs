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
    if inputs == 0 {
        return quantize_rows(weight, inputs, codes, scales);
    }
    let rows = (TASK / inputs).max(1);
    let weight = weight.par_chunks(rows * inputs);
    let result = weight
        .zip(codes.par_chunks_mut(rows * inputs))
        .zip(scales.par_chunks_mut(rows))
        .enumerate()
        .find_map_first(|(task, ((weight, codes), scales))| {
            let fault = quantize_rows(weight, inputs, codes, scales).err()?;
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
    quantize_with(Isa::detected(), weight, inputs, codes, scales)
}

fn quantize_with<T: Real>(
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
        *scale = scale_of(amax);
        let scale = scale.widen();
        isa.run(|| encode(weight, scale, codes));
    }
    Ok(())
}

/// The weights that `codes` `[rows, inputs]` stand for: `code · scale`, the product rounded once to
/// the dtype of `scales`.
pub fn decode<T: Real>(codes: &[u8], inputs: usize, scales: &[T], weight: &mut [T]) {
    let isa = Isa::detected();
    let inputs = inputs.max(1);
    let tasks = codes.par_chunks(inputs).zip(weight.par_chunks_mut(inputs)).zip(scales);
    tasks.for_each_init(Vec::new, |wide, ((codes, weight), scale)| {
        wide.resize(codes.len(), 0f32);
        expand_row(isa, codes, scale.widen(), wide);
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

fn expand_row(isa: Isa, codes: &[u8], scale: f32, out: &mut [f32]) {
    isa.run(|| {
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = f32::from(code as i8) * scale;
        }
    });
}

fn scale_of<T: Real>(amax: T::Magnitude) -> T {
    let scale = T::round(T::of_magnitude(amax).widen() / 127.);
    if scale.widen() == 0. { T::round(1.) } else { scale }
}

#[inline(always)]
fn amax<T: Real>(row: &[T]) -> T::Magnitude {
    row.iter().fold(T::ZERO, |amax, w| amax.max(w.magnitude()))
}

#[inline(always)]
fn encode<T: Real>(row: &[T], scale: f32, codes: &mut [u8]) {
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
