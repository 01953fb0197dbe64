//! A device of plain memory, whose tensors hold what their names say, and which holds the pager to what
//! [`Slot`] guarantees.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use candle_core::{CpuStorage, DType, Device as Candle, Storage, Tensor};
use shuttle::thread::yield_now;

use super::any;
use crate::{
    BlockImage, Bytes, Clock, Device, Digest, Error, ImageTensor, Moved, Occupancy, Result, Slot,
    VisitTimes,
    placeholder::{exchange, poison},
};

/// The device. Clones are the same one.
#[derive(Clone, Default)]
pub(super) struct Memory(Arc<Shared>);

// Of std, since none of it is a hand-off: nothing is locked where threads may switch.
#[derive(Default)]
struct Shared {
    taken: AtomicU64,
    limit: AtomicU64,
    ceiling: AtomicU64,
    /// The ceiling that the pager was told last.
    told: AtomicU64,
    shortage: AtomicU64,
    /// Blocks whose next fetches fail, one for each mention.
    failing: Mutex<Vec<String>>,
    /// Blocks that were fetched before, if such are fetched at once.
    at_once: AtomicBool,
    kept: Mutex<HashSet<String>>,
    fills: AtomicU64,
}

impl Memory {
    /// Memory of which no more than `limit` bytes may ever be taken.
    pub(super) fn new(limit: u64) -> Self {
        let memory = Self::default();
        memory.0.limit.store(limit, Relaxed);
        memory.set_ceiling(u64::MAX);
        memory.0.told.store(u64::MAX, Relaxed);
        memory.0.at_once.store(any(&[false, true]), Relaxed);
        memory
    }

    /// What there is for weights and activations from now on.
    pub(super) fn set_ceiling(&self, bytes: u64) {
        self.0.ceiling.store(bytes, Relaxed);
    }

    /// Others want so much, once.
    pub(super) fn want(&self, bytes: u64) {
        self.0.shortage.store(bytes, Relaxed);
    }

    /// The next fetches of these blocks fail.
    pub(super) fn fail(&self, blocks: &[&str]) {
        locked(&self.0.failing).extend(blocks.iter().map(|&block| block.into()));
    }

    pub(super) fn taken(&self) -> u64 {
        self.0.taken.load(Relaxed)
    }

    pub(super) fn fills(&self) -> u64 {
        self.0.fills.load(Relaxed)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What every element of the tensor of this name is.
pub(super) fn value(name: &str) -> f32 {
    name.bytes().fold(7u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into())) as f32
}

impl Device for Memory {
    fn candle(&self) -> &Candle {
        &Candle::Cpu
    }

    fn compute_dtype(&self) -> DType {
        DType::F32
    }

    fn available(&self) -> Result<Bytes> {
        self.ceiling()
    }

    fn ceiling(&self) -> Result<Bytes> {
        let ceiling = self.0.ceiling.load(Relaxed);
        self.0.told.store(ceiling, Relaxed);
        Ok(Bytes(ceiling))
    }

    fn shortage(&self) -> Bytes {
        Bytes(self.0.shortage.swap(0, Relaxed))
    }

    fn is_out_of_memory(&self, error: &candle_core::Error) -> bool {
        error.to_string().contains("out of memory")
    }

    fn slot(&self, capacity: Bytes, _: Occupancy) -> Result<Box<dyn Slot>> {
        let shared = self.0.clone();
        let taken = shared.taken.fetch_add(capacity.0, Relaxed) + capacity.0;
        let limit = shared.limit.load(Relaxed).min(shared.told.load(Relaxed));
        assert!(taken <= limit, "{taken} bytes are taken of {limit}");
        let capacity = capacity.0;
        Ok(Box::new(MemorySlot { shared, capacity, held: Vec::new(), bound: false, moved: None }))
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        Ok(Box::new(AnyClock { ended: false }))
    }
}

/// Tells times that have nothing to do with what happened, so that plans change.
struct AnyClock {
    ended: bool,
}

impl Clock for AnyClock {
    fn asked(&mut self) {}

    fn began(&mut self) {}

    fn ended(&mut self) {
        self.ended = true;
    }

    fn read(&mut self) -> Result<Option<VisitTimes>> {
        let computed = Duration::from_millis(any(&[1, 3, 20]));
        let times = VisitTimes { stalled: Duration::ZERO, computed };
        Ok(std::mem::take(&mut self.ended).then_some(times))
    }
}

struct MemorySlot {
    shared: Arc<Shared>,
    capacity: u64,
    /// Of the block that it was filled with last, while it is unbound.
    held: Vec<CpuStorage>,
    bound: bool,
    moved: Option<Moved>,
}

impl Slot for MemorySlot {
    fn fill(&mut self, image: &BlockImage) -> Result<u64> {
        assert!(!self.bound, "{} was filled into a slot that is leased", image.name);
        assert!(image.bytes <= self.capacity, "{} does not fit", image.name);
        self.shared.fills.fetch_add(1, Relaxed);
        self.held.clear();
        self.moved = None;
        for tensor in &image.tensors {
            yield_now();
            self.held.push(CpuStorage::F32(vec![value(&tensor.name); tensor.elements()]));
        }
        yield_now();
        let mut failing = locked(&self.shared.failing);
        if let Some(at) = failing.iter().position(|block| *block == image.name) {
            failing.remove(at);
            self.held.clear();
            return Err(Error::Device(format!("no `{}` this time", image.name)));
        }
        drop(failing);
        locked(&self.shared.kept).insert(image.name.clone());
        // As large as it must be to count.
        self.moved =
            Some(Moved { bytes: Bytes(1 << 20), took: Duration::from_millis(any(&[2, 9])) });
        Ok(image.tensors.len() as u64)
    }

    fn fills_at_once(&self, image: &BlockImage) -> bool {
        self.shared.at_once.load(Relaxed) && locked(&self.shared.kept).contains(&image.name)
    }

    fn moved(&mut self) -> Option<Moved> {
        self.moved.take()
    }

    fn digest(&self, _: &[ImageTensor]) -> Result<Digest> {
        Ok([0; 32])
    }

    fn bind(&mut self, tensors: &[Tensor]) -> Result<()> {
        assert!(!self.bound, "bound twice");
        assert_eq!(tensors.len(), self.held.len(), "bound to what the slot does not hold");
        self.bound = true;
        for (tensor, storage) in tensors.iter().zip(std::mem::take(&mut self.held)) {
            exchange(tensor, Storage::Cpu(storage))?;
        }
        Ok(())
    }

    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()> {
        assert!(self.bound, "unbound twice");
        self.bound = false;
        for tensor in tensors {
            if let Storage::Cpu(storage) = exchange(tensor, Storage::Cpu(poison()))? {
                self.held.push(storage);
            }
        }
        Ok(())
    }
}

impl Drop for MemorySlot {
    fn drop(&mut self) {
        self.shared.taken.fetch_sub(self.capacity, Relaxed);
        assert!(!self.bound || std::thread::panicking(), "given back while it is leased");
    }
}
