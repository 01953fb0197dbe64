//! The CogVideoX transformer ([CogVideoX](https://arxiv.org/abs/2408.06072)): blocks in which text and
//! video attend to each other through shared weights, each conditioned by vectors of its own.
//!
//! `config` is the diffusers file, `positions` where patches lie, `blocks` the one kind of block,
//! `transformer` the stem and the walk, `pipeline` all of it, `guidance` how the guidance scale changes over a run.

mod blocks;
mod config;
mod guidance;
mod pipeline;
pub mod positions;
mod transformer;

pub use blocks::CogVideoXBlock;
pub use config::CogVideoXConfig;
pub use guidance::dynamic_guidance;
pub use pipeline::CogVideoXPipeline;
pub use transformer::{CogVideoXInputs, CogVideoXTransformer};
