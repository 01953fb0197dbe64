//! `x · Wᵀ (+ bias)` with int8 weights in int8: the rows of `x` are quantized on the fly, the product is summed exactly
//! in integers, scaled and biased in f32 and rounded once.
//!
//! Which kernel runs is a function of shape and card alone: CUTLASS's on Hopper where its tile copies can read the
//! operands, our own by `mma.sync` everywhere else. Both sum integers and then do the same f32 operations, so equal shapes
//! get equal bits wherever operands lie. Calls are queued on candle's stream and never synchronize the host.

use candle_core::{
    CudaDevice, DType, Device, Result, Tensor, bail, cuda_backend::cudarc::driver::LaunchConfig,
};
use half::{bf16, f16};

use super::{
    KernelImage, NULL, Parameter, infix,
    operand::{self, Operand},
    output::{fresh, into},
    product::{Half, address, aligned},
    short,
};
use crate::{Codes, Epilogue, Input};

/// Machine code and PTX of `w8a8.cu`.
pub(super) static KERNELS: KernelImage =
    KernelImage::new(include_bytes!(concat!(env!("OUT_DIR"), "/w8a8.fatbin")));

/// A block of the product computes so many rows and outputs, with so many threads.
const TILE: usize = 128;
const THREADS: u32 = 128;
/// Values that a thread of the quantization keeps; what a longer row has more is read twice.
const KEPT: usize = 4 * 8;
/// Rows and outputs at most: kernels count them in 32 bits, with room for a tile.
pub(super) const LONGEST: usize = 1 << 30;
/// Inputs at most: so many products of codes sum up within 32 bits.
pub(super) const MOST_INPUTS: usize = 1 << 17;

/// Which kernel multiplies int8 by int8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int8Kernel {
    /// The fastest that the card has for the shape.
    Fastest,
    /// `mma.sync`, which all cards have.
    Mma,
}

/// `x · (codes · scales)ᵀ (+ bias)` as a fresh `[rows, outputs]` of `x`'s dtype: `x` `[rows, inputs]` bf16 or f16,
/// `codes` U8 `[outputs, inputs]` (two's complement), `scales` f32 `[outputs, 1]` and `bias` `[outputs]` in
/// `x`'s dtype are contiguous and on one device.
///
/// A row of `x` becomes codes by its largest magnitude over 127, to nearest, ties to even; one that holds a NaN or an
/// infinity gives NaN throughout, one with nothing above 1e-30 the bias. `None` for other dtypes, for empty
/// tensors, and where `inputs` is no multiple of 16 or more than 2^17.
///
/// # Errors
/// Shapes that do not fit together, weights that are not leased, and whatever the driver refuses.
pub fn w8a8(
    x: &Tensor,
    codes: &Tensor,
    scales: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    w8a8_by(x, codes, scales, bias, Int8Kernel::Fastest)
}

/// [`w8a8`] by the kernel that is named, for tests and timings.
///
/// # Errors
/// As [`w8a8`].
pub fn w8a8_by(
    x: &Tensor,
    codes: &Tensor,
    scales: &Tensor,
    bias: Option<&Tensor>,
    kernel: Int8Kernel,
) -> Result<Option<Tensor>> {
    w8a8_of(&x.into(), (Codes::Int8, codes), scales, bias, kernel)
}

/// [`w8a8_by`] of rows that are numbers or codes already, with a weight of int8 codes of either kind: where its rows were
/// rotated, those of `x` are too, or are codes of such.
pub(crate) fn w8a8_of(
    x: &Input,
    (of, codes): (Codes, &Tensor),
    scales: &Tensor,
    bias: Option<&Tensor>,
    kernel: Int8Kernel,
) -> Result<Option<Tensor>> {
    let shape = (operand::shape(x, of)?.0, codes.dim(0)?);
    fresh(x.device(), x.dtype(), shape, |y| {
        w8a8_into(x, (of, codes), scales, bias, (Epilogue::None, y), kernel)
    })
}

