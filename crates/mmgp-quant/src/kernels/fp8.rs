//! The e4m3 kernels of the CPU: rows to codes and scales, and back.
//!
//! A code has a sign, 4 bits of exponent with the bias 7 and 3 of mantissa; below 2^-6 it counts steps of 2^-9; the largest
//! is 448, there is no infinity, and all ones are NaN (<https://arxiv.org/abs/2209.05433>). Rows are
//! quantized as those of int8 are: one scale a row, `amax / 448` in f32, rounded once to the weight's dtype, 0 becomes
//! 1; a code is `w / scale` by the rounded scale, to nearest, ties to even, and at most 448.

use super::{
    int8::{Encoding, NotFinite, Real, decode_with, quantize_all, quantize_with},
    isa::Isa,
};

/// The largest number that has a code.
pub(crate) const MOST: f32 = 448.;
/// The magnitude of a code that is no number.
const NAN: u8 = 0x7f;
/// The least number with a whole mantissa.
const NORMAL: f32 = 0.015_625;

/// The number that an e4m3 code stands for.
#[inline(always)]
pub fn from_e4m3(code: u8) -> f32 {
    // 2^120: moves the exponent from e4m3's bias to that of f32. Subnormal codes are subnormal before, and exact after.
    const REBIAS: f32 = f32::from_bits((127 + 120) << 23);
    let magnitude = code & 0x7f;
    let value = f32::from_bits(u32::from(magnitude) << 20) * REBIAS;
    let value = if magnitude == NAN { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// The e4m3 code of a number: to nearest, ties to even, what is larger than 448 becomes that; NaN stays NaN.
#[inline(always)]
pub fn to_e4m3(value: f32) -> u8 {
    // The steps of 2^-9 of a subnormal code are the last place of numbers from here on.
    const STEPS: f32 = 16_384.;
    let size = value.abs();
    let bits = if size < MOST { size.to_bits() } else { MOST.to_bits() };
    // Half of what is cut off, less one where the kept part is even.
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    let normal = rounded.wrapping_sub((127 - 7) << 3);
    let subnormal = (f32::from_bits(bits) + STEPS).to_bits().wrapping_sub(STEPS.to_bits());
    let code = if f32::from_bits(bits) < NORMAL { subnormal } else { normal };
    let code = if value.is_nan() { NAN.into() } else { code };
    (value.to_bits() >> 24) as u8 & 0x80 | code as u8
}

/// Floating-point codes with 4 bits of exponent and 3 of mantissa.
pub(super) struct E4m3;

impl Encoding for E4m3 {
    const MOST: f32 = MOST;

    #[inline(always)]
    fn encode<T: Real>(row: &[T], scale: f32, codes: &mut [u8]) {
        codes.iter_mut().zip(row).for_each(|(code, w)| *code = to_e4m3(w.widen() / scale));
    }
}

/// [`quantize`](super::int8::quantize) to e4m3.
pub(crate) fn quantize<T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    quantize_all::<E4m3, T>(weight, inputs, codes, scales)
}

/// [`quantize`] on the calling thread.
pub(crate) fn quantize_rows<T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    quantize_with::<E4m3, T>(Isa::detected(), weight, inputs, codes, scales)
}

