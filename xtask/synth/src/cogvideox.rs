//! CogVideoX' configs.

use mmgp_io::Dtype;
use mmgp_models::{
    cogvideox::{CogVideoXConfig, CogVideoXPipeline, CogVideoXTransformer},
    vae::{
        cogvideox::{CogVideoXDecoder, CogVideoXVaeConfig},
        cogvideox_encoder::CogVideoXEncoder,
    },
};
use serde_json::json;

use crate::{
    folder::{Folder, Model},
    parts,
};

/// A CogVideoX pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CogVideoX {
    /// Positions are added, weights in f16, DDIM.
    Small,
    /// Positions turn, weights in bf16, DPM.
    Large,
    /// The same, from a picture.
    LargeFromPicture,
}

impl Folder {
    /// A pipeline of true widths, with so many of the blocks: 30 (42 of the large ones) and 24 of T5 are
    /// all.
    pub fn cogvideox(kind: CogVideoX, layers: usize, t5: usize) -> Self {
        let (large, picture) = (kind != CogVideoX::Small, kind == CogVideoX::LargeFromPicture);
        let transformer = json!({
            "_class_name": "CogVideoXTransformer3DModel",
            "_diffusers_version": "0.30.0.dev0",
            "activation_fn": "gelu-approximate",
            "attention_bias": true,
            "attention_head_dim": 64,
            "dropout": 0.0,
            "flip_sin_to_cos": true,
            "freq_shift": 0,
            "in_channels": if picture { 32 } else { 16 },
            "max_text_seq_length": 226,
            "norm_elementwise_affine": true,
            "norm_eps": 1e-5,
            "num_attention_heads": if large { 48 } else { 30 },
            "num_layers": layers,
            "out_channels": 16,
            "patch_size": 2,
            "sample_frames": 49,
            "sample_height": 60,
            "sample_width": 90,
            "spatial_interpolation_scale": 1.875,
            "temporal_compression_ratio": 4,
            "temporal_interpolation_scale": 1.0,
            "text_embed_dim": 4096,
            "time_embed_dim": 512,
            "timestep_activation_fn": "silu",
            "use_learned_positional_embeddings": picture,
            "use_rotary_positional_embeddings": large,
        });
        let vae = json!({
            "_class_name": "AutoencoderKLCogVideoX",
            "_diffusers_version": "0.30.0.dev0",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 256, 512],
            "down_block_types": vec!["CogVideoXDownBlock3D"; 4],
            "up_block_types": vec!["CogVideoXUpBlock3D"; 4],
            "force_upcast": true,
            "in_channels": 3,
            "latent_channels": 16,
            "layers_per_block": 3,
            "norm_eps": 1e-6,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_height": 480,
            "sample_width": 720,
            "scaling_factor": if large { 0.7 } else { 1.15258426 },
            "shift_factor": null,
            "temporal_compression_ratio": 4,
            "use_post_quant_conv": false,
            "use_quant_conv": false,
        });
        let scheduler = if large { "CogVideoXDPMScheduler" } else { "CogVideoXDDIMScheduler" };
        let config = json!({
            "_class_name": scheduler,
            "_diffusers_version": "0.30.0.dev0",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": false,
            "clip_sample_range": 1.0,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": true,
            "sample_max_value": 1.0,
            "set_alpha_to_one": true,
            "snr_shift_scale": if large { 1.0 } else { 3.0 },
            "steps_offset": 0,
            "timestep_spacing": "trailing",
            "trained_betas": null,
        });
        let dtype = if large { Dtype::BF16 } else { Dtype::F16 };
        let models = vec![
            parts::t5("text_encoder", t5),
            Model::new(
                "transformer",
                "CogVideoXTransformer3DModel",
                transformer,
                |path, sketch| {
                    CogVideoXTransformer::new(
                        &CogVideoXConfig::from_file(path)?,
                        sketch.builder(),
                    )?;
                    Ok(())
                },
            ),
            Model::new("vae", "AutoencoderKLCogVideoX", vae, |path, sketch| {
                let config = CogVideoXVaeConfig::from_file(path)?;
                CogVideoXEncoder::new(&config, sketch.builder())?;
                CogVideoXDecoder::new(&config, sketch.builder())?;
                Ok(())
            }),
        ];
        Self {
            class: if picture { CogVideoXPipeline::FROM_PICTURE } else { "CogVideoXPipeline" },
            models: models.into_iter().map(|model| model.stored_in(dtype)).collect(),
            scheduler: (scheduler, config),
            tokenizers: vec![("tokenizer", "T5Tokenizer", parts::T5_TOKENIZER)],
        }
    }
}
