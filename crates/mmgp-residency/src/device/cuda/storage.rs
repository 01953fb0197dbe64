//! candle storages over memory that belongs to slots, and poison.
//!
//! A storage made here owns nothing: it is taken back by [`release`], never dropped.

use candle_core::{
    CudaDevice, CudaStorage, DType, Storage,
    cuda_backend::{
        CudaStorageSlice,
        cudarc::driver::{CudaSlice, sys},
    },
};
use half::{bf16, f16};

/// Storage that every operation refuses.
pub(crate) fn poison(device: &CudaDevice) -> CudaStorage {
    let stream = device.cuda_stream();
    // SAFETY: no bytes at no address.
    let nothing = unsafe { stream.upgrade_device_ptr(0, 0) };
    CudaStorage { slice: CudaStorageSlice::F4(nothing), device: device.clone() }
}

/// An empty storage that shows `dtype`.
pub(crate) fn nowhere(dtype: DType, device: &CudaDevice) -> candle_core::Result<CudaStorage> {
    storage_at(device, dtype, 0, 0)
}

/// A storage over memory that it does not own: it must be taken back by [`release`], never dropped.
pub(super) fn storage_at(
    device: &CudaDevice,
    dtype: DType,
    start: sys::CUdeviceptr,
    len: usize,
) -> candle_core::Result<CudaStorage> {
    let stream = device.cuda_stream();
    // SAFETY: `start` is in a slot at a multiple of ALIGN that has so many values behind it, which the
    // caller has copied there; or there are none.
    let slice = unsafe {
        match dtype {
            DType::U8 => CudaStorageSlice::U8(stream.upgrade_device_ptr::<u8>(start, len)),
            DType::F16 => CudaStorageSlice::F16(stream.upgrade_device_ptr::<f16>(start, len)),
            DType::BF16 => CudaStorageSlice::BF16(stream.upgrade_device_ptr::<bf16>(start, len)),
            DType::F32 => CudaStorageSlice::F32(stream.upgrade_device_ptr::<f32>(start, len)),
            other => candle_core::bail!("slots do not hold {other:?}"),
        }
    };
    Ok(CudaStorage { slice, device: device.clone() })
}

/// Forgets a storage without freeing memory that belongs to a slot.
pub(super) fn release(storage: Storage) {
    fn leak<T>(slice: CudaSlice<T>) {
        let _ = slice.leak();
    }
    match storage {
        Storage::Cuda(CudaStorage { slice, .. }) => match slice {
            CudaStorageSlice::U8(s) | CudaStorageSlice::F4(s) => leak(s),
            CudaStorageSlice::F16(s) => leak(s),
            CudaStorageSlice::BF16(s) => leak(s),
            CudaStorageSlice::F32(s) => leak(s),
            other => std::mem::forget(other), // nothing else was ever bound
        },
        other => drop(other),
    }
}