/// [`decode`](super::int8::decode) of e4m3 codes.
pub(crate) fn decode<S: Real, T: Real>(
    codes: &[u8],
    inputs: usize,
    scales: &[S],
    weight: &mut [T],
) {
    decode_with(codes, inputs, scales, weight, expand_row);
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
            *out = from_e4m3(code) * scale;
        }
    });
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;

    /// The number of a code as its definition says it.
    fn by_definition(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let size = match exponent {
            0 => mantissa / 8. * 2f64.powi(-6),
            15 if code & 7 == 7 => f64::NAN,
            _ => (1. + mantissa / 8.) * 2f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { size } else { -size }
    }

    /// The nearest code of a number, found among all of them.
    fn nearest(value: f64) -> u8 {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        let far = |code: &u8| (by_definition(*code) - value.abs()).abs();
        let codes = (0..0x7f).min_by(|a, b| far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1))));
        sign | codes.unwrap_or(0)
    }

    #[test]
    fn every_code_is_the_number_of_its_definition_and_comes_back() {
        for code in 0..=255u8 {
            let (value, expected) = (from_e4m3(code), by_definition(code));
            if code & 0x7f == NAN {
                assert!(value.is_nan() && expected.is_nan(), "{code:#x}");
                assert_eq!(to_e4m3(value) & 0x7f, NAN);
                continue;
            }
            assert_eq!(f64::from(value), expected, "{code:#x}");
            assert_eq!(value.is_sign_negative(), code & 0x80 != 0, "{code:#x}");
            assert_eq!(to_e4m3(value), code, "{value}");
            // Every code is a bf16 and an f16.
            assert_eq!(bf16::from_f32(value).to_f32(), value);
            assert_eq!(f16::from_f32(value).to_f32(), value);
        }
        // Written by hand.
        for (code, value) in [
            (0x00, 0.),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.),
            (0x3c, 1.5),
            (0x40, 2.),
            (0xc5, -3.25),
            (0x7e, 448.),
        ] {
            assert_eq!(from_e4m3(code), value);
        }
    }

    #[test]
    fn numbers_between_two_codes_go_to_the_nearer_and_ties_to_the_even() {
        for code in 0..0x7e {
            let (low, high) = (by_definition(code), by_definition(code + 1));
            let middle = ((low + high) / 2.) as f32; // exact: a code has few bits
            let even = if code & 1 == 0 { code } else { code + 1 };
            for (value, expected) in
                [(middle, even), (middle.next_down(), code), (middle.next_up(), code + 1)]
            {
                assert_eq!(to_e4m3(value), expected, "{value}");
                assert_eq!(to_e4m3(-value), expected | 0x80, "{value}");
            }
        }
        for large in [448.1, 464., 1e30, f32::INFINITY] {
            assert_eq!((to_e4m3(large), to_e4m3(-large)), (0x7e, 0xfe), "{large}");
        }
        assert_eq!((to_e4m3(f32::MIN_POSITIVE), to_e4m3(-0.)), (0, 0x80));
    }

    fn check<T: Real>(weight: &[T], inputs: usize) {
        let rows = weight.len() / inputs;
        for isa in Isa::available() {
            let (mut codes, mut scales) = (vec![9; weight.len()], vec![T::round(9.); rows]);
            quantize_with::<E4m3, T>(isa, weight, inputs, &mut codes, &mut scales).unwrap();
            let mut wide = vec![0f32; inputs];
            for (row, weight) in weight.chunks(inputs).enumerate() {
                let amax = weight.iter().fold(0f32, |m, w| m.max(w.widen().abs()));
                let scale = T::round(amax / 448.).widen();
                let scale = if scale == 0. { 1. } else { scale };
                assert_eq!(scales[row].widen(), scale, "{isa:?}");
                let codes = &codes[row * inputs..][..inputs];
                expand_row(isa, codes, scale, &mut wide);
                for ((w, &code), &back) in weight.iter().zip(codes).zip(&wide) {
                    let quotient = w.widen() / scale;
                    assert_eq!(code, nearest(f64::from(quotient)), "{isa:?}: {quotient}");
                    assert_eq!(back, by_definition(code) as f32 * scale);
                    // Half a step of three bits of mantissa, or of the subnormal codes, and where the scale was rounded
                    // down what is cut off at 448.
                    let (size, off) = (w.widen().abs(), (back - w.widen()).abs());
                    let cut = (size - 448. * scale).max(0.);
                    let half = (size / 16.).max(scale / 1024.).max(cut);
                    assert!(off <= half * 1.000_001, "{isa:?}: {} became {back}", w.widen());
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_variant_follows_the_rule(
            values in prop::collection::vec(-3f32..3., 1..200),
            inputs in 1usize..90,
            power in -30i32..20,
            spread in 0i32..14,
        ) {
            let inputs = inputs.min(values.len());
            let small = |at: usize| 2f32.powi(power - at as i32 % (spread + 1));
            let values: Vec<f32> = values.iter().enumerate().map(|(at, v)| v * small(at)).collect();
            let values = &values[..values.len() / inputs * inputs];
            check(values, inputs);
            check(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), inputs);
            if power < 14 {
                check(&values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), inputs);
            }
        }

        #[test]
        fn any_number_gets_the_nearest_code(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(!value.is_nan());
            prop_assert_eq!(to_e4m3(value), nearest(f64::from(value).clamp(-448., 448.)));
        }
    }

    #[test]
    fn all_threads_give_the_bytes_of_one_and_what_is_not_finite_is_found() {
        let weight: Vec<bf16> = (0..300 * 1000u32)
            .map(|i| bf16::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 - 8e6))
            .collect();
        let (mut codes, mut scales) = (vec![0; weight.len()], vec![bf16::ZERO; 300]);
        quantize(&weight, 1000, &mut codes, &mut scales).unwrap();
        let (mut one, mut of_one) = (vec![0; weight.len()], vec![bf16::ZERO; 300]);
        quantize_rows(&weight, 1000, &mut one, &mut of_one).unwrap();
        assert_eq!((&codes, &scales), (&one, &of_one));
        let mut decoded = vec![bf16::ZERO; weight.len()];
        decode(&codes, 1000, &scales, &mut decoded);
        let value = |at: usize| from_e4m3(codes[at]) * scales[at / 1000].to_f32();
        assert!((0..weight.len()).all(|at| decoded[at] == bf16::from_f32(value(at))));

        let (mut codes, mut scales) = ([9; 4], [9f32; 2]);
        quantize(&[0., -0., 1e-45, 0.], 2, &mut codes, &mut scales).unwrap();
        assert_eq!((codes, scales), ([0, 0x80, 0, 0], [1.; 2]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let fault = quantize(&[0., 1., 2., bad], 2, &mut codes, &mut scales).unwrap_err();
            assert_eq!(fault, NotFinite { row: 1, column: 1 });
        }
    }
}
