//! The kernels of NVIDIA GPUs for the functions of [`nn`](crate::nn), and cuDNN's operations.
//!
//! A kernel does in one pass what the library does in a chain of them. It computes in f32 and rounds once, where
//! the chain rounds at each link: results differ in their last bits, so whether kernels are used belongs to the
//! recipe as the device does. They are used on GPUs for which [`enable`] was called, which is for whoever saw
//! [`self_test`] pass there; elsewhere the library's operations compute, which is said once.

mod choice;
mod convolution;
mod copies;
mod cudnn;
mod flash;
mod heads;
mod launch;
mod self_test;
mod shape;
mod softmax;

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Tensor,
    backend::BackendStorage, bail,
};
use half::{bf16, f16};
use mmgp_quant::{CodedRows, Codes, Epilogue, Input, Linear};

use self::{
    launch::{
        Element, Fresh, KERNELS, Place, Scratch, Written, by_dtype, held_to, run_into, tensor_of,
    },
    shape::{
        Activate, Add, Flat, Gate, GateNorm, Grid, Group, Lines, PerItem, Rows, axes, piece_values,
    },
};
use crate::nn::{Activation, Window};

pub use self::{
    choice::{
        attention_enabled, convolution_enabled, cudnn_version, disable, enable, enable_attention,
        enable_convolution, enable_flash, enable_tested, enabled, flash_enabled,
    },
    self_test::{self_test, self_test_attention, self_test_convolution, self_test_flash},
};
pub(crate) use self::{
    choice::{take, take_input},
    copies::{contiguous, look},
    heads::{attention_beside_gelu, heads, merge, project},
    softmax::Softmaxed,
};

/// The kernels as they were compiled: what a self-test's result is about, beside the card and the driver.
pub fn kernel_image() -> &'static [u8] {
    KERNELS.bytes()
}

/// The same of the kernel for attention.
pub fn flash_image() -> &'static [u8] {
    flash::KERNELS.bytes()
}

/// softmax(q · kᵀ · scale) · v with the heads merged, as [`attention`](crate::nn::attention) has it without
/// biases; `None` where that is not computed as a whole.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = q.device() else {
        return Ok(None);
    };
    let alike = |t: &Tensor| t.dtype() == q.dtype() && t.device().same_device(q.device());
    if !alike(k) || !alike(v) {
        return Ok(None);
    }
    if attention_enabled(device)
        && let Some(out) = cudnn::attention(q, k, v, scale)?
    {
        return Ok(Some(out));
    }
    if flash_enabled(device) { flash::attention(q, k, v, scale, None) } else { Ok(None) }
}

/// The same of items that see their first `keys` keys, as [`attention_up_to`](crate::nn::attention_up_to) has it;
/// `None` where they are better computed one by one, as cuDNN's are.
pub(crate) fn attention_up_to(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    keys: &[usize],
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = q.device() else {
        return Ok(None);
    };
    let alike = |t: &Tensor| t.dtype() == q.dtype() && t.device().same_device(q.device());
    if attention_enabled(device) || !flash_enabled(device) || !alike(k) || !alike(v) {
        return Ok(None);
    }
    flash::attention(q, k, v, scale, Some(keys))
}

/// `weight` over `x`, and `bias`, shapes as [`Conv2d`](crate::nn::Conv2d) has them, to `size` pixels; `None` where
/// that is not computed so.
pub(crate) fn convolution(
    x: &Tensor,
    weights: [&Tensor; 2],
    window: Window,
    size: (usize, usize),
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = x.device() else {
        return Ok(None);
    };
    let alike = |t: &&Tensor| t.dtype() == x.dtype() && t.device().same_device(x.device());
    if !convolution_enabled(device) || !weights.iter().all(alike) {
        return Ok(None);
    }
    match x.dtype() {
        DType::BF16 => convolution::convolve::<bf16>(x, weights, window, size, convolution::STRIP),
        DType::F16 => convolution::convolve::<f16>(x, weights, window, size, convolution::STRIP),
        _ => Ok(None),
    }
}

