//! Checkpoints and configs that differ from the golden vectors in ways that published ones do:
//! other names for the same tensors, parts left out, tensors too many, missing or of another shape.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::t5 as theirs_t5;
use mmgp_io::Checkpoint;
use mmgp_models::{
    flux::{FluxConfig, FluxInputs, FluxTransformer},
    text::{
        clip::{ClipConfig, ClipText, Projection},
        t5::{T5Config, T5Encoder},
    },
    vae::kl::{KlConfig, KlDecoder},
};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Tensors = HashMap<String, Tensor>;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/core").join(name)
}

fn load(case: &Path, file: &str) -> Result<Tensors> {
    Ok(candle_core::safetensors::load(case.join(file), &Device::Cpu)?)
}

/// A builder over `tensors`, written to a file.
fn builder(tensors: &Tensors) -> Result<ModelBuilder> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &path)?;
    let checkpoint = Arc::new(Checkpoint::open(&path)?);
    // The open file outlives its name.
    let pager = Pager::new(&Device::Cpu)?;
    Ok(ModelBuilder::new(&pager, "model", checkpoint))
}

fn renamed(tensors: &Tensors, rename: impl Fn(&str) -> String) -> Tensors {
    tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let largest = b.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / largest)
}

#[test]
fn old_names_of_the_vae_attention() -> Result<()> {
    let case = case("vae-decode");
    let (tensors, io) = (load(&case, "model.safetensors")?, load(&case, "io.safetensors")?);
    let config = KlConfig::from_file(case.join("config.json"))?;
    let decode = |tensors: &Tensors| -> Result<Tensor> {
        let decoder = KlDecoder::new(&config, builder(tensors)?)?;
        assert!(decoder.unused().is_empty());
        Ok(decoder.decode(&io["in.latents"])?)
    };
    let old = renamed(&tensors, |name| {
        name.replace("to_q.", "query.")
            .replace("to_k.", "key.")
            .replace("to_v.", "value.")
            .replace("to_out.0.", "proj_attn.")
    });
    assert!(old.contains_key("decoder.mid_block.attentions.0.proj_attn.bias"));
    assert_eq!(bits(&decode(&old)?)?, bits(&decode(&tensors)?)?);
    Ok(())
}

#[test]
fn a_vae_without_attention_is_one_whose_attention_adds_nothing() -> Result<()> {
    let case = case("vae-decode");
    let (mut tensors, io) = (load(&case, "model.safetensors")?, load(&case, "io.safetensors")?);
    let mut config = KlConfig::from_file(case.join("config.json"))?;
    for (name, tensor) in &mut tensors {
        if name.contains("attentions.0.to_out.0.") {
            *tensor = tensor.zeros_like()?;
        }
    }
    let silent = KlDecoder::new(&config, builder(&tensors)?)?.decode(&io["in.latents"])?;
    tensors.retain(|name, _| !name.contains("attentions."));
    assert!(KlDecoder::new(&config, builder(&tensors)?).is_err());
    config.mid_block_add_attention = false;
    let without = KlDecoder::new(&config, builder(&tensors)?)?.decode(&io["in.latents"])?;
    assert_eq!(bits(&silent)?, bits(&without)?);
    Ok(())
}

#[test]
fn names_of_the_text_encoders() -> Result<()> {
    let t5 = case("t5");
    let (tensors, io) = (load(&t5, "model.safetensors")?, load(&t5, "io.safetensors")?);
    let config = T5Config::from_file(t5.join("config.json"))?;
    let encode = |tensors: &Tensors| -> Result<Tensor> {
        let encoder = T5Encoder::new(&config, builder(tensors)?)?;
        assert!(encoder.unused().is_empty(), "{:?}", encoder.unused());
        Ok(encoder.forward(&io["in.input_ids"], None)?)
    };
    let want = bits(&encode(&tensors)?)?;
    let rename = |name: &str| name.replace("shared.", "encoder.embed_tokens.");
    let mut other = renamed(&tensors, rename);
    assert_eq!(bits(&encode(&other)?)?, want);
    // Some files hold the table twice, and a decoder.
    other.insert("shared.weight".into(), tensors["shared.weight"].clone());
    other.insert("decoder.block.0.x".into(), tensors["shared.weight"].clone());
    assert_eq!(bits(&encode(&other)?)?, want);

    let clip = case("clip-text");
    let (tensors, io) = (load(&clip, "model.safetensors")?, load(&clip, "io.safetensors")?);
    let config = ClipConfig::from_file(clip.join("config.json"))?;
    let encode = |tensors: &Tensors| -> Result<Tensor> {
        let encoder = ClipText::new(&config, Projection::No, builder(tensors)?)?;
        assert!(encoder.unused().is_empty(), "{:?}", encoder.unused());
        Ok(encoder.forward(&io["in.input_ids"])?.pooled)
    };
    let bare = renamed(&tensors, |name| name.trim_start_matches("text_model.").into());
    let mut prefixed = renamed(&bare, |name| format!("text_model.{name}"));
    let ids = Tensor::arange(0u32, 24, &Device::Cpu)?.unsqueeze(0)?;
    prefixed.insert("text_model.embeddings.position_ids".into(), ids);
    assert_eq!(bits(&encode(&bare)?)?, bits(&encode(&prefixed)?)?);
    Ok(())
}

