//! The CPU product over weights in the form that travels.
//!
//! 64 rows of the weight at a time are widened (codes: multiplied by their scale) into an f32 scratch of the thread and multiplied
//! there; the scratch stays in the cache, so that a bf16 weight costs half the memory traffic of an
//! f32 one. Tiles are the unit of work and never depend on the number of threads: neither do the
//! bits of the result.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{fp8, int8};

/// Rows of a weight `[n, k]`, contiguous.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
    Int8 {
        codes: &'a [u8],
        /// One per row.
        scales: &'a [f32],
        /// What `code · scale` is rounded to before it is multiplied.
        rounding: Rounding,
    },
    Fp8 {
        codes: &'a [u8],
        /// One per row.
        scales: &'a [f32],
    },
}

impl Rows<'_> {
    fn len(&self) -> usize {
        match self {
            Rows::Bf16(w) => w.len(),
            Rows::F16(w) => w.len(),
            Rows::F32(w) => w.len(),
            Rows::Int8 { codes, .. } | Rows::Fp8 { codes, .. } => codes.len(),
        }
    }
}

/// The dtype that expanded int8 weights are rounded to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// None: they stay f32.
    F32,
    Bf16,
    F16,
}

/// Rows widened and multiplied at once.
const TILE: usize = 64;

/// `x [m, k] · w [n, k]ᵀ + bias [n]`, all row-major f32 but the weight.
///
/// # Panics
/// If the lengths do not agree with `m`, `n` and `k`: the caller has checked them.
pub(crate) fn product_nt(
    x: &[f32],
    w: Rows<'_>,
    bias: Option<&[f32]>,
    m: usize,
    n: usize,
    k: usize,
) -> Vec<f32> {
    assert_eq!((x.len(), w.len()), (m * k, n * k));
    assert!(bias.is_none_or(|b| b.len() == n));
    let mut out = vec![0f32; m * n];
    if m == 0 || n == 0 || k == 0 {
        if let Some(bias) = bias {
            out.chunks_exact_mut(n.max(1)).for_each(|row| row.copy_from_slice(bias));
        }
        return out;
    }
    let dst = Columns(out.as_mut_ptr());
    (0..n.div_ceil(TILE)).into_par_iter().for_each_init(Vec::new, |scratch, tile| {
        let from = tile * TILE;
        let cols = TILE.min(n - from);
        let range = from * k..(from + cols) * k;
        let weight = match w {
            Rows::F32(w) => &w[range],
            Rows::Bf16(w) => {
                let wide = sized(scratch, cols * k);
                for (wide, narrow) in wide.iter_mut().zip(&w[range]) {
                    *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                }
                wide
            }
            Rows::Int8 { codes, scales, rounding } => {
                let wide = sized(scratch, cols * k);
                int8::expand(&codes[range], k, &scales[from..from + cols], wide);
                match rounding {
                    Rounding::F32 => {}
                    Rounding::Bf16 => {
                        wide.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32())
                    }
                    Rounding::F16 => wide.iter_mut().for_each(|w| *w = f16::from_f32(*w).to_f32()),
                }
                wide
            }
            Rows::Fp8 { codes, scales } => {
                let wide = sized(scratch, cols * k);
                fp8::expand(&codes[range], k, &scales[from..from + cols], wide);
                wide
            }
            Rows::F16(w) => {
                let wide = sized(scratch, cols * k);
                w[range].convert_to_f32_slice(wide);
                wide
            }
        };
        let dst = dst.at(from);
        // SAFETY: `dst` points at column `from` of `out` [m, n]; this task alone writes columns
        // from..from + cols of every row, all inside `out`, which outlives the loop and is not read
        // in it. `x` is [m, k] and `weight` [cols, k], as asserted and sliced above.
        unsafe {
            gemm::gemm(
                m,
                cols,
                k,
                dst,
                1,
                n as isize,
                false,
                x.as_ptr(),
                1,
                k as isize,
                weight.as_ptr(),
                k as isize,
                1,
                0f32,
                1f32,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        if let Some(bias) = bias {
            for row in 0..m {
                // SAFETY: the same columns of row `row`, written by this task alone.
                let y = unsafe { std::slice::from_raw_parts_mut(dst.add(row * n), cols) };
                y.iter_mut().zip(&bias[from..from + cols]).for_each(|(y, b)| *y += b);
            }
        }
    });
    out
}

/// The output, shared by tasks that write disjoint columns.
struct Columns(*mut f32);

// SAFETY: tasks write disjoint columns of the buffer behind the pointer and nothing reads it before
// they have joined.
unsafe impl Sync for Columns {}

impl Columns {
    fn at(&self, column: usize) -> *mut f32 {
        // SAFETY: the caller passes a column below n, and the buffer has at least n elements.
        unsafe { self.0.add(column) }
    }
}

fn sized(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.);
    }
    &mut scratch[..len]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / 8388608. - 1.
        };
        (0..len).map(|_| next()).collect()
    }

    fn naive(x: &[f32], w: &[f32], bias: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
        let dot = |i: usize, j: usize| -> f64 {
            (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c])).sum()
        };
        (0..m * n).map(|at| (dot(at / n, at % n) + f64::from(bias[at % n])) as f32).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_a_naive_product(m in 1usize..9, n in 1usize..150, k in 1usize..70, seed: u32) {
            let (x, w, bias) = (values(m * k, seed), values(n * k, seed ^ 7), values(n, seed ^ 9));
            let half: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            let short: Vec<f16> = w.iter().map(|&v| f16::from_f32(v)).collect();
            let wide_b: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
            let wide_h: Vec<f32> = short.iter().map(|v| v.to_f32()).collect();
            for (rows, wide) in [(Rows::F32(&w), &w), (Rows::Bf16(&half), &wide_b), (Rows::F16(&short), &wide_h)] {
                let got = product_nt(&x, rows, Some(&bias), m, n, k);
                for (a, b) in got.iter().zip(naive(&x, wide, &bias, m, n, k)) {
                    prop_assert!((a - b).abs() <= 1e-5 * (k as f32), "{a} {b}");
                }
                // Widening before the product or inside it is the same product.
                prop_assert_eq!(got, product_nt(&x, Rows::F32(wide), Some(&bias), m, n, k));
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (m, n, k) = (33, 333, 777);
        let (x, w) = (values(m * k, 3), values(n * k, 5));
        let runs: Vec<Vec<f32>> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| product_nt(&x, Rows::F32(&w), None, m, n, k))
            })
            .collect();
        assert_eq!(runs[0], runs[1]);
        assert_eq!(runs[0], runs[2]);
    }

    #[test]
    fn an_empty_inner_dimension_leaves_the_bias() {
        assert_eq!(product_nt(&[], Rows::F32(&[]), Some(&[1., 2.]), 2, 2, 0), [1., 2., 1., 2.]);
    }
}
