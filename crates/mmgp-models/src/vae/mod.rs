//! Autoencoders: from pictures to latents and back.

pub mod kl;
mod kl_parts;