#[test]
fn other_feed_forwards_of_t5_equal_candle() -> Result<()> {
    let dev = Device::Cpu;
    // Theirs takes every ungated activation for relu.
    for (projection, gated) in [("relu", false), ("gated-silu", true)] {
        let mut config = T5Config::default();
        (config.vocab_size, config.d_model, config.d_kv, config.d_ff) = (50, 36, 10, 70);
        (config.num_layers, config.num_heads) = (2, 3);
        config.feed_forward_proj = projection.into();
        let mut tensors = Tensors::new();
        let mut add = |name: &str, shape: &[usize]| -> Result<()> {
            let deviation = if shape.len() == 2 { 0.3 } else { 0. };
            let tensor = Tensor::randn(1. - deviation / 0.3, deviation, shape, &dev)?;
            tensors.insert(name.into(), tensor.to_dtype(DType::F32)?);
            Ok(())
        };
        add("shared.weight", &[50, 36])?;
        add("encoder.final_layer_norm.weight", &[36])?;
        let table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        add(table, &[32, 3])?;
        for i in 0..2 {
            let block = format!("encoder.block.{i}.layer");
            for name in ["q", "k", "v"] {
                add(&format!("{block}.0.SelfAttention.{name}.weight"), &[30, 36])?;
            }
            add(&format!("{block}.0.SelfAttention.o.weight"), &[36, 30])?;
            for (part, up) in [("0", ""), ("1", "")] {
                add(&format!("{block}.{part}.layer_norm{up}.weight"), &[36])?;
            }
            for name in if gated { vec!["wi_0", "wi_1"] } else { vec!["wi"] } {
                add(&format!("{block}.1.DenseReluDense.{name}.weight"), &[70, 36])?;
            }
            add(&format!("{block}.1.DenseReluDense.wo.weight"), &[36, 70])?;
        }
        let json = serde_json::json!({
            "vocab_size": 50, "d_model": 36, "d_kv": 10, "d_ff": 70, "num_layers": 2,
            "num_heads": 3, "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6,
            "relative_attention_max_distance": 128, "dropout_rate": 0.0,
            "initializer_factor": 1.0, "is_decoder": false, "is_encoder_decoder": true,
            "feed_forward_proj": projection, "pad_token_id": 0, "eos_token_id": 1,
        });
        let theirs: theirs_t5::Config = serde_json::from_value(json)?;
        let weights = VarBuilder::from_tensors(tensors.clone(), DType::F32, &dev);
        let mut theirs = theirs_t5::T5EncoderModel::load(weights, &theirs)?;
        let ours = T5Encoder::new(&config, builder(&tensors)?)?;
        let ids = Tensor::new(&[[3u32, 4, 49, 1, 0], [7, 7, 8, 9, 1]], &dev)?;
        let error = far(&ours.forward(&ids, None)?, &theirs.forward(&ids)?)?;
        assert!(error < 1e-5, "{projection}: {error}");
    }
    Ok(())
}

#[test]
fn each_picture_of_a_batch_is_its_own() -> Result<()> {
    let case = case("flux-dev");
    let (tensors, io) = (load(&case, "model.safetensors")?, load(&case, "io.safetensors")?);
    let config = FluxConfig::from_file(case.join("config.json"))?;
    let flux = FluxTransformer::new(&config, builder(&tensors)?)?;
    let dev = Device::Cpu;
    let (timesteps, guidance) = ([0.9f32, 0.3], [3.5f32, 1.]);
    let other = |name: &str, i: usize| -> Result<Tensor> {
        Ok((&io[name] * if i == 0 { 1. } else { -0.7 })?)
    };
    let run = |items: &[usize]| -> Result<Tensor> {
        let stack = |name: &str| -> Result<Tensor> {
            let items: Result<Vec<_>> = items.iter().map(|&i| other(name, i)).collect();
            Ok(Tensor::cat(&items?, 0)?)
        };
        let pick = |values: [f32; 2]| {
            Tensor::new(items.iter().map(|&i| values[i]).collect::<Vec<_>>(), &dev)
        };
        Ok(flux.forward(&FluxInputs {
            hidden_states: &stack("in.hidden_states")?,
            encoder_hidden_states: &stack("in.encoder_hidden_states")?,
            pooled_projections: &stack("in.pooled_projections")?,
            timestep: &pick(timesteps)?,
            img_ids: &io["in.img_ids"],
            txt_ids: &io["in.txt_ids"],
            guidance: Some(&pick(guidance)?),
        })?)
    };
    let both = run(&[0, 1])?;
    for item in [0, 1] {
        let error = far(&both.narrow(0, item, 1)?, &run(&[item])?)?;
        assert!(error < 1e-5, "{item}: {error}");
    }
    Ok(())
}

