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
        WrapErr,
        cudarc::driver::{
            CudaSlice, DevicePtr, DevicePtrMut,
            sys::{
                self,
                CUdevice_attribute::{
                    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
                    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
                },
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
    w8a8::{LONGEST, MOST_INPUTS, Shape, quantize},
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
/// `codes` U8 `[outputs, inputs]` (e4m3), `scales` f32 `[outputs, 1]` (none: 1) and `bias` `[outputs]` in
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
    match x.dtype() {
        DType::BF16 => run::<bf16>(x, codes, scales, bias, to),
        DType::F16 => run::<f16>(x, codes, scales, bias, to),
        _ => Ok(false),
    }
}

/// Whether [`fp8_product_into`] takes rows like `x` as codes, for a weight of these dimensions, on GPUs that multiply such.
pub(crate) fn fp8_reads_codes(x: &Input, weight: &[usize]) -> bool {
    weight.first().is_some_and(|outputs| outputs.is_multiple_of(16)) && reads_codes(x, weight)
}

fn run<T: Half>(
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
    let dtype = x.dtype();
    let (x, codes) = (Operand::of::<T>(x, device)?, aligned::<u8>(codes, device)?);
    let scales = scales.map(|scales| aligned::<f32>(scales, device)).transpose()?;
    let bias = bias.map(|bias| aligned::<T>(bias, device)).transpose()?;
    into::<T>(device, y, |y| {
        let stream = device.cuda_stream();
        let of = (rows, outputs, inputs);
        let planned = product::Shape::fp8::<T>(of, bias.is_some(), epilogue, y.row);
        if !product::offers(&stream, planned)? {
            return Ok(false);
        }
        let ones = scales.is_none().then(|| ones(device, outputs)).transpose()?;
        let mut room = x.room(device, rows, inputs)?;
        // All stay locked until the product is queued.
        let (locked, codes) = (x.locked(), codes.storage_and_layout());
        let scales = scales.as_ref().map(Tensor::storage_and_layout);
        let bias = bias.as_ref().map(Tensor::storage_and_layout);
        let x = locked.at::<T>(&mut room, &stream)?;
        let (w, _w) = address::<u8>(&codes.0, codes.1, &stream)?;
        let (of_outputs, _of_outputs) = match (&scales, &ones) {
            (Some(scales), _) => Some(address::<f32>(&scales.0, scales.1, &stream)?),
            (None, ones) => ones.as_ref().map(|ones| ones.device_ptr(&stream)),
        }
        .unzip();
        let (bias, _bias) = match &bias {
            Some(bias) => Some(address::<T>(&bias.0, bias.1, &stream)?).unzip(),
            None => (None, None),
        };
        let of_outputs = of_outputs.unwrap_or(NULL); // there are one or the other
        let (of_x, of_rows) = (x.codes, x.scales);
        let shape = Shape { rows, outputs, inputs, dtype, epilogue, y_row: y.row };
        let scales = Some((of_rows, of_outputs));
        let at = product::Addresses { x: of_x, w, scales, bias, y: y.address };
        // SAFETY: `address` and `into` held the operands to their memory, and they and the buffers have the lengths that
        // `shape` says, which are those of the plan. All lie on `stream`'s device and are ordered by it; the buffers overlap
        // nothing.
        unsafe {
            quantize(device, Codes::Fp8, shape, x.numbers, (of_x, of_rows))?;
            product::run(device, &stream, planned, &at, (1., 0.))
        }
    })
}

/// A scale of one for each output.
fn ones(device: &CudaDevice, outputs: usize) -> Result<CudaSlice<f32>> {
    let stream = device.cuda_stream();
    // SAFETY: plain numbers, all of which are written before anything reads them.
    let mut ones = unsafe { device.alloc::<f32>(outputs)? };
    {
        let (at, _written) = ones.device_ptr_mut(&stream);
        // SAFETY: there are so many values of 32 bits, ordered by the stream.
        unsafe { sys::cuMemsetD32Async(at, 1f32.to_bits(), outputs, stream.cu_stream()) }
            .result()
            .w()?;
    }
    Ok(ones)
}
