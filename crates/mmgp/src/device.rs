//! Which device models run on, and the pager over it.

use std::{fmt, str::FromStr};

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::Device;
use mmgp_models::Activations;
use mmgp_profiles::Hardware;
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
    /// What products with int8 or fp8 weights take of their input.
    pub(crate) activations: Activations,
}

/// A device that was opened.
pub(crate) struct Opened {
    /// The pager over it.
    pub(crate) pager: Pager,
    /// What decides how fast it is, in words: the GPU and its driver, the processor and its cores; `None` where
    /// that is not known.
    pub(crate) machine: Option<String>,
}

impl DeviceChoice {
    /// Opens the device.
    pub(crate) fn open(self, gpu: &GpuUse) -> mmgp_residency::Result<Opened> {
        let limited = gpu.vram_limit.is_some() || gpu.link_limit.is_some();
        let codes = gpu.activations.codes();
        match self {
            Self::Cpu if limited => {
                Err(Error::Device("a limit on VRAM or on the link needs a GPU".into()))
            }
            Self::Cpu => match codes {
                Some(codes) => Err(Error::Device(format!("{codes} activations need a GPU"))),
                None => cpu(),
            },
            Self::Cuda(ordinal) => cuda(ordinal, gpu),
            Self::Auto => cuda(0, gpu).or_else(|error| {
                use mmgp_residency::Error::Quant;
                if limited {
                    return Err(error); // whoever limits a GPU means one
                }
                if let Some(codes) = codes {
                    return Err(Error::Device(format!("{codes} activations need a GPU: {error}")));
                }
                match &error {
                    Quant(e) if matches!(**e, mmgp_quant::Error::Kernel { .. }) => {
                        tracing::warn!("running on the CPU: {error}");
                    }
                    _ => tracing::info!("running on the CPU: {error}"),
                }
                cpu()
            }),
        }
    }
}

fn cpu() -> mmgp_residency::Result<Opened> {
    Ok(Opened { pager: Pager::new(&Device::Cpu)?, machine: Some(host()) })
}

/// The processor and how many of its cores this process may use.
fn host() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    format!("{}, {} cores", processor_in(&cpus), Hardware::detect().cores)
}

/// The processor that Linux' `/proc/cpuinfo` tells first, by name or, where it has none there, by numbers; the
/// architecture without them.
fn processor_in(cpus: &str) -> String {
    let first = cpus.lines().take_while(|line| !line.trim().is_empty());
    let of = |line: &str| {
        let (key, value) = line.split_once(':')?;
        let told = ["model name", "CPU implementer", "CPU part"].contains(&key.trim());
        told.then(|| value.trim().to_string())
    };
    let told: Vec<String> =
        std::iter::once(std::env::consts::ARCH.to_string()).chain(first.filter_map(of)).collect();
    told.join(" ")
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize, gpu: &GpuUse) -> mmgp_residency::Result<Opened> {
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
    let card = format!("{} (sm_{}{})", card.name, card.capability.0, card.capability.1);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let driver = crate::tested::driver_in(&maps);
    if let Device::Cuda(device) = cuda.candle() {
        let compiled = self_test(&card, driver.as_deref(), &crate::modules::sources(), || {
            Ok(crate::modules::compile(device)?)
        });
        if let Err(why) = compiled {
            tracing::info!("the tensor library's kernels are compiled when they are used: {why}");
        }
        enable_tested(cuda.candle(), device, &card, driver.as_deref(), gpu.activations)?;
    }
    let machine = driver.map(|driver| format!("{card}, {driver}, {}", host()));
    Ok(Opened { pager: Pager::over(cuda)?, machine })
}