/// What is done with rows before they are put where they belong.
#[derive(Clone, Copy, Debug)]
struct Norm<'a> {
    /// The name that the kernel has for it.
    kind: &'static str,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    eps: f64,
}

impl<'a> Norm<'a> {
    const NONE: Self = Self { kind: "none", weight: None, bias: None, eps: 0. };

    /// Of a width, held to the vectors that it is given.
    fn checked(self, width: u64) -> Result<Self> {
        for values in [self.weight, self.bias].into_iter().flatten() {
            if values.dims() != [width as usize] || !values.is_contiguous() {
                bail!("{} norm: rows of {width}, weights {:?}", self.kind, values.dims());
            }
        }
        Ok(self)
    }
}

/// `(x − mean) / √(variance + ε)` over the last dimension of `x`, times the first and plus the second of
/// `weights` `[width]`, times 1 + the first and plus the second of `modulation` `[batch, width]`, for which `x` is
/// `[batch, tokens, width]`.
pub(crate) fn layer_norm(
    x: &Tensor,
    weights: Option<(&Tensor, &Tensor)>,
    modulation: Option<(&Tensor, &Tensor)>,
    eps: f64,
) -> Result<Tensor> {
    let (weight, bias) = weights.unzip();
    let norm = Norm { kind: "layer", weight, bias, eps };
    by_dtype!(x, normed(x, norm, modulation))
}

/// `x / √(mean(x²) + ε) · weight` over the last dimension, `weight` `[width]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let norm = Norm { kind: "rms", weight: Some(weight), bias: None, eps };
    by_dtype!(x, normed(x, norm, None))
}

fn normed<T: Element>(
    x: &Tensor,
    norm: Norm<'_>,
    modulation: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    let lines = Lines::of(x)?;
    let width = lines.width;
    let norm = norm.checked(width)?;
    let modulation = match modulation {
        Some((scale, shift)) => {
            let wanted = [lines.items as usize, width as usize];
            if x.rank() != 3 || scale.dims() != wanted || shift.dims() != wanted {
                bail!("modulate: {:?} by {:?}, {:?}", x.dims(), scale.dims(), shift.dims());
            }
            Some((PerItem::of(scale)?, PerItem::of(shift)?))
        }
        None => None,
    };
    let (scale, shift) = modulation.as_ref().map(|(scale, shift)| (scale, shift)).unzip();
    let mut out = Fresh::<T>::new(x, lines.rows() * width)?;
    if lines.rows() * width > 0 {
        let inputs = [
            Some(&lines.tensor),
            norm.weight,
            norm.bias,
            scale.map(|s| &s.tensor),
            shift.map(|s| &s.tensor),
        ];
        held_to::<T>(&inputs)?;
        let argue = |at: &[u64], out: u64| Rows {
            x: at[0],
            weight: at[1],
            bias: at[2],
            scale: at[3],
            shift: at[4],
            out,
            rows: lines.rows(),
            tokens: lines.tokens,
            heads: 1,
            width,
            x_item: lines.item,
            x_token: lines.token,
            out_item: lines.tokens * width,
            out_token: width,
            scale_item: scale.map_or(0, |s| s.item),
            shift_item: shift.map_or(0, |s| s.item),
            eps: norm.eps,
            ..Rows::default()
        };
        let name = format!("rows_{}_{}", norm.kind, T::SUFFIX);
        let grid = Grid::of_rows(lines.rows(), width, T::VECTOR);
        // SAFETY: `lines` has `rows` rows of `width` values, `weight` and `bias` have `width` and `scale` and
        // `shift` as many for each item; the output has as many rows side by side.
        unsafe { out.run(&name, grid, &inputs, argue)? };
    }
    Ok(out.tensor(x.shape()))
}

