//! A region of VRAM that holds one block at a time, and the copies into it.

use std::{collections::HashMap, ops::Range, sync::Arc};

use candle_core::{
    Storage, Tensor, TensorId,
    cuda_backend::cudarc::driver::{CudaEvent, DriverError, result, sys},
};

use super::{
    Shared, Transfers,
    clock::{between, timed},
    failed,
    kept::Ready,
    made::{Checked, Made, read_range},
    ring::Buffer,
    storage::{release, storage_at},
};
use parking_lot::Mutex;

use crate::{
    BlockImage, Bytes, Digest, Error, ImageTensor, Result,
    device::{Moved, Occupancy, Slot},
    image::ALIGN,
    placeholder::exchange,
};

pub(super) struct CudaSlot {
    shared: Arc<Shared>,
    start: sys::CUdeviceptr,
    size: usize,
    occupancy: Occupancy,
    /// Recorded on the stream of copies once the slot is free, before the block is copied.
    begun: CudaEvent,
    /// Recorded behind the copies of the block that was filled last.
    ready: CudaEvent,
    /// Recorded behind what was computed on it.
    free: CudaEvent,
    /// What was copied last, if nobody asked how long it took.
    moved: Option<u64>,
    /// Whether the computing stream was told to wait for `ready` since the last copy: it need not be twice.
    awaited: bool,
    /// Whether anything may have been computed on the slot that `free` does not tell of.
    unmarked: bool,
    /// Each block that was bound here, by the first of its tensors. Made once, so that a visit makes nothing.
    blocks: HashMap<TensorId, Block>,
}

/// The tensors of a block, and what is exchanged under them: storages over the slot while they are unbound, what
/// was there before while they are bound.
struct Block {
    tensors: Vec<Tensor>,
    others: Vec<Option<Storage>>,
    bound: bool,
}

impl CudaSlot {
    /// Takes `size` bytes of VRAM.
    pub(super) fn new(shared: &Arc<Shared>, size: usize, occupancy: Occupancy) -> Result<Self> {
        let context = shared.stream.context();
        let (begun, ready) = (timed(&shared.copies)?, timed(&shared.copies)?);
        let free = context.new_event(None).map_err(|e| failed("an event", e))?;
        let start = shared.vram.take(size)?;
        let shared = shared.clone();
        Ok(Self {
            shared,
            start,
            size,
            occupancy,
            begun,
            ready,
            free,
            moved: None,
            awaited: false,
            unmarked: false,
            blocks: HashMap::new(),
        })
    }

    /// The block in locked memory, made ready now if the slot is one that blocks take turns in and the
    /// limit allows it.
    fn kept(&self, image: &BlockImage) -> Result<Option<Arc<Ready>>> {
        if self.occupancy == Occupancy::Alone {
            return Ok(None);
        }
        if let Some(ready) = image.kept.get() {
            return Ok(Some(ready));
        }
        let Some(ready) = self.shared.keeper.keep(image)? else { return Ok(None) };
        let ready = Arc::new(ready);
        // Another thread cannot have been faster: a block has one slot.
        image.kept.set(ready.clone());
        Ok(Some(ready))
    }

