//! How much of a card is taken, asked of the driver's management library before there is a context: what
//! the context itself takes shows only in the difference.

use std::ffi::{CString, c_char, c_int, c_void};

use libloading::{Library, Symbol};

/// The structure that `nvmlDeviceGetMemoryInfo` fills.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// Bytes that are taken on the card with this PCI address (`0000:17:00.0`); `None` where the library is
/// missing or refuses.
pub(super) fn used(address: &str) -> Option<u64> {
    let address = CString::new(address).ok()?;
    // SAFETY: the library is NVIDIA's, whose initializers may run at any time; the signatures are those
    // of its documentation, and the pointers outlive the calls.
    unsafe {
        let library = Library::new("libnvidia-ml.so.1").ok()?;
        let init: Symbol<'_, unsafe extern "C" fn() -> c_int> =
            library.get(b"nvmlInit_v2\0").ok()?;
        let end: Symbol<'_, unsafe extern "C" fn() -> c_int> =
            library.get(b"nvmlShutdown\0").ok()?;
        type Find = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
        let find: Symbol<'_, Find> = library.get(b"nvmlDeviceGetHandleByPciBusId_v2\0").ok()?;
        type Ask = unsafe extern "C" fn(*mut c_void, *mut Memory) -> c_int;
        let ask: Symbol<'_, Ask> = library.get(b"nvmlDeviceGetMemoryInfo\0").ok()?;
        if init() != 0 {
            return None;
        }
        let (mut device, mut memory) = (std::ptr::null_mut(), Memory::default());
        let found =
            find(address.as_ptr(), &raw mut device) == 0 && ask(device, &raw mut memory) == 0;
        end();
        found.then_some(memory.used)
    }
}
