//! CogVideoX models that no golden vector has: learned positions, patches of 1.5, `ofs`, no biases.
//! Each is made from a golden case so that what it computes is known.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::{
    cogvideox::{CogVideoXConfig, CogVideoXInputs, CogVideoXTransformer, positions},
    nn::Samples,
};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Tensors = HashMap<String, Tensor>;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/models").join(name)
}

/// The weights of the rotary case in f32, its inputs and outputs, its config.
fn rotary() -> Result<(Tensors, Tensors, CogVideoXConfig)> {
    let dir = case("cogvideox-5b");
    let load = |file: &str| candle_core::safetensors::load(dir.join(file), &Device::Cpu);
    let mut tensors = load("model.safetensors")?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::F32)?;
    }
    let config = CogVideoXConfig::from_file(dir.join("config.json"))?;
    Ok((tensors, load("io.safetensors")?, config))
}

fn model(tensors: &Tensors, config: &CogVideoXConfig) -> Result<CogVideoXTransformer> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &path)?;
    let checkpoint = Arc::new(Checkpoint::open(&path)?); // outlives the file's name
    let pager = Pager::new(&Device::Cpu)?;
    let model = CogVideoXTransformer::new(config, ModelBuilder::new(&pager, "model", checkpoint))?;
    assert!(model.unused().is_empty(), "{:?}", model.unused());
    pager.plan(Budget::Min)?;
    Ok(model)
}

/// A call with the inputs of the rotary case.
fn call(model: &CogVideoXTransformer, io: &Tensors, ofs: Option<&Tensor>) -> Result<Tensor> {
    let positions = positions::scaled(3, [2, 3], [0., 0.], [5., 6.], &Device::Cpu)?;
    Ok(model.forward(&CogVideoXInputs {
        hidden_states: &io["in.hidden_states"],
        encoder_hidden_states: &io["in.encoder_hidden_states"],
        timestep: &io["in.timestep"],
        image_positions: Some(&positions),
        ofs,
    })?)
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let largest = b.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / largest)
}

