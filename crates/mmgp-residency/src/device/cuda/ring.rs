//! The staging ring: a few page-locked buffers that whatever is not locked itself passes through.

use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use parking_lot::{Condvar, Mutex};

use super::{failed, pinned::Pinned};
use crate::Result;

/// The buffers that blocks pass through.
pub(super) struct Ring {
    idle: Mutex<Vec<Buffer>>,
    returned: Condvar,
    pub(super) size: usize,
}

pub(super) struct Buffer {
    pub(super) memory: Pinned,
    pub(super) copied: CudaEvent,
}

impl Ring {
    pub(super) fn new(idle: Vec<Buffer>, size: usize) -> Self {
        Self { idle: Mutex::new(idle), returned: Condvar::new(), size }
    }

    /// A buffer whose last copy is over: the one that was given back longest ago.
    pub(super) fn take(&self) -> Result<Buffer> {
        let mut idle = self.idle.lock();
        while idle.is_empty() {
            self.returned.wait(&mut idle);
        }
        let buffer = idle.remove(0);
        drop(idle);
        if let Err(error) = buffer.copied.synchronize() {
            self.put(buffer);
            return Err(failed("copies to the GPU", error));
        }
        Ok(buffer)
    }

    pub(super) fn put(&self, buffer: Buffer) {
        self.idle.lock().push(buffer);
        self.returned.notify_one();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Err(error) = self.copied.synchronize() {
            tracing::error!("copies from locked memory: {error}");
        }
    }
}
