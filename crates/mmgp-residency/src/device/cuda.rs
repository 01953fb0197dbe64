//! NVIDIA GPUs: blocks stream into VRAM on a copy stream beside the stream that computes.
//!
//! A slot is one allocation; a block's tensors lie in it one behind another, as its image says, and
//! binding points them there. Streams are ordered by events alone: `unbind` records one behind what was
//! computed on the slot, copies into it wait for that, and `bind` makes the computing stream wait for
//! the copies. Blocks that take turns in a slot are kept in page-locked memory in their final form, as
//! far as the limit on it allows, and come in one copy each; everything else passes through a few
//! page-locked buffers, which several threads fill from the files.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device as Candle, Storage, Tensor,
    cuda_backend::{
        CudaStorageSlice,
        cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DriverError, result, sys},
    },
};
use half::{bf16, f16};
use mmgp_io::Dtype;
use parking_lot::{Condvar, Mutex};

use super::{
    Device, Occupancy, Slot,
    pinned::{Locked, Pinned},
    read::{Target, no_way, quantize_tensor, read_elements, read_tensor},
};
use crate::{
    BlockImage, Bytes, Digest, Error, HostMemory, ImageTensor, Making, Result,
    image::ALIGN,
    placeholder::{empty, exchange},
};

/// VRAM that stays free beside what a plan may count on.
const MARGIN: u64 = 512_000_000;

/// How a GPU is used.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Which GPU, as the driver counts them.
    pub ordinal: usize,
    /// The dtype of activations, and of what weights are converted to: bf16, f16 or f32.
    pub compute: DType,
    /// The most bytes of host memory that are page-locked for blocks that stream, the buffers not
    /// counted; by default half of what is available when the device is opened.
    pub locked: Option<Bytes>,
    /// How many page-locked buffers everything else passes through.
    pub buffers: usize,
    /// The size of each.
    pub buffer: Bytes,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self { ordinal: 0, compute: DType::BF16, locked: None, buffers: 8, buffer: Bytes(32 << 20) }
    }
}

/// An NVIDIA GPU and its memory.
pub struct Cuda(Arc<Shared>);

struct Shared {
    candle: Candle,
    device: CudaDevice,
    compute: DType,
    stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    readers: rayon::ThreadPool,
    ring: Ring,
    locked: Arc<Locked>,
}

impl Cuda {
    /// Opens a GPU: a computing and a copying stream of its own, and the buffers.
    ///
    /// # Errors
    /// No such GPU, a driver that is too old, no memory for the buffers; options that make no sense.
    pub fn new(options: &CudaOptions) -> Result<Self> {
        if !matches!(options.compute, DType::BF16 | DType::F16 | DType::F32) {
            return Err(Error::Device(format!("activations in {:?}", options.compute)));
        }
        let size = usize::try_from(options.buffer.0).unwrap_or(usize::MAX);
        if options.buffers < 2 || size < 1 << 16 || !size.is_multiple_of(ALIGN as usize) {
            return Err(Error::Device(format!(
                "{} buffers of {}: at least two of 64 KiB, multiples of {ALIGN} bytes",
                options.buffers, options.buffer
            )));
        }
        let device = CudaDevice::new_with_stream(options.ordinal)?;
        // SAFETY: streams are ordered by this module's events; candle uses one stream only.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context();
        let copies = context.new_stream().map_err(|e| failed("a stream for copies", e))?;
        keep_reserve(context).map_err(|e| failed("the memory pool", e))?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let readers = rayon::ThreadPoolBuilder::new()
            .num_threads((cores / 2).clamp(1, 8))
            .thread_name(|i| format!("mmgp-stage-{i}"))
            .build()
            .map_err(|e| Error::Device(format!("no reading threads: {e}")))?;
        let buffers = Arc::new(Locked::new(Bytes(u64::MAX)));
        let mut idle = Vec::with_capacity(options.buffers);
        for _ in 0..options.buffers {
            let memory = Pinned::new(context, &buffers, size)?;
            let memory = memory.ok_or_else(|| Error::Device("buffers cannot be locked".into()))?;
            let copied = context.new_event(None).map_err(|e| failed("an event", e))?;
            idle.push(Buffer { memory, copied });
        }
        let half = || HostMemory::read().map_or(Bytes(u64::MAX), |m| Bytes(m.available.0 / 2));
        Ok(Self(Arc::new(Shared {
            candle: Candle::Cuda(device.clone()),
            device,
            compute: options.compute,
            stream,
            copies,
            readers,
            ring: Ring { idle: Mutex::new(idle), returned: Condvar::new(), size },
            locked: Arc::new(Locked::new(options.locked.unwrap_or_else(half))),
        })))
    }

