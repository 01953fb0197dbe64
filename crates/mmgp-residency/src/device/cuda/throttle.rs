//! A slower link than there is: copies last as long as they would at a given rate. For measuring what a
//! smaller machine would do; the copies themselves are the same.

use std::{
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result};
use parking_lot::Mutex;

use super::failed;
use crate::{Bytes, Result};

/// The last stretch of a wait is spent looking at the clock: sleeping is not that exact.
const AWAKE: Duration = Duration::from_micros(300);

/// A limit on bytes a second; 0 is none.
#[derive(Default)]
pub(super) struct Throttle(AtomicU64);

/// A copy under way.
pub(super) struct Slowed {
    rate: u64,
    begun: Arc<Mutex<Option<Instant>>>,
}

impl Throttle {
    pub(super) fn set(&self, limit: Option<Bytes>) {
        self.0.store(limit.map_or(0, |l| l.0), Ordering::Relaxed);
    }

    /// Copies begin on `stream`; `None` if there is no limit.
    pub(super) fn begin(&self, stream: &CudaStream) -> Result<Option<Slowed>> {
        let rate = self.0.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(None);
        }
        let begun = Arc::new(Mutex::new(None));
        let note = begun.clone();
        call(stream, move || *note.lock() = Some(Instant::now()))?;
        Ok(Some(Slowed { rate, begun }))
    }
}

impl Slowed {
    /// So many bytes were copied: what follows on the stream waits until the limit would have let them
    /// through.
    pub(super) fn end(self, stream: &CudaStream, bytes: u64) -> Result<()> {
        let took = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        call(stream, move || {
            let Some(until) = self.begun.lock().map(|begun| begun + took) else { return };
            let left = until.saturating_duration_since(Instant::now());
            std::thread::sleep(left.saturating_sub(AWAKE));
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        })
    }
}

/// Calls `f` on a thread of the driver when `stream` comes to it. `f` must not call the driver.
fn call<F: FnOnce() + Send + 'static>(stream: &CudaStream, f: F) -> Result<()> {
    unsafe extern "C" fn run<F: FnOnce()>(data: *mut c_void) {
        // SAFETY: `data` is the box made below, which the driver hands over once.
        let f = unsafe { Box::from_raw(data.cast::<F>()) };
        f();
    }
    let data = Box::into_raw(Box::new(f)).cast::<c_void>();
    // SAFETY: `run` takes the box back, once; the closure makes no calls of the driver.
    let queued =
        unsafe { result::stream::launch_host_function(stream.cu_stream(), run::<F>, data) };
    if let Err(error) = queued {
        // SAFETY: the driver did not take it.
        drop(unsafe { Box::from_raw(data.cast::<F>()) });
        return Err(failed("slowing copies", error));
    }
    Ok(())
}
