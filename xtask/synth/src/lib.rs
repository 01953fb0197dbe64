//! Pipelines of random weights in true shapes: what a machine needs to run a model can be measured
//! without the model.
//!
//! A [`Folder`] is the configs of a pipeline; writing it asks the models themselves, built over a
//! sketch, which tensors they read, so that names and shapes are written down once, in the models.
//! [`values`] says what stands in a tensor.
#![forbid(unsafe_code)]

mod cogvideox;
mod depth;
mod flux;
mod folder;
mod hunyuanvideo;
mod parts;
pub mod values;

pub use cogvideox::CogVideoX;
pub use depth::Depth;
pub use flux::Flux;
pub use folder::{Folder, Options, Written};
