//! Who takes VRAM: weights, activations, and the driver's own; what is left for the first two.
//!
//! Weights are plain allocations, counted here. Activations come from a pool that is made the device's
//! current one: it can be capped, and it says how much it reserved at most. What is free is read from
//! the driver by a thread of its own every few milliseconds, so that nobody who computes waits for it.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};
use parking_lot::Mutex;

use super::{failed, nvml::Nvml};
use crate::{Bytes, Error, Result};

/// The driver maps memory in pages of this size.
const PAGE: u64 = 2 << 20;
/// Pools reserve in pages of this size.
const POOL_PAGE: u64 = 16 * PAGE;
/// How often free memory is read.
const PERIOD: Duration = Duration::from_millis(10);
/// What libraries take after the context was made (modules, workspaces), before it was measured.
const LIBRARIES: u64 = 384_000_000;

/// What the management library and the context may tell apart of free memory, to be taken for the same.
const SAME: u64 = 64 << 20;

/// The VRAM of one GPU, as this process uses it.
pub(super) struct Vram {
    context: Arc<CudaContext>,
    /// Tells what is free, where it tells the same as the context does: asking that one makes launches wait.
    managed: Option<Nvml>,
    limit: Option<u64>,
    margin: u64,
    /// Whether the driver takes host memory where VRAM is over, rather than fail.
    spills: bool,
    /// Taken by the context when it was opened.
    base: u64,
    /// Free when it had been opened.
    free_at_start: u64,
    /// What libraries took since, as far as is known.
    libraries: AtomicU64,
    weights: AtomicU64,
    /// As the watching thread read it last.
    free: AtomicU64,
    /// Given back since then.
    given: AtomicU64,
    pool: Mutex<Pool>,
    /// Pools that were current before and hold what was taken from them then. The driver does not bear that
    /// such a pool is destroyed, whatever its documentation says.
    retired: Mutex<Vec<Pool>>,
}

/// Where activations come from.
struct Pool {
    handle: sys::CUmemoryPool,
    /// The pool that was current before.
    before: sys::CUmemoryPool,
    cap: u64,
    high: u64,
}

// SAFETY: handles of pools may be used from any thread.
unsafe impl Send for Pool {}

impl Vram {
    /// `base` is what the context takes, if that is known.
    pub(super) fn new(
        context: &Arc<CudaContext>,
        limit: Option<Bytes>,
        margin: Bytes,
        base: u64,
        managed: Option<Nvml>,
    ) -> Result<Arc<Self>> {
        let (free, _) = context.mem_get_info().map_err(|e| failed("free memory", e))?;
        let managed = managed.filter(|card| {
            let told = card.memory().map(|memory| memory.free);
            told.is_some_and(|told| told.abs_diff(free as u64) <= SAME)
        });
        if managed.is_none() {
            tracing::debug!("free memory is asked of the context");
        }
        let pool = Pool::new(context, 0).map_err(|e| failed("a memory pool", e))?;
        let vram = Arc::new(Self {
            context: context.clone(),
            managed,
            limit: limit.map(|l| l.0),
            margin: margin.0,
            spills: under_wsl(),
            base,
            free_at_start: free as u64,
            libraries: AtomicU64::new(LIBRARIES),
            weights: AtomicU64::new(0),
            free: AtomicU64::new(free as u64),
            given: AtomicU64::new(0),
            pool: Mutex::new(pool),
            retired: Mutex::default(),
        });
        let watched = Arc::downgrade(&vram);
        std::thread::Builder::new()
            .name("mmgp-vram".into())
            .spawn(move || watch(&watched))
            .map_err(|e| Error::Device(format!("no thread to watch memory: {e}")))?;
        Ok(vram)
    }

    /// A plain allocation for weights.
    pub(super) fn take(&self, size: usize) -> Result<sys::CUdeviceptr> {
        self.context.bind_to_thread().map_err(|e| failed("binding the GPU", e))?;
        if self.spills {
            self.look()?;
            let free = self.free.load(Ordering::Relaxed).saturating_sub(self.margin);
            if size as u64 > free {
                let (size, free) = (Bytes(size as u64), Bytes(free));
                return Err(Error::Device(format!("{size} of VRAM for a slot, {free} are free")));
            }
        }
        // SAFETY: the context was bound to this thread.
        let mut start = unsafe { result::malloc_sync(size) };
        if start.is_err() {
            // What the pools reserved and do not use may be what is missing.
            self.trim();
            // SAFETY: as above.
            start = unsafe { result::malloc_sync(size) };
        }
        let what = || format!("{} of VRAM for a slot", Bytes(size as u64));
        let start = start.map_err(|e| failed(&what(), e))?;
        self.weights.fetch_add(paged(size), Ordering::Relaxed);
        Ok(start)
    }

