//! HunyuanVideo's configs.

use mmgp_io::Dtype;
use mmgp_models::{
    hunyuanvideo::{
        HunyuanVideoConfig, HunyuanVideoDecoder, HunyuanVideoTransformer, HunyuanVideoVaeConfig,
    },
    text::llama::{LlamaConfig, LlamaEncoder},
};
use serde_json::json;

use crate::{
    folder::{Folder, Model},
    parts,
};

/// Its conversation is as many tokens long as the real one's.
const TOKENIZER: &str = "crates/mmgp-models/tests/pipelines/hunyuanvideo/tokenizer";

impl Folder {
    /// A pipeline of true widths, with so many of the blocks: 20 double and 40 single ones and 32 of the
    /// Llama are all. What an encoder of pictures has is left out.
    pub fn hunyuanvideo(double: usize, single: usize, llama: usize) -> Self {
        let transformer = json!({
            "_class_name": "HunyuanVideoTransformer3DModel",
            "_diffusers_version": "0.32.0.dev0",
            "attention_head_dim": 128,
            "guidance_embeds": true,
            "in_channels": 16,
            "mlp_ratio": 4.0,
            "num_attention_heads": 24,
            "num_layers": double,
            "num_refiner_layers": 2,
            "num_single_layers": single,
            "out_channels": 16,
            "patch_size": 2,
            "patch_size_t": 1,
            "pooled_projection_dim": 768,
            "qk_norm": "rms_norm",
            "rope_axes_dim": [16, 56, 56],
            "rope_theta": 256.0,
            "text_embed_dim": 4096,
        });
        let encoder = json!({
            "architectures": ["LlamaModel"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128258,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": llama,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_scaling": null,
            "rope_theta": 500000.0,
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
            "vocab_size": 128320,
        });
        let vae = json!({
            "_class_name": "AutoencoderKLHunyuanVideo",
            "_diffusers_version": "0.32.0.dev0",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": vec!["HunyuanVideoDownBlock3D"; 4],
            "up_block_types": vec!["HunyuanVideoUpBlock3D"; 4],
            "in_channels": 3,
            "latent_channels": 16,
            "layers_per_block": 2,
            "mid_block_add_attention": true,
            "norm_num_groups": 32,
            "out_channels": 3,
            "scaling_factor": 0.476986,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
        });
        let scheduler = json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.32.0.dev0",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 7.0,
            "use_dynamic_shifting": false,
        });
        Self {
            class: "HunyuanVideoPipeline",
            models: vec![
                Model::new("text_encoder", "LlamaModel", encoder, |path, sketch| {
                    let config = LlamaConfig::from_file(path)?;
                    // All of it, though the pipeline needs no last blocks.
                    LlamaEncoder::new(&config, 1, sketch.builder())?;
                    Ok(())
                })
                .stored_in(Dtype::F16),
                parts::clip("text_encoder_2").stored_in(Dtype::F16),
                Model::new(
                    "transformer",
                    "HunyuanVideoTransformer3DModel",
                    transformer,
                    |path, sketch| {
                        let config = HunyuanVideoConfig::from_file(path)?;
                        HunyuanVideoTransformer::new(&config, sketch.builder())?;
                        Ok(())
                    },
                ),
                Model::new("vae", "AutoencoderKLHunyuanVideo", vae, |path, sketch| {
                    let config = HunyuanVideoVaeConfig::from_file(path)?;
                    HunyuanVideoDecoder::new(&config, sketch.builder())?;
                    Ok(())
                })
                .stored_in(Dtype::F16),
            ],
            scheduler: ("FlowMatchEulerDiscreteScheduler", scheduler),
            tokenizers: vec![
                ("tokenizer", "LlamaTokenizerFast", TOKENIZER),
                ("tokenizer_2", "CLIPTokenizer", parts::CLIP_TOKENIZER),
            ],
        }
    }
}
