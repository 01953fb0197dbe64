//! Products of int8 and int8 by CUTLASS, on Hopper: the door to the static library that the build makes of `w8a8_sm90.cu`.
//!
//! Builds without the headers of CUTLASS lack this file's code. The library launches on candle's stream, and gets the
//! GPU's own pointers, which are as wide as the host's.

use std::ffi::{c_int, c_void};

use candle_core::{
    CudaDevice, DType, Result, bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as PROCESSORS,
        },
    },
};

use super::w8a8::{Addresses, Shape, w8a8_name};
use crate::Epilogue;

unsafe extern "C" {
    fn mmgp_w8a8_sm90(
        x: u64,
        x_scales: u64,
        w: u64,
        w_scales: u64,
        bias: u64,
        y: u64,
        half: c_int,
        gelu: c_int,
        y_row: c_int,
        rows: c_int,
        outputs: c_int,
        inputs: c_int,
        processors: c_int,
        stream: *mut c_void,
    ) -> c_int;
}

/// Queues the product, where card and shape allow it: else `false`.
///
/// # Safety
/// The codes of `x` and `w` have `rows` and `outputs` times `inputs` values, their scales and the bias one for each
/// row and output, and `y`, which nobody else uses, `rows` of `outputs`, as far apart as the shape says and not closer than
/// they are long. `inputs` is a multiple of 16, all fit 32 bits, and
/// codes, bias and `y` begin at multiples of 16 bytes. All are ordered by `device`'s stream.
pub(super) unsafe fn multiply(
    device: &CudaDevice,
    Shape { rows, outputs, inputs, dtype, epilogue, y_row }: Shape,
    at: &Addresses,
) -> Result<bool> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let card = (context.attribute(MAJOR).w()?, context.attribute(MINOR).w()?);
    if card != (9, 0) || !outputs.is_multiple_of(8) || !y_row.is_multiple_of(8) {
        return Ok(false);
    }
    // The library finds the context by the thread.
    context.bind_to_thread().w()?;
    // SAFETY: the caller upholds the lengths and the multiples, and the width of the output was looked at above.
    let status = unsafe {
        mmgp_w8a8_sm90(
            at.x,
            at.x_scales,
            at.w,
            at.w_scales,
            at.bias.unwrap_or(0), // null: none
            at.y,
            c_int::from(dtype == DType::F16),
            c_int::from(epilogue == Epilogue::GeluTanh),
            y_row as c_int,
            rows as c_int,
            outputs as c_int,
            inputs as c_int,
            context.attribute(PROCESSORS).w()?,
            stream.cu_stream().cast(),
        )
    };
    if status != 0 {
        let name = w8a8_name(dtype, epilogue)?;
        bail!("{name}: CUTLASS refuses [{rows}, {outputs}] of {inputs} inputs: status {status}");
    }
    Ok(true)
}