    /// Gives back what [`take`](Self::take) took, which nothing uses any more.
    pub(super) fn give_back(&self, start: sys::CUdeviceptr, size: usize) {
        let freed = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: allocated by `take`, unused, given back once.
            unsafe { result::free_sync(start) }
        });
        match freed {
            Ok(()) => {
                self.weights.fetch_sub(paged(size), Ordering::Relaxed);
                self.given.fetch_add(paged(size), Ordering::Relaxed);
            }
            Err(error) => tracing::error!("a slot cannot be given back: {error}"),
        }
    }

    /// What weights and activations may take together.
    pub(super) fn ceiling(&self) -> u64 {
        let ours = self.weights.load(Ordering::Relaxed) + self.reserved();
        let free = self.free.load(Ordering::Relaxed) + self.given.load(Ordering::Relaxed);
        let card = (ours + free).saturating_sub(self.margin);
        match self.limit {
            Some(limit) => {
                let others = self.base + self.libraries.load(Ordering::Relaxed);
                card.min(limit.saturating_sub(others))
            }
            None => card,
        }
    }

    /// What the whole process may take: as it was told, and where the driver would take host memory, what it
    /// has and what is free.
    fn limit(&self) -> Option<u64> {
        let told = self.limit.unwrap_or(u64::MAX);
        if !self.spills {
            return self.limit;
        }
        let ours = self.weights.load(Ordering::Relaxed) + self.reserved();
        let others = self.base + self.libraries.load(Ordering::Relaxed);
        let free = self.free.load(Ordering::Relaxed) + self.given.load(Ordering::Relaxed);
        Some(told.min((ours + others + free).saturating_sub(self.margin)))
    }

    /// Whether the driver takes host memory where VRAM is over.
    pub(super) fn spills(&self) -> bool {
        self.spills
    }

    fn reserved(&self) -> u64 {
        let retired: u64 = self.retired.lock().iter().map(Pool::reserved).sum();
        retired + self.pool.lock().reserved()
    }

    /// How much is missing to the margin now.
    pub(super) fn shortage(&self) -> u64 {
        let free = self.free.load(Ordering::Relaxed) + self.given.load(Ordering::Relaxed);
        self.margin.saturating_sub(free)
    }

    /// Reads what is free now, and waits for no one to do so.
    pub(super) fn look(&self) -> Result<()> {
        let free = match self.managed.as_ref().and_then(Nvml::memory) {
            Some(memory) => memory.free,
            None => self.context.mem_get_info().map_err(|e| failed("free memory", e))?.0 as u64,
        };
        self.free.store(free, Ordering::Relaxed);
        self.given.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// The most that activations reserved since the last call; from here on it is counted anew.
    pub(super) fn take_peak(&self) -> u64 {
        if self.limit.is_some() || self.spills {
            self.measure_libraries();
        }
        // What lies in pools that were current before is of activations too.
        let retired: u64 = self.retired.lock().iter().map(Pool::reserved).sum();
        let mut pool = self.pool.lock();
        let high = pool.reserved().max(pool.high);
        pool.high = 0;
        high + retired
    }

    /// What libraries take shows once something has run: what is gone and is neither ours nor the
    /// context's. Others may take and give back beside us, so the least that was seen counts.
    fn measure_libraries(&self) {
        // Now, not as the watching thread saw it: what was taken since would look like less of theirs.
        if let Err(error) = self.look() {
            tracing::debug!("{error}");
            return;
        }
        let ours = self.weights.load(Ordering::Relaxed) + self.reserved();
        let free = self.free.load(Ordering::Relaxed);
        let gone = self.free_at_start.saturating_sub(free).saturating_sub(ours);
        // Never none: the driver rounds.
        let seen = gone.max(32 << 20);
        self.libraries.fetch_min(seen + (seen >> 3), Ordering::Relaxed);
    }

    /// Lets activations have what `weights` leave of the ceiling, if there is a limit to keep; gives back
    /// what the pool does not use.
    pub(super) fn share(&self, weights: u64) -> Result<()> {
        let Some(limit) = self.limit() else { return Ok(()) };
        let others = self.base + self.libraries.load(Ordering::Relaxed);
        let cap = limit.saturating_sub(others).saturating_sub(weights).max(PAGE);
        let mut pool = self.pool.lock();
        // What is free changes all the time; the margin bears some of that.
        let over = if self.spills { self.margin / 4 } else { 0 };
        if pool.cap != 0 && pool.cap <= cap + over && cap.saturating_sub(pool.cap) < 64 << 20 {
            return Ok(());
        }
        // What is in use stays where it is; the new pool gets what that leaves. Plans change seldom, so
        // waiting for frees that are queued costs little.
        self.context.synchronize().map_err(|e| failed("waiting for the GPU", e))?;
        pool.trim();
        let mut retired = self.retired.lock();
        for mut old in std::mem::take(&mut *retired) {
            old.trim();
            match old.reserved() {
                0 => old.destroy(),
                _ => retired.push(old),
            }
        }
        let kept: u64 = retired.iter().map(Pool::reserved).sum();
        let rest = cap.saturating_sub(kept + pool.reserved()).max(PAGE);
        let mut new = Pool::new(&self.context, rest).map_err(|e| failed("a memory pool", e))?;
        (new.before, new.high, new.cap) = (pool.before, pool.high, cap);
        retired.push(std::mem::replace(&mut *pool, new));
        Ok(())
    }

    /// Gives back what activations reserved and do not use.
    pub(super) fn trim(&self) {
        self.pool.lock().trim();
        self.retired.lock().iter_mut().for_each(Pool::trim);
    }
}

