//! Llama where the golden case says nothing: other names of its tensors, the blocks that are left
//! aside, padding on either side, biases. The golden case's weights, and texts made up here.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::text::llama::{LlamaConfig, LlamaEncoder};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Tensors = HashMap<String, Tensor>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/models/llama")
}

fn stored() -> Result<(LlamaConfig, Tensors)> {
    let config = LlamaConfig::from_file(folder().join("config.json"))?;
    let tensors = candle_core::safetensors::load(folder().join("model.safetensors"), &Device::Cpu)?;
    Ok((config, tensors))
}

fn model(config: &LlamaConfig, end: usize, tensors: &Tensors) -> Result<(LlamaEncoder, Pager)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &path)?;
    let checkpoint = Arc::new(Checkpoint::open(&path)?); // outlives the file's name
    let pager = Pager::new(&Device::Cpu)?;
    let model = LlamaEncoder::new(config, end, ModelBuilder::new(&pager, "model", checkpoint))?;
    pager.plan(Budget::Min)?;
    Ok((model, pager))
}

fn ids(rows: &[&[u32]]) -> Result<Tensor> {
    Ok(Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu)?)
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

fn near(got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims());
    let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    let largest = want.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(worst <= 1e-5 * largest, "{worst} of {largest}");
    Ok(())
}

#[test]
fn what_is_behind_the_hidden_state_is_not_there() -> Result<()> {
    let (config, mut tensors) = stored()?;
    let text = ids(&[&[5, 6, 7, 8, 40, 3]])?;
    let (whole, all) = model(&config, 1, &tensors)?;
    let want = whole.forward(&text, None, 3)?;

    let (short, pager) = model(&config, 3, &tensors)?;
    assert_eq!((whole.blocks(), short.blocks()), (5, 3));
    assert!(short.unused().is_empty(), "{:?}", short.unused());
    assert_eq!(bits(&short.forward(&text, None, 3)?)?, bits(&want)?);
    let weights = |pager: &Pager| pager.report().models[0].weights;
    assert!(weights(&pager) < weights(&all));
    let error = short.forward(&text, None, 2).unwrap_err().to_string();
    assert!(error.contains("built up to 3"), "{error}");

    tensors
        .retain(|name, _| !["layers.3.", "layers.4.", "norm."].iter().any(|p| name.starts_with(p)));
    let (short, _) = model(&config, 3, &tensors)?;
    assert_eq!(bits(&short.forward(&text, None, 3)?)?, bits(&want)?);
    assert!(model(&config, 2, &tensors).is_err());
    // The embeddings are a hidden state too.
    let (none, _) = model(&config, 6, &tensors)?;
    let rows = tensors["embed_tokens.weight"].index_select(&text.squeeze(0)?, 0)?;
    let rows = rows.to_dtype(DType::F32)?.unsqueeze(0)?;
    assert_eq!(bits(&none.forward(&text, None, 6)?)?, bits(&rows)?);
    Ok(())
}

#[test]
fn tensors_of_a_whole_language_model_have_a_prefix() -> Result<()> {
    let (config, tensors) = stored()?;
    let text = ids(&[&[9, 2, 77]])?;
    let want = model(&config, 1, &tensors)?.0.forward(&text, None, 1)?;
    let mut all: Tensors = tensors.into_iter().map(|(k, v)| (format!("model.{k}"), v)).collect();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    all.insert("lm_head.weight".into(), zeros(&[79, 40])?);
    for i in 0..5 {
        let name = format!("model.layers.{i}.self_attn.rotary_emb.inv_freq");
        all.insert(name, zeros(&[5])?);
    }
    let (prefixed, _) = model(&config, 1, &all)?;
    assert!(prefixed.unused().is_empty(), "{:?}", prefixed.unused());
    assert_eq!(bits(&prefixed.forward(&text, None, 1)?)?, bits(&want)?);
    Ok(())
}

#[test]
fn padding_changes_no_token_on_either_side() -> Result<()> {
    let (config, tensors) = stored()?;
    let (llama, _) = model(&config, 1, &tensors)?;
    let text: &[u32] = &[5, 6, 7, 8];
    let want = llama.forward(&ids(&[text])?, None, 2)?;
    let padded = ids(&[&[5, 6, 7, 8, 1, 2, 0], &[3, 4, 5, 5, 6, 7, 8]])?;
    let mask = ids(&[&[1, 1, 1, 1, 0, 0, 0], &[0, 0, 0, 1, 1, 1, 1]])?;
    let got = llama.forward(&padded, Some(&mask), 2)?;
    assert!(!got.flatten_all()?.to_vec1::<f32>()?.iter().any(|v| v.is_nan()));
    near(&got.narrow(0, 0, 1)?.narrow(1, 0, 4)?, &want)?;
    // Only distances count, so that text may stand further right.
    near(&got.narrow(0, 1, 1)?.narrow(1, 3, 4)?, &want)?;
    let seen = llama.forward(&padded, None, 2)?.narrow(0, 1, 1)?.narrow(1, 3, 4)?;
    assert!((seen - want)?.abs()?.max_all()?.to_scalar::<f32>()? > 0.1);
    Ok(())
}

#[test]
fn biases_are_read_where_the_config_has_them() -> Result<()> {
    let (mut config, mut tensors) = stored()?;
    let text = ids(&[&[5, 6, 7, 8]])?;
    let want = model(&config, 1, &tensors)?.0.forward(&text, None, 1)?;
    (config.attention_bias, config.mlp_bias) = (true, true);
    assert!(model(&config, 1, &tensors).is_err());
    for i in 0..5 {
        for (name, width) in [
            ("self_attn.q_proj", 40),
            ("self_attn.k_proj", 20),
            ("self_attn.v_proj", 20),
            ("self_attn.o_proj", 40),
            ("mlp.gate_proj", 62),
            ("mlp.up_proj", 62),
            ("mlp.down_proj", 40),
        ] {
            let zeros = Tensor::zeros(width, DType::F32, &Device::Cpu)?;
            tensors.insert(format!("layers.{i}.{name}.bias"), zeros);
        }
    }
    near(&model(&config, 1, &tensors)?.0.forward(&text, None, 1)?, &want)?;
    let one = Tensor::ones(62, DType::F32, &Device::Cpu)?;
    tensors.insert("layers.2.mlp.up_proj.bias".into(), one);
    let moved = model(&config, 1, &tensors)?.0.forward(&text, None, 1)?;
    assert!((moved - want)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-2);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (config, tensors) = stored()?;
    let (llama, _) = model(&config, 1, &tensors)?;
    let text = ids(&[&[5, 6]])?;
    let refused = |ids: &Tensor, mask: Option<&Tensor>, end: usize, what: &str| {
        let error = llama.forward(ids, mask, end).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(&text, Some(&ids(&[&[1, 1, 1]])?), 1, "a mask of [1, 3] for ids of [1, 2]");
    refused(&text, None, 0, "hidden state 0");
    refused(&text, None, 7, "hidden state 7");
    refused(&text.squeeze(0)?, None, 1, "[batch, tokens]");
    refused(&Tensor::zeros((1, 0), DType::U32, &Device::Cpu)?, None, 1, "no tokens");
    assert!(llama.forward(&ids(&[&[5, 79]])?, None, 1).is_err());
    Ok(())
}
