//! The kernels of GPUs against their twins on the CPU.
//!
//! Machine code that was compiled ahead, or by the driver from PTX, is trusted on a card only after each kernel
//! was seen to compute there what the CPU computes: each does one f32 operation an element and rounds it once,
//! so the bits must be the same. Shapes cut every path: vectors of 16 bytes and their ragged ends, rows that
//! begin inside a vector, operands that begin at no multiple of 16 bytes, more rows than a grid has.
//!
//! Products are the library's, which sums in an order of its own: they are held to what rounding allows, and to giving
//! the same bits again. Those in fp8 are tested apart: a card need not have them.

#[cfg(feature = "cuda")]
mod on_gpu;

use candle_core::DType;
use half::{bf16, f16};

use crate::{
    Codes, Error, Result,
    kernels::{fp8, int8, rotation::rotate_rows},
};

/// The dtypes that kernels exist for.
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// Runs each kernel, and products, on random data of awkward shapes and compares with the CPU.
///
/// Takes a fraction of a second, and on cards for which there is no machine code the driver's compilation of PTX, which it
/// keeps. Which results may be kept, and for how long, is the caller's affair: they hold for one card, one
/// driver, one set of [`kernel_images`](crate::kernel_images) and one [`product_library`](crate::product_library).
///
/// # Errors
/// [`Error::Kernel`] names the first kernel that computes something else, with its shape, what was expected and
/// what was found; [`Error::Candle`] one that cannot be loaded or started.
#[cfg(feature = "cuda")]
pub fn self_test(device: &candle_core::CudaDevice) -> Result<()> {
    for (outputs, inputs, skipped) in EXPANDED {
        for to in DTYPES {
            for (of, scaled) in [(Codes::Int8, true), (Codes::Fp8, true), (Codes::Fp8, false)] {
                on_gpu::expand(device, of, (outputs, inputs), skipped, scaled, to)?;
            }
        }
    }
    for (outputs, inputs, skipped) in EXPANDED_ROTATED {
        for to in DTYPES {
            let (of, shape) = (Codes::RotatedInt8, (outputs, inputs));
            on_gpu::expand(device, of, shape, skipped, true, to)?;
        }
    }
    for (rows, outputs, skipped) in BIASED {
        for dtype in DTYPES {
            on_gpu::add_bias(device, (rows, outputs), skipped, dtype)?;
        }
    }
    for shape in MULTIPLIED {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::product(device, shape, dtype)?;
        }
    }
    for added in ADDED {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::add_product(device, &added, dtype)?;
        }
    }
    for shape in INT8 {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::w8a8(device, Codes::Int8, shape, dtype)?;
        }
    }
    for shape in INT8_ROTATED {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::w8a8(device, Codes::RotatedInt8, shape, dtype)?;
        }
    }
    for activated in ACTIVATED {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::activated_product(device, &activated, dtype)?;
            on_gpu::activated_w8a8(device, &activated, dtype)?;
        }
    }
    Ok(())
}

/// The same of products in fp8, with the quantization before them: for GPUs that
/// [`fp8_multiplies`](crate::fp8_multiplies) names.
///
/// # Errors
/// As [`self_test`]; [`Error::Candle`] too on GPUs without such products.
#[cfg(feature = "cuda")]
pub fn self_test_fp8(device: &candle_core::CudaDevice) -> Result<()> {
    for (rows, inputs) in FP8_ROWS {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::quantize_fp8(device, (rows, inputs), dtype)?;
        }
    }
    for shape in FP8 {
        for dtype in [DType::BF16, DType::F16] {
            for scaled in [true, false] {
                on_gpu::fp8(device, shape, dtype, scaled)?;
            }
        }
    }
    for activated in ACTIVATED {
        for dtype in [DType::BF16, DType::F16] {
            on_gpu::activated_fp8(device, &activated, dtype)?;
        }
    }
    Ok(())
}

