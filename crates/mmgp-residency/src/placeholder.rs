//! Paging under candle tensors: placeholders, binding, poison.
//!
//! A candle tensor is a shared handle to a storage, and an in-place operation may exchange that
//! storage. So a module is built once from placeholders with a shape, a dtype and no memory; binding
//! a block is a handful of pointer exchanges. An unbound tensor holds *poison*, an empty storage of a
//! dtype that no operation accepts, so that any use of it is an ordinary error.

use std::{cell::RefCell, sync::Mutex};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, op::BackpropOp};

/// A tensor of this shape and dtype without memory.
///
/// # Errors
/// Devices that this build cannot page on, dtypes that slots do not hold.
pub(crate) fn placeholder(
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> candle_core::Result<Tensor> {
    // The dtype that a tensor shows is taken from its first storage, so it starts honest and is
    // poisoned before anyone sees it: an empty storage of the honest dtype would crash candle.
    let (honest, poison) = match device {
        Device::Cpu => (Storage::Cpu(empty(dtype, 0)?), Storage::Cpu(poison())),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            use crate::device::cuda::{nowhere, poison};
            (Storage::Cuda(nowhere(dtype, device)?), Storage::Cuda(poison(device)))
        }
        other => {
            candle_core::bail!("paging on {:?} is not built into this binary", other.location())
        }
    };
    let tensor = Tensor::from_storage(honest, shape, BackpropOp::none(), false);
    exchange(&tensor, poison)?;
    Ok(tensor)
}

/// Storage on the host that every operation refuses.
pub(crate) fn poison() -> CpuStorage {
    CpuStorage::F8E8M0(Vec::new())
}

/// A zeroed storage of `len` elements; fresh pages are not touched.
pub(crate) fn empty(dtype: DType, len: usize) -> candle_core::Result<CpuStorage> {
    use bytemuck::allocation::zeroed_vec;
    Ok(match dtype {
        DType::U8 => CpuStorage::U8(zeroed_vec(len)),
        DType::F16 => CpuStorage::F16(zeroed_vec(len)),
        DType::BF16 => CpuStorage::BF16(zeroed_vec(len)),
        DType::F32 => CpuStorage::F32(zeroed_vec(len)),
        other => candle_core::bail!("slots do not hold {other:?}"),
    })
}

/// Puts `storage` under `tensor` and returns what was there. Waits while anyone reads the tensor.
///
/// The storage must be of the tensor's device and have its dtype and size, or be poison.
pub(crate) fn exchange(tensor: &Tensor, storage: Storage) -> candle_core::Result<Storage> {
    struct Exchange(Mutex<RefCell<Storage>>);
    impl Exchange {
        fn swap<T>(
            &self,
            storage: &mut T,
            ours: impl FnOnce(&mut Storage) -> Option<&mut T>,
        ) -> candle_core::Result<()> {
            let held = self.0.lock().unwrap_or_else(|e| e.into_inner());
            match ours(&mut held.borrow_mut()) {
                Some(ours) => std::mem::swap(storage, ours),
                None => candle_core::bail!("a tensor cannot be bound to another device's memory"),
            }
            Ok(())
        }
    }
    impl InplaceOp1 for Exchange {
        fn name(&self) -> &'static str {
            "bind"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            self.swap(storage, |ours| match ours {
                Storage::Cpu(ours) => Some(ours),
                _ => None,
            })
        }
        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            storage: &mut candle_core::CudaStorage,
            _: &Layout,
        ) -> candle_core::Result<()> {
            self.swap(storage, |ours| match ours {
                Storage::Cuda(ours) => Some(ours),
                _ => None,
            })
        }
    }
    let exchange = Exchange(Mutex::new(RefCell::new(storage)));
    tensor.inplace_op1(&exchange)?;
    let Exchange(cell) = exchange;
    Ok(cell.into_inner().unwrap_or_else(|e| e.into_inner()).into_inner())
}

#[cfg(test)]
mod tests {
    use candle_core::D;

    use super::*;

    #[test]
    fn unbound_tensors_refuse_every_operation() -> candle_core::Result<()> {
        let dev = Device::Cpu;
        let w = placeholder(&[4, 4], DType::F32, &dev)?;
        assert_eq!((w.dims(), w.dtype()), (&[4usize, 4][..], DType::F32));
        let x = Tensor::ones((4, 4), DType::F32, &dev)?;
        let ids = Tensor::new(&[0u32, 1], &dev)?;
        assert!(x.matmul(&w).is_err());
        assert!(x.matmul(&w.t()?).is_err());
        assert!((&x + &w).is_err());
        assert!(x.broadcast_mul(&w.narrow(0, 0, 1)?).is_err());
        assert!(w.to_dtype(DType::BF16).is_err());
        assert!(w.sum_all().is_err());
        assert!(w.t()?.contiguous().is_err());
        assert!(w.index_select(&ids, 0).is_err());
        assert!(w.to_vec2::<f32>().is_err());
        assert!(candle_nn::ops::softmax(&w, D::Minus1).is_err());
        Ok(())
    }

    #[test]
    fn views_follow_the_binding() -> candle_core::Result<()> {
        let w = placeholder(&[2, 3], DType::F32, &Device::Cpu)?;
        let view = w.t()?.narrow(0, 1, 2)?;
        let old = exchange(&w, Storage::Cpu(CpuStorage::F32(vec![0., 1., 2., 3., 4., 5.])))?;
        assert!(matches!(old, Storage::Cpu(CpuStorage::F8E8M0(_))));
        assert_eq!(view.to_vec2::<f32>()?, [[1., 4.], [2., 5.]]);
        let back = exchange(&w, Storage::Cpu(poison()))?;
        assert!(matches!(back, Storage::Cpu(CpuStorage::F32(v)) if v.len() == 6));
        assert!(view.to_vec2::<f32>().is_err());
        Ok(())
    }
}
