//! The FLUX.1 transformer: double blocks in which picture and text keep their own weights, then
//! single blocks over both.
//!
//! `config` is the diffusers file, `blocks` the two kinds of block, `transformer` the stem and the
//! walk, `latents` how a picture's latents become tokens and positions.

mod blocks;
mod config;
pub mod latents;
mod pipeline;
mod transformer;

pub use blocks::{DoubleBlock, SingleBlock};
pub use config::FluxConfig;
pub use pipeline::FluxPipeline;
pub use transformer::{FluxInputs, FluxTransformer};