/// `(outputs, inputs, skipped)` of codes that are expanded: so many lie before them in one allocation.
const EXPANDED: [(usize, usize, usize); 8] = [
    (1, 1, 0),
    (1, 37, 0),
    (5, 7, 0),
    (3, 16, 0),
    (33, 129, 0),
    (7, 48, 3),
    (64, 257, 16),
    (257, 1000, 1),
];

/// The same of codes of rotated rows, which have whole groups.
const EXPANDED_ROTATED: [(usize, usize, usize); 5] =
    [(1, 256, 0), (5, 512, 0), (7, 256, 3), (9, 768, 16), (130, 1024, 0)];

/// `(rows, outputs, skipped)` of products that a bias is added to.
const BIASED: [(usize, usize, usize); 7] =
    [(1, 1, 0), (3, 7, 0), (17, 24, 0), (17, 24, 1), (300, 33, 8), (5, 4096, 0), (66_000, 8, 0)];

/// `(rows, outputs, inputs)` of products.
const MULTIPLIED: [(usize, usize, usize); 9] = [
    (1, 64, 96),
    (1, 64, 8192),
    (3, 24, 8),
    (77, 136, 256),
    (300, 72, 128),
    (1, 5, 7),
    (3, 33, 129),
    (77, 40, 515),
    (300, 257, 64),
];

/// A product that is added to columns of an output.
struct Added {
    rows: usize,
    /// The width of the output, the first column that is added to, and how many.
    y: (usize, usize, usize),
    /// The same of the input that is read.
    t: (usize, usize, usize),
}

const ADDED: [Added; 3] = [
    Added { rows: 77, y: (264, 64, 136), t: (32, 16, 16) },
    Added { rows: 300, y: (72, 0, 72), t: (4, 0, 4) },
    Added { rows: 3, y: (33, 3, 5), t: (7, 2, 4) },
];

/// `(rows, outputs, inputs)` of products in int8: tiles that are cut, longer rows than a thread keeps, widths that
/// tile copies cannot read.
const INT8: [(usize, usize, usize); 7] = [
    (1, 64, 96),
    (1, 16, 33_024),
    (3, 136, 16),
    (77, 33, 272),
    (77, 264, 336),
    (300, 48, 128),
    (3, 16, 24), // nothing multiplies these
];

/// The same of rotated rows: a group, several warps, threads without a vector, longer rows than a thread keeps.
const INT8_ROTATED: [(usize, usize, usize); 5] =
    [(1, 64, 256), (3, 136, 512), (77, 33, 1280), (300, 48, 256), (3, 16, 33_024)];

/// `(rows, inputs)` of rows that become e4m3: a vector, threads without one, longer rows than a thread keeps.
const FP8_ROWS: [(usize, usize); 4] = [(1, 8), (77, 272), (3, 33_024), (300, 128)];

/// `(rows, outputs, inputs)` of products in fp8: one row and few, tiles that are cut.
const FP8: [(usize, usize, usize); 6] =
    [(1, 64, 96), (3, 144, 16), (77, 272, 336), (300, 48, 128), (128, 256, 256), (77, 32, 1040)];

/// A product with GELU behind it that goes into columns.
struct Activated {
    rows: usize,
    inputs: usize,
    /// As [`Added`] has it.
    y: (usize, usize, usize),
}

/// Columns behind and before others, all columns, one row; outputs that cut tiles.
const ACTIVATED: [Activated; 4] = [
    Activated { rows: 77, inputs: 256, y: (272, 64, 144) },
    Activated { rows: 300, inputs: 128, y: (336, 256, 80) },
    Activated { rows: 129, inputs: 96, y: (80, 0, 80) },
    Activated { rows: 1, inputs: 64, y: (96, 16, 64) },
];

/// GELU by tanh of what a product is nearly, and how far one in `dtype` may be from it: its slope is at most 1.13, and the
/// library's tanh is the card's, off by 2^-10.
fn activated(expected: &mut [(f32, f32)], dtype: DType) {
    let step = if dtype == DType::BF16 { 2f32.powi(-8) } else { 2f32.powi(-11) };
    for (value, allowed) in expected {
        let v = f64::from(*value);
        let inner = (2. / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3));
        let gelu = (0.5 * v * (1. + inner.tanh())) as f32;
        *allowed = 1.13 * *allowed + step * gelu.abs() + 2f32.powi(-10) * value.abs();
        *value = gelu;
    }
}

