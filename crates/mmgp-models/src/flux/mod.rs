//! The FLUX.1 transformer: double blocks in which picture and text keep their own weights, then
//! single blocks over both.
//!
//! `config` is the diffusers file, `transformer` the stem and the walk over the blocks of `nn::joint`, `latents` how a picture's latents become tokens and positions.

mod config;
pub mod latents;
mod pipeline;
mod transformer;

pub use config::FluxConfig;
pub use pipeline::FluxPipeline;
pub use transformer::{FluxInputs, FluxTransformer};