    /// Tells at any time how much host memory is page-locked for blocks that stream, counted where
    /// the driver is called.
    pub fn locked_counter(&self) -> impl Fn() -> Bytes + Send + Sync + use<> {
        let locked = self.0.locked.clone();
        move || locked.bytes()
    }
}

/// Lets the pool that activations come from keep what was freed: returning it at each
/// synchronization costs milliseconds a block.
fn keep_reserve(context: &Arc<CudaContext>) -> std::result::Result<(), DriverError> {
    context.bind_to_thread()?;
    let mut most = u64::MAX;
    // SAFETY: the device is that of the context just bound; the attribute is a u64.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        sys::cuMemPoolSetAttribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            std::ptr::from_mut(&mut most).cast(),
        )
        .result()
    }
}

pub(super) fn failed(what: &str, error: DriverError) -> Error {
    Error::Device(format!("{what}: {error}"))
}

impl Device for Cuda {
    fn candle(&self) -> &Candle {
        &self.0.candle
    }

    fn compute_dtype(&self) -> DType {
        self.0.compute
    }

    fn travels_as(&self, stored: Dtype) -> Option<DType> {
        Some(match stored {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            Dtype::U8 | Dtype::I8 => DType::U8,
            _ => return None,
        })
    }

    /// What the driver says is free, less a margin.
    fn available(&self) -> Result<Bytes> {
        let (free, _) =
            self.0.stream.context().mem_get_info().map_err(|e| failed("free memory", e))?;
        Ok(Bytes((free as u64).saturating_sub(MARGIN)))
    }

    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>> {
        let shared = &self.0;
        let context = shared.stream.context();
        let event = || context.new_event(None).map_err(|e| failed("an event", e));
        let (ready, free) = (event()?, event()?);
        let size = (capacity.0 as usize).max(ALIGN as usize);
        // SAFETY: the context was bound to this thread by `new_event`.
        let start = unsafe { result::malloc_sync(size) };
        let start = start.map_err(|e| failed(&format!("{capacity} of VRAM for a slot"), e))?;
        let shared = shared.clone();
        Ok(Box::new(CudaSlot { shared, start, size, occupancy, ready, free }))
    }
}

/// A region of VRAM.
struct CudaSlot {
    shared: Arc<Shared>,
    start: sys::CUdeviceptr,
    size: usize,
    occupancy: Occupancy,
    /// Recorded behind the copies of the block that was filled last.
    ready: CudaEvent,
    /// Recorded behind what was computed on it.
    free: CudaEvent,
}

impl Slot for CudaSlot {
    fn fills_at_once(&self, image: &BlockImage) -> bool {
        self.occupancy == Occupancy::Turns && image.kept.get().is_some()
    }

    fn fill(&mut self, image: &BlockImage) -> Result<()> {
        let Shared { copies, stream, .. } = &*self.shared;
        if image.bytes > self.size as u64 {
            let (bytes, size) = (Bytes(image.bytes), Bytes(self.size as u64));
            return Err(Error::Device(format!("`{}` of {bytes} in a slot of {size}", image.name)));
        }
        stream.context().bind_to_thread().map_err(|e| failed("binding the GPU", e))?;
        copies.wait(&self.free).map_err(|e| failed("ordering copies", e))?;
        match self.slab(image)? {
            Some(slab) => slab.copy_to(copies, self.start, image.bytes as usize)?,
            None => self.stage(image)?,
        }
        self.ready.record(copies).map_err(|e| failed("ordering copies", e))
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

impl CudaSlot {
    /// The block in page-locked memory, made now if the slot is one that blocks take turns in and the
    /// limit allows it.
    fn slab<'a>(&self, image: &'a BlockImage) -> Result<Option<&'a Slab>> {
        if self.occupancy == Occupancy::Alone {
            return Ok(None);
        }
        if image.kept.get().is_none() {
            let Shared { stream, locked, readers, .. } = &*self.shared;
            let context = stream.context();
            let size = image.bytes as usize;
            let Some(mut memory) = Pinned::new(context, locked, size)? else { return Ok(None) };
            let mut digest = Checked::new(image);
            let made = Made::of(image)?;
            readers.install(|| read_range(image, &made, 0..size, memory.bytes_mut()))?;
            digest.update(0..size, memory.bytes());
            digest.finish()?;
            let copied = context.new_event(None).map_err(|e| failed("an event", e))?;
            // Another thread cannot have been faster: a block has one slot.
            let _ = image.kept.set(Arc::new(Slab { memory, copied }));
        }
        Ok(image.kept.get().and_then(|kept| kept.downcast_ref()))
    }