/// Values of both signs between 1/16 and 16, the same for the same seed, rounded to `dtype`.
fn values(len: usize, seed: u32, dtype: DType) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    for i in 0..len as u32 {
        let bits = scattered(i, seed);
        let mantissa = 1. + (bits & 0x7f_ffff) as f32 / 8_388_608.;
        let exponent = (bits >> 23 & 7) as i32 - 4;
        let sign = if bits >> 31 == 0 { 1. } else { -1. };
        values.push(sign * mantissa * 2f32.powi(exponent));
    }
    round(&mut values, dtype);
    values
}

fn codes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (scattered(i, 5) >> 24) as u8).collect()
}

fn scattered(i: u32, seed: u32) -> u32 {
    let mixed = (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    (mixed ^ mixed >> 15).wrapping_mul(0xc2b2_ae35) ^ mixed >> 13
}

fn round(values: &mut [f32], dtype: DType) {
    match dtype {
        DType::BF16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        DType::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        _ => {}
    }
}

/// What `expand_*` computes, widened.
fn expanded(of: Codes, codes: &[u8], inputs: usize, scales: &[f32], dtype: DType) -> Vec<f32> {
    let mut weight = vec![0.; codes.len()];
    match of {
        Codes::Int8 | Codes::RotatedInt8 => int8::expand(codes, inputs, scales, &mut weight),
        Codes::Fp8 => fp8::expand(codes, inputs, scales, &mut weight),
    }
    if of == Codes::RotatedInt8 {
        rotate_rows(&mut weight, inputs);
    }
    round(&mut weight, dtype);
    weight
}

/// What `add_bias_*` computes, widened.
fn biased(y: &mut [f32], bias: &[f32], dtype: DType) {
    for row in y.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        round(row, dtype);
    }
}

/// What a product of `x` `[rows, inputs]` and `w` `[outputs, inputs]` is in f64, and how far one in `dtype` may be
/// from it: half a step of its numbers, twice if it is rounded before the bias comes, and what sums in
/// f32 lose, in any order and cut instead of rounded.
fn multiplied(
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    inputs: usize,
    dtype: DType,
) -> Vec<(f32, f32)> {
    let step = if dtype == DType::BF16 { 2f64.powi(-8) } else { 2f64.powi(-11) };
    let lost = inputs as f64 * 2f64.powi(-22);
    let mut all = Vec::new();
    for x in x.chunks_exact(inputs) {
        for (output, w) in w.chunks_exact(inputs).enumerate() {
            let (mut sum, mut most) = (0f64, 0f64);
            for (&x, &w) in x.iter().zip(w) {
                let product = f64::from(x) * f64::from(w);
                sum += product;
                most += product.abs();
            }
            let with = sum + bias.map_or(0., |bias| f64::from(bias[output]));
            let allowed = step * (sum.abs() + with.abs()) + lost * most;
            all.push((with as f32, allowed as f32));
        }
    }
    all
}

/// What `quantize_*` computes of `x` `[rows, inputs]`: codes and scales.
fn quantized(x: &[f32], inputs: usize) -> (Vec<i8>, Vec<f32>) {
    quantized_by(x, inputs, 127., 0, |x| x.round_ties_even() as i8)
}

/// What `quantize_fp8_*` computes of `x` `[rows, inputs]`: codes and scales.
fn quantized_to_fp8(x: &[f32], inputs: usize) -> (Vec<u8>, Vec<f32>) {
    quantized_by(x, inputs, fp8::MOST, 0, fp8::to_e4m3)
}

fn quantized_by<C: Copy>(
    x: &[f32],
    inputs: usize,
    most: f32,
    none: C,
    encode: impl Fn(f32) -> C,
) -> (Vec<C>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::new());
    for row in x.chunks_exact(inputs) {
        let finite = row.iter().all(|x| x.is_finite());
        let largest = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        let some = finite && largest >= 1e-30;
        let inverse = most / largest;
        let code = |x: &f32| if some { encode(x * inverse) } else { none };
        codes.extend(row.iter().map(code));
        scales.push(match (finite, some) {
            (false, _) => f32::NAN,
            (true, true) => largest / most,
            (true, false) => 0.,
        });
    }
    (codes, scales)
}