/// `x + gate · y`: `x` and `y` are `[batch, tokens, width]`, `gate` is `[batch, width]`.
pub(crate) fn gated_add(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    by_dtype!(x, gated(x, y, gate))
}

fn gated<T: Element>(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    if y.dims() != x.dims() || gate.dims() != [batch, width] {
        bail!("gated_add: {:?}, {:?}, {:?}", x.dims(), y.dims(), gate.dims());
    }
    let (lines, others, gates) = (Lines::of(x)?, Lines::of(y)?, PerItem::of(gate)?);
    let (rows, width) = (lines.rows(), lines.width);
    let mut out = Fresh::<T>::new(x, rows * width)?;
    if rows * width > 0 {
        let inputs = [Some(&lines.tensor), Some(&others.tensor), Some(&gates.tensor)];
        held_to::<T>(&inputs)?;
        let argue = |at: &[u64], out: u64| Gate {
            x: at[0],
            y: at[1],
            gate: at[2],
            out,
            rows,
            tokens: lines.tokens,
            width,
            x_item: lines.item,
            x_token: lines.token,
            y_item: others.item,
            y_token: others.token,
            gate_item: gates.item,
        };
        let grid = Grid::of_columns(rows, width, 1, T::VECTOR);
        // SAFETY: `x` and `y` have `rows` rows of `width` values and `gate` one for each item; the output has as
        // many side by side.
        unsafe { out.run(&format!("gate_{}", T::SUFFIX), grid, &inputs, argue)? };
    }
    Ok(out.tensor(x.shape()))
}

/// What a norm is taken of: `x`, or `x + gate · y` as [`gated_add`] has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normed<'a> {
    pub(crate) x: &'a Tensor,
    /// `y` and its gate.
    pub(crate) gated: Option<(&'a Tensor, &'a Tensor)>,
    /// Scale and shift, `[batch, width]` each.
    pub(crate) modulation: [&'a Tensor; 2],
    pub(crate) eps: f64,
}

impl Normed<'_> {
    /// The sum, where there is one, and its norm, as [`layer_norm`] has it: as numbers or as the codes that are wanted.
    pub(crate) fn run(&self, codes: Option<Codes>) -> Result<(Option<Tensor>, Input)> {
        by_dtype!(self.x, normed_into(self, codes))
    }
}