    /// Brings a block through the buffers.
    fn stage(&self, image: &BlockImage) -> Result<()> {
        let Shared { copies, readers, ring, .. } = &*self.shared;
        let mut digest = Checked::new(image);
        let made = Made::of(image)?;
        let size = image.bytes as usize;
        for from in (0..size).step_by(ring.size) {
            let range = from..size.min(from + ring.size);
            let mut buffer = ring.take()?;
            let bytes = &mut buffer.memory.bytes_mut()[..range.len()];
            let done = readers.install(|| read_range(image, &made, range.clone(), bytes));
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
        digest.finish()
    }
}

impl Drop for CudaSlot {
    fn drop(&mut self) {
        // What was queued on the slot must be over before its memory is anyone else's.
        let freed = self.free.synchronize().and_then(|()| {
            self.ready.synchronize()?;
            // SAFETY: allocated by `Cuda::slot`; unbound, since the pager drops no bound slot.
            unsafe { result::free_sync(self.start) }
        });
        if let Err(error) = freed {
            tracing::error!("a slot cannot be given back: {error}");
        }
    }
}

/// A block in its final form in page-locked memory.
struct Slab {
    memory: Pinned,
    copied: CudaEvent,
}

impl Slab {
    fn copy_to(&self, copies: &CudaStream, to: sys::CUdeviceptr, size: usize) -> Result<()> {
        let bytes = &self.memory.bytes()[..size];
        // SAFETY: source and target have so many bytes; the slab is not written any more, and not
        // dropped before `copied` has passed.
        unsafe { result::memcpy_htod_async(to, bytes, copies.cu_stream()) }
            .and_then(|()| self.copied.record(copies))
            .map_err(|e| failed("copying to the GPU", e))
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Err(error) = self.copied.synchronize() {
            tracing::error!("copies from locked memory: {error}");
        }
    }
}

/// The buffers that blocks pass through.
struct Ring {
    idle: Mutex<Vec<Buffer>>,
    returned: Condvar,
    size: usize,
}

struct Buffer {
    memory: Pinned,
    copied: CudaEvent,
}

impl Ring {
    /// A buffer whose last copy is over: the one that was given back longest ago.
    fn take(&self) -> Result<Buffer> {
        let mut idle = self.idle.lock();
        while idle.is_empty() {
            self.returned.wait(&mut idle);
        }
        let buffer = idle.remove(0);
        drop(idle);
        if let Err(error) = buffer.copied.synchronize() {
            self.put(buffer);
            return Err(failed("copies to the GPU", error));
        }
        Ok(buffer)
    }

    fn put(&self, buffer: Buffer) {
        self.idle.lock().push(buffer);
        self.returned.notify_one();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Err(error) = self.copied.synchronize() {
            tracing::error!("copies from locked memory: {error}");
        }
    }
}

/// The tensors of a block that cannot be read range by range: quantized ones, and those whose rows
/// stand apart.
struct Made(Vec<Option<CpuStorage>>);

impl Made {
    fn of(image: &BlockImage) -> Result<Self> {
        let mut made: Vec<Option<CpuStorage>> = vec![None; image.tensors.len()];
        for (at, tensor) in image.tensors.iter().enumerate() {
            if tensor.making == Making::Int8Codes {
                let Some(t) = image.tensors.get(at + 1).filter(|t| t.making == Making::Int8Scales)
                else {
                    return Err(no_way(tensor, "its scales do not follow its codes"));
                };
                let mut codes = empty(tensor.dtype, tensor.elements())?;
                let mut scales = empty(t.dtype, t.elements())?;
                quantize_tensor(tensor, &mut codes, &mut scales)?;
                (made[at], made[at + 1]) = (Some(codes), Some(scales));
            } else if tensor.segments.iter().any(|s| s.stride.is_some()) {
                let mut whole = empty(tensor.dtype, tensor.elements())?;
                read_tensor(tensor, &mut whole)?;
                made[at] = Some(whole);
            }
        }
        Ok(Self(made))
    }
}

/// Fills `out` with the bytes `range` of a block as it lies in a slot.
fn read_range(image: &BlockImage, made: &Made, range: Range<usize>, out: &mut [u8]) -> Result<()> {
    for (tensor, made) in image.tensors.iter().zip(&made.0) {
        let (start, width) = (tensor.offset as usize, tensor.dtype.size_in_bytes());
        let end = start + tensor.bytes() as usize;
        let (from, to) = (range.start.max(start), range.end.min(end));
        if from >= to {
            continue;
        }
        // Tensors and ranges begin at multiples of ALIGN, so no value is cut in two.
        let bytes = &mut out[from - range.start..to - range.start];
        let wrong = || no_way(tensor, "it cannot be staged");
        match made {
            Some(made) => {
                let whole = match made {
                    CpuStorage::U8(v) => v.as_slice(),
                    CpuStorage::F16(v) => bytemuck::cast_slice(v),
                    CpuStorage::BF16(v) => bytemuck::cast_slice(v),
                    CpuStorage::F32(v) => bytemuck::cast_slice(v),
                    _ => return Err(wrong()),
                };
                bytes.copy_from_slice(&whole[from - start..to - start]);
            }
            None => {
                let elements = (from - start) / width..(to - start) / width;
                let target = Target::over(bytes, tensor.dtype).ok_or_else(wrong)?;
                read_elements(tensor, elements, target)?;
            }
        }
    }
    Ok(())
}

/// Holds a block to its digest the first time it passes by.
struct Checked<'a> {
    image: &'a BlockImage,
    hasher: Option<blake3::Hasher>,
}

