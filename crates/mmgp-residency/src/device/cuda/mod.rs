//! NVIDIA GPUs: blocks stream into VRAM on a copy stream beside the stream that computes.
//!
//! A slot is one allocation; a block's tensors lie in it one behind another, as its image says, and
//! binding points them there. Streams are ordered by events alone: `unbind` records one behind what was
//! computed on the slot, copies into it wait for that, and `bind` makes the computing stream wait for
//! the copies. Blocks that take turns in a slot are kept in page-locked memory, where their file lies or
//! gathered, as far as the limit on it allows; everything else passes through a few page-locked
//! buffers, which several threads fill from the files.

use std::{ffi::CStr, sync::Arc};

use candle_core::{
    CudaDevice, DType, Device as Candle,
    cuda_backend::cudarc::driver::{CudaStream, DriverError, result, sys},
};

use self::{
    clock::EventClock,
    kept::Keeper,
    nvml::Nvml,
    pinned::{Locked, Pinned},
    registered::Registrar,
    ring::{Buffer, Ring},
    slot::CudaSlot,
    throttle::Throttle,
    vram::Vram,
};
use super::{Clock, Device, Occupancy, Slot};
use crate::{Bytes, Error, HostMemory, ImageTensor, Result, image::ALIGN};

mod clock;
mod kept;
mod made;
mod nvml;
mod pinned;
mod registered;
mod ring;
mod slot;
mod storage;
mod throttle;
mod vram;

pub(crate) use storage::{nowhere, poison};

/// What a context takes where the driver does not tell.
const CONTEXT: u64 = 600_000_000;

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
    /// Where the bytes of blocks that stream are locked.
    pub files: Files,
    /// How many page-locked buffers everything else passes through.
    pub buffers: usize,
    /// The size of each: what fits a core's cache is filled and copied twice as fast as what does not.
    pub buffer: Bytes,
    /// Whether copies run while blocks compute.
    pub transfers: Transfers,
    /// The most VRAM that this process takes, all included; a small card for a large one to stand in
    /// for.
    pub vram_limit: Option<Bytes>,
    /// VRAM that stays free for others.
    pub margin: Bytes,
    /// Bytes a second at which blocks are copied at most; a slow link for a fast one to stand in for.
    pub link_limit: Option<Bytes>,
    /// Whether weights are poisoned at the end of each lease, so that any use outside of one fails. It takes time,
    /// so that by default only debug builds do; else such a use finds whatever lies in the slot.
    pub poisons: bool,
}

/// Where the bytes of blocks that stream are locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Files {
    /// In the page cache, where their file is mapped, if the driver can register it; else copied.
    #[default]
    Registered,
    /// In memory of their own.
    Copied,
}

/// Whether copies run while blocks compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transfers {
    /// The next block is copied while one computes.
    #[default]
    Overlapped,
    /// A block is copied when it is needed, and computing waits for it.
    Synchronous,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            compute: DType::BF16,
            locked: None,
            files: Files::default(),
            buffers: 32,
            buffer: Bytes(2 << 20),
            transfers: Transfers::default(),
            vram_limit: None,
            margin: Bytes(512_000_000),
            link_limit: None,
            poisons: cfg!(debug_assertions),
        }
    }
}

/// An NVIDIA GPU and its memory. Clones are the same device.
#[derive(Clone)]
pub struct Cuda(Arc<Shared>);

