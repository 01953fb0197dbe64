//! A region of VRAM that holds one block at a time, and the copies into it.

use std::{sync::Arc, time::Duration};

use candle_core::{
    Storage, Tensor,
    cuda_backend::cudarc::driver::{CudaEvent, result, sys},
};

use super::{
    Shared, Transfers,
    clock::{between, timed},
    failed,
    kept::Ready,
    made::{Checked, Made, read_range},
    storage::{poison, release, storage_at},
};
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
    moved: Option<(u64, u64)>,
}

impl CudaSlot {
    /// Takes `size` bytes of VRAM.
    pub(super) fn new(shared: &Arc<Shared>, size: usize, occupancy: Occupancy) -> Result<Self> {
        let context = shared.stream.context();
        let (begun, ready) = (timed(&shared.copies)?, timed(&shared.copies)?);
        let free = context.new_event(None).map_err(|e| failed("an event", e))?;
        let start = shared.vram.take(size)?;
        let shared = shared.clone();
        Ok(Self { shared, start, size, occupancy, begun, ready, free, moved: None })
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

    /// Brings a block through the buffers; says in how many copies.
    fn stage(&self, image: &BlockImage) -> Result<u64> {
        let Shared { copies, keeper, ring, .. } = &*self.shared;
        let mut digest = Checked::new(image);
        let made = Made::of(image)?;
        let size = image.bytes as usize;
        for from in (0..size).step_by(ring.size) {
            let range = from..size.min(from + ring.size);
            let mut buffer = ring.take()?;
            let bytes = &mut buffer.memory.bytes_mut()[..range.len()];
            let done = keeper.readers.install(|| read_range(image, &made, range.clone(), bytes));
            let done = done.and_then(|()| {
                digest.update(range.clone(), &buffer.memory.bytes()[..range.len()]);
                let bytes = &buffer.memory.bytes()[..range.len()];
                // SAFETY: source and target have so many bytes; the buffer is not written again
                // before `copied` has passed, the slot not freed before `ready` has.
                unsafe {
                    let to = self.start + range.start as u64;
                    result::memcpy_htod_async(to, bytes, copies.cu_stream())
                }
                .and_then(|()| buffer.copied.record(copies))
                .map_err(|e| failed("copying to the GPU", e))
            });
            ring.put(buffer);
            done?;
        }
        digest.finish()?;
        Ok(size.div_ceil(ring.size) as u64)
    }
}

impl Slot for CudaSlot {
    fn fills_at_once(&self, image: &BlockImage) -> bool {
        self.occupancy == Occupancy::Turns
            && self.shared.transfers == Transfers::Overlapped
            && image.kept.is_some()
    }

    fn fill(&mut self, image: &BlockImage) -> Result<()> {
        let Shared { copies, stream, throttle, transfers, .. } = &*self.shared;
        if image.bytes > self.size as u64 {
            let (bytes, size) = (Bytes(image.bytes), Bytes(self.size as u64));
            return Err(Error::Device(format!("`{}` of {bytes} in a slot of {size}", image.name)));
        }
        stream.context().bind_to_thread().map_err(|e| failed("binding the GPU", e))?;
        let order = |e| failed("ordering copies", e);
        self.moved = None;
        let kept = self.kept(image)?;
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
        self.moved = Some((image.bytes, queued));
        Ok(())
    }

    fn moved(&mut self) -> Option<Moved> {
        let (bytes, copies) = self.moved.filter(|_| self.ready.is_complete())?;
        self.moved = None;
        let took = between(&self.begun, &self.ready).unwrap_or(Duration::ZERO);
        Some(Moved { bytes: Bytes(bytes), copies, took })
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
        stream.wait(&self.ready).map_err(|e| failed("waiting for copies", e))?;
        let mut offset = 0;
        for tensor in tensors {
            let (dtype, len) = (tensor.dtype(), tensor.elem_count());
            let storage = storage_at(device, dtype, self.start + offset, len)?;
            release(exchange(tensor, Storage::Cuda(storage))?);
            offset += ((len * dtype.size_in_bytes()) as u64).next_multiple_of(ALIGN);
        }
        Ok(())
    }

    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()> {
        for tensor in tensors {
            release(exchange(tensor, Storage::Cuda(poison(&self.shared.device)))?);
        }
        self.free.record(&self.shared.stream).map_err(|e| failed("ordering copies", e))
    }
}

impl Drop for CudaSlot {
    fn drop(&mut self) {
        // What was queued on the slot must be over before its memory is anyone else's.
        let over = self.free.synchronize().and_then(|()| self.ready.synchronize());
        if let Err(error) = over {
            tracing::error!("a slot cannot be given back: {error}");
            return;
        }
        // The pager drops no bound slot.
        self.shared.vram.give_back(self.start, self.size);
    }
}
