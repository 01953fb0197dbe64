//! Running generative models that are larger than the machine.
//!
//! The facade over the crates below it: [`Offload`] names a device and a budget, loads a pipeline or
//! single models under names, and runs them as if everything were resident.
//!
//! ```no_run
//! use mmgp::{Budget, Offload};
//!
//! # fn main() -> mmgp::Result<()> {
//! let mut offload = Offload::builder().budget(Budget::Percent(25.)).build()?;
//! let mut pipeline = offload.pipeline("assets/tiny-flux")?;
//! println!("{}", offload.plan()?); // made from headers alone, nothing is loaded yet
//! let request = pipeline.defaults().request("red heart");
//! let drawn = offload.generate(&mut *pipeline, &request, &mut |_| ())?;
//! mmgp::write_png("red-heart.png".as_ref(), &drawn.frames[0], &[])?;
//! println!("{}", offload.report());
//! # Ok(())
//! # }
//! ```
//!
//! Unmodified candle modules are paged whole:
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, linear};
//! use mmgp::Offload;
//!
//! # fn main() -> mmgp::Result<()> {
//! let offload = Offload::builder().build()?;
//! let layer = offload.module("layer", "layer.safetensors", DType::F32, |vb| linear(4, 4, vb))?;
//! let x = Tensor::zeros((1, 4), DType::F32, &Device::Cpu)?;
//! let y = layer.run(|layer| layer.forward(&x))?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

#[cfg(any(test, feature = "cuda"))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // only its tests run without a GPU
mod compilers;
mod convert;
mod device;
mod error;
mod image;
mod latents;
#[cfg(feature = "cuda")]
mod modules;
mod names;
mod notes;
mod offload;
mod pace;
mod picture;
mod store;
#[cfg(any(test, feature = "cuda"))]
mod tested;
mod times;
mod video;

pub use convert::Converted;
pub use device::DeviceChoice;
pub use error::{Error, Result};
pub use image::read_picture;
pub use latents::{About, Denoised};
pub use mmgp_io::Overwrite;
pub use mmgp_lora::{AdapterArg, Skipped, StepWeights, Unfit};
pub use mmgp_models::{
    Activations, Defaults, Event, GuidanceSchedule, Latents, Output, Picture, Pipeline, Recipe,
    Request, Tiles,
};
pub use mmgp_profiles::{Amounts, Hardware, Models, Profile, QuantizationType, Settings, Switch};
pub use mmgp_residency::{Budget, Budgets, Bytes, Forecast, Plan, Report, process_peak};
#[cfg(feature = "cuda")]
pub use modules::compile as compile_kernels;
pub use names::{Medium, Names};
pub use offload::{Module, Offload, OffloadBuilder};
pub use picture::write_png;
pub use store::{Entry, Store};
pub use video::{Video, VideoFormat};
