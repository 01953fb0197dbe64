//! The kernels against their twins on the CPU.
//!
//! Each runs on values of awkward shapes and is held to what the same function of [`nn`](crate::nn) computes on
//! the CPU in f32. Where a kernel rounds each operation as the CPU does, the bits must be the same. Where it sums
//! in another order, or has another exponential, a value may lie half a unit of its dtype's last place from the
//! CPU's, which is its rounding, and 10⁻⁵ of its size, which is a hundred times what f32 costs. Operands that
//! begin at no multiple of 16 bytes must give the same bits as those that do.

use candle_core::{CudaDevice, D, DType, Device, Tensor};
use mmgp_quant::{Codes, Error, Input, MemorySource, Result, Weights};

use super::{
    GroupNorm,
    convolution::convolve,
    heads::{AttentionWithin, Turned},
};
use crate::nn::{self, Activation, Conv2d, HeadRows, Heads, LayerNorm, RmsNorm, Rope, Window};

const EPS: f64 = 1e-6;

/// Widths of rows: a value, less than a vector, ragged ends, a warp, a head, several warps, more than a block
/// holds.
const WIDTHS: [usize; 9] = [1, 3, 12, 44, 128, 257, 3072, 3073, 9000];
/// Others of whole groups: one, which a warp has, and more than threads keep.
const GROUPED: [usize; 2] = [256, 9216];

/// Runs each kernel and compares with the CPU.
///
/// Takes a second, and on cards for which there is no machine code the driver's compilation of PTX, which it
/// keeps. Which results may be kept, and for how long, is the caller's affair: they hold for one card, one
/// driver and one [`kernel_image`](super::kernel_image). Nothing is [enabled](super::enable) by it.
///
/// # Errors
/// [`Error::Kernel`] names the first kernel that computes something else, with what was expected and found;
/// [`Error::Candle`] one that cannot be loaded or started.
pub fn self_test(device: &CudaDevice) -> Result<()> {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let on = On { device, dtype };
        on.norms()?;
        on.heads()?;
        on.sums()?;
        on.gates()?;
        on.gated_norms()?;
        on.activations()?;
        on.groups()?;
        on.softmaxes()?;
        on.copies()?;
    }
    Ok(())
}

/// Runs the kernel for attention and compares with the CPU.
///
/// As [`self_test`], for one [`flash_image`](super::flash_image). Nothing is [enabled](super::enable_flash) by it.
///
/// # Errors
/// Those of [`self_test`].
pub fn self_test_flash(device: &CudaDevice) -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        On { device, dtype }.flash()?;
    }
    Ok(())
}

/// Runs cuDNN's attention in `dtype`, bf16 or f16, and compares with the CPU.
///
/// Takes a second or two the first time on a machine, when its kernels are compiled, which the driver keeps. Results
/// hold for one card, one driver and one [version](super::cudnn_version). Nothing is
/// [enabled](super::enable_attention) by it.
///
/// # Errors
/// [`Error::Kernel`] where it computes something else; [`Error::Candle`] where it does not run.
pub fn self_test_attention(device: &CudaDevice, dtype: DType) -> Result<()> {
    On { device, dtype }.whole_attention()
}

/// Runs cuDNN's convolution in `dtype` and compares with the CPU; as [`self_test_attention`].
///
/// # Errors
/// Those of [`self_test_attention`].
pub fn self_test_convolution(device: &CudaDevice, dtype: DType) -> Result<()> {
    On { device, dtype }.convolutions()
}

/// What a result may differ by.
#[derive(Clone, Copy, PartialEq)]
enum Within {
    /// What weights in the dtype, and a mean of values by them, cost.
    Weights,
    /// A sum that is rounded before a number of at most 4 is added to it, and after.
    Products,
    /// Nothing, once the CPU's is rounded to the dtype.
    Bits,
    /// The dtype's rounding, and what f32 operations cost.
    Rounding,
}

#[derive(Clone, Copy)]
struct On<'a> {
    device: &'a CudaDevice,
    dtype: DType,
}

/// Puts a tensor of the CPU onto the GPU, in the dtype under test and so many values behind a vector's start.
struct Put<'a> {
    on: On<'a>,
    skipped: usize,
}