impl<'a> Checked<'a> {
    fn new(image: &'a BlockImage) -> Self {
        let wanted = |e: &&crate::Expected| !e.checked.load(Ordering::Relaxed);
        let hasher = image.expected.as_ref().filter(wanted).map(|_| blake3::Hasher::new());
        Self { image, hasher }
    }

    /// The next bytes of the block, in order.
    fn update(&mut self, range: Range<usize>, bytes: &[u8]) {
        let (Some(hasher), Some(expected)) = (&mut self.hasher, &self.image.expected) else {
            return;
        };
        for tensor in self.image.tensors.iter().take(expected.tensors) {
            let start = tensor.offset as usize;
            let (from, to) =
                (range.start.max(start), range.end.min(start + tensor.bytes() as usize));
            if from < to {
                hasher.update_rayon(&bytes[from - range.start..to - range.start]);
            }
        }
    }

    fn finish(self) -> Result<()> {
        if let (Some(hasher), Some(expected)) = (self.hasher, &self.image.expected) {
            if *hasher.finalize().as_bytes() != expected.digest {
                return Err(Error::corrupt(self.image));
            }
            expected.checked.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Storage that every operation refuses.
pub(crate) fn poison(device: &CudaDevice) -> CudaStorage {
    let stream = device.cuda_stream();
    // SAFETY: no bytes at no address.
    let nothing = unsafe { stream.upgrade_device_ptr(0, 0) };
    CudaStorage { slice: CudaStorageSlice::F4(nothing), device: device.clone() }
}

/// An empty storage that shows `dtype`.
pub(crate) fn nowhere(dtype: DType, device: &CudaDevice) -> candle_core::Result<CudaStorage> {
    storage_at(device, dtype, 0, 0)
}

/// A storage over memory that it does not own: it must be taken back by [`release`], never dropped.
fn storage_at(
    device: &CudaDevice,
    dtype: DType,
    start: sys::CUdeviceptr,
    len: usize,
) -> candle_core::Result<CudaStorage> {
    let stream = device.cuda_stream();
    // SAFETY (all): `start` is in a slot at a multiple of ALIGN that has so many values behind it,
    // which the caller has copied there; or there are none.
    let slice = match dtype {
        DType::U8 => CudaStorageSlice::U8(unsafe { stream.upgrade_device_ptr::<u8>(start, len) }),
        // SAFETY: as above.
        DType::F16 => {
            CudaStorageSlice::F16(unsafe { stream.upgrade_device_ptr::<f16>(start, len) })
        }
        DType::BF16 => {
            // SAFETY: as above.
            CudaStorageSlice::BF16(unsafe { stream.upgrade_device_ptr::<bf16>(start, len) })
        }
        // SAFETY: as above.
        DType::F32 => {
            CudaStorageSlice::F32(unsafe { stream.upgrade_device_ptr::<f32>(start, len) })
        }
        other => candle_core::bail!("slots do not hold {other:?}"),
    };
    Ok(CudaStorage { slice, device: device.clone() })
}

/// Forgets a storage without freeing memory that belongs to a slot.
fn release(storage: Storage) {
    fn leak<T>(slice: CudaSlice<T>) {
        let _ = slice.leak();
    }
    match storage {
        Storage::Cuda(CudaStorage { slice, .. }) => match slice {
            CudaStorageSlice::U8(s) | CudaStorageSlice::F4(s) => leak(s),
            CudaStorageSlice::F16(s) => leak(s),
            CudaStorageSlice::BF16(s) => leak(s),
            CudaStorageSlice::F32(s) => leak(s),
            other => std::mem::forget(other), // nothing else was ever bound
        },
        other => drop(other),
    }
}
