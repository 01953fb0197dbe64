//! `x · Wᵀ (+ bias)` with e4m3 weights in fp8: the rows of `x` become e4m3 on the fly (a kernel of `w8a8.cu`), and cublasLt
//! multiplies with a scale for each row and each output, adds the bias and rounds once.
//!
//! Such scales were seen to work on compute capability 9.0 alone, and the library knows them nowhere else: on other cards there
//! is nothing here, and weights are expanded. Layers come here once a self-test of the card allowed it ([`enable_fp8`]); the
//! choice is one of the process, by CUDA context. Calls are queued on candle's stream and never synchronize the host.

use std::{
    collections::HashSet,
    sync::{LazyLock, PoisonError, RwLock},
};

use candle_core::{
    CudaDevice, DType, Device, Result, Tensor, bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{
            CudaSlice, DevicePtrMut, DeviceRepr,
            sys::CUdevice_attribute::{
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            },
        },
    },
};
use half::{bf16, f16};

use super::{
    NULL,
    operand::{self, Operand, reads_codes},
    output::{fresh, into},
    product::{self, Half, address, aligned},
    short,
    w8a8::{Addresses, LONGEST, MOST_INPUTS, Shape, quantize},
};
use crate::{Codes, Epilogue, Input};

/// Contexts whose GPU was seen to multiply in fp8. Contexts of devices live as long as the process once a kernel was
/// loaded into them.
static ENABLED: LazyLock<RwLock<HashSet<usize>>> = LazyLock::new(RwLock::default);

fn context(device: &CudaDevice) -> usize {
    device.cuda_stream().context().cu_ctx() as usize
}

/// Has linear layers whose source allows it multiply in fp8 on `device`'s GPU from now on. The caller knows that
/// [`self_test_fp8`](crate::self_test_fp8) passed on this card with this driver, these
/// [`kernel_images`](crate::kernel_images) and this [`product_library`](crate::product_library).
pub fn enable_fp8(device: &CudaDevice) {
    ENABLED.write().unwrap_or_else(PoisonError::into_inner).insert(context(device));
}

/// Has them expand their weights there, as they do before it was enabled.
pub fn disable_fp8(device: &CudaDevice) {
    ENABLED.write().unwrap_or_else(PoisonError::into_inner).remove(&context(device));
}

/// Whether linear layers may multiply in fp8 on `device`'s GPU.
pub fn fp8_enabled(device: &CudaDevice) -> bool {
    ENABLED.read().unwrap_or_else(PoisonError::into_inner).contains(&context(device))
}

/// Whether `device`'s GPU is one on which products in fp8 with scales of rows and columns are there.
///
/// # Errors
/// Whatever the driver refuses.
pub fn fp8_multiplies(device: &CudaDevice) -> Result<bool> {
    let stream = device.cuda_stream();
    let context = stream.context();
    Ok((context.attribute(MAJOR).w()?, context.attribute(MINOR).w()?) == (9, 0))
}

/// What the product is called in errors.
pub(crate) fn fp8_name(dtype: DType) -> Result<String> {
    Ok(format!("fp8_{}", short(dtype)?))
}

/// `x · (codes · scales)ᵀ (+ bias)` as a fresh `[rows, outputs]` of `x`'s dtype: `x` `[rows, inputs]` bf16 or f16,
/// `codes` U8 `[outputs, inputs]` (e4m3), `scales` bf16, f16 or f32 `[outputs, 1]` (none: 1) and `bias` `[outputs]` in
/// `x`'s dtype are contiguous and on one device.
///
/// A row of `x` becomes codes by its largest magnitude over 448, to nearest, ties to even; one that holds a NaN or an
/// infinity gives NaN throughout, one with nothing above 1e-30 the bias. `None` for other dtypes, for empty tensors, where
/// `inputs` or `outputs` is no multiple of 16, where the library offers nothing, and on GPUs where it is not known to
/// work.
///
/// # Errors
/// Shapes that do not fit together, weights that are not leased, and whatever the driver refuses.
pub fn fp8_product(
    x: &Tensor,
    codes: &Tensor,
    scales: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    fp8_product_of(&x.into(), codes, scales, bias)
}

/// [`fp8_product`] of rows that are numbers or codes already.
pub(crate) fn fp8_product_of(
    x: &Input,
    codes: &Tensor,
    scales: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let shape = (operand::shape(x, Codes::Fp8)?.0, codes.dim(0)?);
    fresh(x.device(), x.dtype(), shape, |y| {
        fp8_product_into(x, codes, scales, bias, (Epilogue::None, y))
    })
}

