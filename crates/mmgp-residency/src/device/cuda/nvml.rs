//! How much of a card is taken and free, asked of the driver's management library: before there is a
//! context, since what the context itself takes shows only in the difference, and while one is in use,
//! since asking the context would stop whoever queues work in it.

use std::ffi::{CStr, c_char, c_int, c_void};

use libloading::Library;

type Init = unsafe extern "C" fn() -> c_int;
type Find = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
type Ask = unsafe extern "C" fn(*mut c_void, *mut Memory) -> c_int;

/// A card's memory in bytes, as `nvmlDeviceGetMemoryInfo` tells.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Memory {
    _total: u64,
    pub(super) free: u64,
    pub(super) used: u64,
}

/// A card.
pub(super) struct Nvml {
    device: *mut c_void,
    ask: Ask,
    end: Init,
    _library: Library,
}

// SAFETY: the library may be called from any thread, with handles from any other.
unsafe impl Send for Nvml {}
// SAFETY: as above.
unsafe impl Sync for Nvml {}

impl Nvml {
    /// The card with this PCI address (`0000:17:00.0`); `None` where the library is missing or refuses.
    pub(super) fn open(address: &CStr) -> Option<Self> {
        // SAFETY: the library is NVIDIA's, whose initializers may run at any time; the signatures are those
        // of its documentation, the pointers outlive the calls, and the functions the library, which is kept.
        unsafe {
            let library = Library::new("libnvidia-ml.so.1").ok()?;
            let init: Init = *library.get(b"nvmlInit_v2\0").ok()?;
            let end: Init = *library.get(b"nvmlShutdown\0").ok()?;
            let find: Find = *library.get(b"nvmlDeviceGetHandleByPciBusId_v2\0").ok()?;
            let ask: Ask = *library.get(b"nvmlDeviceGetMemoryInfo\0").ok()?;
            if init() != 0 {
                return None;
            }
            // From here on it is ended when this is dropped.
            let mut card = Self { device: std::ptr::null_mut(), ask, end, _library: library };
            let found = find(address.as_ptr(), &raw mut card.device) == 0;
            found.then_some(card)
        }
    }

    /// What is free and taken now.
    pub(super) fn memory(&self) -> Option<Memory> {
        let mut memory = Memory::default();
        // SAFETY: the handle is the library's, the structure is the one that it fills.
        let told = unsafe { (self.ask)(self.device, &raw mut memory) };
        (told == 0).then_some(memory)
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: initialized by `open`, once.
        unsafe { (self.end)() };
    }
}
