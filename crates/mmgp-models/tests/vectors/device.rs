//! Where the cases run: on the CPU, or in f32 on the first GPU where the tests are built for GPUs and
//! `MMGP_TEST_DEVICE=cuda` asks for it. All pagers share one device, so that tensors meet.

use std::sync::OnceLock;

use candle_core::Device;
use mmgp_residency::Pager;

/// A pager of its own over the device.
pub(crate) fn pager() -> mmgp_residency::Result<Pager> {
    first().beside()
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
            let compute = candle_core::DType::F32;
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