/// `x` `[rows, inputs]` as products with codes quantize it.
fn turned(of: Codes, x: &[f32], inputs: usize) -> Vec<f32> {
    let mut x = x.to_vec();
    if of == Codes::RotatedInt8 {
        rotate_rows(&mut x, inputs);
    }
    x
}

/// What `w8a8_*` computes, widened: exact sums of integers, then three roundings in f32 and the last to `dtype`.
fn multiplied_in_int8(
    x: &[f32],
    codes: &[u8],
    scales: &[f32],
    bias: Option<&[f32]>,
    inputs: usize,
    dtype: DType,
) -> Vec<f32> {
    let (x, of_rows) = quantized(x, inputs);
    let mut all = Vec::new();
    for (x, of_row) in x.chunks_exact(inputs).zip(of_rows) {
        for (output, w) in codes.chunks_exact(inputs).enumerate() {
            let products = x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w as i8));
            let sum: i32 = products.sum();
            let bias = bias.map_or(0., |bias| bias[output]);
            all.push(of_row.mul_add(scales[output] * sum as f32, bias));
        }
    }
    round(&mut all, dtype);
    all
}

/// What a product of the e4m3 codes that the rows of `x` become and the weight `w` is in f64, and how far one that is
/// rounded to `dtype` may be from it: as [`multiplied`] says, and what is lost in the tensor cores. They bring the products of
/// a step of 32 inputs and the sum so far to one exponent and cut off what is below its 13 bits or so. The largest of
/// them is far below the sum of all magnitudes; 2^-11 of that is allowed for each step, and three for few inputs.
fn multiplied_in_fp8(
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    inputs: usize,
    dtype: DType,
) -> Vec<(f32, f32)> {
    let (codes, scales) = quantized_to_fp8(x, inputs);
    let mut wide = vec![0.; x.len()];
    fp8::expand(&codes, inputs, &scales, &mut wide);
    let mut all = multiplied(&wide, w, bias, inputs, dtype);
    // The same of magnitudes, of which the share is lost.
    let sizes: Vec<f32> = wide.iter().map(|x| x.abs()).collect();
    let weights: Vec<f32> = w.iter().map(|w| w.abs()).collect();
    let most = multiplied(&sizes, &weights, None, inputs, DType::F32);
    let steps = inputs.div_ceil(32) as f32;
    for ((_, allowed), (most, _)) in all.iter_mut().zip(most) {
        *allowed += most * (steps + 3.) * 2f32.powi(-11);
    }
    all
}

/// Holds what a product computed to what it should be nearly. Where that is no number, neither may the other be.
fn compare_near(
    kernel: &str,
    shape: (usize, usize),
    expected: &[(f32, f32)],
    found: &[f32],
) -> Result<()> {
    let near = |(at, &(expected, allowed)): (usize, &(f32, f32))| {
        let near = |found: &f32| {
            (found - expected).abs() <= allowed || found.is_nan() && expected.is_nan()
        };
        found.get(at).copied().filter(near)
    };
    let nearest: Vec<f32> = expected.iter().enumerate().map(|e| near(e).unwrap_or(e.1.0)).collect();
    compare(kernel, shape, &nearest, found)
}