#[test]
fn samples_apart_are_batches_of_one() -> Result<()> {
    let (tensors, io, config) = rotary()?;
    let model = model(&tensors, &config)?;
    let positions = positions::scaled(3, [2, 3], [0., 0.], [5., 6.], &Device::Cpu)?;
    let call = |range: Option<usize>, samples: Samples| -> Result<Tensor> {
        let of = |name: &str| -> Result<Tensor> {
            Ok(match range {
                Some(i) => io[name].narrow(0, i, 1)?,
                None => io[name].clone(),
            })
        };
        let inputs = CogVideoXInputs {
            hidden_states: &of("in.hidden_states")?,
            encoder_hidden_states: &of("in.encoder_hidden_states")?,
            timestep: &of("in.timestep")?,
            image_positions: Some(&positions),
            ofs: None,
        };
        Ok(model.forward_samples(&inputs, samples)?)
    };
    let bits = |t: &Tensor| -> Result<Vec<u32>> {
        Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    let apart = call(None, Samples::Apart)?;
    assert!(far(&apart, &call(None, Samples::Together)?)? < 1e-5);
    for i in 0..2 {
        let alone = call(Some(i), Samples::Together)?;
        assert_eq!(bits(&apart.narrow(0, i, 1)?)?, bits(&alone)?);
    }
    Ok(())
}

#[test]
fn learned_positions_are_added_to_text_and_patches() -> Result<()> {
    let (mut tensors, io, mut config) = rotary()?;
    let (text, patches, hidden) = (7, 18, 32);
    // A table whose rows are all equal is a bias; one for text, one for patches.
    let rand = || Tensor::randn(0f32, 1., hidden, &Device::Cpu);
    let (of_text, of_patches) = (rand()?, rand()?);
    let mut biased = tensors.clone();
    for (name, more) in [("text_proj", &of_text), ("proj", &of_patches)] {
        let name = format!("patch_embed.{name}.bias");
        let sum = (&biased[&name] + more)?;
        biased.insert(name, sum);
    }
    let want = call(&model(&biased, &config)?, &io, None)?;

    let spread = |t: &Tensor, n: usize| t.broadcast_as((1, n, hidden))?.contiguous();
    let table = Tensor::cat(&[spread(&of_text, text)?, spread(&of_patches, patches)?], 1)?;
    tensors.insert("patch_embed.pos_embedding".into(), table);
    config.use_learned_positional_embeddings = true;
    let learned = model(&tensors, &config)?;
    assert!(far(&call(&learned, &io, None)?, &want)? < 1e-5);
    assert!(far(&want, &io["out.sample"])? > 1e-2);

    // The table is for one size of latents and one length of text.
    for (name, dim) in [("in.hidden_states", 1), ("in.encoder_hidden_states", 1)] {
        let mut short = io.clone();
        let less = io[name].narrow(dim, 0, io[name].dim(dim)? - 1)?;
        short.insert(name.into(), less);
        let frames = short["in.hidden_states"].dim(1)?;
        let at = positions::counted([frames, 2, 3], &Device::Cpu)?;
        let error = learned.forward(&CogVideoXInputs {
            hidden_states: &short["in.hidden_states"],
            encoder_hidden_states: &short["in.encoder_hidden_states"],
            timestep: &short["in.timestep"],
            image_positions: Some(&at),
            ofs: None,
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("learned positions are for 7 text tokens"), "{error}");
    }
    Ok(())
}

#[test]
fn patches_of_1_5_are_a_linear_layer() -> Result<()> {
    let (mut tensors, io, mut config) = rotary()?;
    let weight = tensors["patch_embed.proj.weight"].flatten_from(1)?;
    tensors.insert("patch_embed.proj.weight".into(), weight.clone());
    config.patch_size_t = Some(1);
    config.patch_bias = false; // says nothing about a linear layer
    let got = call(&model(&tensors, &config)?, &io, None)?;
    assert!(far(&got, &io["out.sample"])? < 1e-5);

    // Patches of two frames that are read as their mean and written alike: what a model of one frame
    // makes of half of the frames, each twice.
    let frames = io["in.hidden_states"].narrow(1, 0, 1)?;
    let twice = Tensor::cat(&[&frames, &frames], 1)?;
    let both = |t: &Tensor, channels: usize, dim: usize, scale: f64| -> Result<Tensor> {
        // [.. channels, 4] to [.. channels, 2 frames, 4] around the dimension `dim`.
        let t = if dim == 1 { t.clone() } else { t.t()? };
        let (rows, side) = (t.dim(0)?, 4);
        let t = (t.contiguous()?.reshape((rows, channels, 1, side))? * scale)?;
        let t = Tensor::cat(&[&t, &t], 2)?.reshape((rows, channels * 2 * side))?;
        Ok(if dim == 1 { t } else { t.t()?.contiguous()? })
    };
    let mut joined = tensors.clone();
    joined.insert("patch_embed.proj.weight".into(), both(&weight, 4, 1, 0.5)?);
    joined.insert("proj_out.weight".into(), both(&tensors["proj_out.weight"], 4, 0, 1.)?);
    let bias = both(&tensors["proj_out.bias"].unsqueeze(0)?, 4, 1, 1.)?.squeeze(0)?;
    joined.insert("proj_out.bias".into(), bias);
    let at = positions::counted([1, 2, 3], &Device::Cpu)?;
    let inputs = |x| CogVideoXInputs {
        hidden_states: x,
        encoder_hidden_states: &io["in.encoder_hidden_states"],
        timestep: &io["in.timestep"],
        image_positions: Some(&at),
        ofs: None,
    };
    let want = model(&tensors, &config)?.forward(&inputs(&frames))?;
    config.patch_size_t = Some(2);
    let pairs = model(&joined, &config)?;
    let got = pairs.forward(&inputs(&twice))?;
    for frame in 0..2 {
        assert!(far(&got.narrow(1, frame, 1)?, &want)? < 1e-5);
    }
    assert!(pairs.forward(&inputs(&frames)).is_err()); // half a patch
    Ok(())
}

#[test]
fn ofs_is_added_to_the_timestep() -> Result<()> {
    let (mut tensors, io, mut config) = rotary()?;
    let width = 24;
    // linear_1 makes SiLU's argument 0 but for the first cosine, so that the vector is known:
    // linear_2's first column times SiLU(cos(ofs)), and its bias.
    let dev = Device::Cpu;
    let mut first = vec![0f32; width * width];
    first[0] = 1.;
    let rand = |s: &[usize]| Tensor::randn(0f32, 0.5, s, &dev);
    let (second, bias) = (rand(&[width, width])?, rand(&[width])?);
    let of = |layer: &str| format!("ofs_embedding.{layer}");
    let mut with = tensors.clone();
    with.insert(of("linear_1.weight"), Tensor::from_vec(first, (width, width), &dev)?);
    with.insert(of("linear_1.bias"), Tensor::zeros(width, DType::F32, &dev)?);
    with.insert(of("linear_2.weight"), second.clone());
    with.insert(of("linear_2.bias"), bias.clone());
    let ofs = 2f64;
    let silu = ofs.cos() / (1. + (-ofs.cos()).exp());
    let vector = ((second.narrow(1, 0, 1)?.squeeze(1)? * silu)? + bias)?;
    let name = "time_embedding.linear_2.bias";
    let sum = (&tensors[name] + vector)?;
    tensors.insert(name.into(), sum);
    let plain = model(&tensors, &config)?;
    let want = call(&plain, &io, None)?;
    assert!(far(&want, &io["out.sample"])? > 1e-3);

    config.ofs_embed_dim = Some(width);
    let reads = model(&with, &config)?;
    let ofs = Tensor::new(&[ofs as f32, ofs as f32], &dev)?;
    assert!(far(&call(&reads, &io, Some(&ofs))?, &want)? < 1e-5);
    assert!(call(&reads, &io, None).is_err());
    assert!(call(&reads, &io, Some(&ofs.narrow(0, 0, 1)?)).is_err());
    assert!(call(&plain, &io, Some(&ofs)).is_err());
    Ok(())
}

#[test]
fn a_bias_that_the_config_leaves_out_is_a_bias_of_zero() -> Result<()> {
    let (mut tensors, io, mut config) = rotary()?;
    let names: Vec<String> = tensors.keys().cloned().collect();
    let gone = |name: &str| {
        name == "patch_embed.proj.bias"
            || ["to_q.bias", "to_k.bias", "to_v.bias"].iter().any(|end| name.ends_with(end))
    };
    for name in names.iter().filter(|name| gone(name)) {
        let zeros = tensors[name].zeros_like()?;
        tensors.insert(name.clone(), zeros);
    }
    let want = call(&model(&tensors, &config)?, &io, None)?;
    tensors.retain(|name, _| !gone(name));
    (config.attention_bias, config.patch_bias) = (false, false);
    let got = call(&model(&tensors, &config)?, &io, None)?;
    assert!(far(&got, &want)? < 1e-6);
    assert!(far(&got, &io["out.sample"])? > 1e-3);
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused() -> Result<()> {
    let (tensors, io, config) = rotary()?;
    let model = model(&tensors, &config)?;
    let dev = Device::Cpu;
    let at = positions::counted([3, 2, 3], &dev)?;
    let good = CogVideoXInputs {
        hidden_states: &io["in.hidden_states"],
        encoder_hidden_states: &io["in.encoder_hidden_states"],
        timestep: &io["in.timestep"],
        image_positions: Some(&at),
        ofs: None,
    };
    model.forward(&good)?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &dev);
    let (channels, odd) = (zeros(&[2, 3, 5, 4, 6])?, zeros(&[2, 3, 4, 3, 6])?);
    let (flat, empty) = (zeros(&[2, 4, 4, 6])?, zeros(&[2, 0, 4, 4, 6])?);
    let (narrow, one_text) = (zeros(&[2, 7, 19])?, zeros(&[1, 7, 20])?);
    let (few, times) = (zeros(&[17, 3])?, zeros(&[3])?);
    for (inputs, what) in [
        (CogVideoXInputs { hidden_states: &channels, ..good }, "reads 4 channels"),
        (CogVideoXInputs { hidden_states: &odd, ..good }, "not whole patches of 1 x 2 x 2"),
        (CogVideoXInputs { hidden_states: &empty, ..good }, "not whole patches"),
        (CogVideoXInputs { hidden_states: &flat, ..good }, "five dimensions"),
        (CogVideoXInputs { encoder_hidden_states: &narrow, ..good }, "text of width 20"),
        (CogVideoXInputs { encoder_hidden_states: &one_text, ..good }, "one text and one timestep"),
        (CogVideoXInputs { timestep: &times, ..good }, "one text and one timestep"),
        (CogVideoXInputs { image_positions: None, ..good }, "reads positions"),
        (CogVideoXInputs { image_positions: Some(&few), ..good }, "a position for each"),
    ] {
        let error = model.forward(&inputs).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("hidden_states ["), "{what}: {error}");
    }
    Ok(())
}
