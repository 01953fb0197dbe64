//! FLUX.1's configs.

use mmgp_models::{
    flux::{FluxConfig, FluxTransformer},
    vae::kl::{KlConfig, KlDecoder, KlEncoder},
};
use serde_json::json;

use crate::{
    folder::{Folder, Model},
    parts,
};

/// A FLUX.1 pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flux {
    /// Guided, with a schedule that depends on the picture's size.
    Dev,
    /// Four steps.
    Schnell,
}

impl Folder {
    /// A pipeline of true widths, with so many of the blocks: 19 double and 38 single ones and 24 of
    /// T5 are all.
    pub fn flux(kind: Flux, double: usize, single: usize, t5: usize) -> Self {
        let dev = kind == Flux::Dev;
        // The published files have no `axes_dims_rope` and no `out_channels`.
        let transformer = json!({
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": "0.30.0.dev0",
            "attention_head_dim": 128,
            "guidance_embeds": dev,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": double,
            "num_single_layers": single,
            "patch_size": 1,
            "pooled_projection_dim": 768,
        });
        let vae = json!({
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.30.0.dev0",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": vec!["DownEncoderBlock2D"; 4],
            "up_block_types": vec!["UpDecoderBlock2D"; 4],
            "force_upcast": true,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "latents_mean": null,
            "latents_std": null,
            "layers_per_block": 2,
            "mid_block_add_attention": true,
            "norm_num_groups": 32,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_post_quant_conv": false,
            "use_quant_conv": false,
        });
        let scheduler = json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.30.0.dev0",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": if dev { 3.0 } else { 1.0 },
            "use_dynamic_shifting": dev,
        });
        Self {
            class: "FluxPipeline",
            models: vec![
                parts::clip("text_encoder"),
                parts::t5("text_encoder_2", t5),
                Model::new("transformer", "FluxTransformer2DModel", transformer, |path, sketch| {
                    FluxTransformer::new(&FluxConfig::from_file(path)?, sketch.builder())?;
                    Ok(())
                }),
                Model::new("vae", "AutoencoderKL", vae, |path, sketch| {
                    let config = KlConfig::from_file(path)?;
                    KlEncoder::new(&config, sketch.builder())?;
                    KlDecoder::new(&config, sketch.builder())?;
                    Ok(())
                }),
            ],
            scheduler: ("FlowMatchEulerDiscreteScheduler", scheduler),
            tokenizers: vec![
                ("tokenizer", "CLIPTokenizer", parts::CLIP_TOKENIZER),
                ("tokenizer_2", "T5TokenizerFast", parts::T5_TOKENIZER),
            ],
        }
    }
}