/// Tests what computes on the card, and has what passed used. What the tensor library does too, only slower, may
/// fail or be missing.
#[cfg(feature = "cuda")]
fn enable_tested(
    candle: &Device,
    device: &CudaDevice,
    card: &str,
    driver: Option<&str>,
    activations: Activations,
) -> mmgp_residency::Result<()> {
    use mmgp_models::nn::cuda as nn;
    let library = mmgp_quant::product_library().to_le_bytes();
    let [int8, w8a8, hopper] = mmgp_quant::kernel_images();
    let tested = [int8, w8a8, hopper, &library];
    self_test(card, driver, &tested, || mmgp_quant::self_test(device))?;

    type Test = fn(&CudaDevice) -> TestResult;
    let optional = |what: &str, tested: &[&[u8]], test: Test, enable: fn(&CudaDevice)| {
        match self_test(card, driver, tested, || test(device)) {
            Ok(()) => enable(device),
            // What broke the context leaves nothing to compute with.
            Err(error) if candle.synchronize().is_err() => return Err(error),
            Err(error) => tracing::warn!("computing without {what}, which is slower: {error}"),
        }
        Ok(())
    };
    // Whatever this process had decided before.
    mmgp_quant::disable_fp8(device);
    nn::disable(device);
    if activations == Activations::Fp8 {
        if mmgp_quant::fp8_multiplies(device)? {
            let tested = [b"fp8", w8a8, &library[..]];
            let (test, enable) = (mmgp_quant::self_test_fp8, mmgp_quant::enable_fp8);
            optional("products in fp8", &tested, test, enable)?;
        } else {
            tracing::warn!(
                "fp8 activations do nothing on {card}: products of fp8 with a scale for each row need compute \
                 capability 9.0; weights are expanded before each product"
            );
        }
    }
    let kernels = nn::kernel_image();
    optional("fused kernels", &[kernels], nn::self_test, nn::enable)?;
    if !nn::enabled(device) {
        return Ok(());
    }
    let (test, enable) = (nn::self_test_flash, nn::enable_flash);
    optional("the kernel for attention", &[nn::flash_image()], test, enable)?;
    match nn::cudnn_version() {
        Ok(version) => {
            let version = version.to_le_bytes();
            let subject = |what: &'static str| [what.as_bytes(), &version, kernels];
            let (test, enable) = (nn::self_test_attention, nn::enable_attention);
            optional("cuDNN's attention", &subject("attention"), test, enable)?;
            let (test, enable) = (nn::self_test_convolution, nn::enable_convolution);
            optional("cuDNN's convolution", &subject("convolution"), test, enable)?;
        }
        Err(why) => tracing::warn!(
            "computing attention and convolutions without cuDNN 9, which is slower: it was not found ({why}); \
             install it or name its library in MMGP_CUDNN"
        ),
    }
    Ok(())
}

/// What a self-test says.
#[cfg(feature = "cuda")]
type TestResult = Result<(), mmgp_quant::Error>;

/// Tests what computes on the card, once for this card, driver and build: kernels, and versions of libraries. What is done
/// once for them and is no test goes through here too.
#[cfg(feature = "cuda")]
fn self_test(
    card: &str,
    driver: Option<&str>,
    kernels: &[&[u8]],
    test: impl FnOnce() -> TestResult,
) -> TestResult {
    use crate::{Store, notes::Notes, tested};
    let subject = driver.map(|driver| tested::Subject {
        card: card.into(),
        driver: driver.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        kernels: blake3::hash(&kernels.concat()).to_hex().to_string(),
    });
    let notes = Store::of_user().map(|store| Notes::at(store.folder().join("self-test")));
    tested::once(notes.as_ref(), subject.as_ref(), || {
        tracing::info!("testing the kernels on {card}");
        test()
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize, _: &GpuUse) -> mmgp_residency::Result<Opened> {
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

    #[test]
    fn the_processor_is_what_linux_tells_first() {
        let arch = std::env::consts::ARCH;
        let pc =
            "processor\t: 0\nmodel name\t: EPYC: 7\ncpu MHz\t\t: 3000\n\nmodel name\t: other\n";
        assert_eq!(processor_in(pc), format!("{arch} EPYC: 7"));
        let arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n\n";
        assert_eq!(processor_in(arm), format!("{arch} 0x41 0xd4f"));
        assert_eq!(processor_in(""), arch);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_gpus_says_so() {
        let pager =
            |choice: DeviceChoice, gpu: &GpuUse| choice.open(gpu).map_err(|e| e.to_string());
        let any = GpuUse::default();
        let error = pager(DeviceChoice::Cuda(0), &any).err().unwrap_or_default();
        assert!(error.contains("--features cuda"), "{error}");
        assert!(pager(DeviceChoice::Auto, &any).is_ok());
        // Limits of a GPU are never left out silently.
        let limited = GpuUse { vram_limit: Some(Bytes(1 << 33)), ..GpuUse::default() };
        assert!(pager(DeviceChoice::Auto, &limited).is_err());
        assert!(pager(DeviceChoice::Cpu, &limited).is_err());
        // Nor is what only a GPU computes.
        for (activations, name) in [(Activations::Int8, "int8"), (Activations::Fp8, "fp8")] {
            let gpu = GpuUse { activations, ..GpuUse::default() };
            for choice in [DeviceChoice::Auto, DeviceChoice::Cpu] {
                let error = pager(choice, &gpu).err().unwrap_or_default();
                let expected = format!("{name} activations need a GPU");
                assert!(error.contains(&expected), "{choice}: {error}");
            }
        }
    }
}