struct Shared {
    candle: Candle,
    device: CudaDevice,
    compute: DType,
    stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    transfers: Transfers,
    poisons: bool,
    keeper: Keeper,
    ring: Ring,
    throttle: Throttle,
    vram: Arc<Vram>,
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
        let managed = managed(options.ordinal);
        let taken = || managed.as_ref().and_then(Nvml::memory).map(|memory| memory.used);
        let taken_before = taken();
        let device = CudaDevice::new_with_stream(options.ordinal)?;
        // SAFETY: streams are ordered by this module's events; candle uses one stream only.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context();
        let copies = context.new_stream().map_err(|e| failed("a stream for copies", e))?;
        let base = match (taken_before, taken()) {
            (Some(before), Some(after)) => after.saturating_sub(before),
            _ => CONTEXT,
        };
        let vram = Vram::new(context, options.vram_limit, options.margin, base, managed)?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let readers = rayon::ThreadPoolBuilder::new()
            .num_threads((cores * 3 / 4).clamp(1, 16))
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
        let locked = Arc::new(Locked::new(options.locked.unwrap_or_else(half)));
        let registrar = Registrar::new(context, &locked, options.files == Files::Registered);
        let throttle = Throttle::default();
        throttle.set(options.link_limit);
        Ok(Self(Arc::new(Shared {
            candle: Candle::Cuda(device.clone()),
            compute: options.compute,
            transfers: options.transfers,
            poisons: options.poisons,
            keeper: Keeper { context: context.clone(), locked, registrar, readers },
            ring: Ring::new(idle, size),
            throttle,
            vram,
            device,
            stream,
            copies,
        })))
    }

    /// Tells at any time how much host memory is page-locked for blocks that stream, counted where
    /// the driver is called.
    pub fn locked_counter(&self) -> impl Fn() -> Bytes + Send + Sync + use<> {
        let locked = self.0.keeper.locked.clone();
        move || locked.bytes()
    }

    /// Changes the bytes a second at which blocks are copied at most.
    pub fn set_link_limit(&self, limit: Option<Bytes>) {
        self.0.throttle.set(limit);
    }
}

/// The card of this number in the driver's management library, where there is one.
fn managed(ordinal: usize) -> Option<Nvml> {
    let mut address = [0u8; 16];
    // SAFETY: the driver is initialised before a device is asked for; the buffer has as many bytes as
    // its length says.
    unsafe {
        result::init().ok()?;
        let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
        let (start, len) = (address.as_mut_ptr().cast(), address.len() as i32);
        sys::cuDeviceGetPCIBusId(start, len, device).result().ok()?;
    }
    Nvml::open(CStr::from_bytes_until_nul(&address).ok()?)
}

fn failed(what: &str, error: DriverError) -> Error {
    Error::Device(format!("{what}: {error}"))
}

impl Device for Cuda {
    fn candle(&self) -> &Candle {
        &self.0.candle
    }

    fn compute_dtype(&self) -> DType {
        self.0.compute
    }

    /// Weights of a byte a number are expanded before they are multiplied by.
    fn expansion(&self, tensor: &ImageTensor) -> Bytes {
        match tensor.dtype {
            DType::U8 => Bytes((tensor.elements() * self.0.compute.size_in_bytes()) as u64),
            _ => Bytes(0),
        }
    }

    fn available(&self) -> Result<Bytes> {
        self.ceiling()
    }

    fn ceiling(&self) -> Result<Bytes> {
        Ok(Bytes(self.0.vram.ceiling()))
    }

    fn shortage(&self) -> Bytes {
        Bytes(self.0.vram.shortage())
    }

    fn take_peak(&self) -> Bytes {
        Bytes(self.0.vram.take_peak())
    }

    fn share(&self, weights: Bytes) -> Result<()> {
        self.0.vram.share(weights.0)
    }

    fn trim(&self) {
        self.0.vram.trim();
    }

    fn is_out_of_memory(&self, error: &candle_core::Error) -> bool {
        is_out_of_memory(error)
    }

    fn spills(&self) -> bool {
        self.0.vram.spills()
    }

    fn overlaps(&self) -> bool {
        self.0.transfers == Transfers::Overlapped
    }

    fn locked(&self) -> Bytes {
        self.0.keeper.locked.bytes()
    }

    fn lockable(&self) -> Bytes {
        self.0.keeper.locked.left()
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        Ok(Box::new(EventClock::new(&self.0.stream)?))
    }

    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>> {
        let size = (capacity.0 as usize).max(ALIGN as usize);
        Ok(Box::new(CudaSlot::new(&self.0, size, occupancy)?))
    }
}

/// Whether the GPU had no memory left, wherever the error comes from.
fn is_out_of_memory(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(DriverError(code)) = error.downcast_ref()
            && *code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
        {
            return true;
        }
        next = error.source();
    }
    // candle wraps some errors in text alone.
    error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY")
}
