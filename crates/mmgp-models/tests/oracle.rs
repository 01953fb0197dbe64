//! T5 and CLIP against candle-transformers' own, on the demo's weights, two texts at a time; Llama on
//! random ones.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    clip::text_model as theirs_clip, llama as theirs_llama, t5 as theirs_t5,
};
use mmgp_io::Checkpoint;
use mmgp_models::text::{
    clip::{ClipConfig, ClipText, Projection},
    llama::{LlamaConfig, LlamaEncoder},
    t5::{T5Config, T5Encoder},
};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn folder(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-flux").join(part)
}

/// Weights as f32, from a copy in memory: no unsafe code is needed for it.
fn their_weights(part: &str) -> Result<VarBuilder<'static>> {
    let bytes = std::fs::read(folder(part).join("model.safetensors"))?;
    Ok(VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?)
}

fn our_builder(pager: &Pager, part: &str) -> Result<ModelBuilder> {
    let checkpoint = Arc::new(Checkpoint::open_dir(folder(part), &["model"])?);
    Ok(ModelBuilder::new(pager, part, checkpoint))
}

fn ids(vocab: u32, tokens: usize, end: u32) -> Result<Tensor> {
    let mut rows: Vec<u32> =
        (0..2 * tokens as u32).map(|i| 3 + i.wrapping_mul(2_654_435_761) % (vocab - 8)).collect();
    (rows[tokens - 1], rows[2 * tokens - 4]) = (end, end);
    Ok(Tensor::from_vec(rows, (2, tokens), &Device::Cpu)?)
}

fn near(got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims());
    let largest = want.abs()?.max_all()?.to_scalar::<f32>()?;
    let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(worst <= 2e-5 * largest, "{worst} of {largest}");
    Ok(())
}

#[test]
fn t5_equals_candle() -> Result<()> {
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder("text_encoder_2").join("config.json"))?)?;
    config["is_encoder_decoder"] = true.into(); // which theirs needs
    let config: theirs_t5::Config = serde_json::from_value(config)?;
    let mut theirs = theirs_t5::T5EncoderModel::load(their_weights("text_encoder_2")?, &config)?;

    let pager = Pager::new(&Device::Cpu)?;
    let config = T5Config::from_file(folder("text_encoder_2").join("config.json"))?;
    let ours = T5Encoder::new(&config, our_builder(&pager, "text_encoder_2")?)?;
    pager.plan(Budget::Min)?;
    for tokens in [5, 32, 200] {
        let ids = ids(2000, tokens, 1)?;
        near(&ours.forward(&ids, None)?, &theirs.forward(&ids)?)?;
    }
    Ok(())
}

#[test]
fn clip_equals_candle() -> Result<()> {
    let config = theirs_clip::ClipTextConfig {
        vocab_size: 1536,
        embed_dim: 128,
        activation: theirs_clip::Activation::QuickGelu,
        intermediate_size: 384,
        max_position_embeddings: 77,
        pad_with: None,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        projection_dim: 128,
    };
    let weights = their_weights("text_encoder")?.pp("text_model");
    let theirs = theirs_clip::ClipTextTransformer::new(weights, &config)?;

    let pager = Pager::new(&Device::Cpu)?;
    let config = ClipConfig::from_file(folder("text_encoder").join("config.json"))?;
    let ours = ClipText::new(&config, Projection::No, our_builder(&pager, "text_encoder")?)?;
    pager.plan(Budget::Min)?;
    let ids = ids(1500, 77, 1535)?;
    let output = ours.forward(&ids)?;
    near(&output.last_hidden_state, &theirs.forward_with_mask(&ids, usize::MAX)?)?;
    // Pooled at the first end token of each text.
    for (item, at) in [(0, 76), (1, 73)] {
        near(&output.pooled.get(item)?, &output.last_hidden_state.get(item)?.get(at)?)?;
    }
    assert!(ours.forward(&Tensor::zeros((1, 78), DType::U32, &Device::Cpu)?).is_err());
    assert!(ours.forward(&Tensor::full(1536u32, (1, 3), &Device::Cpu)?).is_err());
    Ok(())
}

#[test]
fn llama_equals_candle() -> Result<()> {
    // As many words as the stream is wide, so that a head that is the identity gives hidden states.
    const WIDTH: usize = 48;
    let json = serde_json::json!({
        "hidden_size": WIDTH, "vocab_size": WIDTH, "intermediate_size": 92, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "max_position_embeddings": 256,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64
        }
    });
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("config.json");
    std::fs::write(&config, json.to_string())?;
    let mut tensors = HashMap::new();
    let mut add = |name: String, shape: &[usize]| -> Result<()> {
        let norm = name.contains("norm");
        let (mean, deviation) = if norm { (1f32, 0.3) } else { (0., 0.15) };
        tensors.insert(name, Tensor::randn(mean, deviation, shape, &Device::Cpu)?);
        Ok(())
    };
    add("model.embed_tokens.weight".into(), &[WIDTH, WIDTH])?;
    add("model.norm.weight".into(), &[WIDTH])?;
    for i in 0..3 {
        for (name, shape) in [
            ("input_layernorm", &[WIDTH][..]),
            ("post_attention_layernorm", &[WIDTH]),
            ("self_attn.q_proj", &[WIDTH, WIDTH]),
            ("self_attn.k_proj", &[WIDTH / 2, WIDTH]),
            ("self_attn.v_proj", &[WIDTH / 2, WIDTH]),
            ("self_attn.o_proj", &[WIDTH, WIDTH]),
            ("mlp.gate_proj", &[92, WIDTH]),
            ("mlp.up_proj", &[92, WIDTH]),
            ("mlp.down_proj", &[WIDTH, 92]),
        ] {
            add(format!("model.layers.{i}.{name}.weight"), shape)?;
        }
    }
    let file = dir.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, &file)?;
    tensors.insert("lm_head.weight".into(), Tensor::eye(WIDTH, DType::F32, &Device::Cpu)?);
    let theirs: theirs_llama::LlamaConfig = serde_json::from_value(json)?;
    let theirs_config = theirs.into_config(false);
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let theirs = theirs_llama::Llama::load(weights, &theirs_config)?;

    let pager = Pager::new(&Device::Cpu)?;
    let builder = ModelBuilder::new(&pager, "llama", Arc::new(Checkpoint::open(&file)?));
    let ours = LlamaEncoder::new(&LlamaConfig::from_file(&config)?, 1, builder)?;
    pager.plan(Budget::Min)?;
    for tokens in [4, 33, 150] {
        let ids = ids(WIDTH as u32, tokens, 1)?;
        let mut cache = theirs_llama::Cache::new(false, DType::F32, &theirs_config, &Device::Cpu)?;
        // Theirs tells the last token only.
        let want = theirs.forward(&ids, 0, &mut cache)?;
        near(&ours.forward(&ids, None, 1)?.narrow(1, tokens - 1, 1)?.squeeze(1)?, &want)?;
    }
    Ok(())
}