/// [`w8a8_of`] with an epilogue into `y`, as [`into`] takes it; `false`, with `y` as it was, for what that answers with
/// `None`, and where [`into`] says so.
pub(crate) fn w8a8_into(
    x: &Input,
    codes: (Codes, &Tensor),
    scales: &Tensor,
    bias: Option<&Tensor>,
    to: (Epilogue, &Tensor),
    kernel: Int8Kernel,
) -> Result<bool> {
    match x.dtype() {
        DType::BF16 => run::<bf16>(x, codes, scales, bias, to, kernel),
        DType::F16 => run::<f16>(x, codes, scales, bias, to, kernel),
        _ => Ok(false),
    }
}

/// The kernel that quantizes rows.
pub(crate) fn quantize_name(to: Codes, dtype: DType) -> Result<String> {
    Ok(format!("quantize_{}{}", infix(to), short(dtype)?))
}

/// The product's name: of its kernel, or in errors.
pub(crate) fn w8a8_name(dtype: DType, epilogue: Epilogue) -> Result<String> {
    let behind = match epilogue {
        Epilogue::None => "",
        Epilogue::GeluTanh => "gelu_",
    };
    Ok(format!("w8a8_{behind}{}", short(dtype)?))
}

fn run<T: Half>(
    x: &Input,
    (of, codes): (Codes, &Tensor),
    scales: &Tensor,
    bias: Option<&Tensor>,
    (epilogue, y): (Epilogue, &Tensor),
    kernel: Int8Kernel,
) -> Result<bool> {
    let ((rows, inputs), (outputs, width)) = (operand::shape(x, of)?, codes.dims2()?);
    let fits = bias.is_none_or(|bias| bias.dims() == [outputs] && bias.dtype() == x.dtype());
    let fits = fits && y.dims() == [rows, outputs];
    let grouped = of.with_inputs(inputs) == of;
    if width != inputs || scales.elem_count() != outputs || !fits || !grouped {
        bail!(
            "{of} linear: input {:?}, codes {:?}, scales {:?}, bias {:?}, output {:?}",
            x.dims(),
            codes.dims(),
            scales.dims(),
            bias.map(Tensor::dims),
            y.dims()
        );
    }
    let Device::Cuda(device) = x.device() else {
        bail!("int8 linear: a product of the GPU was given a tensor of another device");
    };
    if rows == 0 || outputs == 0 || inputs == 0 || !inputs.is_multiple_of(16) {
        return Ok(false);
    }
    if rows > LONGEST || outputs > LONGEST || inputs > MOST_INPUTS {
        return Ok(false);
    }
    let dtype = x.dtype();
    let (x, codes) = (Operand::of::<T>(x, device)?, aligned::<u8>(codes, device)?);
    let scales = aligned::<f32>(scales, device)?;
    let bias = bias.map(|bias| aligned::<T>(bias, device)).transpose()?;
    into::<T>(device, y, |y| {
        if y.row > LONGEST {
            return Ok(false);
        }
        let stream = device.cuda_stream();
        let mut room = x.room(device, rows, inputs)?;
        // All stay locked until the product is queued.
        let (locked, codes) = (x.locked(), codes.storage_and_layout());
        let (scales, bias) =
            (scales.storage_and_layout(), bias.as_ref().map(Tensor::storage_and_layout));
        let x = locked.at::<T>(&mut room, &stream)?;
        let (w, _w) = address::<u8>(&codes.0, codes.1, &stream)?;
        let (scales, _scales) = address::<f32>(&scales.0, scales.1, &stream)?;
        let (bias, _bias) = match &bias {
            Some(bias) => Some(address::<T>(&bias.0, bias.1, &stream)?).unzip(),
            None => (None, None),
        };
        let shape = Shape { rows, outputs, inputs, dtype, epilogue, y_row: y.row };
        let at =
            Addresses { x: x.codes, x_scales: x.scales, w, w_scales: scales, bias, y: y.address };
        // SAFETY: `address` and `into` held the operands to their memory, and they and the buffers have the lengths
        // that `shape` says. All lie on `stream`'s device and are ordered by it; the buffers overlap nothing.
        unsafe {
            quantize(device, of, shape, x.numbers, (x.codes, x.scales))?;
            let done = kernel == Int8Kernel::Fastest && multiply_on_hopper(device, shape, &at)?;
            if !done {
                multiply(device, shape, &at)?;
            }
        }
        Ok(true)
    })
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) dtype: DType,
    pub(super) epilogue: Epilogue,
    /// Values of the output from one row to the next.
    pub(super) y_row: usize,
}

