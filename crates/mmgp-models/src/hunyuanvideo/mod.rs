//! HunyuanVideo ([HunyuanVideo](https://arxiv.org/abs/2412.03603)): a transformer whose first blocks
//! have weights of their own for text and video, and whose last ones share them; its text, states of a
//! Llama, is refined first.
//!
//! `config` is the diffusers file, `refiner` the blocks of its own (the others are those of `nn::joint`),
//! `transformer` the stem and the walk; `vae` decodes latents to frames, in tiles of space and time, by the steps of `vae_parts`;
//! `prompt` is the text that stands around a prompt, and `pipeline` all of it.

mod config;
mod pipeline;
pub mod prompt;
mod refiner;
mod transformer;
mod vae;
mod vae_config;
mod vae_parts;

pub use config::HunyuanVideoConfig;
pub use pipeline::HunyuanVideoPipeline;
pub use refiner::RefinerBlock;
pub use transformer::{HunyuanVideoInputs, HunyuanVideoTransformer};
pub use vae::{HunyuanVideoDecoder, Tile, Tiling};
pub use vae_config::HunyuanVideoVaeConfig;

/// ε of all norms.
const EPS: f64 = 1e-6;
