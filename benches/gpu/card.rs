//! The device that is measured: a GPU, or the host where there is none.
//!
//! All that differs between the two stands here. The host has no link that could be limited and no
//! memory of its own to report.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Result, bail};
use candle_core::Device;
#[cfg(feature = "cuda")]
use mmgp_models::nn;
use mmgp_residency::{Bytes, Pager};
#[cfg(feature = "cuda")]
use mmgp_residency::{Cuda, CudaOptions};

/// How often memory in use is looked at.
const SAMPLES: Duration = Duration::from_millis(20);

/// An opened device.
pub(crate) struct Card {
    pager: Pager,
    #[cfg(feature = "cuda")]
    cuda: Option<Cuda>,
}

impl Card {
    /// Opens GPU number `ordinal`, or the host if there is no number. `locked` is the most host memory that
    /// may be page-locked for blocks.
    ///
    /// # Errors
    /// A device that this build or machine does not have.
    pub(crate) fn open(ordinal: Option<usize>, locked: Option<Bytes>) -> Result<Self> {
        match ordinal {
            Some(ordinal) => Self::gpu(ordinal, locked),
            None => Ok(Self {
                pager: Pager::new(&Device::Cpu)?,
                #[cfg(feature = "cuda")]
                cuda: None,
            }),
        }
    }

    #[cfg(feature = "cuda")]
    fn gpu(ordinal: usize, locked: Option<Bytes>) -> Result<Self> {
        let options = CudaOptions { ordinal, locked, ..CudaOptions::default() };
        let cuda = Cuda::new(&options)?;
        if let Device::Cuda(device) = mmgp_residency::Device::candle(&cuda) {
            nn::cuda::enable_tested(device)?;
            if mmgp_quant::fp8_multiplies(device)? {
                mmgp_quant::self_test_fp8(device)?;
                mmgp_quant::enable_fp8(device);
            }
        }
        Ok(Self { pager: Pager::over(cuda.clone())?, cuda: Some(cuda) })
    }

    #[cfg(not(feature = "cuda"))]
    fn gpu(_: usize, _: Option<Bytes>) -> Result<Self> {
        bail!(
            "this build has no GPU support: build it with `--features cuda`, or use `--device cpu`"
        )
    }

    /// A pager over the device; another with [`Pager::beside`].
    pub(crate) fn pager(&self) -> &Pager {
        &self.pager
    }

    /// The device of its tensors.
    pub(crate) fn device(&self) -> &Device {
        self.pager.device().candle()
    }

    /// Waits until everything is computed; copies of blocks go on.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn synchronize(&self) -> Result<()> {
        Ok(self.device().synchronize()?)
    }

    /// Slows copies to the device down to so many bytes per second.
    ///
    /// # Errors
    /// A limit on the host, which has no link.
    pub(crate) fn limit_link(&self, limit: Option<Bytes>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            cuda.set_link_limit(limit);
            return Ok(());
        }
        if limit.is_some() {
            bail!("a limit on the link needs a GPU");
        }
        Ok(())
    }

    /// The card's name, or the host's.
    pub(crate) fn name(&self) -> String {
        gpu_name(self.device()).unwrap_or_else(|| "host".into())
    }

    /// What is in use of the card's memory now, by anyone, if it has memory of its own.
    pub(crate) fn used(&self) -> Option<u64> {
        used(self.device())
    }

    /// Begins to watch how much of the card's memory is in use, by anyone.
    pub(crate) fn watch(&self) -> Watch {
        let (peak, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let device = self.device().clone();
        let thread = thread::spawn({
            let (peak, over) = (peak.clone(), over.clone());
            move || {
                while let Some(used) = used(&device) {
                    peak.fetch_max(used, Ordering::Relaxed);
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    thread::sleep(SAMPLES);
                }
            }
        });
        Watch { peak, over, thread: Some(thread) }
    }
}

/// Looks at the card's memory until it is asked for the peak.
pub(crate) struct Watch {
    peak: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Ends the watch; the most that was in use, if the device has memory of its own.
    pub(crate) fn peak(mut self) -> Option<u64> {
        self.end();
        Some(self.peak.load(Ordering::Relaxed)).filter(|&peak| peak > 0)
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(feature = "cuda")]
fn used(device: &Device) -> Option<u64> {
    let Device::Cuda(device) = device else { return None };
    let (free, total) = device.cuda_stream().context().mem_get_info().ok()?;
    Some((total - free) as u64)
}

#[cfg(not(feature = "cuda"))]
fn used(_: &Device) -> Option<u64> {
    None
}

#[cfg(feature = "cuda")]
fn gpu_name(device: &Device) -> Option<String> {
    let Device::Cuda(device) = device else { return None };
    device.cuda_stream().context().name().ok()
}

#[cfg(not(feature = "cuda"))]
fn gpu_name(_: &Device) -> Option<String> {
    None
}

/// The version of NVIDIA's driver, if its tool is there to tell.
pub(crate) fn driver() -> Option<String> {
    told("driver_version")
}

/// What is in use of the card's memory as the driver's tool tells it, which is what other programs read.
pub(crate) fn used_as_told() -> Option<u64> {
    let mib: u64 = told("memory.used")?.strip_suffix(" MiB")?.parse().ok()?;
    Some(mib << 20)
}

fn told(what: &str) -> Option<String> {
    let mut ask = Command::new("nvidia-smi");
    ask.args([&format!("--query-gpu={what}"), "--format=csv,noheader"]);
    let told = ask.output().ok().filter(|told| told.status.success())?;
    let told = String::from_utf8(told.stdout).ok()?.lines().next()?.trim().to_string();
    (!told.is_empty()).then_some(told)
}