impl Drop for Vram {
    fn drop(&mut self) {
        let pool = self.pool.get_mut();
        let ended = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: the device is that of the context; the pool that was current before lives.
            unsafe {
                let device = self.context.cu_device();
                if result::device::get_mem_pool(device)? == pool.handle {
                    result::device::set_mem_pool(device, pool.before)?;
                }
            }
            self.context.synchronize()
        });
        let retired = std::mem::take(self.retired.get_mut());
        let last = Pool { ..*pool };
        for mut pool in retired.into_iter().chain([last]) {
            pool.trim();
            // What a tensor still lies in stays as long as the process.
            if pool.reserved() == 0 {
                pool.destroy();
            }
        }
        if let Err(error) = ended {
            tracing::error!("a memory pool stays: {error}");
        }
    }
}

impl Pool {
    /// A pool of at most `cap` bytes (0: no limit), made the device's current one.
    fn new(context: &Arc<CudaContext>, cap: u64) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: plain numbers, of which zero is a value.
        let mut props: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        props.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        props.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        props.location.id = context.ordinal() as i32;
        // Whole pages of the pool's own; none would mean no limit.
        props.maxSize = match cap {
            0 => 0,
            cap => (cap / POOL_PAGE).max(1) * POOL_PAGE,
        } as usize;
        // SAFETY: the device is that of the context just bound; the attribute is a u64.
        unsafe {
            let device = context.cu_device();
            let before = result::device::get_mem_pool(device)?;
            let handle = result::mem_pool::create(&raw const props)?;
            let mut most = u64::MAX;
            // Giving back at each synchronization would cost milliseconds a block.
            let keep = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(handle, keep, (&raw mut most).cast())?;
            result::device::set_mem_pool(device, handle)?;
            Ok(Self { handle, before, cap, high: 0 })
        }
    }

    fn reserved(&self) -> u64 {
        let mut bytes = 0u64;
        let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        // SAFETY: the pool lives as long as this; the attribute is a u64.
        let read =
            unsafe { result::mem_pool::get_attribute(self.handle, which, (&raw mut bytes).cast()) };
        read.map_or(0, |()| bytes)
    }

    fn trim(&mut self) {
        self.high = self.high.max(self.reserved());
        // SAFETY: the pool lives as long as this.
        if let Err(error) = unsafe { result::mem_pool::trim_to(self.handle, 0) } {
            tracing::warn!("activations' memory cannot be given back: {error}");
        }
    }

    /// Ends a pool that is not current any more; what is in use stays until it is freed.
    fn destroy(self) {
        // SAFETY: nobody takes from it any more.
        if let Err(error) = unsafe { result::mem_pool::destroy(self.handle) } {
            tracing::error!("a memory pool stays: {error}");
        }
    }
}

/// Whether this is Linux inside Windows, where the driver's memory is Windows' to give.
fn under_wsl() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.is_ok_and(|release| is_of_wsl(&release))
}

/// Whether a kernel's release is one of WSL's, such as `5.15.153.1-microsoft-standard-WSL2`.
fn is_of_wsl(release: &str) -> bool {
    release.to_ascii_lowercase().contains("microsoft")
}

/// What an allocation takes of the card.
fn paged(size: usize) -> u64 {
    (size as u64).next_multiple_of(PAGE)
}

/// Reads free memory until nobody asks any more.
fn watch(vram: &Weak<Vram>) {
    loop {
        std::thread::sleep(PERIOD);
        let Some(vram) = vram.upgrade() else { return };
        if let Err(error) = vram.look() {
            tracing::debug!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_of_wsl;

    #[test]
    fn wsl_is_known_by_its_kernel() {
        for release in ["5.15.153.1-microsoft-standard-WSL2\n", "4.4.0-19041-Microsoft"] {
            assert!(is_of_wsl(release), "{release}");
        }
        assert!(!is_of_wsl("6.8.0-45-generic\n"));
    }
}