fn normed_into<T: Element>(
    normed: &Normed<'_>,
    codes: Option<Codes>,
) -> Result<(Option<Tensor>, Input)> {
    let &Normed { x, gated, modulation: [scale, shift], eps } = normed;
    let (batch, _, width) = x.dims3()?;
    let (y, gate) = gated.unzip();
    let alike = y.is_none_or(|y| y.dims() == x.dims());
    let per_item = [Some(scale), Some(shift), gate];
    if !alike || per_item.into_iter().flatten().any(|t| t.dims() != [batch, width]) {
        bail!("norm: {:?}, {:?}, {:?}", x.dims(), y.map(Tensor::dims), scale.dims());
    }
    let (lines, others) = (Lines::of(x)?, y.map(Lines::of).transpose()?);
    let gates = gate.map(PerItem::of).transpose()?;
    let (scales, shifts) = (PerItem::of(scale)?, PerItem::of(shift)?);
    let (rows, width) = (lines.rows(), lines.width);
    let len = rows * width;
    if codes.is_some() && (!width.is_multiple_of(T::VECTOR) || T::DTYPE == DType::F32) {
        bail!("norm: no codes of rows of {width} values in {:?}", T::DTYPE);
    }
    if let Some(of) = codes
        && of.with_inputs(width as usize) != of
    {
        bail!("norm: rows of {width} values are no groups for {of}");
    }
    let Device::Cuda(device) = x.device() else {
        bail!("nn: a kernel of the GPU was given a tensor of another device");
    };
    let mut sum = y.map(|_| Fresh::<T>::new(x, len)).transpose()?;
    let mut numbers = match codes {
        Some(_) => None,
        None => Some(Fresh::<T>::new(x, len)?),
    };
    let mut coded = None;
    if codes.is_some() {
        // SAFETY: plain numbers, and the kernel below writes all of them.
        let room =
            unsafe { (device.alloc::<u8>(len as usize)?, device.alloc::<f32>(rows as usize)?) };
        coded = Some(room);
    }
    if len > 0 {
        let inputs = [
            Some(&lines.tensor),
            others.as_ref().map(|lines| &lines.tensor),
            gates.as_ref().map(|gates| &gates.tensor),
            Some(&scales.tensor),
            Some(&shifts.tensor),
        ];
        held_to::<T>(&inputs)?;
        let (summed, made) = (sum.is_some(), coded.is_some());
        let mut written: Vec<&mut dyn Written> = Vec::with_capacity(3);
        written.extend(sum.iter_mut().map(|sum| sum as &mut dyn Written));
        written.extend(numbers.iter_mut().map(|numbers| numbers as &mut dyn Written));
        if let Some((codes, scales)) = &mut coded {
            written.push(codes);
            written.push(scales);
        }
        let argue = |at: &[u64], to: &[u64]| {
            let first = usize::from(summed);
            GateNorm {
                x: at[0],
                y: at[1],
                gate: at[2],
                scale: at[3],
                shift: at[4],
                sum: if summed { to[0] } else { 0 },
                out: to[first],
                row_scales: if made { to[first + 1] } else { 0 },
                rows,
                tokens: lines.tokens,
                width,
                x_item: lines.item,
                x_token: lines.token,
                y_item: others.as_ref().map_or(0, |lines| lines.item),
                y_token: others.as_ref().map_or(0, |lines| lines.token),
                gate_item: gates.as_ref().map_or(0, |gates| gates.item),
                scale_item: scales.item,
                shift_item: shifts.item,
                eps,
            }
        };
        let name = match (summed, codes) {
            (true, None) => format!("gate_norm_{}", T::SUFFIX),
            (true, Some(of)) => format!("gate_norm_{of}_{}", T::SUFFIX),
            (false, Some(of)) => format!("norm_{of}_{}", T::SUFFIX),
            (false, None) => bail!("norm: numbers of a norm alone are another kernel's"),
        };
        let grid = Grid::of_rows(rows, width, T::VECTOR);
        // SAFETY: `x` and `y` have `rows` rows of `width` values, the others one for each item; what is written has as many rows
        // side by side, and a scale for each.
        unsafe { run_into(device, &mut written, &name, grid, &inputs, argue)? };
    }
    let input = match (numbers, coded, codes) {
        (Some(numbers), ..) => numbers.tensor(x.shape()).into(),
        (None, Some((codes, scales)), Some(of)) => Input::Codes(CodedRows {
            of,
            codes: tensor_of(codes, device, (rows as usize, width as usize)),
            scales: tensor_of(scales, device, (rows as usize, 1)),
            dtype: T::DTYPE,
            dims: x.dims().to_vec(),
        }),
        _ => bail!("norm: nothing was written"),
    };
    Ok((sum.map(|sum| sum.tensor(x.shape())), input))
}

/// `x + factor · y`, `y` broadcast to the shape of `x`; `None` for more than six axes.
pub(crate) fn add(x: &Tensor, y: &Tensor, factor: f64) -> Result<Option<Tensor>> {
    by_dtype!(x, added(x, y, factor))
}

