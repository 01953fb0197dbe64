//! Pages of a mapped file, locked where they lie in the page cache: a weight file is then its own
//! page-locked image, without a second copy in memory.
//!
//! The map is shared and read-only, as [`SourceFile`] makes it: registering a private one can hang the
//! driver. Once registered, pages stay, whatever happens to the file.

use std::{
    ffi::c_void,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, sys};
use mmgp_io::SourceFile;

use super::{
    failed,
    pinned::{Booked, Locked, PAGE},
};

/// Pages are only read.
const READ_ONLY: u32 = 0x08;

/// Registers files with one GPU's driver, as long as that works.
pub(super) struct Registrar {
    context: Arc<CudaContext>,
    locked: Arc<Locked>,
    works: AtomicBool,
}

impl Registrar {
    pub(super) fn new(context: &Arc<CudaContext>, locked: &Arc<Locked>, wanted: bool) -> Self {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED as ASKED;
        let supported = context.attribute(ASKED).is_ok_and(|value| value != 0);
        if wanted && !supported {
            tracing::info!(
                "this driver registers no files: their blocks are copied to locked memory"
            );
        }
        let works = AtomicBool::new(wanted && supported);
        Self { context: context.clone(), locked: locked.clone(), works }
    }

    /// Whether files can be registered, as far as is known.
    pub(super) fn works(&self) -> bool {
        self.works.load(Ordering::Relaxed)
    }

    /// Locks the pages that lie wholly in `range` of the file, which may take as long as reading them does;
    /// `None` where there are none, the limit on locked memory does not allow it or the driver refuses.
    ///
    /// Pages that the range shares with its neighbours are left out: the driver registers none twice.
    pub(super) fn register(&self, file: &Arc<SourceFile>, range: Range<u64>) -> Option<Registered> {
        let map = file.mapped();
        let start = (range.start as usize).next_multiple_of(PAGE);
        let end = range.end as usize / PAGE * PAGE;
        if !self.works() || end > map.len() || start >= end {
            return None;
        }
        let len = end - start;
        let booked = self.locked.book(len as u64)?;
        let first = map[start..].as_ptr();
        let registered = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: whole pages of a live shared map, which is kept open beside the registration.
            unsafe { sys::cuMemHostRegister_v2(first.cast_mut().cast::<c_void>(), len, READ_ONLY) }
                .result()
        });
        if let Err(error) = registered {
            // Somebody else of this process has it: that says nothing of other files.
            if error.0 == sys::CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED {
                return None;
            }
            let path = file.path().display();
            tracing::warn!(
                "{path} cannot be registered ({error}): copied to locked memory instead"
            );
            self.works.store(false, Ordering::Relaxed);
            return None;
        }
        let context = self.context.clone();
        let pages = start as u64..end as u64;
        let first = first as usize;
        Some(Registered { pages, first, context, _file: file.clone(), _booked: booked })
    }
}

/// A registration; ends when it is dropped, which must be after the copies from it.
pub(super) struct Registered {
    /// The bytes of the file.
    pub(super) pages: Range<u64>,
    /// The address that it was made with.
    first: usize,
    context: Arc<CudaContext>,
    _file: Arc<SourceFile>,
    _booked: Booked,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let ended = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: registered at this address by `register`, once.
            unsafe { sys::cuMemHostUnregister(self.first as *mut c_void) }.result()
        });
        if let Err(error) = ended {
            tracing::error!("{}", failed("a file stays registered", error));
        }
    }
}
