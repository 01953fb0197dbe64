//! Which device models run on, and the pager over it.

use std::{fmt, str::FromStr};

use candle_core::Device;
use mmgp_residency::Pager;

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

impl DeviceChoice {
    /// A pager over the device.
    pub(crate) fn pager(self) -> mmgp_residency::Result<Pager> {
        match self {
            Self::Cpu => Pager::new(&Device::Cpu),
            Self::Cuda(ordinal) => cuda(ordinal),
            Self::Auto => cuda(0).or_else(|error| {
                use mmgp_residency::Error::Quant;
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
fn cuda(ordinal: usize) -> mmgp_residency::Result<Pager> {
    use mmgp_residency::{Cuda, CudaOptions, Device as _};
    let card = mmgp_quant::Card::of(ordinal)?;
    let cuda = Cuda::new(&CudaOptions { ordinal, ..CudaOptions::default() })?;
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
fn cuda(_: usize) -> mmgp_residency::Result<Pager> {
    Err(mmgp_residency::Error::NotPageable {
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
        let error = DeviceChoice::Cuda(0).pager().err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("--features cuda"), "{error}");
        assert!(DeviceChoice::Auto.pager().is_ok());
    }
}
