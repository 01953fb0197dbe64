//! What needs an NVIDIA GPU, in one program, since each holds all kernels. These tests fail where no CUDA device can be opened.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // tests may panic

mod blocks;
mod nn;
mod pipelines;
mod tiny_flux;

use std::sync::{Mutex, MutexGuard};

use candle_core::CudaDevice;

/// What computes on a GPU is decided for the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static SWITCH: Mutex<()> = Mutex::new(());
    SWITCH.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A GPU on which the tensor library's operations compute.
fn gpu() -> (CudaDevice, MutexGuard<'static, ()>) {
    let guard = alone();
    let device = CudaDevice::new_with_stream(0).expect("this test needs a CUDA device");
    // SAFETY: one stream only.
    unsafe { device.disable_event_tracking() };
    mmgp_models::nn::cuda::disable(&device);
    (device, guard)
}
