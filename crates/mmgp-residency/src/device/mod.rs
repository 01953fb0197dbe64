//! What a kind of memory must provide so that blocks can be paged into it.
//!
//! The pager decides what goes where and when; a [`Device`] has the memory and moves the bytes. Both
//! a host device (this crate's [`Host`]) and a GPU fit behind it: on a GPU `fill` queues copies on a
//! copy stream behind the event that `unbind` recorded, and `bind` makes the compute stream wait for
//! them, so that nothing here ever waits on the host for the device.

use candle_core::{DType, Tensor};
use mmgp_io::Dtype;

use crate::{BlockImage, Bytes, Digest, ImageTensor, Result};

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub(crate) mod cuda;
mod host;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod pinned;
mod read;

#[cfg(feature = "cuda")]
pub use cuda::{Cuda, CudaOptions};
pub use host::Host;

/// Who lives in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupancy {
    /// One block, for good: it is filled seldom.
    Alone,
    /// Several blocks in turn: it is filled all the time.
    Turns,
}

/// Memory that blocks are paged into, and the way bytes get there.
pub trait Device: Send + Sync {
    /// The candle device whose tensors live in this memory.
    fn candle(&self) -> &candle_core::Device;

    /// The dtype in which activations are computed.
    fn compute_dtype(&self) -> DType;

    /// The dtype that a stored tensor has in a slot when it is kept as it travels, or `None` if
    /// this device cannot hold it.
    fn travels_as(&self, stored: Dtype) -> Option<DType>;

    /// Free memory in bytes that a plan may count on, read now.
    fn available(&self) -> Result<Bytes>;

    /// A region that holds one block of at most `capacity` bytes at a time. The pager has booked
    /// the bytes; the implementation takes no more than `capacity`.
    ///
    /// # Errors
    /// Memory that is not there.
    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>>;
}

/// A region of device memory that holds one block at a time.
///
/// The pager guarantees: `fill` is called unbound, from a worker thread, with images that fit;
/// `bind` and `unbind` alternate, on the thread that computes, with the tensors of the image filled
/// last, in image order; nothing is called while another call runs.
pub trait Slot: Send {
    /// Makes the slot hold `image`, or arranges that it will before anything computes after `bind`.
    ///
    /// # Errors
    /// A file that cannot be read (any more). The slot then holds nothing.
    fn fill(&mut self, image: &BlockImage) -> Result<()>;

    /// Whether `fill` would only queue work for the device: it is then called by the thread that
    /// computes, without a detour through a worker.
    fn fills_at_once(&self, _image: &BlockImage) -> bool {
        false
    }

    /// The digest of `tensors`, the first of what the slot was filled with; it is unbound.
    ///
    /// # Errors
    /// Whatever the device refuses.
    fn digest(&self, tensors: &[ImageTensor]) -> Result<Digest>;

    /// Points `tensors` at the slot.
    ///
    /// # Errors
    /// Whatever the tensor library refuses; the tensors are then unbound.
    fn bind(&mut self, tensors: &[Tensor]) -> Result<()>;

    /// Poisons `tensors`. What was queued on the device before still finds its bytes.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()>;
}
