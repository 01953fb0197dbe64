//! Where the cases run: on the CPU, or on the first GPU where the tests are built for GPUs and
//! `MMGP_TEST_DEVICE=cuda` asks for it, in f32, or in bf16 where `MMGP_TEST_DTYPE=bf16` does. All pagers share one
//! device, so that tensors meet.

use std::sync::OnceLock;

use candle_core::{DType, Device};
use mmgp_residency::Pager;

/// A pager of its own over the device.
pub(crate) fn pager() -> mmgp_residency::Result<Pager> {
    first().beside()
}

/// What is computed in.
pub(crate) fn dtype() -> DType {
    first().device().compute_dtype()
}

/// The device.
pub(crate) fn device() -> Device {
    first().device().candle().clone()
}

fn first() -> &'static Pager {
    static FIRST: OnceLock<Pager> = OnceLock::new();
    FIRST.get_or_init(|| open(std::env::var("MMGP_TEST_DEVICE").as_deref()).expect("a device"))
}

fn open(wanted: Result<&str, &std::env::VarError>) -> mmgp_residency::Result<Pager> {
    match wanted {
        #[cfg(feature = "cuda")]
        Ok("cuda") => {
            use mmgp_residency::{Cuda, CudaOptions};
            let compute = match std::env::var("MMGP_TEST_DTYPE").as_deref() {
                Ok("bf16") => DType::BF16,
                Ok(other) if other != "f32" => {
                    panic!("MMGP_TEST_DTYPE={other}: expected f32 or bf16")
                }
                _ => DType::F32,
            };
            let cuda = Cuda::new(&CudaOptions { compute, ..CudaOptions::default() })?;
            if let Device::Cuda(device) = mmgp_residency::Device::candle(&cuda) {
                mmgp_models::nn::cuda::enable_tested(device)?;
            }
            Pager::over(cuda)
        }
        Ok(other) if other != "cpu" => panic!("MMGP_TEST_DEVICE={other} is not built in"),
        _ => Pager::new(&Device::Cpu),
    }
}