/// [`fp8_product_of`] with an epilogue into `y`, as [`into`] takes it; `false`, with `y` as it was, for what that answers with
/// `None`, and where [`into`] says so.
pub(crate) fn fp8_product_into(
    x: &Input,
    codes: &Tensor,
    scales: Option<&Tensor>,
    bias: Option<&Tensor>,
    to: (Epilogue, &Tensor),
) -> Result<bool> {
    match (x.dtype(), scales.map_or(DType::F32, Tensor::dtype)) {
        (DType::BF16, DType::BF16) => run::<bf16, bf16>(x, codes, scales, bias, to),
        (DType::BF16, DType::F16) => run::<bf16, f16>(x, codes, scales, bias, to),
        (DType::BF16, DType::F32) => run::<bf16, f32>(x, codes, scales, bias, to),
        (DType::F16, DType::BF16) => run::<f16, bf16>(x, codes, scales, bias, to),
        (DType::F16, DType::F16) => run::<f16, f16>(x, codes, scales, bias, to),
        (DType::F16, DType::F32) => run::<f16, f32>(x, codes, scales, bias, to),
        _ => Ok(false),
    }
}

/// Whether [`fp8_product_into`] takes rows like `x` as codes, for a weight of these dimensions, on GPUs that multiply such.
pub(crate) fn fp8_reads_codes(x: &Input, weight: &[usize]) -> bool {
    weight.first().is_some_and(|outputs| outputs.is_multiple_of(16)) && reads_codes(x, weight)
}

fn run<T: Half, S: CudaDType + DeviceRepr + 'static>(
    x: &Input,
    codes: &Tensor,
    scales: Option<&Tensor>,
    bias: Option<&Tensor>,
    (epilogue, y): (Epilogue, &Tensor),
) -> Result<bool> {
    let ((rows, inputs), (outputs, width)) = (operand::shape(x, Codes::Fp8)?, codes.dims2()?);
    let fits = bias.is_none_or(|bias| bias.dims() == [outputs] && bias.dtype() == x.dtype());
    let fits = fits && y.dims() == [rows, outputs];
    if width != inputs || scales.is_some_and(|s| s.elem_count() != outputs) || !fits {
        bail!(
            "fp8 linear: input {:?}, codes {:?}, scales {:?}, bias {:?}, output {:?}",
            x.dims(),
            codes.dims(),
            scales.map(Tensor::dims),
            bias.map(Tensor::dims),
            y.dims()
        );
    }
    let Device::Cuda(device) = x.device() else {
        bail!("fp8 linear: a product of the GPU was given a tensor of another device");
    };
    if rows == 0 || outputs == 0 || inputs == 0 || rows > LONGEST || outputs > LONGEST {
        return Ok(false);
    }
    if inputs > MOST_INPUTS || !inputs.is_multiple_of(16) || !outputs.is_multiple_of(16) {
        return Ok(false);
    }
    if !fp8_multiplies(device)? {
        return Ok(false);
    }
    let (dtype, stored) = (x.dtype(), scales.map_or(DType::F32, Tensor::dtype));
    let (x, codes) = (Operand::of::<T>(x, device)?, aligned::<u8>(codes, device)?);
    let bias = bias.map(|bias| aligned::<T>(bias, device)).transpose()?;
    into::<T>(device, y, |y| {
        let stream = device.cuda_stream();
        let of = (rows, outputs, inputs);
        let planned = product::Shape::fp8::<T>(of, bias.is_some(), epilogue, y.row);
        if !product::offers(&stream, planned)? {
            return Ok(false);
        }
        // SAFETY: plain numbers, and a kernel writes each before another reads it.
        let mut wide = unsafe { device.alloc::<f32>(outputs)? };
        let mut room = x.room(device, rows, inputs)?;
        // All stay locked until the product is queued.
        let (locked, codes) = (x.locked(), codes.storage_and_layout());
        let (scales, bias) =
            (scales.map(Tensor::storage_and_layout), bias.as_ref().map(Tensor::storage_and_layout));
        let x = locked.at::<T>(&mut room, &stream)?;
        let (w, _w) = address::<u8>(&codes.0, codes.1, &stream)?;
        let (scales, _scales) = match &scales {
            Some(scales) => Some(address::<S>(&scales.0, scales.1, &stream)?).unzip(),
            None => (None, None),
        };
        let (bias, _bias) = match &bias {
            Some(bias) => Some(address::<T>(&bias.0, bias.1, &stream)?).unzip(),
            None => (None, None),
        };
        let (wide, _wide) = wide.device_ptr_mut(&stream);
        let (of_x, of_rows) = (x.codes, x.scales);
        let y_row = y.row;
        let y = y.address;
        let shape = Shape { rows, outputs, inputs, dtype, epilogue, y_row };
        let at = Addresses { x: of_x, x_scales: of_rows, w, w_scales: wide, bias, y };
        let multiplied = product::Addresses { x: of_x, w, scales: Some((of_rows, wide)), bias, y };
        // SAFETY: `address` and `into` held the operands to their memory, and they and the buffers have the lengths that
        // `shape` says, which are those of the plan. All lie on `stream`'s device and are ordered by it; the buffers overlap
        // nothing.
        unsafe {
            let read = (x.numbers, scales.unwrap_or(NULL), stored);
            quantize(device, Codes::Fp8, shape, read, &at)?;
            product::run(device, &stream, planned, &multiplied, (1., 0.))
        }
    })
}

