//! The rotation that spreads outliers: an orthogonal map of each group of 256 values of a row.
//!
//! Codes of a row share one scale, so a few channels that are far larger than the rest cost all others their precision. A group
//! times the Walsh-Hadamard matrix `H`, whose entries are ±1/16, has no such channels, and `H · H = 1`: a product of rotated
//! rows with a rotated weight, `(x · H) · (W · H)ᵀ`, is that of the rows and the weight as they were.
//!
//! The order of operations is fixed, and `rotation.cuh` has the same, so that the bits are those of GPUs: for the strides 1, 2,
//! 4, … 128 in turn, each pair of values `a` and `b` that are a stride apart becomes `a + b` and `a − b`; at last each value is
//! multiplied by 1/16, which is exact unless it leaves the range. All is f32, each operation rounded by itself.

use rayon::prelude::*;

use super::isa::Isa;

/// Values that are rotated together.
pub(crate) const GROUP: usize = 256;
/// Values whose exchanges stay in one vector.
const VECTOR: usize = 8;
/// 1 / √256
const NORM: f32 = 0.0625;

/// Rotates each group of 256 `values`, as [`Codes::RotatedInt8`](crate::Codes::RotatedInt8) has rows; those behind the last whole
/// one stay as they are. Rotated twice they are what they were, but for rounding.
pub fn rotate(values: &mut [f32]) {
    rotate_with(Isa::detected(), values);
}

/// [`rotate`] of rows of `width`, on all threads of the current pool.
pub(crate) fn rotate_rows(values: &mut [f32], width: usize) {
    values.par_chunks_mut(width.max(1)).for_each(rotate);
}

fn rotate_with(isa: Isa, values: &mut [f32]) {
    isa.run(|| {
        let (groups, _) = values.as_chunks_mut::<GROUP>();
        groups.iter_mut().for_each(group);
    });
}

#[inline(always)]
fn group(values: &mut [f32; GROUP]) {
    let (vectors, _) = values.as_chunks_mut::<VECTOR>();
    for vector in vectors {
        *vector = exchanged::<4>(exchanged::<2>(exchanged::<1>(*vector)));
    }
    let mut stride = VECTOR;
    while stride < GROUP {
        for pairs in values.chunks_exact_mut(2 * stride) {
            let (low, high) = pairs.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
    values.iter_mut().for_each(|value| *value *= NORM);
}

/// One stride within a vector: the lower of a pair becomes the sum, the upper one the lower less itself.
#[inline(always)]
fn exchanged<const STRIDE: usize>(of: [f32; VECTOR]) -> [f32; VECTOR] {
    std::array::from_fn(|at| {
        let own = if at & STRIDE == 0 { of[at] } else { -of[at] };
        of[at ^ STRIDE] + own
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An entry of the matrix by its definition: the parity of the bits that row and column share.
    fn entry(row: usize, column: usize) -> f64 {
        if (row & column).count_ones().is_multiple_of(2) { 1. / 16. } else { -1. / 16. }
    }

    fn norm(values: &[f32]) -> f64 {
        values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_group_is_multiplied_by_the_matrix(
            values in prop::collection::vec(-3f32..3., 2 * GROUP + 7),
        ) {
            let mut rotated = values.clone();
            rotate(&mut rotated);
            for (from, to) in values.chunks_exact(GROUP).zip(rotated.chunks_exact(GROUP)) {
                for (row, &found) in to.iter().enumerate() {
                    let terms = from.iter().enumerate();
                    let sum: f64 = terms.map(|(at, &v)| entry(row, at) * f64::from(v)).sum();
                    prop_assert!((f64::from(found) - sum).abs() < 1e-5, "{found} {sum}");
                }
                // Orthogonal: lengths stay.
                prop_assert!((norm(from) - norm(to)).abs() < 1e-5 * norm(from));
            }
            prop_assert_eq!(&rotated[2 * GROUP..], &values[2 * GROUP..]);

            // Its own inverse.
            let mut back = rotated.clone();
            rotate(&mut back);
            for (was, is) in values.iter().zip(&back) {
                prop_assert!((was - is).abs() < 1e-5, "{was} {is}");
            }

            // The same bits by every instruction set, on any number of threads, and by the order as it is written.
            for isa in Isa::available() {
                let mut again = values.clone();
                rotate_with(isa, &mut again);
                prop_assert_eq!(&again, &rotated, "{:?}", isa);
            }
            let mut again = values.clone();
            rotate_rows(&mut again[..2 * GROUP], GROUP);
            prop_assert_eq!(&again, &rotated);
            let mut again = values.clone();
            for group in again.chunks_exact_mut(GROUP) {
                for stride in [1, 2, 4, 8, 16, 32, 64, 128] {
                    for low in (0..GROUP).filter(|at| at & stride == 0) {
                        let (a, b) = (group[low], group[low + stride]);
                        (group[low], group[low + stride]) = (a + b, a - b);
                    }
                }
                group.iter_mut().for_each(|v| *v /= 16.);
            }
            prop_assert_eq!(&again, &rotated);
        }
    }

    #[test]
    fn an_outlier_is_spread_over_its_group() {
        let mut values = [0f32; GROUP];
        values[77] = 100.;
        rotate(&mut values);
        assert!(values.iter().all(|v| v.abs() == 6.25));
    }
}
