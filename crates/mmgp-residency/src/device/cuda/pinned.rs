//! Page-locked host memory, from which a GPU copies at the full speed of its link.
//!
//! Pages are faulted in by several threads and then registered with the driver, which takes a tenth of
//! the time of letting the driver allocate them. What is locked is counted where the driver is called:
//! no counter of the system shows it.

use std::{
    alloc::{Layout, alloc, dealloc},
    ffi::c_void,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, sys};
use rayon::prelude::*;

use super::failed;
use crate::{Bytes, Error, Result};

pub(super) const PAGE: usize = 4096;
/// Bytes that one thread touches at a time.
const TOUCH: usize = 8 << 20;

/// How many bytes are locked, and how many may be.
#[derive(Debug)]
pub(super) struct Locked {
    bytes: AtomicU64,
    limit: u64,
    /// Whether the driver refused: it is not asked again.
    refused: AtomicBool,
}

impl Locked {
    pub(super) fn new(limit: Bytes) -> Self {
        Self { bytes: AtomicU64::new(0), limit: limit.0, refused: AtomicBool::new(false) }
    }

    pub(super) fn bytes(&self) -> Bytes {
        Bytes(self.bytes.load(Ordering::Relaxed))
    }

    /// How much more may be locked.
    pub(super) fn left(&self) -> Bytes {
        match self.works() {
            true => Bytes(self.limit.saturating_sub(self.bytes().0)),
            false => Bytes(0),
        }
    }

    /// Whether memory can be locked, as far as is known.
    pub(super) fn works(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Books `bytes` if the limit allows it.
    pub(super) fn book(self: &Arc<Self>, bytes: u64) -> Option<Booked> {
        let more = |held: u64| held.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Booked { bytes, of: self.clone() })
    }
}

/// Bytes that count as locked as long as this lives.
pub(super) struct Booked {
    bytes: u64,
    of: Arc<Locked>,
}

impl Drop for Booked {
    fn drop(&mut self) {
        self.of.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Whole pages of locked memory.
pub(super) struct Pinned {
    start: NonNull<u8>,
    layout: Layout,
    context: Arc<CudaContext>,
    _booked: Booked,
}

// SAFETY: the memory belongs to this value alone and is reached through `&self` and `&mut self` only.
unsafe impl Send for Pinned {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// At least `len` zeroed bytes, or `None` where the limit on locked memory does not allow them or
    /// the driver refuses to lock them.
    ///
    /// # Errors
    /// Memory that is not there.
    pub(super) fn new(
        context: &Arc<CudaContext>,
        locked: &Arc<Locked>,
        len: usize,
    ) -> Result<Option<Self>> {
        let size = len.max(1).next_multiple_of(PAGE);
        let Some(booked) = locked.book(size as u64) else { return Ok(None) };
        let layout = Layout::from_size_align(size, PAGE).map_err(|_| no_memory(size))?;
        // SAFETY: the layout has a size above zero.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else {
            return Err(no_memory(size));
        };
        let base = start.as_ptr() as usize;
        (0..size).into_par_iter().step_by(TOUCH).for_each(|at| {
            // SAFETY: at..at + TOUCH, cut at `size`, lies in the allocation, which nobody else knows
            // yet; the ranges of the tasks do not overlap.
            unsafe { std::ptr::write_bytes((base + at) as *mut u8, 0, TOUCH.min(size - at)) };
        });
        let registered = context.bind_to_thread().and_then(|()| {
            // SAFETY: the range is the allocation, which outlives its registration (see `drop`).
            unsafe { sys::cuMemHostRegister_v2(start.as_ptr().cast::<c_void>(), size, 0) }.result()
        });
        if let Err(error) = registered {
            let size = Bytes(size as u64);
            tracing::warn!(
                "{size} of memory cannot be locked ({error}): blocks pass through buffers"
            );
            locked.refused.store(true, Ordering::Relaxed);
            // SAFETY: allocated above with this layout, and nobody else knows it.
            unsafe { dealloc(start.as_ptr(), layout) };
            return Ok(None);
        }
        Ok(Some(Self { start, layout, context: context.clone(), _booked: booked }))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation has `size` bytes, all written by `new`; `&self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; `&mut self` keeps everyone else away.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let unregistered = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: `new` registered it; who queued copies from it has waited for them.
            unsafe { sys::cuMemHostUnregister(self.start.as_ptr().cast::<c_void>()) }.result()
        });
        if let Err(error) = unregistered {
            tracing::error!("locked memory cannot be given back: {}", failed("unlock", error));
            return;
        }
        // SAFETY: allocated by `new` with this layout; it is not registered any more.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

fn no_memory(size: usize) -> Error {
    Error::Device(format!("no {} of host memory for locked buffers", Bytes(size as u64)))
}