/// What the quantization writes.
struct Quantized {
    /// `[rows, inputs]`
    codes: CudaSlice<u8>,
    /// One for each row.
    row_scales: CudaSlice<f32>,
    /// The scales of the weight, one for each output.
    wide: CudaSlice<f32>,
}

impl Quantized {
    /// Memory that the kernel fills before anything reads it.
    fn alloc(device: &CudaDevice, (rows, outputs, inputs): (usize, usize, usize)) -> Result<Self> {
        // SAFETY: plain numbers, and the kernel writes each before another reads it.
        unsafe {
            Ok(Self {
                codes: device.alloc::<u8>(rows * inputs)?,
                row_scales: device.alloc::<f32>(rows)?,
                wide: device.alloc::<f32>(outputs)?,
            })
        }
    }
}

/// The codes and scales that the rows of `x` `[rows, inputs]`, bf16 or f16, become, and the scales widened, for the
/// self-test: `inputs` is a multiple of 8, and `x` begins at a multiple of 16 bytes.
pub(crate) fn quantized_to_fp8(
    x: &Tensor,
    scales: Option<&Tensor>,
    outputs: usize,
) -> Result<(Vec<u8>, Vec<f32>, Vec<f32>)> {
    match (x.dtype(), scales.map_or(DType::F32, Tensor::dtype)) {
        (DType::BF16, DType::BF16) => quantized::<bf16, bf16>(x, scales, outputs),
        (DType::BF16, DType::F16) => quantized::<bf16, f16>(x, scales, outputs),
        (DType::BF16, DType::F32) => quantized::<bf16, f32>(x, scales, outputs),
        (DType::F16, DType::BF16) => quantized::<f16, bf16>(x, scales, outputs),
        (DType::F16, DType::F16) => quantized::<f16, f16>(x, scales, outputs),
        (DType::F16, DType::F32) => quantized::<f16, f32>(x, scales, outputs),
        (x, scales) => bail!("fp8 linear: input {x:?}, scales {scales:?}"),
    }
}

fn quantized<T: Half, S: CudaDType + DeviceRepr + 'static>(
    x: &Tensor,
    scales: Option<&Tensor>,
    outputs: usize,
) -> Result<(Vec<u8>, Vec<f32>, Vec<f32>)> {
    let (rows, inputs) = x.dims2()?;
    let Device::Cuda(device) = x.device() else {
        bail!("fp8 linear: a product of the GPU was given a tensor of another device");
    };
    if !inputs.is_multiple_of(8) || scales.is_some_and(|s| s.elem_count() != outputs) {
        bail!("fp8 linear: input {:?}, scales {:?}", x.dims(), scales.map(Tensor::dims));
    }
    let stream = device.cuda_stream();
    let (dtype, stored) = (x.dtype(), scales.map_or(DType::F32, Tensor::dtype));
    let x = aligned::<T>(x, device)?;
    let mut made = Quantized::alloc(device, (rows, outputs, inputs))?;
    {
        let x = x.storage_and_layout();
        let scales = scales.map(Tensor::storage_and_layout);
        let (x, _x) = address::<T>(&x.0, x.1, &stream)?;
        let (scales, _scales) = match &scales {
            Some(scales) => Some(address::<S>(&scales.0, scales.1, &stream)?).unzip(),
            None => (None, None),
        };
        let (of_x, _of_x) = made.codes.device_ptr_mut(&stream);
        let (wide, _wide) = made.wide.device_ptr_mut(&stream);
        let (of_rows, _of_rows) = made.row_scales.device_ptr_mut(&stream);
        let epilogue = Epilogue::None;
        let shape = Shape { rows, outputs, inputs, dtype, epilogue, y_row: outputs };
        let at =
            Addresses { x: of_x, x_scales: of_rows, w: NULL, w_scales: wide, bias: None, y: NULL };
        // SAFETY: `address` held the operands to their memory, and they and the buffers have the lengths that `shape`
        // says; the quantization reads and writes no others. All are ordered by `stream`.
        unsafe {
            quantize(device, Codes::Fp8, shape, (x, scales.unwrap_or(NULL), stored), &at)?;
        }
    }
    Ok((
        device.clone_dtoh(&made.codes)?,
        device.clone_dtoh(&made.row_scales)?,
        device.clone_dtoh(&made.wide)?,
    ))
}