/// Holds what a kernel computed to what it should have.
fn compare(kernel: &str, shape: (usize, usize), expected: &[f32], found: &[f32]) -> Result<()> {
    let failed = |at: usize, expected: f32, found: f32| Error::Kernel {
        kernel: kernel.into(),
        shape: [shape.0, shape.1],
        at,
        expected,
        found,
    };
    if expected.len() != found.len() {
        return Err(failed(expected.len().min(found.len()), f32::NAN, f32::NAN));
    }
    let mut pairs = expected.iter().zip(found).enumerate();
    let same = |e: f32, f: f32| e.to_bits() == f.to_bits() || e.is_nan() && f.is_nan();
    match pairs.find(|(_, (e, f))| !same(**e, **f)) {
        Some((at, (&expected, &found))) => Err(failed(at, expected, found)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn twins_are_what_layers_compute_on_the_cpu() {
        let (outputs, inputs) = (64, 257);
        let codes = codes(outputs * inputs);
        assert!((0..=255).all(|code| codes.contains(&code)), "every code occurs");
        let wide = values(outputs, 7, DType::F32);
        let half: Vec<bf16> = wide.iter().map(|&s| bf16::from_f32(s)).collect();
        let mut weight = vec![bf16::ZERO; codes.len()];
        int8::decode(&codes, inputs, &half, &mut weight);
        let decoded: Vec<f32> = weight.iter().map(|w| w.to_f32()).collect();
        let scales = values(outputs, 7, DType::BF16);
        let twin = expanded(Codes::Int8, &codes, inputs, &scales, DType::BF16);
        assert_eq!(twin, decoded);
        fp8::decode(&codes, inputs, &half, &mut weight);
        let bits = |values: &mut dyn Iterator<Item = f32>| -> Vec<u32> {
            values.map(|v| if v.is_nan() { 1 } else { v.to_bits() }).collect()
        };
        let twin = expanded(Codes::Fp8, &codes, inputs, &scales, DType::BF16);
        assert_eq!(bits(&mut twin.into_iter()), bits(&mut weight.iter().map(|w| w.to_f32())));

        let mut y = values(6, 11, DType::F16);
        let bias = values(3, 13, DType::F16);
        let sum = |at: usize| f16::from_f32(y[at]) + f16::from_f32(bias[at % 3]);
        let sums: Vec<f32> = (0..6).map(|at| sum(at).to_f32()).collect();
        biased(&mut y, &bias, DType::F16);
        assert_eq!(y, sums);
    }

    #[test]
    fn what_is_activated_is_gelu_with_room_for_what_was_near() {
        let sums: Vec<f32> = (-40..40).map(|i| i as f32 / 8.).collect();
        let mut expected: Vec<(f32, f32)> = sums.iter().map(|&v| (v, 0.01)).collect();
        activated(&mut expected, DType::BF16);
        let device = candle_core::Device::Cpu;
        let gelu = candle_core::Tensor::new(sums.as_slice(), &device).unwrap().gelu().unwrap();
        for ((want, allowed), gelu) in expected.iter().zip(gelu.to_vec1::<f32>().unwrap()) {
            assert!((want - gelu).abs() < 1e-5 && *allowed > 0.011, "{want} {gelu}");
        }
        // Columns are within their rows, some behind and some before others, and all.
        let place = |of: &dyn Fn(usize, usize, usize) -> bool| {
            ACTIVATED.iter().any(|&Activated { y: (width, first, outputs), .. }| {
                assert!(first + outputs <= width);
                of(width, first, outputs)
            })
        };
        assert!(place(&|width, first, outputs| first > 0 && first + outputs < width));
        assert!(place(&|width, first, outputs| first > 0 && first + outputs == width));
        assert!(place(&|width, first, outputs| (first, outputs) == (0, width)));
        assert!(ACTIVATED.iter().any(|a| a.rows == 1) && ACTIVATED.iter().any(|a| a.rows > 256));
        assert!(ACTIVATED.iter().all(|a| a.inputs.is_multiple_of(16)), "what int8 multiplies");
    }

    #[test]
    fn shapes_cut_every_path() {
        // A thread of `expand` takes 16 codes, one of `add_bias` 4 or 8 values; a grid has 65,535 rows.
        let any = |of: &dyn Fn(usize, usize, usize) -> bool| {
            EXPANDED.iter().any(|&(o, i, s)| of(o, i, s))
        };
        assert!(any(&|o, i, s| o * i % 16 == 0 && i % 16 == 0 && s == 0), "vectors alone");
        assert!(any(&|o, i, s| o * i > 16 && o * i % 16 != 0 && s == 0), "vectors and an end");
        assert!(any(&|o, i, s| o > 1 && i % 16 != 0 && s == 0), "rows that begin inside a vector");
        assert!(any(&|o, i, _| o > 1 && i < 16), "several rows in one vector");
        assert!(any(&|o, i, s| o * i > 256 && s % 16 != 0), "no vectors, several threads");
        let any =
            |of: &dyn Fn(usize, usize, usize) -> bool| BIASED.iter().any(|&(r, o, s)| of(r, o, s));
        assert!(any(&|_, o, s| o % 8 == 0 && s == 0) && any(&|_, o, _| o % 4 != 0));
        assert!(any(&|_, o, s| o % 8 == 0 && s % 4 != 0) && any(&|r, _, _| r > 65_535));
        // Products: rows of 16 bytes and others, one row, and so few outputs for so many inputs that sums are divided.
        let any = |of: &dyn Fn(usize, usize, usize) -> bool| {
            MULTIPLIED.iter().any(|&(r, o, i)| of(r, o, i))
        };
        for rows in [1, 3, 77, 300] {
            assert!(any(&|r, o, i| r == rows && o % 8 == 0 && i % 8 == 0));
            assert!(any(&|r, o, i| r == rows && (o % 8 != 0 || i % 8 != 0)));
        }
        assert!(any(&|r, o, i| r * o * 100 < i));
        // Sums that go into columns: each part of the memory within its, and the places at vectors or not.
        let within = |(all, from, len): (usize, usize, usize)| from + len <= all;
        assert!(ADDED.iter().all(|a| a.rows > 0 && within(a.y) && within(a.t)));
        let vectors = |(all, from, _): (usize, usize, usize)| all % 8 == 0 && from % 8 == 0;
        assert!(ADDED.iter().any(|a| vectors(a.y) && vectors(a.t) && a.y.1 > 0 && a.t.1 > 0));
        assert!(ADDED.iter().any(|a| !vectors(a.y) && !vectors(a.t)));
        // In int8: tiles of 128 by 128 in steps of 64, threads that keep 32 values and 1024 of them, rows of 16 bytes.
        let any =
            |of: &dyn Fn(usize, usize, usize) -> bool| INT8.iter().any(|&(r, o, i)| of(r, o, i));
        assert!(any(&|r, _, _| r > 128) && any(&|_, o, _| o > 128 && o % 128 != 0));
        assert!(any(&|_, _, i| i > 64 && i % 64 != 0) && any(&|_, _, i| i > 1024 * 32));
        assert!(any(&|_, o, i| o % 8 != 0 && i % 16 == 0) && any(&|_, _, i| i % 16 != 0));
        // Of rotated rows: whole groups alone; one a row, more than a block has warps, and more than a thread keeps.
        let whole = |inputs: usize| Codes::RotatedInt8.with_inputs(inputs) == Codes::RotatedInt8;
        assert!(INT8_ROTATED.iter().all(|&(_, _, i)| whole(i)));
        assert!(EXPANDED_ROTATED.iter().all(|&(_, i, _)| whole(i)));
        assert!(INT8_ROTATED.iter().any(|&(r, _, i)| r > 256 && i == 256));
        assert!(INT8_ROTATED.iter().any(|&(r, _, i)| r > 2 && i > 1024 * 32));
        assert!(EXPANDED_ROTATED.iter().any(|&(_, _, s)| s % 8 != 0));
        // In fp8: the same quantization, and sides of 16 alone.
        assert!(FP8_ROWS.iter().any(|&(_, i)| i > 1024 * 32));
        assert!(FP8_ROWS.iter().all(|(_, i)| i % 8 == 0));
        assert!(FP8.iter().all(|(_, o, i)| o % 16 == 0 && i % 16 == 0));
        assert!(FP8.iter().any(|&(r, _, _)| r == 1) && FP8.iter().any(|&(r, _, _)| r > 256));
    }

    #[test]
    fn products_in_int8_are_as_near_as_their_codes() {
        let (inputs, dtype) = (272, DType::BF16);
        let mut x = values(4 * inputs, 41, dtype);
        x[..inputs].fill(0.);
        x[2 * inputs - 1] = f32::NAN;
        let (of_x, of_rows) = quantized(&x, inputs);
        assert!(of_x[..2 * inputs].iter().all(|&code| code == 0));
        assert!(of_rows[0] == 0. && of_rows[1].is_nan());

        let of_w = codes(5 * inputs);
        let (scales, bias) = (values(5, 43, DType::F32), values(5, 47, dtype));
        let y = multiplied_in_int8(&x, &of_w, &scales, Some(&bias), inputs, dtype);
        assert_eq!(turned(Codes::Int8, &x[2 * inputs..], inputs), &x[2 * inputs..]);
        assert_eq!(y[..5], bias);
        assert!(y[5..10].iter().all(|y| y.is_nan()));

        let w = expanded(Codes::Int8, &of_w, inputs, &scales, DType::F32);
        let expected = multiplied(&x, &w, Some(&bias), inputs, dtype);
        for row in 2..4 {
            let (of_row, at) = (of_rows[row], row * inputs..(row + 1) * inputs);
            assert_eq!(of_x[at.clone()].iter().map(|code| code.unsigned_abs()).max(), Some(127));
            for (x, &code) in x[at.clone()].iter().zip(&of_x[at]) {
                assert!((x - f32::from(code) * of_row).abs() <= 0.5001 * of_row, "{x} is {code}");
            }
            for (output, w) in w.chunks_exact(inputs).enumerate() {
                let (expected, rounding) = expected[row * 5 + output];
                let most: f32 = w.iter().map(|w| w.abs()).sum::<f32>() * 0.5001 * of_row;
                let off = (y[row * 5 + output] - expected).abs();
                assert!(off <= most + 2. * rounding, "off by {off}, {most} is allowed");
                assert!(off > 0., "nothing was rounded");
            }
        }
    }

    #[test]
    fn products_of_rotated_codes_are_those_of_what_they_stand_for() {
        let (inputs, dtype) = (512, DType::F32);
        let x = values(3 * inputs, 41, dtype);
        let (of_w, scales) = (codes(5 * inputs), values(5, 43, DType::F32));
        let rotated = turned(Codes::RotatedInt8, &x, inputs);
        let y = multiplied_in_int8(&rotated, &of_w, &scales, None, inputs, dtype);
        let w = expanded(Codes::RotatedInt8, &of_w, inputs, &scales, DType::F32);
        for (found, (expected, _)) in y.iter().zip(multiplied(&x, &w, None, inputs, dtype)) {
            let off = (found - expected).abs();
            let most = w.iter().map(|w| w.abs()).fold(0f32, f32::max);
            // Half a code of each input, of 127 for 64 or so, in the mean.
            assert!(off < 0.3 * most * (inputs as f32).sqrt(), "{found} {expected}");
        }
    }

    #[test]
    fn products_in_fp8_are_as_near_as_their_codes() {
        let (inputs, dtype) = (272, DType::BF16);
        let mut x = values(4 * inputs, 41, dtype);
        x[..inputs].fill(0.);
        x[2 * inputs - 1] = f32::NAN;
        let (codes, of_rows) = quantized_to_fp8(&x, inputs);
        assert!(codes[..2 * inputs].iter().all(|&code| code == 0));
        assert!(of_rows[0] == 0. && of_rows[1].is_nan());
        let (w, bias) = (values(5 * inputs, 43, dtype), values(5, 47, dtype));
        let y = multiplied_in_fp8(&x, &w, Some(&bias), inputs, dtype);
        assert!(y[..5].iter().zip(&bias).all(|(y, bias)| y.0 == *bias));
        assert!(y[5..10].iter().all(|y| y.0.is_nan()));
        let exact = multiplied(&x, &w, Some(&bias), inputs, dtype);
        for row in 2..4 {
            let at = row * inputs..(row + 1) * inputs;
            assert_eq!(codes[at.clone()].iter().map(|code| code & 0x7f).max(), Some(0x7e));
            let mut half = Vec::new();
            for (x, &code) in x[at.clone()].iter().zip(&codes[at]) {
                let step = (x.abs() / 16.).max(of_rows[row] / 1024.) * 1.0001;
                let back = fp8::from_e4m3(code) * of_rows[row];
                assert!((x - back).abs() <= step, "{x} became {back}");
                half.push(step);
            }
            for (output, w) in w.chunks_exact(inputs).enumerate() {
                let most: f32 = w.iter().zip(&half).map(|(w, half)| w.abs() * half).sum();
                let off = (y[row * 5 + output].0 - exact[row * 5 + output].0).abs();
                assert!(off > 0. && off <= most, "off by {off}, {most} is allowed");
            }
        }
        // Another row, and none at all, are far off.
        let found: Vec<f32> = y.iter().map(|y| y.0).collect();
        compare_near("p", (4, 5), &y, &found).unwrap();
        for wrong in [found[10], 0., f32::NAN] {
            let mut other = found.clone();
            other[16] = wrong;
            assert!(compare_near("p", (4, 5), &y, &other).is_err(), "{wrong}");
        }
        let mut other = found;
        other[6] = 1.; // where a NaN belongs
        assert!(compare_near("p", (4, 5), &y, &other).is_err());
    }

    #[test]
    fn products_are_held_to_rounding_alone() {
        for dtype in [DType::BF16, DType::F16] {
            let (x, w, bias) = (values(3 * 515, 17, dtype), values(5 * 515, 19, dtype), [2.; 5]);
            let expected = multiplied(&x, &w, Some(&bias), 515, dtype);
            // Summed in f32, from the other end.
            let mut found = Vec::new();
            for x in x.chunks_exact(515) {
                for (w, bias) in w.chunks_exact(515).zip(bias) {
                    let products = x.iter().zip(w).rev().map(|(x, w)| x * w);
                    found.push(products.sum::<f32>() + bias);
                }
            }
            round(&mut found, dtype);
            compare_near("p", (3, 5), &expected, &found).unwrap();
            // Without the bias, of other rows, or not a number it is something else.
            for wrong in [found[7] - 2., found[2], f32::NAN] {
                let mut other = found.clone();
                other[7] = wrong;
                let far = compare_near("p", (3, 5), &expected, &other);
                let small = dtype == DType::BF16 && wrong == found[7] - 2.;
                assert!(far.is_err() || small, "{dtype:?} {wrong}");
            }
            assert!(compare_near("p", (3, 5), &expected, &found[1..]).is_err());
        }
    }

    #[test]
    fn rounding_is_seen() {
        // Data whose results need no rounding would pass a kernel that rounds wrongly.
        for dtype in DTYPES.into_iter().filter(|&dtype| dtype != DType::F32) {
            let scales = values(100, 7, DType::F32);
            let exact = expanded(Codes::Int8, &codes(1000), 10, &scales, DType::F32);
            let rounded = expanded(Codes::Int8, &codes(1000), 10, &scales, dtype);
            assert!(exact.iter().zip(&rounded).filter(|(a, b)| a != b).count() > 900);
            assert!(rounded.iter().all(|v| v.is_finite()));
        }
    }

    #[test]
    fn one_wrong_bit_is_an_error_that_names_its_place() {
        let expected = values(12, 3, DType::BF16);
        compare("add_bias_bf16", (3, 4), &expected, &expected).unwrap();
        let mut found = expected.clone();
        found[7] = f32::from_bits(found[7].to_bits() ^ 1 << 16);
        let error = compare("add_bias_bf16", (3, 4), &expected, &found).unwrap_err().to_string();
        let (e, f) = (expected[7].to_string(), found[7].to_string());
        for text in ["add_bias_bf16", "[3, 4]", "element 7", &e, &f] {
            assert!(error.contains(text), "no {text} in: {error}");
        }
        // −0 is not 0, and a row too few is not nothing.
        assert!(compare("k", (1, 1), &[0.], &[-0.]).is_err());
        assert!(compare("k", (1, 1), &expected, &expected[..11]).is_err());
    }
}
