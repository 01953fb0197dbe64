//! HunyuanVideo where the golden case says nothing: patches of several frames, no guidance, no
//! refiner, either kind of block alone, and padding. Made from the golden case's weights.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::hunyuanvideo::{HunyuanVideoConfig, HunyuanVideoInputs, HunyuanVideoTransformer};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Tensors = HashMap<String, Tensor>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/models/hunyuan-video")
}

/// The weights of the golden case in f32, its inputs and outputs, its config.
fn golden() -> Result<(Tensors, Tensors, HunyuanVideoConfig)> {
    let load = |file: &str| candle_core::safetensors::load(folder().join(file), &Device::Cpu);
    let mut tensors = load("model.safetensors")?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::F32)?;
    }
    let config = HunyuanVideoConfig::from_file(folder().join("config.json"))?;
    Ok((tensors, load("io.safetensors")?, config))
}

fn lengths(io: &Tensors) -> Result<Vec<usize>> {
    let mask = io["in.encoder_attention_mask"].to_vec2::<i64>()?;
    Ok(mask.iter().map(|row| row.iter().sum::<i64>() as usize).collect())
}

fn model(tensors: &Tensors, config: &HunyuanVideoConfig) -> Result<HunyuanVideoTransformer> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &path)?;
    let checkpoint = Arc::new(Checkpoint::open(&path)?); // outlives the file's name
    let pager = Pager::new(&Device::Cpu)?;
    let builder = ModelBuilder::new(&pager, "model", checkpoint);
    let model = HunyuanVideoTransformer::new(config, builder)?;
    assert!(model.unused().is_empty(), "{:?}", model.unused());
    pager.plan(Budget::Min)?;
    Ok(model)
}

fn inputs<'a>(io: &'a Tensors, lengths: &'a [usize]) -> HunyuanVideoInputs<'a> {
    HunyuanVideoInputs {
        hidden_states: &io["in.hidden_states"],
        timestep: &io["in.timestep"],
        encoder_hidden_states: &io["in.encoder_hidden_states"],
        text_lengths: lengths,
        pooled_projections: &io["in.pooled_projections"],
        guidance: Some(&io["in.guidance"]),
    }
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let largest = b.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / largest)
}

#[test]
fn padding_changes_nothing_and_an_item_is_alone() -> Result<()> {
    let (tensors, mut io, config) = golden()?;
    let model = model(&tensors, &config)?;
    assert_eq!(model.blocks(), 6);
    let lengths = lengths(&io)?;
    assert!(lengths[0] != lengths[1], "{lengths:?}");
    let want = io["out.sample"].clone();
    for item in 0..2 {
        let mut one: Tensors = io.clone();
        for tensor in one.values_mut() {
            *tensor = tensor.narrow(0, item, 1)?.contiguous()?;
        }
        let got = model.forward(&inputs(&one, &lengths[item..=item]))?;
        assert!(far(&got, &want.narrow(0, item, 1)?)? < 1e-5);
    }
    // What stands in the padding is not looked at, were it no numbers.
    let states = &io["in.encoder_hidden_states"];
    let (_, tokens, width) = states.dims3()?;
    let nan = Tensor::full(f32::NAN, (2, tokens, width), &Device::Cpu)?;
    let keep = io["in.encoder_attention_mask"].unsqueeze(2)?.broadcast_as((2, tokens, width))?;
    let hidden = keep.to_dtype(DType::U8)?.where_cond(states, &nan)?;
    io.insert("in.encoder_hidden_states".into(), hidden);
    assert!(far(&model.forward(&inputs(&io, &lengths))?, &want)? < 1e-5);
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let cut = io["in.encoder_hidden_states"].narrow(1, 0, longest)?;
    io.insert("in.encoder_hidden_states".into(), Tensor::cat(&[&cut, &nan], 1)?);
    assert!(far(&model.forward(&inputs(&io, &lengths))?, &want)? < 1e-5);
    Ok(())
}

#[test]
fn a_model_without_guidance_reads_none() -> Result<()> {
    let (mut tensors, io, mut config) = golden()?;
    let lengths = lengths(&io)?;
    // A perceptron that gives zeros is the same as none.
    for end in ["weight", "bias"] {
        let name = format!("time_text_embed.guidance_embedder.linear_2.{end}");
        let zeros = tensors[&name].zeros_like()?;
        tensors.insert(name, zeros);
    }
    let want = model(&tensors, &config)?.forward(&inputs(&io, &lengths))?;
    assert!(far(&want, &io["out.sample"])? > 1e-3);
    tensors.retain(|name, _| !name.contains("guidance_embedder"));
    config.guidance_embeds = false;
    let free = model(&tensors, &config)?;
    let all = inputs(&io, &lengths);
    let got = free.forward(&HunyuanVideoInputs { guidance: None, ..all })?;
    assert!(far(&got, &want)? < 1e-6);
    assert!(free.forward(&all).is_err());
    Ok(())
}

