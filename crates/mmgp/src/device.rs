//! Which device models run on, and the pager over it.

use std::{fmt, str::FromStr};

use candle_core::Device;
use mmgp_residency::{Bytes, Error, Pager};

/// The device that models run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if this build pages on GPUs, one can be opened, and its kernels pass their self-test;
    /// else the CPU.
    #[default]
    Auto,
    /// The CPU, in f32.
    Cpu,
    /// The NVIDIA GPU of this number, in bf16.
    Cuda(usize),
}

/// How a GPU is used, where it is one.
#[derive(Clone, Debug, Default)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // a build without GPUs only asks for limits
pub(crate) struct GpuUse {
    /// The most VRAM of the whole process.
    pub(crate) vram_limit: Option<Bytes>,
    /// Bytes a second at which blocks are copied at most.
    pub(crate) link_limit: Option<Bytes>,
    /// The share of RAM that may be page-locked.
    pub(crate) locked_share: Option<f64>,
    /// Whether computing waits for each copy.
    pub(crate) synchronous: bool,
}

impl DeviceChoice {
    /// A pager over the device.
    pub(crate) fn pager(self, gpu: &GpuUse) -> mmgp_residency::Result<Pager> {
        let limited = gpu.vram_limit.is_some() || gpu.link_limit.is_some();
        match self {
            Self::Cpu if limited => {
                Err(Error::Device("a limit on VRAM or on the link needs a GPU".into()))
            }
            Self::Cpu => Pager::new(&Device::Cpu),
            Self::Cuda(ordinal) => cuda(ordinal, gpu),
            Self::Auto => cuda(0, gpu).or_else(|error| {
                use mmgp_residency::Error::Quant;
                if limited {
                    return Err(error); // whoever limits a GPU means one
                }
                match &error {
                    Quant(e) if matches!(**e, mmgp_quant::Error::Kernel { .. }) => {
                        tracing::warn!("running on the CPU: {error}");
                    }
                    _ => tracing::info!("running on the CPU: {error}"),
                }
                Pager::new(&Device::Cpu)
            }),
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize, gpu: &GpuUse) -> mmgp_residency::Result<Pager> {
    use mmgp_residency::{Cuda, CudaOptions, Device as _, HostMemory, Transfers};
    let card = mmgp_quant::Card::of(ordinal)?;
    let of_ram = |share: f64| Some(Bytes((HostMemory::read()?.total.0 as f64 * share) as u64));
    let cuda = Cuda::new(&CudaOptions {
        ordinal,
        locked: gpu.locked_share.and_then(of_ram),
        transfers: if gpu.synchronous { Transfers::Synchronous } else { Transfers::Overlapped },
        vram_limit: gpu.vram_limit,
        link_limit: gpu.link_limit,
        ..CudaOptions::default()
    })?;
    if let Device::Cuda(device) = cuda.candle() {
        self_test(&card, device)?;
    }
    Pager::over(cuda)
}

/// Tests the kernels on the card, once for this card, driver and build.
#[cfg(feature = "cuda")]
fn self_test(
    card: &mmgp_quant::Card,
    device: &candle_core::CudaDevice,
) -> Result<(), mmgp_quant::Error> {
    use crate::{Store, tested};
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let subject = tested::driver_in(&maps).map(|driver| tested::Subject {
        card: format!("{} (sm_{}{})", card.name, card.capability.0, card.capability.1),
        driver,
        version: env!("CARGO_PKG_VERSION").into(),
        kernels: blake3::hash(mmgp_quant::kernel_image()).to_hex().to_string(),
    });
    let folder = Store::of_user().map(|store| store.folder().join("self-test"));
    tested::once(folder.as_deref(), subject.as_ref(), || {
        tracing::info!("testing the kernels on {}", card.name);
        mmgp_quant::self_test(device)
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize, _: &GpuUse) -> mmgp_residency::Result<Pager> {
    Err(Error::NotPageable {
        model: "pager".into(),
        reason: "this build has no GPU support: build mmgp with `--features cuda`".into(),
    })
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!("`{text}` is no device: expected auto, cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_text() {
        for (text, device) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "CUDA"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_gpus_says_so() {
        let pager =
            |choice: DeviceChoice, gpu: &GpuUse| choice.pager(gpu).map_err(|e| e.to_string());
        let any = GpuUse::default();
        let error = pager(DeviceChoice::Cuda(0), &any).err().unwrap_or_default();
        assert!(error.contains("--features cuda"), "{error}");
        assert!(pager(DeviceChoice::Auto, &any).is_ok());
        // Limits of a GPU are never left out silently.
        let limited = GpuUse { vram_limit: Some(Bytes(1 << 33)), ..any };
        assert!(pager(DeviceChoice::Auto, &limited).is_err());
        assert!(pager(DeviceChoice::Cpu, &limited).is_err());
    }
}