fn added<T: Element>(x: &Tensor, y: &Tensor, factor: f64) -> Result<Option<Tensor>> {
    let x = shape::contiguous(x)?;
    let alike = y.dims() == x.dims() && y.is_contiguous();
    let y = y.broadcast_as(x.dims())?;
    let Some([dims, strides]) = axes(y.layout()) else { return Ok(None) };
    let len = x.elem_count() as u64;
    let mut out = Fresh::<T>::new(&x, len)?;
    if len > 0 {
        let inputs = [Some(&x), Some(&y)];
        held_to::<T>(&inputs)?;
        let argue = |at: &[u64], out: u64| Add {
            x: at[0],
            y: at[1],
            out,
            len,
            alike: u64::from(alike),
            dims,
            strides,
            factor,
        };
        let grid = Grid::of_columns(1, len, 1, T::VECTOR);
        // SAFETY: `x` and the output have `len` values side by side, and so has `y` where it is alike; else its layout has the
        // dimensions of `x` and these strides.
        unsafe { out.run(&format!("add_{}", T::SUFFIX), grid, &inputs, argue)? };
    }
    Ok(Some(out.tensor(x.shape())))
}

/// The name that kernels have for a function.
fn called(function: Activation) -> &'static str {
    match function {
        Activation::Relu => "relu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_tanh",
        Activation::QuickGelu => "quick_gelu",
        Activation::Silu => "silu",
    }
}

/// `function` of each value, times that of `times` where it is given, which has the shape of `x`.
pub(crate) fn activate(function: Activation, x: &Tensor, times: Option<&Tensor>) -> Result<Tensor> {
    by_dtype!(x, activated(function, x, times))
}

fn activated<T: Element>(
    function: Activation,
    x: &Tensor,
    times: Option<&Tensor>,
) -> Result<Tensor> {
    if times.is_some_and(|times| times.dims() != x.dims()) {
        bail!("activation: {:?} times {:?}", x.dims(), times.map(Tensor::dims));
    }
    let mut out = Fresh::<T>::new(x, x.elem_count() as u64)?;
    if x.elem_count() > 0 {
        let all: Vec<&Tensor> = std::iter::once(x).chain(times).collect();
        let all = Flat::alike(&all)?;
        let place = (0, all[0].width);
        columns(&mut out, called(function), &all[0], all.get(1), place)?;
    }
    Ok(out.tensor(x.shape()))
}

/// gelu_tanh of a linear layer's output, within its product; `None` where that is no product with such an epilogue.
pub(crate) fn gelu_of(linear: &Linear, x: &Input) -> Result<Option<Tensor>> {
    by_dtype!(x, gelu_of_product(linear, x))
}

fn gelu_of_product<T: Element>(linear: &Linear, x: &Input) -> Result<Option<Tensor>> {
    let mut dims = x.dims().to_vec();
    let rows = dims.iter().product::<usize>() / linear.inputs().max(1);
    if dims.pop().is_none() || rows == 0 || linear.side().is_taken() {
        return Ok(None);
    }
    dims.push(linear.outputs());
    let y = Fresh::<T>::on(x.device(), (rows * linear.outputs()) as u64)?;
    // The product writes all of it; without it it is dropped.
    let y = y.tensor((rows, linear.outputs()));
    let done = linear.forward_into(x, Epilogue::GeluTanh, &y)?;
    done.then(|| y.reshape(dims)).transpose()
}

/// `[a, gelu_tanh(linear(x))]` along the last dimension, shapes as in [`join_gelu`](crate::nn::join_gelu).
pub(crate) fn join_gelu_of(a: &Tensor, linear: &Linear, x: &Input) -> Result<Tensor> {
    by_dtype!(a, joined_gelu_of(a, linear, x))
}

fn joined_gelu_of<T: Element>(a: &Tensor, linear: &Linear, x: &Input) -> Result<Tensor> {
    let ((batch, tokens, n), m) = (a.dims3()?, linear.outputs());
    let (rows, width) = (batch * tokens, n + m);
    if rows * n * m > 0 && !linear.side().is_taken() {
        let mut out = Fresh::<T>::new(a, (rows * width) as u64)?;
        columns(&mut out, "copy", &Flat::rows(a)?, None, (0, width as u64))?;
        // The product writes the columns that are not written yet.
        let out = out.tensor((rows, width));
        if linear.forward_into(x, Epilogue::GeluTanh, &out.narrow(1, n, m)?)? {
            return out.reshape((batch, tokens, width));
        }
    }
    joined_gelu::<T>(a, &linear.forward_input(x)?)
}