impl Put<'_> {
    /// It is converted on the CPU, so that no kernel but the tested one runs.
    fn tensor(&self, t: &Tensor) -> candle_core::Result<Tensor> {
        let len = t.elem_count();
        let mut values = vec![0f32; self.skipped];
        values.extend(t.flatten_all()?.to_vec1::<f32>()?);
        let values = Tensor::new(values.as_slice(), &Device::Cpu)?.to_dtype(self.on.dtype)?;
        let there = values.to_device(&Device::Cuda(self.on.device.clone()))?;
        there.narrow(0, self.skipped, len)?.reshape(t.dims())
    }

    fn rms_norm(&self, weight: &Tensor) -> Result<RmsNorm> {
        RmsNorm::new(&self.weights(&[("weight", weight)])?, weight.elem_count(), EPS)
    }

    fn weights(&self, weights: &[(&str, &Tensor)]) -> Result<Weights> {
        let device = Device::Cuda(self.on.device.clone());
        let mut source = MemorySource::new(&device).computing_in(self.on.dtype);
        for (name, tensor) in weights {
            source = source.with(*name, self.tensor(tensor)?);
        }
        Ok(Weights::new(source))
    }
}

impl On<'_> {
    fn norms(&self) -> Result<()> {
        for width in WIDTHS {
            let tokens = if width < 1000 { 37 } else { 3 };
            let x = self.apart(&[2, tokens, width], 1)?;
            let [w, b] = [self.values(&[width], 2)?, self.values(&[width], 3)?];
            // Scale and shift are columns of one product, as they are in models.
            let rows = self.values(&[2, 3 * width], 4)?;
            let part = |of: &Tensor, i: usize| of.narrow(1, i * width, width);
            let (scale, shift) = (part(&rows, 1)?, part(&rows, 2)?);
            let all = [("weight", &w), ("bias", &b)];
            let cpu = LayerNorm::new(&cpu(&all), width, EPS)?;

            let want = nn::layer_norm_modulated(&x, &scale, &shift, EPS)?;
            self.check("rows_layer", Within::Rounding, &want, |put| {
                let (x, rows) = (put.tensor(&x)?, put.tensor(&rows)?);
                Ok(super::layer_norm(&x, None, Some((&part(&rows, 1)?, &part(&rows, 2)?)), EPS)?)
            })?;
            self.check("rows_layer", Within::Rounding, &cpu.forward(&x)?, |put| {
                let (w, b) = (put.tensor(&w)?, put.tensor(&b)?);
                Ok(super::layer_norm(&put.tensor(&x)?, Some((&w, &b)), None, EPS)?)
            })?;
            let want = cpu.forward_modulated(&x, &scale, &shift)?;
            self.check("rows_layer", Within::Rounding, &want, |put| {
                let (w, b, rows) = (put.tensor(&w)?, put.tensor(&b)?, put.tensor(&rows)?);
                let modulation = (&part(&rows, 1)?, &part(&rows, 2)?);
                Ok(super::layer_norm(&put.tensor(&x)?, Some((&w, &b)), Some(modulation), EPS)?)
            })?;
            let want = RmsNorm::new(&self::cpu(&[("weight", &w)]), width, EPS)?.forward(&x)?;
            self.check("rows_rms", Within::Rounding, &want, |put| {
                Ok(super::rms_norm(&put.tensor(&x)?, &put.tensor(&w)?, EPS)?)
            })?;
        }
        Ok(())
    }

    fn heads(&self) -> Result<()> {
        for (count, dim, first) in [(2, 6, 0), (3, 44, 5), (4, 64, 8), (24, 128, 0), (1, 512, 16)] {
            let heads = Heads { count, dim };
            let (text, image) = (5, 7);
            let a = self.apart(&[2, text, first + heads.width() + 8], 1)?;
            let b = self.apart(&[2, image, first + heads.width()], 2)?;
            let weight = self.values(&[dim], 3)?;
            let norm = RmsNorm::new(&cpu(&[("weight", &weight)]), dim, EPS)?;
            let ids = self.values(&[text + image, 1], 4)?.affine(100., 0.)?;
            let rope = |device: &Device| Rope::new(&ids, &[dim], 10_000., device);
            let turn = rope(&Device::Cpu)?;
            for (name, normed, turned) in [
                ("rows_none", false, false),
                ("rows_none", false, true),
                ("rows_rms", true, false),
                ("rows_rms", true, true),
            ] {
                let joined = |a: &Tensor, b: &Tensor, norm: &RmsNorm, turn: &Rope| {
                    let (before, behind) = (turn.narrow(0, text)?, turn.narrow(text, image)?);
                    let part = |rows, rope| HeadRows {
                        rows,
                        first,
                        norm: normed.then_some(norm),
                        rope: turned.then_some(rope),
                    };
                    // On the GPU: whether kernels are used there was not decided yet.
                    let parts = [part(a, &before), part(b, &behind)];
                    match a.device() {
                        Device::Cpu => heads.join(&parts),
                        _ => super::heads(heads, &parts),
                    }
                };
                let want = joined(&a, &b, &norm, &turn)?;
                let within = if normed { Within::Rounding } else { Within::Bits };
                self.check(name, within, &want, |put| {
                    let turn = rope(&Device::Cuda(self.device.clone()))?;
                    let (a, b) = (put.tensor(&a)?, put.tensor(&b)?);
                    Ok(joined(&a, &b, &put.rms_norm(&weight)?, &turn)?)
                })?;
            }
            self.turns(heads)?;
            let x = self.values(&[2, count, 9, dim], 5)?;
            self.check("rows_none", Within::Bits, &nn::heads::merge(&x)?, |put| {
                Ok(super::merge(&put.tensor(&x)?)?)
            })?;
        }
        Ok(())
    }

    /// Queries and keys in the rows of a projection, behind which something else lies; for heads of whole vectors.
    fn turns(&self, heads: Heads) -> Result<()> {
        let dim = heads.dim;
        let vector = 16 / self.dtype.size_in_bytes();
        if !dim.is_multiple_of(vector) || dim / vector > 32 {
            return Ok(());
        }
        let (width, tokens) = (heads.width(), 9);
        let x = self.apart(&[2, tokens, 2 * width + vector], 1)?;
        let (a, b) = (self.values(&[dim], 2)?, self.values(&[dim], 3)?);
        let ids = self.values(&[tokens, 1], 4)?.affine(100., 0.)?;
        let rope = |device: &Device| Rope::new(&ids, &[dim], 10_000., device);
        let turn = rope(&Device::Cpu)?;
        let part = |first: usize, weight: &Tensor| -> Result<Tensor> {
            let norm = RmsNorm::new(&cpu(&[("weight", weight)]), dim, EPS)?;
            let split = heads.split(&x, first, Some(&norm), Some(&turn))?;
            Ok(split.transpose(1, 2)?.reshape((2, tokens, width))?)
        };
        let before = x.narrow(2, 0, vector)?;
        let want = Tensor::cat(&[before, part(vector, &a)?, part(vector + width, &b)?], 2)?;
        self.check("turn", Within::Rounding, &want, |put| {
            let turn = rope(&Device::Cuda(self.device.clone()))?;
            let norms = [&put.rms_norm(&a)?, &put.rms_norm(&b)?];
            // In memory of its own, which begins where vectors may.
            let x = put.tensor(&x)?.force_contiguous()?;
            x.inplace_op1(&Turned { heads, first: vector, norms, rope: &turn })?;
            Ok(x)
        })?;
        Ok(())
    }

    fn flash(&self) -> Result<()> {
        let computed = |q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, keys: Option<&[usize]>| {
            super::flash::attention(q, k, v, scale, keys)
        };
        // Heads of both widths and narrower ones; whole and ragged tiles of queries and keys; heads that share keys.
        for (heads, groups, queries, keys, dim) in [
            (2, 2, 333, 340, 128),
            (4, 2, 77, 172, 64),
            (3, 1, 1, 12, 128),
            (2, 2, 128, 128, 64),
            (2, 1, 130, 100, 72),
            (1, 1, 129, 257, 40),
            (2, 2, 5, 1, 8),
        ] {
            let used = keys - keys / 4;
            self.attention("flash", [heads, groups, queries, keys, dim], None, computed)?;
            let lengths = [used, 1 + used / 3];
            self.attention("flash", [heads, groups, queries, keys, dim], Some(lengths), computed)?;
        }
        Ok(())
    }

    /// Of few shapes: the library compiles kernels when they are first used on a machine, up to a second each, and each shape's
    /// plan takes some hundredths at every start.
    fn whole_attention(&self) -> Result<()> {
        let shapes = match self.dtype {
            DType::BF16 => &[[2, 333, 333, 128], [3, 77, 130, 64]][..],
            _ => &[[2, 77, 130, 128]],
        };
        for &[heads, queries, keys, dim] in shapes {
            let shape = [heads, heads, queries, keys, dim];
            self.attention("attention", shape, None, |q, k, v, scale, _| {
                super::cudnn::attention(q, k, v, scale)
            })?;
        }
        self.attention_within(Heads { count: 2, dim: 128 }, 333)
    }

    /// Attention within rows, whose columns are the result, queries, keys, values, and others.
    fn attention_within(&self, heads: Heads, tokens: usize) -> Result<()> {
        let (width, keys) = (heads.width(), tokens - tokens / 4);
        let x = self.values(&[2, tokens, 4 * width + 24], 1)?;
        let part = |i: usize| heads.split(&x, i * width, None, None);
        let (k, v) = (part(2)?.narrow(2, 0, keys)?, part(3)?.narrow(2, 0, keys)?);
        let scale = 0.5 / (heads.dim as f64).sqrt();
        let mixed = nn::attention(&part(1)?, &k, &v, scale, &[])?;
        let want = Tensor::cat(&[mixed, x.narrow(2, width, 3 * width + 24)?], 2)?;
        self.check("attention within", Within::Weights, &want, |put| {
            let x = put.tensor(&x)?.force_contiguous()?;
            let within = AttentionWithin::new(heads, keys, scale);
            x.inplace_op1(&within)?;
            if !within.is_done() {
                return Err(Error::Invalid("it is not computed".into()));
            }
            Ok(x)
        })
    }

    /// Holds attention of two items to the CPU's: of so many heads, groups of them, queries, keys and values of a head,
    /// items seeing their first keys where `lengths` are given.
    fn attention(
        &self,
        name: &str,
        [heads, groups, queries, keys, dim]: [usize; 5],
        lengths: Option<[usize; 2]>,
        run: impl Fn(
            &Tensor,
            &Tensor,
            &Tensor,
            f64,
            Option<&[usize]>,
        ) -> candle_core::Result<Option<Tensor>>,
    ) -> Result<()> {
        let (wide, narrow) = (heads * dim, groups * dim);
        let a = self.values(&[2, queries, wide], 1)?;
        let b = self.values(&[2, keys, wide + 2 * narrow], 2)?;
        // Within the rows of a projection, the keys not to their end.
        let parts = |a: &Tensor, b: &Tensor| {
            // Views: a copy would be the library's, whose kernels are compiled first.
            let split = |t: &Tensor, first: usize, count: usize| {
                let heads = t.reshape((2, t.dim(1)?, t.dim(2)? / dim, dim))?;
                heads.narrow(2, first / dim, count)?.transpose(1, 2)
            };
            let used = keys - keys / 4;
            let (k, v) = (split(b, wide, groups)?, split(b, wide + narrow, groups)?);
            candle_core::Result::Ok((
                split(a, 0, heads)?,
                k.narrow(2, 0, used)?,
                v.narrow(2, 0, used)?,
            ))
        };
        let scale = 0.5 / (dim as f64).sqrt();
        let (q, k, v) = parts(&a, &b)?;
        let want = match &lengths {
            Some(lengths) => nn::attention_up_to(&q, &k, &v, scale, lengths)?,
            None => nn::attention(&q, &k, &v, scale, &[])?,
        };
        self.check(name, Within::Weights, &want, |put| {
            let (q, k, v) = parts(&put.tensor(&a)?, &put.tensor(&b)?)?;
            let found = run(&q, &k, &v, scale, lengths.as_ref().map(|keys| keys.as_slice()))?;
            found.ok_or_else(|| Error::Invalid("it is not computed".into()))
        })
    }

    fn convolutions(&self) -> Result<()> {
        let name = "convolution";
        for (batch, inputs, outputs, window, (height, width)) in [
            (1, 8, 16, Window::SAME, (5, 7)),
            (2, 16, 3, Window::SAME, (9, 70)),
            (1, 40, 33, Window::DOUBLE, (7, 20)),
            (2, 24, 8, Window::HALVE, (10, 12)),
            (1, 4, 64, Window::SAME.nearest(), (6, 40)),
        ] {
            let x = self.values(&[batch, inputs, height, width], 1)?;
            let kernel = window.kernel;
            let weight = self.values(&[outputs, inputs, kernel, kernel], 2)?;
            let bias = self.values(&[outputs], 3)?;
            let all = [("weight", &weight), ("bias", &bias)];
            let want = Conv2d::new(&cpu(&all), inputs, outputs, window)?.forward(&x)?;
            let size = (want.dim(2)?, want.dim(3)?);
            // As a whole, and in strips of a few rows, of which the last overlaps.
            for strip in [1 << 30, (4 * inputs * width * window.repeat) as u64 * 8] {
                self.check(name, Within::Products, &want, |put| {
                    let (x, weight, bias) =
                        (put.tensor(&x)?, put.tensor(&weight)?, put.tensor(&bias)?);
                    let weights = [&weight, &bias];
                    let found = match self.dtype {
                        DType::F16 => convolve::<half::f16>(&x, weights, window, size, strip)?,
                        _ => convolve::<half::bf16>(&x, weights, window, size, strip)?,
                    };
                    found.ok_or_else(|| Error::Invalid("it is not computed".into()))
                })?;
            }
        }
        Ok(())
    }

    /// Alike, broadcast along leading, trailing and inner axes, and a part of something wider.
    fn sums(&self) -> Result<()> {
        for (shape, other, first) in [
            (vec![1, 3, 1000], vec![1, 3, 1000], 0),
            (vec![2, 5, 7], vec![2, 5, 9], 1),
            (vec![2, 3, 4, 33], vec![3, 1, 33], 0),
            (vec![2, 3, 4, 5, 6], vec![2, 1, 1, 1, 6], 0),
            (vec![7, 31], vec![7, 1], 0),
            (vec![4100], vec![1], 0),
        ] {
            let (x, y) = (self.values(&shape, 1)?, self.values(&other, 2)?);
            let last = other.len() - 1;
            let width = if first > 0 { shape[shape.len() - 1] } else { other[last] };
            for factor in [1., -0.3] {
                let part = |y: &Tensor| y.narrow(last, first, width);
                let want = nn::add_scaled(&x, &part(&y)?, factor)?;
                self.check("add", Within::Bits, &want, |put| {
                    let (x, y) = (put.tensor(&x)?, part(&put.tensor(&y)?)?);
                    super::add(&x, &y, factor)?
                        .ok_or_else(|| Error::Invalid("it is not computed".into()))
                })?;
            }
        }
        Ok(())
    }

    fn gates(&self) -> Result<()> {
        for width in WIDTHS {
            let tokens = if width < 1000 { 37 } else { 3 };
            let (x, y) =
                (self.values(&[2, tokens, width], 1)?, self.values(&[2, tokens + 4, width], 2)?);
            let gate = self.values(&[2, 2 * width], 3)?;
            let parts = |y: &Tensor, gate: &Tensor| {
                candle_core::Result::Ok((y.narrow(1, 4, tokens)?, gate.narrow(1, width, width)?))
            };
            let (own, half) = parts(&y, &gate)?;
            self.check("gate", Within::Bits, &nn::gated_add(&x, &own, &half)?, |put| {
                let (own, half) = parts(&put.tensor(&y)?, &put.tensor(&gate)?)?;
                Ok(super::gated_add(&put.tensor(&x)?, &own, &half)?)
            })?;
        }
        Ok(())
    }

    /// As a sum and its norm have it, each to the bit; and as the codes that become of those.
    fn gated_norms(&self) -> Result<()> {
        for width in WIDTHS.into_iter().chain(GROUPED) {
            let tokens = if width < 1000 { 37 } else { 3 };
            let x = self.apart(&[2, tokens, width], 1)?;
            let y = self.values(&[2, tokens + 4, width], 2)?;
            let rows = self.values(&[2, 4 * width], 3)?;
            let parts = |y: &Tensor, rows: &Tensor| {
                let part = |i: usize| rows.narrow(1, i * width, width);
                candle_core::Result::Ok((y.narrow(1, 4, tokens)?, part(1)?, part(2)?, part(3)?))
            };
            let (own, gate, scale, shift) = parts(&y, &rows)?;
            let sum = nn::gated_add(&x, &own, &gate)?;
            let sum = sum.to_dtype(self.dtype)?.to_dtype(DType::F32)?;
            let want = nn::layer_norm_modulated(&sum, &scale, &shift, EPS)?;
            self.check("gate_norm", Within::Rounding, &want, |put| {
                let (own, gate, scale, shift) = parts(&put.tensor(&y)?, &put.tensor(&rows)?)?;
                let x = put.tensor(&x)?;
                let modulation = [&scale, &shift];
                let gated =
                    super::Normed { x: &x, gated: Some((&own, &gate)), modulation, eps: EPS };
                let (added, normed) = gated.run(None)?;
                let apart = super::gated_add(&x, &own, &gate)?;
                let added = added.ok_or_else(|| Error::Invalid("there is no sum".into()))?;
                let (one, other) = (back(&apart)?, back(&added)?);
                self.compare("gate_norm", &x, &one, &other, Within::Bits)?;
                let normed = normed.numbers()?;
                let alone = super::layer_norm(&apart, None, Some((&scale, &shift)), EPS)?;
                let (one, other) = (back(&alone)?, back(&normed)?);
                self.compare("gate_norm", &x, &one, &other, Within::Bits)?;
                if width.is_multiple_of(8) && self.dtype != DType::F32 {
                    let all = [Codes::Int8, Codes::Fp8, Codes::RotatedInt8];
                    for of in all.into_iter().filter(|of| of.with_inputs(width) == *of) {
                        let (again, codes) = gated.run(Some(of))?;
                        let again =
                            again.ok_or_else(|| Error::Invalid("there is no sum".into()))?;
                        self.compare(
                            "gate_norm",
                            &x,
                            &back(&added)?,
                            &back(&again)?,
                            Within::Bits,
                        )?;
                        self.coded(&format!("gate_norm_{of}"), &other, width, &codes)?;
                        let plain = super::Normed { x: &apart, gated: None, ..gated };
                        self.coded(&format!("norm_{of}"), &other, width, &plain.run(Some(of))?.1)?;
                    }
                }
                Ok(normed)
            })?;
        }
        Ok(())
    }

    /// Holds codes and scales to what becomes of `numbers`, rows of `width`.
    fn coded(&self, kernel: &str, numbers: &[f32], width: usize, found: &Input) -> Result<()> {
        let Input::Codes(found) = found else {
            return Err(Error::Invalid(format!("{kernel} made no codes")));
        };
        let most = if found.of == Codes::Fp8 { 448. } else { 127. };
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for row in numbers.chunks_exact(width) {
            let mut row = row.to_vec();
            if found.of == Codes::RotatedInt8 {
                mmgp_quant::rotate(&mut row);
            }
            let largest = row.iter().fold(0f32, |most, y| most.max(y.abs()));
            scales.push(largest / most);
            let inverse = most / largest;
            codes.extend(row.iter().map(|y| match found.of {
                Codes::Int8 | Codes::RotatedInt8 => (y * inverse).round_ties_even() as i8 as u8,
                Codes::Fp8 => mmgp_quant::to_e4m3(y * inverse),
            }));
        }
        let there = found.codes.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
        let numbers = |codes: &[u8]| codes.iter().map(|&code| f32::from(code)).collect::<Vec<_>>();
        let shape = &found.codes;
        self.bits(kernel, shape, &numbers(&codes), &numbers(&there))?;
        let there = found.scales.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        self.bits(kernel, &found.scales, &scales, &there)
    }

    /// Holds f32 numbers to others.
    fn bits(&self, kernel: &str, shape: &Tensor, expected: &[f32], found: &[f32]) -> Result<()> {
        On { dtype: DType::F32, ..*self }.compare(kernel, shape, expected, found, Within::Bits)
    }

    fn activations(&self) -> Result<()> {
        for shape in [vec![1], vec![3, 7], vec![8, 1024], vec![70_001]] {
            let (x, y) = (self.values(&shape, 1)?, self.values(&shape, 2)?);
            for function in [
                Activation::Relu,
                Activation::Gelu,
                Activation::GeluTanh,
                Activation::QuickGelu,
                Activation::Silu,
            ] {
                let name = super::called(function);
                let within =
                    if function == Activation::Relu { Within::Bits } else { Within::Rounding };
                self.check(name, within, &function.apply(&x)?, |put| {
                    Ok(super::activate(function, &put.tensor(&x)?, None)?)
                })?;
                self.check(name, within, &function.apply_times(&x, &y)?, |put| {
                    Ok(super::activate(function, &put.tensor(&x)?, Some(&put.tensor(&y)?))?)
                })?;
            }
        }
        for (n, m, first) in [(1, 1, 0), (12, 44, 5), (128, 512, 384), (3072, 12_288, 9216)] {
            let (a, x) = (self.values(&[2, 3, n], 1)?, self.values(&[2, 3, first + m], 2)?);
            let part = |x: &Tensor| x.narrow(D::Minus1, first, m);
            let want = nn::joined_gelu(&a, &part(&x)?)?;
            self.check("gelu_tanh", Within::Rounding, &want, |put| {
                Ok(super::join_gelu(&put.tensor(&a)?, &part(&put.tensor(&x)?)?)?)
            })?;
            // What is copied stays as it is.
            self.check("copy", Within::Bits, &want.narrow(D::Minus1, 0, n)?, |put| {
                let joined = super::join_gelu(&put.tensor(&a)?, &part(&put.tensor(&x)?)?)?;
                Ok(joined.to_device(&Device::Cpu)?.narrow(D::Minus1, 0, n)?)
            })?;
        }
        Ok(())
    }

    fn groups(&self) -> Result<()> {
        // The second has groups of several pieces, the third ragged ones.
        for (shape, groups) in
            [(vec![2, 12, 5, 7], 3), (vec![1, 32, 48, 48], 4), (vec![2, 8, 3, 33, 35], 2)]
        {
            let channels = shape[1];
            let x = self.values(&shape, 1)?;
            let (w, b) = (self.values(&[channels], 2)?, self.values(&[channels], 3)?);
            let all = [("weight", &w), ("bias", &b)];
            let cpu = nn::GroupNorm::new(&cpu(&all), groups, channels, EPS)?;
            for silu in [false, true] {
                let want = if silu { cpu.forward_silu(&x)? } else { cpu.forward(&x)? };
                let name = if silu { "group_silu" } else { "group_copy" };
                self.check(name, Within::Rounding, &want, |put| {
                    let (weight, bias) = (&put.tensor(&w)?, &put.tensor(&b)?);
                    let norm = GroupNorm { weight, bias, groups, eps: EPS, silu };
                    let x = put.tensor(&x)?;
                    let y = norm.forward(&x)?;
                    norm.in_place(&x)?;
                    let (same, place) = (back(&y)?, back(&x)?);
                    self.compare(name, &want, &same, &place, Within::Bits)?;
                    Ok(y)
                })?;
            }
        }
        Ok(())
    }

    fn softmaxes(&self) -> Result<()> {
        for (batch, heads, queries, keys) in
            [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 77, 77), (2, 2, 9, 1024), (1, 1, 3, 9001)]
        {
            let scores = self.values(&[batch, heads, queries, keys], 1)?;
            let of_heads = self.values(&[1, heads, queries, keys], 2)?;
            let of_items = self.values(&[batch, 1, 1, keys], 3)?;
            let causal = self.made(&[1, 1, queries, keys], |i| {
                let (query, key) = (i as usize / keys, i as usize % keys);
                if key > query { f32::NEG_INFINITY } else { 0. }
            })?;
            for biases in [&[][..], &[&of_heads], &[&of_heads, &of_items], &[&causal]] {
                let owned: Vec<Tensor> = biases.iter().map(|bias| (*bias).clone()).collect();
                let want = nn::softmax(scores.copy()?, 0.3, &owned)?;
                self.check("softmax", Within::Rounding, &want, |put| {
                    let x = put.tensor(&scores)?;
                    let biases = biases.iter().map(|bias| put.tensor(bias));
                    let biases = biases.collect::<candle_core::Result<Vec<_>>>()?;
                    let biases: Vec<&Tensor> = biases.iter().collect();
                    x.inplace_op1(&super::Softmaxed { scale: 0.3, biases: &biases })?;
                    Ok(x)
                })?;
            }
        }
        Ok(())
    }

    fn copies(&self) -> Result<()> {
        let copied = |x: &Tensor| match super::contiguous(x)? {
            Some(copy) => Ok(copy),
            None => Err(Error::Invalid(format!("{} axes are not copied", x.rank()))),
        };
        let x = self.values(&[2, 3, 4, 5, 2, 7], 1)?;
        for order in [[0, 2, 4, 1, 3, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 5, 4]] {
            let moved = |x: &Tensor| x.permute(order);
            self.check("gather", Within::Bits, &moved(&x)?.contiguous()?, |put| {
                copied(&moved(&put.tensor(&x)?)?)
            })?;
        }
        let part = |x: &Tensor| x.flatten(0, 2)?.flatten(1, 3)?.narrow(1, 3, 40)?.t();
        self.check("gather", Within::Bits, &part(&x)?.contiguous()?, |put| {
            copied(&part(&put.tensor(&x)?)?)
        })?;

        let ids = [3u32, 0, 10, 3, 9, 1];
        for width in WIDTHS {
            let table = self.values(&[11, width], 2)?;
            let want = nn::look_up(&table, &Tensor::new(&ids, &Device::Cpu)?)?;
            let on = |ids: &[u32]| Tensor::new(ids, &Device::Cuda(self.device.clone()));
            self.check("look", Within::Bits, &want, |put| {
                let table = put.tensor(&table)?;
                let missing = back(&super::look(&table, &on(&[11, u32::MAX])?)?)?;
                if !missing.iter().all(|value| value.is_nan()) {
                    return Err(Error::Invalid("lines that are not there are numbers".into()));
                }
                Ok(super::look(&table, &on(&ids)?)?)
            })?;
        }
        Ok(())
    }

    /// Values between −4 and 4, the same for the same seed, rounded to the dtype.
    fn values(&self, shape: &[usize], seed: u32) -> Result<Tensor> {
        self.made(shape, |i| scattered(i, seed) as f32 / (1u32 << 29) as f32 - 4.)
    }

    /// Values between 0.5 and 4.5 of alternating signs: a norm of a few values that happen to lie side by side
    /// would multiply the last bits of their mean.
    fn apart(&self, shape: &[usize], seed: u32) -> Result<Tensor> {
        self.made(shape, |i| {
            let size = scattered(i, seed) as f32 / (1u32 << 30) as f32 + 0.5;
            if i % 2 == 0 { size } else { -size }
        })
    }

    fn made(&self, shape: &[usize], value: impl Fn(u32) -> f32) -> Result<Tensor> {
        let len: usize = shape.iter().product();
        let values: Vec<f32> = (0..len as u32).map(value).collect();
        let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
        Ok(values.to_dtype(self.dtype)?.to_dtype(DType::F32)?)
    }

    /// Holds what `run` computes of operands at both kinds of address to `want`.
    fn check(
        &self,
        kernel: &str,
        within: Within,
        want: &Tensor,
        run: impl Fn(&Put<'_>) -> Result<Tensor>,
    ) -> Result<()> {
        let expected = want.flatten_all()?.to_vec1::<f32>()?;
        let mut first: Option<Vec<f32>> = None;
        for skipped in [0, 1] {
            let found = run(&Put { on: *self, skipped }).and_then(|found| {
                if found.dims() != want.dims() {
                    let (found, want) = (found.dims().to_vec(), want.dims());
                    return Err(Error::Invalid(format!("shape {found:?}, not {want:?}")));
                }
                back(&found)
            });
            let found = found.map_err(|error| match error {
                Error::Kernel { .. } => error,
                other => Error::Invalid(format!(
                    "kernel `{kernel}` on {:?} in {:?} does not run: {other}",
                    want.dims(),
                    self.dtype
                )),
            })?;
            self.compare(kernel, want, &expected, &found, within)?;
            match &first {
                Some(first) => self.compare(kernel, want, first, &found, Within::Bits)?,
                None => first = Some(found),
            }
        }
        Ok(())
    }

    fn compare(
        &self,
        kernel: &str,
        shape: &Tensor,
        expected: &[f32],
        found: &[f32],
        within: Within,
    ) -> Result<()> {
        let alike = |expected: f32, found: f32| match within {
            Within::Bits => rounded(expected, self.dtype).to_bits() == found.to_bits(),
            // A unit of the last place of the largest value, which is 4.
            Within::Weights => (expected - found).abs() <= 2. * half_unit(4., self.dtype),
            Within::Products => {
                let sum = half_unit(expected.abs() + 4., self.dtype);
                (expected - found).abs() <= half_unit(expected, self.dtype) + sum + 1e-2
            }
            Within::Rounding => {
                let allowed = half_unit(expected, self.dtype) + 1e-5 * (1. + expected.abs());
                (expected - found).abs() <= allowed // not if either is no number
            }
        };
        let differs = expected.iter().zip(found).position(|(&e, &f)| !alike(e, f));
        let differs = differs.or((expected.len() != found.len()).then_some(0));
        match differs {
            None => Ok(()),
            Some(at) => {
                let width = shape.dims().last().copied().unwrap_or(1);
                let dtype = self.dtype.as_str();
                Err(Error::Kernel {
                    kernel: format!("{kernel}_{dtype}"),
                    shape: [shape.elem_count() / width.max(1), width],
                    at,
                    expected: expected.get(at).copied().unwrap_or(f32::NAN),
                    found: found.get(at).copied().unwrap_or(f32::NAN),
                })
            }
        }
    }
}

