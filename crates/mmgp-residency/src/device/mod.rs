//! What a kind of memory must provide so that blocks can be paged into it.
//!
//! The pager decides what goes where and when; a [`Device`] has the memory and moves the bytes. Both
//! a host device (this crate's [`Host`]) and a GPU fit behind it: on a GPU `fill` queues copies on a
//! copy stream behind the event that `unbind` recorded, and `bind` makes the compute stream wait for
//! them, so that nothing here ever waits on the host for the device.

use std::time::Duration;

use candle_core::{DType, Tensor};
use mmgp_io::Dtype;

use crate::{BlockImage, Bytes, Digest, ImageTensor, Result};

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub(crate) mod cuda;
mod host;
mod read;

#[cfg(feature = "cuda")]
pub use cuda::{Cuda, CudaOptions, Files, Transfers};
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
    fn travels_as(&self, stored: Dtype) -> Option<DType> {
        Some(match stored {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            Dtype::U8 | Dtype::I8 => DType::U8,
            _ => return None,
        })
    }

    /// Memory in bytes that weights may take where nobody says how much, read now.
    ///
    /// # Errors
    /// Whatever the device refuses.
    fn available(&self) -> Result<Bytes>;

    /// A region that holds one block of at most `capacity` bytes at a time. The pager has booked
    /// the bytes; the implementation takes no more than `capacity`.
    ///
    /// # Errors
    /// Memory that is not there.
    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>>;

    /// A clock for the visits of one block.
    ///
    /// # Errors
    /// Whatever the device refuses.
    fn clock(&self) -> Result<Box<dyn Clock>>;

    /// What an operation takes beside the weight while it multiplies by `tensor`.
    fn expansion(&self, _tensor: &ImageTensor) -> Bytes {
        Bytes(0)
    }

    /// What weights and activations may take together, as known now; no limit by default.
    ///
    /// # Errors
    /// Whatever the device refuses.
    fn ceiling(&self) -> Result<Bytes> {
        Ok(Bytes(u64::MAX))
    }

    /// How much should be given back now because others want it.
    fn shortage(&self) -> Bytes {
        Bytes(0)
    }

    /// The most that activations took since the last call.
    fn take_peak(&self) -> Bytes {
        Bytes(0)
    }

    /// Weights will take so much from now on: activations may have the rest of what there is.
    ///
    /// # Errors
    /// Whatever the device refuses.
    fn share(&self, _weights: Bytes) -> Result<()> {
        Ok(())
    }

    /// Gives back what activations took and do not use any more.
    fn trim(&self) {}

    /// Whether an operation failed because there was no memory left for what it makes.
    fn is_out_of_memory(&self, _error: &candle_core::Error) -> bool {
        false
    }

    /// Whether memory that is not there is taken elsewhere, so that computing gets slow instead of failing.
    fn spills(&self) -> bool {
        false
    }

    /// Whether a slot may be filled while another computes.
    fn overlaps(&self) -> bool {
        true
    }

    /// Host memory that is page-locked for blocks that stream.
    fn locked(&self) -> Bytes {
        Bytes(0)
    }

    /// How much more of it may be.
    fn lockable(&self) -> Bytes {
        Bytes(0)
    }
}

/// Times the visits of one block on the device, or whatever else is queued again and again, without waiting for it.
///
/// The pager calls `asked`, `began` and `ended` in this order, on the thread that computes; `asked` not where
/// the block has been there since an earlier visit, so that nothing can be waited for.
pub trait Clock: Send {
    /// Computing needs the block from here on.
    fn asked(&mut self);

    /// It is there.
    fn began(&mut self);

    /// What computes on it was queued.
    fn ended(&mut self);

    /// The times of the last visit, once; `None` as long as it is not over.
    ///
    /// # Errors
    /// The device failed: the times will never be known.
    fn read(&mut self) -> Result<Option<VisitTimes>>;
}

/// How long a visit took on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisitTimes {
    /// That computing waited for the block.
    pub stalled: Duration,
    /// That it computed.
    pub computed: Duration,
}

/// What was brought into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its bytes.
    pub bytes: Bytes,
    /// From the moment at which the slot was free.
    pub took: Duration,
}

/// A region of device memory that holds one block at a time.
///
/// The pager guarantees: `fill` is called unbound, from a worker thread, with images that fit;
/// `bind` and `unbind` alternate, on the thread that computes, with the tensors of the image filled
/// last, in image order; nothing is called while another call runs.
pub trait Slot: Send {
    /// Makes the slot hold `image`, or arranges that it will before anything computes after `bind`; says in
    /// how many copies.
    ///
    /// # Errors
    /// A file that cannot be read (any more). The slot then holds nothing.
    fn fill(&mut self, image: &BlockImage) -> Result<u64>;

    /// Whether `fill` would only queue work for the device: it is then called by the thread that
    /// computes, without a detour through a worker.
    fn fills_at_once(&self, _image: &BlockImage) -> bool {
        false
    }

    /// How long it took to bring what `fill` brought last, once it is there; told once, and not at all
    /// once the slot is filled anew.
    fn moved(&mut self) -> Option<Moved>;

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

    /// Ends the use of `tensors`: what was queued on the device before still finds its bytes. They are poisoned,
    /// or stay bound until [`unbind_all`](Self::unbind_all) where the slot's memory stays where it is.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()>;

    /// Poisons whatever `unbind` left bound: blocks may come to other slots from here on.
    fn unbind_all(&mut self) {}
}