#[test]
fn flux_inputs_that_do_not_fit_are_refused() -> Result<()> {
    let case = case("flux-schnell");
    let (tensors, io) = (load(&case, "model.safetensors")?, load(&case, "io.safetensors")?);
    let config = FluxConfig::from_file(case.join("config.json"))?;
    let flux = FluxTransformer::new(&config, builder(&tensors)?)?;
    let inputs = FluxInputs {
        hidden_states: &io["in.hidden_states"],
        encoder_hidden_states: &io["in.encoder_hidden_states"],
        pooled_projections: &io["in.pooled_projections"],
        timestep: &io["in.timestep"],
        img_ids: &io["in.img_ids"],
        txt_ids: &io["in.txt_ids"],
        guidance: None,
    };
    assert!(flux.forward(&inputs).is_ok());
    let one = io["in.hidden_states"].narrow(0, 0, 1)?;
    let error = |inputs: &FluxInputs<'_>| match flux.forward(inputs) {
        Ok(_) => "accepted".to_string(),
        Err(error) => error.to_string(),
    };
    let guided = FluxInputs { guidance: Some(&io["in.timestep"]), ..inputs };
    assert!(error(&guided).contains("reads no guidance scale"));
    for wrong in [
        FluxInputs { img_ids: &io["in.txt_ids"], ..inputs },
        FluxInputs { txt_ids: &io["in.timestep"], ..inputs },
        FluxInputs { timestep: &io["in.txt_ids"], ..inputs },
        FluxInputs { hidden_states: &one, ..inputs },
        FluxInputs { hidden_states: &io["in.timestep"], ..inputs },
    ] {
        assert!(error(&wrong).contains("flux: "), "{}", error(&wrong));
    }
    // Widths are the weights' affair.
    assert!(error(&FluxInputs { pooled_projections: &io["in.timestep"], ..inputs }) != "accepted");
    Ok(())
}

#[test]
fn tensors_that_are_missing_misshapen_or_too_many_are_named() -> Result<()> {
    let case = case("flux-schnell");
    let tensors = load(&case, "model.safetensors")?;
    let config = FluxConfig::from_file(case.join("config.json"))?;
    let open = |tensors: &Tensors| -> Result<FluxTransformer> {
        Ok(FluxTransformer::new(&config, builder(tensors)?)?)
    };
    let name = "single_transformer_blocks.1.attn.norm_q.weight";
    let mut other = tensors.clone();
    other.remove(name);
    let error = open(&other).err().ok_or("accepted")?.to_string();
    assert!(error.contains(name) && error.contains("model.safetensors"), "{error}");
    other.insert(name.into(), Tensor::zeros(11, DType::F32, &Device::Cpu)?);
    let error = open(&other).err().ok_or("accepted")?.to_string();
    assert!(error.contains(name) && error.contains("[11]") && error.contains("[10]"), "{error}");
    other.insert(name.into(), tensors[name].clone());
    other.insert("transformer_blocks.7.stray".into(), tensors[name].clone());
    assert_eq!(open(&other)?.unused(), ["transformer_blocks.7.stray"]);
    // More blocks than are stored: the first that is not there is named, and nothing is allocated.
    let mut deep = config.clone();
    deep.num_layers = 1000;
    let error = FluxTransformer::new(&deep, builder(&tensors)?).err().ok_or("accepted")?;
    assert!(error.to_string().contains("transformer_blocks.2."), "{error}");
    Ok(())
}

#[test]
fn a_damaged_file_is_an_error_and_the_next_run_works() -> Result<()> {
    let case = case("t5");
    let (tensors, io) = (load(&case, "model.safetensors")?, load(&case, "io.safetensors")?);
    let config = T5Config::from_file(case.join("config.json"))?;
    let encoder = T5Encoder::new(&config, builder(&tensors)?)?;
    let ids = Tensor::new(&[[3u32, 97]], &Device::Cpu)?; // one past the vocabulary
    assert!(encoder.forward(&ids, None).is_err());
    assert!(encoder.forward(&Tensor::new(&[3u32], &Device::Cpu)?, None).is_err());
    let mask = Tensor::ones((2, 36), DType::F32, &Device::Cpu)?;
    assert!(encoder.forward(&io["in.input_ids"], Some(&mask)).is_err());
    let after = encoder.forward(&io["in.input_ids"], None)?;
    assert!(far(&after, &io["out.last_hidden_state"])? < 1e-4);
    let pager = Pager::new(&Device::Cpu)?;
    let checkpoint = Arc::new(Checkpoint::open(case.join("model.safetensors"))?);
    let paged = T5Encoder::new(&config, ModelBuilder::new(&pager, "t5", checkpoint))?;
    pager.plan(Budget::Min)?;
    assert_eq!(bits(&paged.forward(&io["in.input_ids"], None)?)?, bits(&after)?);
    Ok(())
}