    /// Brings a block through the buffers; says in how many copies. Threads fill one buffer each, and what
    /// is full is copied while others are filled.
    fn stage(&self, image: &BlockImage) -> Result<u64> {
        let Shared { keeper, ring, .. } = &*self.shared;
        let mut digest = Checked::new(image);
        let made = Made::of(image)?;
        let size = image.bytes as usize;
        let ranges = (0..size).step_by(ring.size).map(|from| from..size.min(from + ring.size));
        let fill = |buffer: &mut Buffer, range: Range<usize>| {
            read_range(image, &made, range.clone(), &mut buffer.memory.bytes_mut()[..range.len()])
        };
        if digest.is_wanted() {
            // The digest is of bytes in their order.
            for range in ranges.clone() {
                let mut buffer = ring.take()?;
                let done = keeper.readers.install(|| fill(&mut buffer, range.clone()));
                let done = done.and_then(|()| {
                    digest.update(range.clone(), &buffer.memory.bytes()[..range.len()]);
                    self.copy(&buffer, range)
                });
                ring.put(buffer);
                done?;
            }
            digest.finish()?;
            return Ok(ranges.count() as u64);
        }
        let error = Mutex::new(None);
        let fail = |e: Error| {
            error.lock().get_or_insert(e);
        };
        keeper.readers.in_place_scope(|scope| {
            for range in ranges.clone() {
                if error.lock().is_some() {
                    return;
                }
                // Only this thread waits for buffers: tasks never wait, so each gives its own back.
                let mut buffer = match ring.take() {
                    Ok(buffer) => buffer,
                    Err(e) => return fail(e),
                };
                let (fill, fail) = (&fill, &fail);
                scope.spawn(move |_| {
                    let done = fill(&mut buffer, range.clone());
                    if let Err(e) = done.and_then(|()| self.copy(&buffer, range)) {
                        fail(e);
                    }
                    ring.put(buffer);
                });
            }
        });
        match error.into_inner() {
            Some(error) => Err(error),
            None => Ok(ranges.count() as u64),
        }
    }

    /// Queues the copy of a buffer to `range` of the slot.
    fn copy(&self, buffer: &Buffer, range: Range<usize>) -> Result<()> {
        let Shared { copies, stream, .. } = &*self.shared;
        let bytes = &buffer.memory.bytes()[..range.len()];
        stream
            .context()
            .bind_to_thread()
            .and_then(|()| {
                // SAFETY: source and target have so many bytes; the buffer is not written again before
                // `copied` has passed, the slot not freed before `ready` has.
                unsafe {
                    let to = self.start + range.start as u64;
                    result::memcpy_htod_async(to, bytes, copies.cu_stream())
                }
            })
            .and_then(|()| buffer.copied.record(copies))
            .map_err(|e| failed("copying to the GPU", e))
    }
}

impl Slot for CudaSlot {
    fn fills_at_once(&self, image: &BlockImage) -> bool {
        self.occupancy == Occupancy::Turns
            && self.shared.transfers == Transfers::Overlapped
            && image.kept.is_some()
    }

    fn fill(&mut self, image: &BlockImage) -> Result<u64> {
        let shared = self.shared.clone();
        let Shared { copies, stream, throttle, transfers, .. } = &*shared;
        if image.bytes > self.size as u64 {
            let (bytes, size) = (Bytes(image.bytes), Bytes(self.size as u64));
            return Err(Error::Device(format!("`{}` of {bytes} in a slot of {size}", image.name)));
        }
        stream.context().bind_to_thread().map_err(|e| failed("binding the GPU", e))?;
        let order = |e| failed("ordering copies", e);
        self.moved = None;
        let kept = self.kept(image)?;
        self.mark().map_err(order)?;
        self.awaited = false;
        copies.wait(&self.free).map_err(order)?;
        self.begun.record(copies).map_err(order)?;
        let slowed = throttle.begin(copies)?;
        let queued = match kept {
            Some(ready) => {
                ready.copy_to(copies, self.start)?;
                ready.copies()
            }
            None => self.stage(image)?,
        };
        if let Some(slowed) = slowed {
            slowed.end(copies, image.bytes)?;
        }
        self.ready.record(copies).map_err(order)?;
        if *transfers == Transfers::Synchronous {
            self.ready.synchronize().map_err(order)?;
        }
        self.moved = Some(image.bytes);
        Ok(queued)
    }

    fn moved(&mut self) -> Option<Moved> {
        let bytes = self.moved.filter(|_| self.ready.is_complete())?;
        self.moved = None;
        let took = between(&self.begun, &self.ready).unwrap_or_default();
        Some(Moved { bytes: Bytes(bytes), took })
    }

