//! The staging ring: a few buffers that whatever is not locked itself passes through on its way to a
//! device.
//!
//! Threads that fetch take buffers and wait for them; whoever fills one gives it back and never waits,
//! with its copy perhaps still under way.

use crate::{
    Result,
    sync::{Condvar, Mutex},
};

/// A buffer of the ring.
pub(crate) trait Staged {
    /// Waits until its last copy is over.
    ///
    /// # Errors
    /// Whatever the device refuses.
    fn wait(&self) -> Result<()>;
}

/// The buffers that blocks pass through.
pub(crate) struct Ring<B> {
    idle: Mutex<Vec<B>>,
    returned: Condvar,
    /// Bytes of one buffer.
    pub(crate) size: usize,
}

impl<B: Staged> Ring<B> {
    pub(crate) fn new(idle: Vec<B>, size: usize) -> Self {
        Self { idle: Mutex::new(idle), returned: Condvar::new(), size }
    }

    /// A buffer whose last copy is over: the one that was given back longest ago.
    ///
    /// # Errors
    /// Its copy failed. The buffer stays in the ring.
    pub(crate) fn take(&self) -> Result<B> {
        let mut idle = self.idle.lock();
        while idle.is_empty() {
            self.returned.wait(&mut idle);
        }
        let buffer = idle.remove(0);
        drop(idle);
        if let Err(error) = buffer.wait() {
            self.put(buffer);
            return Err(error);
        }
        Ok(buffer)
    }

    pub(crate) fn put(&self, buffer: B) {
        self.idle.lock().push(buffer);
        self.returned.notify_one();
    }
}
