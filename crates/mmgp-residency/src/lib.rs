//! Paging model weights under candle tensors: models larger than the memory they run in.
//!
//! Three nouns carry the crate. A *block* is the smallest group of weights that moves together; a
//! [`Plan`] says which blocks stay and which stream, through how many slots, within a [`Budget`]; a
//! *lease* is the guard under which a block's weights are on the device. A module is built once,
//! from placeholders, by a [`ModelBuilder`]; its weights are then reached only through passes:
//!
//! ```
//! use std::{collections::BTreeMap, sync::Arc};
//!
//! use candle_core::{Device, Tensor};
//! use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
//! use mmgp_quant::Bias;
//! use mmgp_residency::{Budget, ModelBuilder, Pager};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("model.safetensors");
//! # let spec = |name: &str| TensorSpec { name: name.into(), dtype: Dtype::F32, shape: vec![2, 2] };
//! # let specs: Vec<_> = (0..3).map(|i| spec(&format!("layers.{i}.weight"))).collect();
//! # let mut writer = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::No)?;
//! # for spec in &specs { writer.write(&spec.name, bytemuck::bytes_of(&[0f32, 2., 1., 0.]))?; }
//! # writer.finish()?;
//! let pager = Pager::new(&Device::Cpu)?;
//! let builder = ModelBuilder::new(&pager, "tower", Arc::new(Checkpoint::open(&path)?));
//! let layers = (0..3)
//!     .map(|i| builder.block(&format!("layers.{i}")).linear(2, 2, Bias::No))
//!     .collect::<Result<Vec<_>, _>>()?;
//! let model = builder.finish((), layers)?;
//! pager.plan(Budget::Min)?; // one block at a time
//!
//! let mut x = Tensor::new(&[[1f32, 1.]], &Device::Cpu)?;
//! let pass = model.pass()?;
//! for layer in pass.blocks() {
//!     x = layer?.run(|layer| layer.forward(&x))?;
//! }
//! assert_eq!(x.to_vec2::<f32>()?, [[4., 2.]]);
//! assert_eq!(pager.report().peak.0, 256); // one block of three
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)] // but below `device/`, for the GPU

mod builder;
mod bytes;
mod device;
mod error;
#[cfg(test)]
mod handoffs;
mod image;
mod lease;
mod memory;
mod order;
mod pager;
mod placeholder;
mod plan;
mod report;
#[cfg(any(feature = "cuda", test))]
mod ring;
mod save;
mod schedule;
mod sync;

pub use builder::{ModelBuilder, Sketch, check_pageable};
pub use bytes::Bytes;
pub use device::{Clock, Device, Host, Moved, Occupancy, Slot, VisitTimes};
#[cfg(feature = "cuda")]
pub use device::{Cuda, CudaOptions, Files, Transfers};
pub use error::{Error, Result};
pub use image::{ALIGN, BlockImage, Digest, Expected, ImageTensor, Making, Segment};
pub use lease::{Paged, Pass, Visit};
pub use memory::HostMemory;
pub use pager::{Attachment, Attachments, BlockTarget, Pager};
pub use plan::{Budget, Budgets, ModelPlan, Plan, SlotPlan};
pub use report::{BlockForecast, Forecast, ModelReport, Report, process_peak};
pub use save::Saved;
pub use schedule::PassCosts;
