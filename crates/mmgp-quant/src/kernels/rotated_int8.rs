//! int8 codes of rotated rows: what [`int8`](super::int8) does, of rows whose groups were rotated first, in f32.
//!
//! Codes and scales follow the same rule, by the largest magnitude of the rotated row. What codes stand for is `code · scale`
//! in f32, rotated back and rounded once. Rows hold whole groups; values behind the last would stay unrotated, both ways.

use super::{
    int8::{NotFinite, Real, amax, decode_with, encode, expand_row, in_tasks, scale_of},
    isa::Isa,
    rotation::rotate,
};

/// [`quantize`](super::int8::quantize) of rotated rows.
pub(crate) fn quantize<T: Real>(
    weight: &[T],
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [T],
) -> Result<(), NotFinite> {
    in_tasks(weight, inputs, codes, scales, |weight, codes, scales| {
        quantize_rows(weight, inputs, codes, scales)
    })
}

/// [`quantize`] on the calling thread.
pub(crate) fn quantize_rows<T: Real>(
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
    let isa = Isa::detected();
    let mut rotated = vec![0f32; inputs];
    let rows = weight.chunks_exact(inputs).zip(codes.chunks_exact_mut(inputs)).zip(scales);
    for (row, ((weight, codes), scale)) in rows.enumerate() {
        isa.run(|| rotated.iter_mut().zip(weight).for_each(|(to, w)| *to = w.widen()));
        rotate(&mut rotated);
        let amax = isa.run(|| amax(&rotated));
        if amax >= f32::INFINITY.to_bits() as i32 {
            // Rotated it is all over its group.
            let column = weight.iter().position(|w| !w.widen().is_finite());
            let column = column.or_else(|| rotated.iter().position(|w| !w.is_finite()));
            return Err(NotFinite { row, column: column.unwrap_or(0) });
        }
        *scale = scale_of(f32::from_bits(amax as u32), 127.);
        let scale = scale.widen();
        isa.run(|| encode(&rotated, scale, codes));
    }
    Ok(())
}

/// [`decode`](super::int8::decode) of the codes of rotated rows.
pub(crate) fn decode<S: Real, T: Real>(
    codes: &[u8],
    inputs: usize,
    scales: &[S],
    weight: &mut [T],
) {
    decode_with(codes, inputs, scales, weight, |isa, codes, scale, wide| {
        expand_row(isa, codes, scale, wide);
        rotate(wide);
    });
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::kernels::int8;

    const DIMS: (usize, usize) = (5, 512);

    /// Values of which one in each row is far larger than the rest.
    fn values() -> Vec<f32> {
        let value = |i: usize| {
            let v = (i as u32).wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32 - 0.5;
            if i % DIMS.1 == 77 { 50. } else { v }
        };
        (0..DIMS.0 * DIMS.1).map(value).collect()
    }

    fn check<T: Real + PartialEq + std::fmt::Debug>(of: impl Fn(f32) -> T) {
        let weight: Vec<T> = values().into_iter().map(of).collect();
        let (outputs, inputs) = DIMS;
        let (mut codes, mut scales) = (vec![9; weight.len()], vec![T::round(9.); outputs]);
        quantize(&weight, inputs, &mut codes, &mut scales).unwrap();
        // By the rule, a row at a time.
        for (row, weight) in weight.chunks(inputs).enumerate() {
            let mut wide: Vec<f32> = weight.iter().map(|w| w.widen()).collect();
            rotate(&mut wide);
            let amax = wide.iter().fold(0f32, |most, w| most.max(w.abs()));
            let scale = T::round(amax / 127.);
            assert_eq!(scales[row], scale);
            let code = |w: &f32| (w / scale.widen()).round_ties_even().clamp(-128., 127.) as i8;
            let expected: Vec<u8> = wide.iter().map(|w| code(w) as u8).collect();
            assert_eq!(codes[row * inputs..][..inputs], expected);
        }
        let mut again = (vec![0; weight.len()], vec![T::round(0.); outputs]);
        quantize_rows(&weight, inputs, &mut again.0, &mut again.1).unwrap();
        assert_eq!((codes.as_slice(), scales.as_slice()), (again.0.as_slice(), &*again.1));

        // What they stand for is far nearer than what codes without the rotation stand for.
        let off = |decoded: &[T]| {
            let pairs = weight.iter().zip(decoded);
            pairs.map(|(a, b)| f64::from(a.widen() - b.widen()).powi(2)).sum::<f64>().sqrt()
        };
        let mut decoded = vec![T::round(0.); weight.len()];
        decode(&codes, inputs, &scales, &mut decoded);
        let rotated = off(&decoded);
        int8::quantize(&weight, inputs, &mut codes, &mut scales).unwrap();
        int8::decode(&codes, inputs, &scales, &mut decoded);
        let plain = off(&decoded);
        assert!(rotated < plain / 4., "{rotated} {plain}");
    }

    #[test]
    fn rotated_rows_follow_the_rule_and_come_back() {
        check(|v| v);
        check(bf16::from_f32);
        check(f16::from_f32);
    }

    #[test]
    fn zeros_get_scale_one_and_what_is_not_finite_is_found_where_it_was() {
        let (mut codes, mut scales) = (vec![9; 512], [9f32; 2]);
        let mut weight = vec![0f32; 512];
        quantize(&weight, 256, &mut codes, &mut scales).unwrap();
        assert_eq!((codes.iter().max(), scales), (Some(&0), [1.; 2]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            weight[256 + 9] = bad;
            let fault = quantize(&weight, 256, &mut codes, &mut scales).unwrap_err();
            assert_eq!(fault, NotFinite { row: 1, column: 9 });
        }
        // Finite, but not its sums.
        weight[256..].fill(3e38);
        let fault = quantize(&weight, 256, &mut codes, &mut scales).unwrap_err();
        assert_eq!(fault.row, 1);
        quantize(&[], 0, &mut [], &mut scales).unwrap();
    }
}