/// `[a, gelu_tanh(x)]` along the last dimension, of `[batch, tokens, …]` each.
pub(crate) fn join_gelu(a: &Tensor, x: &Tensor) -> Result<Tensor> {
    by_dtype!(a, joined_gelu(a, x))
}

fn joined_gelu<T: Element>(a: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (batch, tokens, n) = a.dims3()?;
    let (xb, xt, m) = x.dims3()?;
    if (xb, xt) != (batch, tokens) {
        bail!("join_gelu: {:?} and {:?}", a.dims(), x.dims());
    }
    let width = (n + m) as u64;
    let mut out = Fresh::<T>::new(a, (batch * tokens) as u64 * width)?;
    let parts = [("copy", a, 0, n), (called(Activation::GeluTanh), x, n as u64, m)];
    for (name, part, column, columns_of) in parts {
        if batch * tokens * columns_of > 0 {
            columns(&mut out, name, &Flat::rows(part)?, None, (column, width))?;
        }
    }
    Ok(out.tensor((batch, tokens, n + m)))
}

/// `name` of each value of `x`, times that of `times`, into the columns of `out` from the first of `place` on,
/// whose rows have the second of `place`.
fn columns<T: Element>(
    out: &mut Fresh<T>,
    name: &str,
    x: &Flat,
    times: Option<&Flat>,
    (column, width): (u64, u64),
) -> Result<()> {
    if times.is_some_and(|t| (t.rows, t.width) != (x.rows, x.width))
        || column + x.width > width
        || x.rows * width > out.len()
    {
        bail!("activation: columns that do not fit");
    }
    let inputs = [Some(&x.tensor), times.map(|t| &t.tensor)];
    held_to::<T>(&inputs)?;
    let argue = |at: &[u64], out: u64| Activate {
        x: at[0],
        times: at[1],
        out: out + column * size_of::<T>() as u64,
        rows: x.rows,
        width: x.width,
        x_row: x.step,
        times_row: times.map_or(0, |t| t.step),
        out_row: if x.rows > 1 { width } else { 0 },
    };
    let grid = Grid::of_columns(x.rows, x.width, 2, T::VECTOR);
    // SAFETY: `x` and `times` have as many rows of as many values, and those of the output, which are that many
    // too, have room for them from `column` on: checked above.
    unsafe { out.run(&format!("{name}_{}", T::SUFFIX), grid, &inputs, argue) }
}

/// GroupNorm over `[batch, channels, …]`, contiguous: `weight` and `bias` `[channels]`, `groups` that divide them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupNorm<'a> {
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// Whether SiLU comes behind it.
    pub(crate) silu: bool,
}

impl GroupNorm<'_> {
    /// Into new memory.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        by_dtype!(x, group_norm(self, x))
    }

    /// In the memory of `x`, contiguous, which must be the caller's own.
    pub(crate) fn in_place(&self, x: &Tensor) -> Result<()> {
        x.inplace_op1(self)
    }

    /// The shape of the work on a tensor of `dims`.
    fn sized<T: Element>(&self, dims: &[usize]) -> Result<Group> {
        let &[batch, channels, ..] = dims else {
            bail!("group norm: {dims:?}");
        };
        let weights = [self.weight, self.bias];
        let fit = |t: &Tensor| t.dims() == [channels] && t.is_contiguous();
        if !weights.into_iter().all(fit)
            || self.groups == 0
            || !channels.is_multiple_of(self.groups)
        {
            bail!("group norm: {dims:?} in {} groups for {:?}", self.groups, self.weight.dims());
        }
        let [of_group, plane] =
            [channels / self.groups, dims[2..].iter().product()].map(|n| n as u64);
        Ok(Group {
            groups: (batch * self.groups) as u64,
            pieces_of_group: (of_group * plane).div_ceil(piece_values(T::VECTOR)),
            channels: channels as u64,
            of_group,
            plane,
            eps: self.eps,
            ..Group::default()
        })
    }

    /// Its three kernels, in their order.
    fn kernels<T: Element>(&self, size: &Group) -> [(String, Grid); 3] {
        let last = if self.silu { "silu" } else { "copy" };
        let name = |name: &str| format!("group_{name}_{}", T::SUFFIX);
        [
            (name("pieces"), Grid::of_pieces(size.groups * size.pieces_of_group)),
            (name("moments"), Grid::of_pieces(size.groups)),
            (name(last), Grid::of_columns(size.groups * size.of_group, size.plane, 2, T::VECTOR)),
        ]
    }
}

