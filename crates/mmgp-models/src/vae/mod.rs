//! Autoencoders: from pictures and videos to latents and back.
//!
//! Decoder and encoder are separate models over one checkpoint, so that a run which only draws has
//! no encoder in memory. Each is all stem: its activations are far larger than its weights.

pub mod cogvideox;
pub mod cogvideox_encoder;
mod cogvideox_parts;
pub mod kl;
mod kl_parts;
mod spool;
pub(crate) mod tiling;