/// The same layers on the CPU, in f32.
fn cpu(weights: &[(&str, &Tensor)]) -> Weights {
    let source = weights.iter().fold(MemorySource::new(&Device::Cpu), |source, (name, tensor)| {
        source.with(*name, (*tensor).clone())
    });
    Weights::new(source)
}

fn back(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn scattered(i: u32, seed: u32) -> u32 {
    let mixed = (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    (mixed ^ mixed >> 15).wrapping_mul(0xc2b2_ae35) ^ mixed >> 13
}

fn rounded(v: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => half::bf16::from_f32(v).to_f32(),
        DType::F16 => half::f16::from_f32(v).to_f32(),
        _ => v,
    }
}

/// Half the distance of `v`'s neighbours in `dtype`, for numbers that are not denormal.
fn half_unit(v: f32, dtype: DType) -> f32 {
    let bits = match dtype {
        DType::BF16 => 8,
        DType::F16 => 11,
        _ => 24,
    };
    let exponent = (v.to_bits() >> 23 & 0xff) as i32 - 127;
    2f32.powi(exponent - bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_units_are_what_rounding_costs() {
        for dtype in [DType::BF16, DType::F16] {
            let mut most = 0f32;
            for i in 0..100_000 {
                let v = 1. + i as f32 / 20_000.;
                let cost = (rounded(v, dtype) - v).abs() / half_unit(v, dtype);
                assert!(cost <= 1., "{v}");
                most = most.max(cost);
            }
            assert!(most > 0.95, "{dtype:?} {most}");
        }
        assert_eq!(half_unit(1., DType::F32), f32::EPSILON / 2.);
    }
}
