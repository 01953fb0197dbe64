//! The buffers of the staging ring: page-locked memory, and the event behind its last copy.

use candle_core::cuda_backend::cudarc::driver::CudaEvent;

use super::{failed, pinned::Pinned};
use crate::{Result, ring::Staged};

/// The buffers that blocks pass through.
pub(super) type Ring = crate::ring::Ring<Buffer>;

pub(super) struct Buffer {
    pub(super) memory: Pinned,
    pub(super) copied: CudaEvent,
}

impl Staged for Buffer {
    fn wait(&self) -> Result<()> {
        self.copied.synchronize().map_err(|error| failed("copies to the GPU", error))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Err(error) = self.copied.synchronize() {
            tracing::error!("copies from locked memory: {error}");
        }
    }
}
