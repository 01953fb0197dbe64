//! The host device: models larger than RAM, on the CPU, out of files.
//!
//! A slot is one recycled `Vec` per tensor, in the form that travels (bf16 stays bf16: `Linear`
//! widens it while multiplying), or f32 where candle's own operations compute on it. Bytes come by
//! positioned reads: unlike a mapping they fail with an error when the file shrinks under them, and
//! cold files read faster. Small threads of its own read, so that they never wait for compute.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use candle_core::{CpuStorage, DType, Device as Candle, Storage, Tensor};
use rayon::prelude::*;

use super::{
    Clock, Device, Moved, Occupancy, Slot, VisitTimes,
    read::{no_way, quantize_tensor, read_tensor},
};
use crate::{
    BlockImage, Bytes, Digest, Error, HostMemory, ImageTensor, Making, Result,
    placeholder::{empty, exchange, poison},
};

/// The CPU and its RAM.
pub struct Host {
    readers: Arc<rayon::ThreadPool>,
}

impl Host {
    /// A host device with reading threads of its own: half as many as cores, at most four.
    ///
    /// # Errors
    /// No threads to be had.
    pub fn new() -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let readers = rayon::ThreadPoolBuilder::new()
            .num_threads((cores / 2).clamp(1, 4))
            .thread_name(|i| format!("mmgp-read-{i}"))
            .build()
            .map_err(|e| Error::NotPageable {
                model: "host device".into(),
                reason: format!("no reading threads: {e}"),
            })?;
        Ok(Self { readers: Arc::new(readers) })
    }
}

impl Device for Host {
    fn candle(&self) -> &Candle {
        &Candle::Cpu
    }

    fn compute_dtype(&self) -> DType {
        DType::F32
    }

    /// Half of what [`HostMemory`] says is available; no limit where the operating system does not
    /// tell.
    fn available(&self) -> Result<Bytes> {
        Ok(HostMemory::read().map_or(Bytes(u64::MAX), |memory| Bytes(memory.available.0 / 2)))
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        Ok(Box::<HostClock>::default())
    }

    fn slot(&self, _capacity: Bytes, _: Occupancy) -> Result<Box<dyn Slot>> {
        Ok(Box::new(HostSlot { readers: self.readers.clone(), held: Vec::new(), moved: None }))
    }
}

/// One `Vec` per tensor of the block that the slot was last filled with.
struct HostSlot {
    readers: Arc<rayon::ThreadPool>,
    held: Vec<CpuStorage>,
    moved: Option<Moved>,
}

/// Computing on the host is done when its call returns, so the wall clock tells.
#[derive(Default)]
struct HostClock {
    asked: Option<Instant>,
    began: Option<Instant>,
    last: Option<VisitTimes>,
}

impl Clock for HostClock {
    fn asked(&mut self) {
        self.asked = Some(Instant::now());
    }

    fn began(&mut self) {
        self.began = Some(Instant::now());
    }

    fn ended(&mut self) {
        if let Some(began) = self.began {
            let asked = self.asked.take().unwrap_or(began);
            self.last = Some(VisitTimes { stalled: began - asked, computed: began.elapsed() });
        }
    }

    fn read(&mut self) -> Result<Option<VisitTimes>> {
        Ok(self.last.take())
    }
}

impl Slot for HostSlot {
    fn fill(&mut self, image: &BlockImage) -> Result<u64> {
        let begun = Instant::now();
        let mut targets = recycle(std::mem::take(&mut self.held), &image.tensors)?;
        let (mut plain, mut pairs) = (Vec::new(), Vec::new());
        let mut all = targets.iter_mut().zip(&image.tensors);
        while let Some((target, tensor)) = all.next() {
            match tensor.making {
                Making::Codes(_) => match all.next() {
                    Some((scales, t)) if t.making == Making::Scales => {
                        pairs.push((tensor, target, scales));
                    }
                    _ => return Err(no_way(tensor, "its scales do not follow its codes")),
                },
                _ => plain.push((target, tensor)),
            }
        }
        self.readers.install(|| {
            plain.into_par_iter().try_for_each(|(target, tensor)| read_tensor(tensor, target))
        })?;
        // Quantizing is work for all cores, not for the few threads that wait for the disk.
        pairs
            .into_par_iter()
            .try_for_each(|(t, codes, scales)| quantize_tensor(t, codes, scales))?;
        self.held = targets;
        match &image.expected {
            Some(expected) if !expected.checked.load(Ordering::Relaxed) => {
                if self.digest_of(expected.tensors)? != expected.digest {
                    self.held.clear();
                    return Err(Error::corrupt(image));
                }
                expected.checked.store(true, Ordering::Relaxed);
            }
            _ => {}
        }
        self.moved = Some(Moved { bytes: Bytes(image.bytes), took: begun.elapsed() });
        Ok(1)
    }

    fn moved(&mut self) -> Option<Moved> {
        self.moved.take()
    }

    fn digest(&self, tensors: &[ImageTensor]) -> Result<Digest> {
        self.digest_of(tensors.len())
    }

    fn bind(&mut self, tensors: &[Tensor]) -> Result<()> {
        let storages = std::mem::take(&mut self.held);
        for (tensor, storage) in tensors.iter().zip(storages) {
            exchange(tensor, Storage::Cpu(storage))?;
        }
        Ok(())
    }

    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.held.clear();
        for tensor in tensors {
            if let Storage::Cpu(storage) = exchange(tensor, Storage::Cpu(poison()))? {
                self.held.push(storage);
            }
        }
        Ok(())
    }
}

impl HostSlot {
    fn digest_of(&self, tensors: usize) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        for storage in self.held.iter().take(tensors) {
            match storage {
                CpuStorage::U8(v) => hasher.update_rayon(v),
                CpuStorage::F16(v) => hasher.update_rayon(bytemuck::cast_slice(v)),
                CpuStorage::BF16(v) => hasher.update_rayon(bytemuck::cast_slice(v)),
                CpuStorage::F32(v) => hasher.update_rayon(bytemuck::cast_slice(v)),
                _ => continue, // slots hold nothing else
            };
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

/// Storages for `tensors`: those of `old` that fit, then new ones. What does not fit is given back
/// before anything is taken, so that a slot never holds more than its larger block.
fn recycle(old: Vec<CpuStorage>, tensors: &[ImageTensor]) -> Result<Vec<CpuStorage>> {
    let mut spare: HashMap<(DType, usize), Vec<CpuStorage>> = HashMap::new();
    for storage in old {
        spare.entry(kind(&storage)).or_default().push(storage);
    }
    let reused: Vec<Option<CpuStorage>> = tensors
        .iter()
        .map(|t| spare.get_mut(&(t.dtype, t.elements())).and_then(Vec::pop))
        .collect();
    drop(spare);
    reused
        .into_iter()
        .zip(tensors)
        .map(|(storage, t)| match storage {
            Some(storage) => Ok(storage),
            None => Ok(empty(t.dtype, t.elements())?),
        })
        .collect()
}

fn kind(storage: &CpuStorage) -> (DType, usize) {
    match storage {
        CpuStorage::U8(v) => (DType::U8, v.len()),
        CpuStorage::F16(v) => (DType::F16, v.len()),
        CpuStorage::BF16(v) => (DType::BF16, v.len()),
        CpuStorage::F32(v) => (DType::F32, v.len()),
        _ => (DType::F64, 0),
    }
}