/// Where the operands of a product lie on the GPU.
pub(super) struct Addresses {
    /// Codes of the activations and their scales.
    pub(super) x: u64,
    pub(super) x_scales: u64,
    /// Codes of the weight and their scales in f32.
    pub(super) w: u64,
    pub(super) w_scales: u64,
    pub(super) bias: Option<u64>,
    pub(super) y: u64,
}

/// Queues the quantization of the rows at `x`, unless that is null: to codes, and a scale for each.
///
/// # Safety
/// `x` has `rows · inputs` values of the shape's dtype and begins at a multiple of 16 bytes, `inputs` is a multiple of 8 and of
/// rotated groups, there are so many codes and a scale for each row. All are ordered by `device`'s stream.
pub(super) unsafe fn quantize(
    device: &CudaDevice,
    to: Codes,
    Shape { rows, inputs, dtype, .. }: Shape,
    x: u64,
    (codes, scales): (u64, u64),
) -> Result<()> {
    if x == NULL {
        return Ok(());
    }
    let kernel = KERNELS.function(device, &quantize_name(to, dtype)?)?;
    let threads = inputs.div_ceil(KEPT).next_multiple_of(32).min(1024);
    let config = LaunchConfig {
        grid_dim: (rows as u32, 1, 1),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    let inputs = inputs as i32;
    // SAFETY: the parameters are those of the kernel of this name, and the caller upholds their lengths.
    unsafe { kernel.launch(&device.cuda_stream(), config, &[&x, &codes, &scales, &inputs]) }
}

/// Queues the product by `mma.sync`.
///
/// # Safety
/// The codes of `x` and `w` have `rows` and `outputs` times `inputs` values, their scales and the bias one for each
/// row and output, and `y`, which nobody else uses, `rows` of `outputs`, as far apart as the shape says and not closer than
/// they are long; codes and `y` begin at multiples of 16 bytes. All are ordered by `device`'s stream.
unsafe fn multiply(
    device: &CudaDevice,
    Shape { rows, outputs, inputs, dtype, epilogue, y_row }: Shape,
    at: &Addresses,
) -> Result<()> {
    let name = w8a8_name(dtype, epilogue)?;
    let kernel = KERNELS.function(device, &name)?;
    let tiles = rows.div_ceil(TILE) * outputs.div_ceil(TILE);
    let Some(tiles) = i32::try_from(tiles).ok().and_then(|tiles| u32::try_from(tiles).ok()) else {
        bail!("{name}: [{rows}, {outputs}] has more tiles than a grid has blocks");
    };
    let config =
        LaunchConfig { grid_dim: (tiles, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
    let (rows, outputs, inputs) = (rows as i32, outputs as i32, inputs as i32);
    let y_row = y_row as i32;
    let bias = at.bias.unwrap_or(0); // null: none
    let stream = device.cuda_stream();
    let operands: [&dyn Parameter; 6] = [&at.x, &at.x_scales, &at.w, &at.w_scales, &bias, &at.y];
    let sizes: [&dyn Parameter; 4] = [&rows, &outputs, &inputs, &y_row];
    // SAFETY: the parameters are those of the kernel of this name, and the caller upholds their lengths.
    unsafe { kernel.launch(&stream, config, &[&operands[..], &sizes].concat()) }
}

/// Queues the product by CUTLASS, where the build has it and card and shape allow it: else `false`.
///
/// # Safety
/// As [`multiply`], and the bias begins at a multiple of 16 bytes.
#[cfg_attr(not(w8a8_sm90), allow(unused_variables))]
unsafe fn multiply_on_hopper(device: &CudaDevice, shape: Shape, at: &Addresses) -> Result<bool> {
    // SAFETY: the same is asked for.
    #[cfg(w8a8_sm90)]
    let done = unsafe { super::hopper::multiply(device, shape, at) };
    #[cfg(not(w8a8_sm90))]
    let done = Ok(false);
    done
}