#[test]
fn any_kind_of_block_may_be_missing() -> Result<()> {
    let (tensors, io, config) = golden()?;
    let lengths = lengths(&io)?;
    let all = inputs(&io, &lengths);
    // A block whose gates are 0 changes nothing, which is the same as no block.
    for (kind, norms, none) in [
        (
            "context_embedder.token_refiner.refiner_blocks",
            &["norm_out"][..],
            (|c| c.num_refiner_layers = 0) as fn(&mut HunyuanVideoConfig),
        ),
        ("transformer_blocks", &["norm1", "norm1_context"], |c| c.num_layers = 0),
        ("single_transformer_blocks", &["norm"], |c| c.num_single_layers = 0),
    ] {
        let mut still = tensors.clone();
        for i in 0..2 {
            for norm in norms {
                for end in ["weight", "bias"] {
                    let name = format!("{kind}.{i}.{norm}.linear.{end}");
                    let zeros = still[&name].zeros_like()?;
                    still.insert(name, zeros);
                }
            }
        }
        let want = model(&still, &config)?.forward(&all)?;
        assert!(far(&want, &io["out.sample"])? > 1e-3, "{kind}");
        still.retain(|name, _| !name.starts_with(&format!("{kind}.")));
        let mut without = config.clone();
        none(&mut without);
        let got = model(&still, &without)?.forward(&all)?;
        assert!(far(&got, &want)? < 1e-6, "{kind}");
    }
    Ok(())
}

#[test]
fn patches_may_hold_several_frames() -> Result<()> {
    let (mut tensors, io, mut config) = golden()?;
    let lengths = lengths(&io)?;
    // Patches of two frames that are read as their mean and written alike: what a model of one frame
    // makes of half of the frames, each twice.
    let frames = io["in.hidden_states"].narrow(2, 0, 2)?.contiguous()?;
    let all = HunyuanVideoInputs { hidden_states: &frames, ..inputs(&io, &lengths) };
    let want = model(&tensors, &config)?.forward(&all)?;
    let name = "x_embedder.proj.weight";
    let half = (&tensors[name] * 0.5)?;
    tensors.insert(name.into(), Tensor::cat(&[&half, &half], 2)?);
    for end in ["weight", "bias"] {
        let name = format!("proj_out.{end}");
        let values = tensors[&name].clone();
        let rest = values.dims().get(1).copied().unwrap_or(1);
        let values = values.reshape((8, 1, 4, rest))?;
        let values = Tensor::cat(&[&values, &values], 1)?;
        let shape = if end == "bias" { vec![64] } else { vec![64, rest] };
        tensors.insert(name, values.reshape(shape)?);
    }
    config.patch_size_t = 2;
    let pairs = model(&tensors, &config)?;
    let at = Tensor::new(&[0u32, 0, 1, 1], &Device::Cpu)?;
    let twice = frames.index_select(&at, 2)?;
    let got = pairs.forward(&HunyuanVideoInputs { hidden_states: &twice, ..all })?;
    assert!(far(&got, &want.index_select(&at, 2)?)? < 1e-5);
    let odd = io["in.hidden_states"].clone();
    let error = pairs.forward(&HunyuanVideoInputs { hidden_states: &odd, ..all });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("not whole patches of 2 x 2 x 2"), "{error}");
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused() -> Result<()> {
    let (tensors, io, config) = golden()?;
    let model = model(&tensors, &config)?;
    let lengths = lengths(&io)?;
    let good = inputs(&io, &lengths);
    model.forward(&good)?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let (channels, odd) = (zeros(&[2, 7, 3, 4, 6])?, zeros(&[2, 8, 3, 3, 6])?);
    let (flat, empty) = (zeros(&[2, 8, 4, 6])?, zeros(&[2, 8, 0, 4, 6])?);
    let (narrow, one_text) = (zeros(&[2, 9, 19])?, zeros(&[1, 9, 20])?);
    let (pooled, three) = (zeros(&[2, 13])?, zeros(&[3])?);
    for (inputs, what) in [
        (HunyuanVideoInputs { hidden_states: &channels, ..good }, "reads 8 channels"),
        (HunyuanVideoInputs { hidden_states: &odd, ..good }, "not whole patches of 1 x 2 x 2"),
        (HunyuanVideoInputs { hidden_states: &empty, ..good }, "not whole patches"),
        (HunyuanVideoInputs { hidden_states: &flat, ..good }, "five dimensions"),
        (HunyuanVideoInputs { encoder_hidden_states: &narrow, ..good }, "text of width 20"),
        (HunyuanVideoInputs { encoder_hidden_states: &one_text, ..good }, "one text, one length"),
        (HunyuanVideoInputs { pooled_projections: &pooled, ..good }, "pooled text of width 14"),
        (HunyuanVideoInputs { timestep: &three, ..good }, "one timestep per video"),
        (HunyuanVideoInputs { text_lengths: &[9], ..good }, "one length of it"),
        (HunyuanVideoInputs { text_lengths: &[9, 0], ..good }, "at least one token"),
        (HunyuanVideoInputs { text_lengths: &[9, 10], ..good }, "not more than there are states"),
        (HunyuanVideoInputs { guidance: None, ..good }, "reads a guidance scale"),
        (HunyuanVideoInputs { guidance: Some(&three), ..good }, "one guidance scale per video"),
    ] {
        let error = model.forward(&inputs).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("hidden_states ["), "{what}: {error}");
    }
    Ok(())
}
