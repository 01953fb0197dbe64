//! Which device models run on, and the pager over it.

#[cfg(feature = "cuda")]
use std::path::Path;
use std::{fmt, path::PathBuf, str::FromStr};

use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, DType};
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
    /// The program that compiles the tensor library's kernels, as [`OffloadBuilder::kernel_compiler`](crate::OffloadBuilder).
    pub(crate) compiler: Option<PathBuf>,
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
        std::thread::scope(|scope| {
            // Only where it can be noted that it was tried, else each start would.
            if let Some(program) = &gpu.compiler
                && driver.is_some()
                && crate::Store::of_user().is_some()
            {
                scope.spawn(|| compile(program, ordinal, gpu.vram_limit, &card, driver.as_deref()));
            }
            enable_tested(cuda.candle(), device, &card, driver.as_deref(), gpu.activations)
        })?;
    }
    let machine = driver.map(|driver| format!("{card}, {driver}, {}", host()));
    Ok(Opened { pager: Pager::over(cuda)?, machine })
}

/// Has processes of `program` compile the tensor library's kernels once for this card, driver and build.
#[cfg(feature = "cuda")]
fn compile(program: &Path, ordinal: usize, limit: Option<Bytes>, card: &str, driver: Option<&str>) {
    // For each process that has a context on the GPU beside this one's for a while.
    const ROOM: u64 = 1 << 30;
    let at_once = limit.map_or(usize::MAX, |limit| (limit.0 / ROOM).max(1) as usize);
    let tried = once(card, driver, &crate::modules::sources(), || {
        tracing::info!("the driver compiles kernels for {card}");
        crate::modules::compile_by(program, ordinal, at_once).or_else(|why| {
            tracing::info!("kernels are compiled when they are used: {why}");
            Ok(())
        })
    });
    if let Err(why) = tried {
        tracing::info!("kernels are compiled when they are used: {why}");
    }
}

/// Tests what computes on the card, all side by side, and has what passed used. What the tensor library does too, only slower,
/// may fail or be missing.
#[cfg(feature = "cuda")]
fn enable_tested(
    candle: &Device,
    device: &CudaDevice,
    card: &str,
    driver: Option<&str>,
    activations: Activations,
) -> mmgp_residency::Result<()> {
    use mmgp_models::nn::cuda as nn;
    // Whatever this process had decided before.
    mmgp_quant::disable_fp8(device);
    nn::disable(device);
    let library = mmgp_quant::product_library().to_le_bytes();
    let [int8, w8a8, hopper] = mmgp_quant::kernel_images();
    let (kernels, flash) = (nn::kernel_image(), nn::flash_image());
    let fp8 = activations == Activations::Fp8 && mmgp_quant::fp8_multiplies(device)?;
    if activations == Activations::Fp8 && !fp8 {
        tracing::warn!(
            "fp8 activations do nothing on {card}: products of fp8 with a scale for each row need compute \
             capability 9.0; weights are expanded before each product"
        );
    }
    let version = nn::cudnn_version();
    if let Err(why) = &version {
        tracing::warn!(
            "computing attention and convolutions without cuDNN 9, which is slower: it was not found ({why}); \
             install it or name its library in MMGP_CUDNN"
        );
    }
    let cudnn = version.is_ok();
    let version = version.unwrap_or_default().to_le_bytes();

    let part = |what, about, test, enable| Part { what, about, test, enable, rank: Rank::Fused };
    let products = vec![int8, w8a8, hopper, &library[..]];
    let mut parts = vec![
        Part {
            rank: Rank::Needed,
            ..part("products", products, mmgp_quant::self_test as Test, (|_| {}) as Enable)
        },
        Part {
            rank: Rank::Alone,
            ..part("fused kernels", vec![kernels], nn::self_test, nn::enable)
        },
        part("the kernel for attention", vec![flash], nn::self_test_flash, nn::enable_flash),
    ];
    if fp8 {
        let about = vec![&b"fp8"[..], w8a8, &library];
        let (test, enable): (Test, Enable) = (mmgp_quant::self_test_fp8, mmgp_quant::enable_fp8);
        parts.push(Part { rank: Rank::Alone, ..part("products in fp8", about, test, enable) });
    }
    if cudnn {
        let about = |what: &'static [u8]| vec![what, &version[..], kernels];
        // In what a GPU computes in here alone: the library compiles kernels for each.
        let test: Test = |device| nn::self_test_attention(device, DType::BF16);
        let about_it = about(b"attention in bf16");
        parts.push(part("cuDNN's attention", about_it, test, nn::enable_attention as Enable));
        let test: Test = |device| nn::self_test_convolution(device, DType::BF16);
        let about_it = about(b"convolution in bf16");
        parts.push(part("cuDNN's convolution", about_it, test, nn::enable_convolution as Enable));
    }
    let results: Vec<TestResult> = std::thread::scope(|scope| {
        let test = |part: &Part<'_>| {
            once(card, driver, &part.about, || {
                tracing::info!("testing {} on {card}", part.what);
                (part.test)(device)
            })
        };
        let started: Vec<_> = parts.iter().map(|part| scope.spawn(move || test(part))).collect();
        let joined = started.into_iter().zip(&parts).map(|(test, part)| {
            let panicked =
                |_| Err(mmgp_quant::Error::Invalid(format!("{}: it panicked", part.what)));
            test.join().unwrap_or_else(panicked)
        });
        joined.collect()
    });
    // A fault of one takes the context from all: whoever reads the first error should know of the others.
    for (part, result) in parts.iter().zip(&results) {
        if let Err(error) = result {
            tracing::warn!("the self-test of {} failed: {error}", part.what);
        }
    }
    for (part, result) in parts.iter().zip(results) {
        match result {
            Ok(()) if part.rank == Rank::Fused && !nn::enabled(device) => {}
            Ok(()) => (part.enable)(device),
            // What broke the context leaves nothing to compute with.
            Err(error) if part.rank == Rank::Needed || candle.synchronize().is_err() => {
                return Err(error.into());
            }
            Err(error) => {
                tracing::warn!("computing without {}, which is slower: {error}", part.what);
            }
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
type Test = fn(&CudaDevice) -> TestResult;
#[cfg(feature = "cuda")]
type Enable = fn(&CudaDevice);

/// A part of what computes on a GPU.
#[cfg(feature = "cuda")]
struct Part<'a> {
    what: &'static str,
    /// What its test's result is about.
    about: Vec<&'a [u8]>,
    test: Test,
    enable: Enable,
    rank: Rank,
}

/// What a part is worth.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, PartialEq)]
enum Rank {
    /// Nothing computes without it.
    Needed,
    /// Of use whatever becomes of others.
    Alone,
    /// Of use beside the fused kernels.
    Fused,
}

/// What a self-test says.
#[cfg(feature = "cuda")]
type TestResult = Result<(), mmgp_quant::Error>;

/// Does what is done once for this card, driver and build: kernels, and versions of libraries.
#[cfg(feature = "cuda")]
fn once(
    card: &str,
    driver: Option<&str>,
    kernels: &[&[u8]],
    run: impl FnOnce() -> TestResult,
) -> TestResult {
    use crate::{Store, notes::Notes, tested};
    let subject = driver.map(|driver| tested::Subject {
        card: card.into(),
        driver: driver.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        kernels: blake3::hash(&kernels.concat()).to_hex().to_string(),
    });
    let notes = Store::of_user().map(|store| Notes::at(store.folder().join("self-test")));
    tested::once(notes.as_ref(), subject.as_ref(), run)
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
