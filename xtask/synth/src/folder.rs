//! A pipeline's folder in diffusers' layout: its configs, and writing it.
//!
//! Configs are written first and read back by the models' own readers; `model_index.json`, which
//! makes a folder a pipeline, comes last.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use mmgp_io::{Dtype, TensorSpec, write_sharded};
use mmgp_models::{
    flux::{FluxConfig, FluxTransformer},
    text::{
        clip::{ClipConfig, ClipText, Projection},
        t5::{T5Config, T5Encoder},
    },
    vae::kl::{KlConfig, KlDecoder, KlEncoder},
};
use mmgp_residency::{ModelBuilder, Pager};
use serde_json::{Value, json};

use crate::values;

/// A FLUX.1 pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flux {
    /// Guided, with a schedule that depends on the picture's size.
    Dev,
    /// Four steps.
    Schnell,
}

/// The configs of a FLUX pipeline, as their files have them.
#[derive(Clone, Debug)]
pub struct Folder {
    /// `FluxTransformer2DModel`
    pub transformer: Value,
    /// `CLIPTextModel`
    pub text_encoder: Value,
    /// `T5EncoderModel`
    pub text_encoder_2: Value,
    /// `AutoencoderKL`
    pub vae: Value,
    /// `FlowMatchEulerDiscreteScheduler`
    pub scheduler: Value,
}

/// How a folder is written.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Other seeds give other weights.
    pub seed: u64,
    /// A file of weights is at most so large, in bytes, or holds a single tensor.
    pub shard_bytes: u64,
    /// The folder whose `tokenizer` and `tokenizer_2` are copied.
    pub tokenizers: &'a Path,
}

/// The weights of one model, written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its folder.
    pub model: &'static str,
    /// Tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Making and writing them, until they are on the disk.
    pub took: Duration,
}

impl Folder {
    /// A pipeline of true widths, with so many of the blocks: 19 double and 38 single ones and 24 of
    /// T5 are all.
    pub fn flux(kind: Flux, double: usize, single: usize, t5: usize) -> Self {
        let dev = kind == Flux::Dev;
        Self {
            // The published files have no `axes_dims_rope` and no `out_channels`.
            transformer: json!({
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
            }),
            text_encoder: json!({
                "architectures": ["CLIPTextModel"],
                "model_type": "clip_text_model",
                "torch_dtype": "bfloat16",
                "vocab_size": 49408,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "projection_dim": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "max_position_embeddings": 77,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 1,
            }),
            text_encoder_2: json!({
                "architectures": ["T5EncoderModel"],
                "model_type": "t5",
                "torch_dtype": "bfloat16",
                "vocab_size": 32128,
                "d_model": 4096,
                "d_kv": 64,
                "d_ff": 10240,
                "num_layers": t5,
                "num_decoder_layers": t5,
                "num_heads": 64,
                "relative_attention_num_buckets": 32,
                "relative_attention_max_distance": 128,
                "layer_norm_epsilon": 1e-6,
                "feed_forward_proj": "gated-gelu",
                "dense_act_fn": "gelu_new",
                "is_gated_act": true,
                "is_encoder_decoder": true,
                "tie_word_embeddings": false,
                "decoder_start_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 0,
            }),
            vae: json!({
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
            }),
            scheduler: json!({
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "_diffusers_version": "0.30.0.dev0",
                "base_image_seq_len": 256,
                "base_shift": 0.5,
                "max_image_seq_len": 4096,
                "max_shift": 1.15,
                "num_train_timesteps": 1000,
                "shift": if dev { 3.0 } else { 1.0 },
                "use_dynamic_shifting": dev,
            }),
        }
    }

    /// Writes the folder, which must not exist or be empty. `tell` hears of each model's weights.
    ///
    /// # Errors
    /// A folder that is in use; a config that no model can have; a disk that refuses.
    pub fn write(
        &self,
        dir: &Path,
        options: &Options<'_>,
        mut tell: impl FnMut(&Written),
    ) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
        let empty = fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?.next();
        ensure!(empty.is_none(), "{} is not empty: name a new folder", dir.display());

        for name in ["tokenizer", "tokenizer_2"] {
            copy_files(&options.tokenizers.join(name), &dir.join(name))?;
        }
        write_json(&dir.join("scheduler/scheduler_config.json"), &self.scheduler)?;
        // Every config before any weights: a mistake in one costs nothing then.
        let models = [
            ("text_encoder", &self.text_encoder),
            ("text_encoder_2", &self.text_encoder_2),
            ("transformer", &self.transformer),
            ("vae", &self.vae),
        ];
        let mut sketched = Vec::new();
        for (name, config) in models {
            let path = dir.join(name).join("config.json");
            write_json(&path, config)?;
            sketched.push((name, tensors(name, &path)?));
        }
        for (name, tensors) in sketched {
            tell(&write_weights(name, &dir.join(name), &tensors, options)?);
        }
        write_json(&dir.join("model_index.json"), &index())
    }
}

/// What the model of this name asks for under the config at `path`.
fn tensors(model: &'static str, path: &Path) -> Result<Vec<(String, Vec<usize>)>> {
    let pager = Pager::new(&Device::Cpu)?;
    let (builder, sketch) = ModelBuilder::sketch(&pager, model, Dtype::BF16);
    let tensors = match model {
        "text_encoder" => {
            ClipText::new(&ClipConfig::from_file(path)?, Projection::No, builder)?;
            sketch.tensors()
        }
        "text_encoder_2" => {
            T5Encoder::new(&T5Config::from_file(path)?, builder)?;
            sketch.tensors()
        }
        "transformer" => {
            FluxTransformer::new(&FluxConfig::from_file(path)?, builder)?;
            sketch.tensors()
        }
        _ => {
            let config = KlConfig::from_file(path)?;
            KlEncoder::new(&config, builder)?;
            let (builder, decoder) = ModelBuilder::sketch(&pager, model, Dtype::BF16);
            KlDecoder::new(&config, builder)?;
            [sketch.tensors(), decoder.tensors()].concat()
        }
    };
    Ok(tensors)
}

fn write_weights(
    model: &'static str,
    dir: &Path,
    tensors: &[(String, Vec<usize>)],
    options: &Options<'_>,
) -> Result<Written> {
    let begun = Instant::now();
    // transformers and diffusers name their files differently.
    let stem = match model.starts_with("text_encoder") {
        true => "model",
        false => "diffusion_pytorch_model",
    };
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, shape)| TensorSpec::new(name, Dtype::BF16, shape.clone()))
        .collect();
    write_sharded(dir, stem, &specs, options.shard_bytes, |spec, write| {
        values::make(&spec.name, &spec.shape, options.seed, write)
    })?;
    let bytes = specs.iter().filter_map(TensorSpec::bytes).sum();
    Ok(Written { model, tensors: specs.len(), bytes, took: begun.elapsed() })
}

fn index() -> Value {
    json!({
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.30.0.dev0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    }
    fs::write(path, format!("{value:#}\n")).with_context(|| format!("{}", path.display()))
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("{}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("{}", from.display()))? {
        let path = entry?.path();
        let copy = to.join(path.file_name().unwrap_or_default());
        // Read and written, so that the copy has not the rights of the original.
        let bytes = fs::read(&path).with_context(|| format!("{}", path.display()))?;
        fs::write(&copy, bytes).with_context(|| format!("{}", copy.display()))?;
    }
    Ok(())
}
