//! Where products write: tensors of their own, or columns of one that is there.

use std::{cell::Cell, marker::PhantomData};

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Storage,
    Tensor, backend::BackendStorage, bail, cuda_backend::cudarc::driver::DevicePtrMut,
    op::BackpropOp,
};
use half::{bf16, f16};

use super::product::{ALIGNED, Half, is_multiple};

/// Rows that a product writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    pub(super) address: u64,
    /// Values from one row to the next.
    pub(super) row: usize,
}

/// What `write` makes of a fresh `[rows, outputs]` in `dtype`, all of which it writes if it answers `true`; `None` if it does not,
/// for other dtypes than bf16 and f16, and for no rows or no outputs.
pub(super) fn fresh(
    device: &Device,
    dtype: DType,
    (rows, outputs): (usize, usize),
    write: impl FnOnce(&Tensor) -> Result<bool>,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = device else {
        bail!("linear: a product of the GPU was given a tensor of another device");
    };
    let Some(len) = rows.checked_mul(outputs).filter(|&len| len > 0) else { return Ok(None) };
    // SAFETY: plain numbers, and `write` writes all of them; without it they are dropped.
    let storage = unsafe {
        match dtype {
            DType::BF16 => CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(len)?, device.clone()),
            DType::F16 => CudaStorage::wrap_cuda_slice(device.alloc::<f16>(len)?, device.clone()),
            _ => return Ok(None),
        }
    };
    let storage = Storage::Cuda(storage);
    let y = Tensor::from_storage(storage, (rows, outputs), BackpropOp::none(), false);
    Ok(write(&y)?.then_some(y))
}

/// Calls `write` with where `y` lies, which is `[rows, outputs]` of `T` on `device`, the values of a row side by side, and
/// stays locked meanwhile: nothing that `write` reads may share its memory. Answers as it does, and `false`, without a call,
/// for a `y` that does not begin at a multiple of 16 bytes.
pub(super) fn into<T: Half>(
    device: &CudaDevice,
    y: &Tensor,
    write: impl FnOnce(Output) -> Result<bool>,
) -> Result<bool> {
    let into = Into {
        device,
        write: Cell::new(Some(write)),
        done: Cell::new(false),
        of: PhantomData::<T>,
    };
    y.inplace_op1(&into)?;
    Ok(into.done.get())
}

/// [`into`] as a custom operation, because only those may write.
struct Into<'a, T, F> {
    device: &'a CudaDevice,
    write: Cell<Option<F>>,
    done: Cell<bool>,
    of: PhantomData<T>,
}

impl<T: Half, F: FnOnce(Output) -> Result<bool>> InplaceOp1 for Into<'_, T, F> {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("linear: a product of the GPU was given an output of another device")
    }

    fn cuda_fwd(&self, y: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let Some(write) = self.write.take() else { return Ok(()) };
        let stream = self.device.cuda_stream();
        if y.device().cuda_stream() != stream {
            bail!("linear: an output of another device");
        }
        let (rows, outputs) = layout.shape().dims2()?;
        let (row, step) = (layout.stride()[0], layout.stride()[1]);
        // The only row is as far from the next as it is long.
        let row = if rows > 1 { row } else { row.max(outputs) };
        let first = layout.start_offset();
        let values = y.as_cuda_slice_mut::<T>()?;
        let end =
            rows.saturating_sub(1).checked_mul(row).and_then(|n| n.checked_add(first + outputs));
        if (outputs > 1 && step != 1) || row < outputs || end.is_none_or(|end| end > values.len()) {
            bail!(
                "linear: an output of {:?}, {:?} apart, is no rows",
                layout.dims(),
                layout.stride()
            );
        }
        let (address, _written) = values.device_ptr_mut(&stream);
        let address = address + (first * size_of::<T>()) as u64;
        if is_multiple(address, ALIGNED) {
            self.done.set(write(Output { address, row })?);
        }
        Ok(())
    }
}