    fn digest(&self, tensors: &[ImageTensor]) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        let context = self.shared.stream.context();
        context.bind_to_thread().map_err(|e| failed("binding the GPU", e))?;
        self.ready.synchronize().map_err(|e| failed("copies", e))?;
        for tensor in tensors {
            let mut bytes = vec![0u8; tensor.bytes() as usize];
            // SAFETY: `fill` put a tensor of this size at this place of the slot.
            unsafe { result::memcpy_dtoh_sync(&mut bytes, self.start + tensor.offset) }
                .map_err(|e| failed("reading a slot", e))?;
            hasher.update_rayon(&bytes);
        }
        Ok(*hasher.finalize().as_bytes())
    }

    fn bind(&mut self, tensors: &[Tensor]) -> Result<()> {
        let Shared { device, stream, .. } = &*self.shared;
        if !self.awaited {
            stream.wait(&self.ready).map_err(|e| failed("waiting for copies", e))?;
            self.awaited = true;
        }
        let Some(first) = tensors.first() else { return Ok(()) };
        if self.blocks.get(&first.id()).is_none_or(|known| known.tensors.len() != tensors.len()) {
            let (mut offset, mut others) = (0, Vec::with_capacity(tensors.len()));
            for tensor in tensors {
                let (dtype, len) = (tensor.dtype(), tensor.elem_count());
                let storage = storage_at(device, dtype, self.start + offset, len)?;
                others.push(Some(Storage::Cuda(storage)));
                offset += ((len * dtype.size_in_bytes()) as u64).next_multiple_of(ALIGN);
            }
            let block = Block { tensors: tensors.to_vec(), others, bound: false };
            if let Some(old) = self.blocks.insert(first.id(), block) {
                old.end();
            }
        }
        self.blocks.get_mut(&first.id()).map_or(Ok(()), |block| block.set(true))
    }

    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()> {
        // Binding belongs to the plan: what is bound stays so, unless every use outside of a lease is to fail.
        let block = tensors.first().and_then(|first| self.blocks.get_mut(&first.id()));
        let unbound = match block {
            Some(block) if self.shared.poisons => block.set(false),
            _ => Ok(()),
        };
        self.unmarked = true;
        // What stays is filled once: it need not be known when each visit of it is over.
        let marked = match self.occupancy {
            Occupancy::Turns => self.mark(),
            Occupancy::Alone => Ok(()),
        };
        unbound.and(marked.map_err(|e| failed("ordering copies", e)))
    }

    fn unbind_all(&mut self) {
        self.blocks.drain().for_each(|(_, block)| block.end());
    }
}

impl Block {
    /// Binds the tensors or unbinds them.
    fn set(&mut self, bound: bool) -> Result<()> {
        if self.bound != bound {
            self.bound = bound;
            for (tensor, other) in self.tensors.iter().zip(&mut self.others) {
                if let Some(storage) = other.take() {
                    *other = Some(exchange(tensor, storage)?);
                }
            }
        }
        Ok(())
    }

    /// Unbinds them for good.
    fn end(mut self) {
        if let Err(error) = self.set(false) {
            // A storage that stays under a tensor is over memory that it does not own.
            tracing::error!("a block stays bound: {error}");
        }
        self.others.into_iter().flatten().for_each(release);
    }
}

impl CudaSlot {
    /// Makes `free` tell when all that was computed on the slot is over.
    fn mark(&mut self) -> std::result::Result<(), DriverError> {
        if self.unmarked {
            self.free.record(&self.shared.stream)?;
            self.unmarked = false;
        }
        Ok(())
    }
}

impl Drop for CudaSlot {
    fn drop(&mut self) {
        self.unbind_all();
        // What was queued on the slot must be over before its memory is anyone else's.
        let marked = self.mark();
        let over =
            marked.and_then(|()| self.free.synchronize()).and_then(|()| self.ready.synchronize());
        if let Err(error) = over {
            tracing::error!("a slot cannot be given back: {error}");
            return;
        }
        self.shared.vram.give_back(self.start, self.size);
    }
}
