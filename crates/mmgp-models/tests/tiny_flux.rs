//! The demo's pipeline against what diffusers drew with it: token ids, embeddings, the first step,
//! the final latents and the picture, each under a quarter of the memory that the weights need.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::{
    flux::{FluxConfig, FluxInputs, FluxTransformer, latents},
    noise::torch_normal,
    schedulers::flow_match_euler::{FlowMatchConfig, FlowMatchEuler, Request, linspace_sigmas},
    text::{
        clip::{ClipConfig, ClipText, Projection},
        t5::{T5Config, T5Encoder},
        tokenizer::Tokenizer,
    },
    vae::kl::{KlConfig, KlDecoder, KlEncoder},
};
use mmgp_residency::{Budget, ModelBuilder, Pager};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const PROMPTS: [&str; 3] = ["red heart", "a picture of a rocket", "cat face"];
const STEPS: usize = 8;

fn assets(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn reference() -> Result<HashMap<String, Tensor>> {
    let path = assets("tiny-flux-reference").join("reference.safetensors");
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?)
}

fn open(pager: &Pager, part: &str) -> Result<(ModelBuilder, PathBuf)> {
    let dir = assets("tiny-flux").join(part);
    let checkpoint = Checkpoint::open_dir(&dir, &["diffusion_pytorch_model", "model"])?;
    Ok((ModelBuilder::new(pager, part, Arc::new(checkpoint)), dir.join("config.json")))
}

fn relative(got: &Tensor, want: &Tensor) -> Result<f64> {
    assert_eq!(got.dims(), want.dims());
    let norm = |t: &Tensor| t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok((norm(&(got - want)?)? / norm(want)?).sqrt())
}

#[test]
fn seed_42_draws_what_it_draws_in_torch() -> Result<()> {
    let noise = Tensor::from_vec(torch_normal(42, 16 * 16 * 16), (1, 16, 16, 16), &Device::Cpu)?;
    let want = &reference()?["initial_latent"];
    let worst = (latents::pack(&noise)? - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(worst <= 1e-6, "{worst}");
    Ok(())
}

#[test]
fn prompts_become_the_same_ids() -> Result<()> {
    let reference = reference()?;
    let clip = Tokenizer::open_dir(assets("tiny-flux/tokenizer"))?;
    let t5 = Tokenizer::open_dir(assets("tiny-flux/tokenizer_2"))?;
    for (i, prompt) in PROMPTS.iter().enumerate() {
        for (tokenizer, name, len) in [(&clip, "clip_ids", 77), (&t5, "t5_ids", 32)] {
            let want = reference[&format!("p{i}.{name}")].to_dtype(DType::U32)?.to_vec1::<u32>()?;
            assert_eq!(tokenizer.encode(prompt, len)?.ids, want, "{prompt}");
        }
    }
    Ok(())
}

#[test]
fn the_whole_pipeline_draws_what_diffusers_draws() -> Result<()> {
    let reference = reference()?;
    let dev = Device::Cpu;
    let pager = Pager::new(&dev)?;
    let (builder, config) = open(&pager, "text_encoder")?;
    let clip = ClipText::new(&ClipConfig::from_file(config)?, Projection::No, builder)?;
    let (builder, config) = open(&pager, "text_encoder_2")?;
    let t5 = T5Encoder::new(&T5Config::from_file(config)?, builder)?;
    let (builder, config) = open(&pager, "transformer")?;
    let flux = FluxTransformer::new(&FluxConfig::from_file(config)?, builder)?;
    let (builder, config) = open(&pager, "vae")?;
    let vae_config = KlConfig::from_file(config)?;
    let vae = KlDecoder::new(&vae_config, builder)?;
    for unused in [clip.unused(), t5.unused(), flux.unused(), vae.unused()] {
        assert!(unused.is_empty(), "{unused:?}");
    }
    pager.plan(Budget::Percent(60.))?; // the VAE is all stem and half of it all

    let clip_tokens = Tokenizer::open_dir(assets("tiny-flux/tokenizer"))?;
    let t5_tokens = Tokenizer::open_dir(assets("tiny-flux/tokenizer_2"))?;
    let config = assets("tiny-flux/scheduler/scheduler_config.json");
    let scheduler = FlowMatchEuler::new(FlowMatchConfig::from_file(config)?)?;
    let sigmas = linspace_sigmas(STEPS);
    let schedule = scheduler.schedule(&Request { sigmas: Some(&sigmas), ..Default::default() })?;
    let noise = Tensor::from_vec(torch_normal(42, 16 * 16 * 16), (1, 16, 16, 16), &dev)?;
    let (img_ids, txt_ids) = (latents::image_ids(8, 8, &dev)?, latents::text_ids(32, &dev)?);

    for (i, prompt) in PROMPTS.iter().enumerate() {
        let near = |name: &str, got: &Tensor, tolerance: f64| -> Result<()> {
            let error = relative(got, &reference[&format!("p{i}.{name}")])?;
            eprintln!("{prompt}: {name} {error:.1e}");
            assert!(error <= tolerance, "{prompt}: {name} is off by {error:.1e}");
            Ok(())
        };
        let ids = |tokenizer: &Tokenizer, len: usize| -> Result<Tensor> {
            Ok(Tensor::new(tokenizer.encode(prompt, len)?.ids, &dev)?.unsqueeze(0)?)
        };
        let pooled = clip.forward(&ids(&clip_tokens, 77)?)?.pooled;
        let text = t5.forward(&ids(&t5_tokens, 32)?, None)?;
        near("pooled", &pooled, 1e-5)?;
        near("prompt_embeds", &text, 1e-5)?;
        let mut sample = latents::pack(&noise)?;
        for (at, &timestep) in schedule.timesteps().iter().enumerate() {
            let velocity = flux.forward(&FluxInputs {
                hidden_states: &sample,
                encoder_hidden_states: &text,
                pooled_projections: &pooled,
                timestep: &Tensor::new(&[timestep / 1000.], &dev)?,
                img_ids: &img_ids,
                txt_ids: &txt_ids,
                guidance: None,
            })?;
            if at == 0 {
                near("w0.step0", &velocity, 1e-5)?;
            }
            sample = schedule.step(at, &velocity, &sample)?;
        }
        near("w0.final_latents", &sample, 1e-3)?;
        let decoded = vae.decode(&latents::unpack(&sample, 8, 8)?)?;
        let image = ((decoded / 2.)? + 0.5)?.clamp(0f32, 1f32)?.squeeze(0)?;
        near("w0.image", &image, 1e-3)?;
    }
    Ok(())
}

#[test]
fn a_picture_survives_its_latents() -> Result<()> {
    let pager = Pager::new(&Device::Cpu)?;
    let (builder, config) = open(&pager, "vae")?;
    let config = KlConfig::from_file(config)?;
    let encoder = KlEncoder::new(&config, builder)?;
    let (builder, _) = open(&pager, "vae")?;
    let decoder = KlDecoder::new(&config, builder)?;
    assert!(encoder.unused().is_empty() && decoder.unused().is_empty());
    let picture = ((&reference()?["p0.w0.image"] * 2.)? - 1.)?.unsqueeze(0)?;
    let again = decoder.decode(&encoder.encode(&picture)?.latents)?;
    let error = relative(&again, &picture)?;
    assert!(error < 0.2, "{error}");
    Ok(())
}
