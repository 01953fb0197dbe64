//! Diffusion models written as a stem and a list of blocks, so that their weights can be paged.
//!
//! Three nouns carry the crate. A *config* is the checked file of a model; a *model*
//! ([`flux::FluxTransformer`], [`cogvideox::CogVideoXTransformer`], [`text::t5::T5Encoder`],
//! [`text::clip::ClipText`], [`vae::kl::KlDecoder`]) is built from a config and a `ModelBuilder`, and
//! its weights are on the device only inside its `forward`; a *schedule* ([`schedulers`]) says which
//! noise levels a run visits. Nothing here knows where weights lie or how they travel.
//!
//! ```
//! use mmgp_models::schedulers::flow_match_euler::{
//!     FlowMatchConfig, FlowMatchEuler, Request, linspace_sigmas,
//! };
//! use mmgp_models::{flux::latents, noise::torch_normal};
//! use candle_core::{Device, Tensor};
//!
//! # fn main() -> mmgp_models::Result<()> {
//! // The noise that seed 42 gives in diffusers, as the tokens that FLUX sees.
//! let noise = Tensor::from_vec(torch_normal(42, 16 * 4 * 6), (1, 16, 4, 6), &Device::Cpu)?;
//! let mut sample = latents::pack(&noise)?;
//! assert_eq!(sample.dims(), [1, 6, 64]);
//!
//! let scheduler = FlowMatchEuler::new(FlowMatchConfig::default())?;
//! let sigmas = linspace_sigmas(4);
//! let schedule = scheduler.schedule(&Request { sigmas: Some(&sigmas), ..Request::default() })?;
//! for step in 0..schedule.len() {
//!     let velocity = &sample; // where a FluxTransformer's forward would stand
//!     sample = schedule.step(step, velocity, &sample)?;
//! }
//! # Ok(())
//! # }
//! ```

#![cfg_attr(not(feature = "cuda"), forbid(unsafe_code))]
#![deny(unsafe_code)]

pub mod cogvideox;
mod config;
mod error;
pub mod flux;
pub mod hunyuanvideo;
pub mod nn;
pub mod noise;
mod pipeline;
mod registry;
pub mod schedulers;
pub mod text;
pub mod vae;

pub use error::{Error, Result};
pub use pipeline::{
    Activations, Defaults, Event, GuidanceSchedule, Latents, OpenOptions, Output, Picture,
    Pipeline, PipelinePart, Recipe, Replaced, Request, Tiles,
};
pub use registry::{ModelIndex, open_pipeline};