/// What the kernels of a GroupNorm tell each other.
struct Told {
    pieces: Scratch,
    moments: Scratch,
}

impl Told {
    fn new(device: &CudaDevice, size: &Group) -> Result<Self> {
        let pieces = Scratch::new(device, 2 * size.groups * size.pieces_of_group)?;
        Ok(Self { pieces, moments: Scratch::new(device, 2 * size.groups)? })
    }

    fn within(&self, device: &CudaDevice, size: Group) -> Group {
        let (pieces, moments) = (self.pieces.address(device), self.moments.address(device));
        Group { pieces, moments, ..size }
    }
}

fn group_norm<T: Element>(norm: &GroupNorm<'_>, x: &Tensor) -> Result<Tensor> {
    let x = shape::contiguous(x)?;
    let size = norm.sized::<T>(x.dims())?;
    let mut out = Fresh::<T>::new(&x, x.elem_count() as u64)?;
    if x.elem_count() > 0 {
        let told = Told::new(out.device(), &size)?;
        let size = told.within(out.device(), size);
        let inputs = [Some(&x), Some(norm.weight), Some(norm.bias)];
        held_to::<T>(&inputs)?;
        for (name, grid) in norm.kernels::<T>(&size) {
            let argue =
                |at: &[u64], out: u64| Group { x: at[0], weight: at[1], bias: at[2], out, ..size };
            // SAFETY: `size` is that of `x`, of which the output has as many values; `weight` and `bias` have
            // one for each channel, and `told` has room for two numbers of each piece and each group.
            unsafe { out.run(&name, grid, &inputs, argue)? };
        }
    }
    Ok(out.tensor(x.shape()))
}

impl InplaceOp1 for GroupNorm<'_> {
    fn name(&self) -> &'static str {
        "group norm"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("group norm: a kernel of the GPU was given a tensor of the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        by_dtype!(storage, group_norm_in_place(self, storage, layout))
    }
}

fn group_norm_in_place<T: Element>(
    norm: &GroupNorm<'_>,
    storage: &mut CudaStorage,
    layout: &Layout,
) -> Result<()> {
    let size = norm.sized::<T>(layout.dims())?;
    if layout.shape().elem_count() == 0 {
        return Ok(());
    }
    let inputs = [Some(norm.weight), Some(norm.bias)];
    held_to::<T>(&inputs)?;
    let mut place = Place::<T>::of(storage, layout)?;
    let told = Told::new(place.device(), &size)?;
    let size = told.within(place.device(), size);
    for (name, grid) in norm.kernels::<T>(&size) {
        let argue =
            |at: &[u64], out: u64| Group { x: out, weight: at[0], bias: at[1], out, ..size };
        // SAFETY: `size` is that of `layout`, which `place` was held to; a thread writes a vector of it after it
        // has read it. `weight` and `bias` have a value for each channel, `told` room for two numbers of each
        // piece and each group.
        unsafe { place.run(&name, grid, &inputs, argue)? };
    }
    Ok(())
}
