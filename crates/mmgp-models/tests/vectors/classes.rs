//! How a case of each class is run.
//!
//! Transformers, encoders and VAEs run twice, resident and paged through the smallest budget, each
//! time for two passes, and every output must have equal bits each time.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Tensor};
use mmgp_io::Checkpoint;
use mmgp_models::{
    cogvideox::{CogVideoXConfig, CogVideoXInputs, CogVideoXTransformer, positions},
    flux::{FluxConfig, FluxInputs, FluxTransformer, latents},
    hunyuanvideo::{
        HunyuanVideoConfig, HunyuanVideoDecoder, HunyuanVideoInputs, HunyuanVideoTransformer,
        HunyuanVideoVaeConfig, Tiling, prompt,
    },
    nn::Rope,
    schedulers::{
        ddim::Ddim,
        discrete::DiscreteConfig,
        dpm::Dpm,
        flow_match_euler::{
            FlowMatchConfig, FlowMatchEuler, Request, Schedule, calculate_mu, linspace_sigmas,
        },
    },
    text::{
        clip::{ClipConfig, ClipText, Projection},
        llama::{LlamaConfig, LlamaEncoder},
        t5::{T5Config, T5Encoder},
    },
    vae::{
        cogvideox::{CogVideoXDecoder, CogVideoXVaeConfig},
        kl::{KlConfig, KlDecoder, KlEncoder},
    },
};
use mmgp_residency::{Budget, ModelBuilder};
use serde_json::Value;

use crate::{
    Outcome,
    case::{Case, Error, compare, same_bits},
    formats, lora,
};

pub(crate) type Outputs = BTreeMap<&'static str, Tensor>;

pub(crate) fn run(case: &Case) -> Result<Outcome, Error> {
    match (case.about.kind.as_str(), case.about.class.as_str()) {
        ("lora", _) => lora::run(case),
        ("format", _) => formats::run(case),
        (_, "FluxTransformer2DModel") => model(case, flux),
        (_, "T5EncoderModel") => model(case, t5),
        (_, "CLIPTextModel") => model(case, |case, b| clip(case, b, Projection::No)),
        (_, "CLIPTextModelWithProjection") => model(case, |case, b| clip(case, b, Projection::Yes)),
        (_, "LlamaModel") => model(case, llama),
        (_, "CogVideoXTransformer3DModel") => model(case, cogvideox),
        (_, "HunyuanVideoTransformer3DModel") => model(case, hunyuanvideo),
        ("vae_decoder", "AutoencoderKLHunyuanVideo") => model(case, hunyuanvideo_decoder),
        ("vae_decoder", "AutoencoderKL") => model(case, decoder),
        ("vae_encoder", "AutoencoderKL") => model(case, encoder),
        ("vae_decoder", "AutoencoderKLCogVideoX") => model(case, cogvideox_decoder),
        (_, "FlowMatchEulerDiscreteScheduler") => scheduler(case),
        (_, "CogVideoXDDIMScheduler") => ddim(case),
        (_, "CogVideoXDPMScheduler") => dpm(case),
        (_, "FluxPipeline") => pipeline(case),
        (_, class) => Ok(Outcome::Skipped(format!("{class} is not built yet"))),
    }
}

/// Runs a model as `make` builds it, resident and paged.
pub(crate) fn model(
    case: &Case,
    make: impl Fn(&Case, ModelBuilder) -> Result<Box<dyn Fn() -> Result<Outputs, Error> + '_>, Error>,
) -> Result<Outcome, Error> {
    let checkpoint = Arc::new(Checkpoint::open(case.dir.join("model.safetensors"))?);
    let mut first: Option<Outputs> = None;
    for budget in [Budget::Unlimited, Budget::Min] {
        let pager = crate::device::pager()?;
        let forward = make(case, ModelBuilder::new(&pager, "model", checkpoint.clone()))?;
        let plan = pager.plan(budget)?;
        for _pass in 0..2 {
            let outputs = forward()?;
            match &first {
                Some(first) => {
                    for (name, output) in &outputs {
                        same_bits(name, output, &first[name])?;
                    }
                }
                None => first = Some(outputs),
            }
        }
        let peak = pager.report().peak;
        if peak > plan.budget {
            return Err(format!("{peak} of weights under a budget of {}", plan.budget).into());
        }
    }
    for (name, output) in first.iter().flatten() {
        case.check(name, output)?;
    }
    case.done()
}

/// No stored tensor may be left over: it would be a part of the model that was forgotten.
pub(crate) fn all_used(unused: &[String]) -> Result<(), Error> {
    match unused.is_empty() {
        true => Ok(()),
        false => Err(format!("stored tensors that nobody asked for: {unused:?}").into()),
    }
}

pub(crate) type Forward<'a> = Box<dyn Fn() -> Result<Outputs, Error> + 'a>;

pub(crate) fn flux(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = FluxConfig::from_file(case.dir.join("config.json"))?;
    let model = FluxTransformer::new(&config, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || {
        let sample = model.forward(&FluxInputs {
            hidden_states: case.input("hidden_states")?,
            encoder_hidden_states: case.input("encoder_hidden_states")?,
            pooled_projections: case.input("pooled_projections")?,
            timestep: case.input("timestep")?,
            img_ids: case.input("img_ids")?,
            txt_ids: case.input("txt_ids")?,
            guidance: case.optional_input("guidance"),
        })?;
        Ok(Outputs::from([("sample", sample)]))
    }))
}

fn cogvideox(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = CogVideoXConfig::from_file(case.dir.join("config.json"))?;
    let model = CogVideoXTransformer::new(&config, builder)?;
    all_used(model.unused())?;
    let positions = match case.about.kwargs.get("rotary_made_with") {
        Some(made) => Some(rotary(case, &config, made)?),
        None => None,
    };
    Ok(Box::new(move || {
        let sample = model.forward(&CogVideoXInputs {
            hidden_states: case.input("hidden_states")?,
            encoder_hidden_states: case.input("encoder_hidden_states")?,
            timestep: case.input("timestep")?,
            image_positions: positions.as_ref(),
            ofs: case.optional_input("ofs"),
        })?;
        Ok(Outputs::from([("sample", sample)]))
    }))
}

/// The positions of a rotary case, if they give the tables that its model was called with.
fn rotary(case: &Case, config: &CogVideoXConfig, made: &Value) -> Result<Tensor, Error> {
    let list = |value: &Value| -> Result<[f64; 2], Error> {
        let all = value.as_array().into_iter().flatten().filter_map(Value::as_f64);
        all.collect::<Vec<_>>().try_into().map_err(|_| "not two numbers".into())
    };
    let grid = list(&made["grid_size"])?.map(|n| n as usize);
    let (from, to) = (list(&made["crops_coords"][0])?, list(&made["crops_coords"][1])?);
    let frames = made["temporal_size"].as_u64().ok_or("no temporal_size")? as usize;
    let dev = crate::device::device();
    let positions = positions::scaled(frames, grid, from, to, &dev)?;
    // (1, 0) turns to (cos, sin); diffusers' tables have each of them twice.
    let rope = Rope::new(&positions, &config.axes(), 10000., &dev)?;
    let (patches, dim) = (positions.dim(0)?, config.attention_head_dim);
    let ones = Tensor::new(&[1f32, 0.], &dev)?.repeat((1, 1, patches, dim / 2))?;
    let turned = rope.apply(&ones)?.reshape((patches, dim / 2, 2))?;
    for (i, name) in ["cos", "sin"].into_iter().enumerate() {
        let got = turned.narrow(2, i, 1)?.repeat((1, 1, 2))?.reshape((patches, dim))?;
        let want = case.input(&format!("image_rotary_emb.{name}"))?;
        compare(name, &got, want, 1e-6)?;
    }
    Ok(positions)
}

fn t5(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = T5Config::from_file(case.dir.join("config.json"))?;
    let model = T5Encoder::new(&config, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || {
        let ids = case.input("input_ids")?;
        let mut outputs = Outputs::from([("last_hidden_state", model.forward(ids, None)?)]);
        if case.has_output("last_hidden_state_masked") {
            let masked = model.forward(ids, Some(case.input("attention_mask")?))?;
            outputs.insert("last_hidden_state_masked", masked);
        }
        Ok(outputs)
    }))
}

fn clip(case: &Case, builder: ModelBuilder, projection: Projection) -> Result<Forward<'_>, Error> {
    let config = ClipConfig::from_file(case.dir.join("config.json"))?;
    let model = ClipText::new(&config, projection, builder)?;
    all_used(model.unused())?;
    let pooled = match projection {
        Projection::Yes => "text_embeds",
        Projection::No => "pooler_output",
    };
    Ok(Box::new(move || {
        let output = model.forward(case.input("input_ids")?)?;
        Ok(Outputs::from([
            ("last_hidden_state", output.last_hidden_state),
            ("penultimate_hidden_state", output.penultimate_hidden_state),
            (pooled, output.pooled),
        ]))
    }))
}

fn llama(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = LlamaConfig::from_file(case.dir.join("config.json"))?;
    let model = LlamaEncoder::new(&config, 1, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || {
        let (ids, mask) = (case.input("input_ids")?, case.input("attention_mask")?);
        let tokens = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
        let state = |end: usize| -> Result<Tensor, Error> {
            Ok(model.forward(ids, Some(mask), end)?.broadcast_mul(&tokens)?)
        };
        Ok(Outputs::from([("hidden_states.-3", state(3)?), ("last_hidden_state", state(1)?)]))
    }))
}

fn decoder(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = KlConfig::from_file(case.dir.join("config.json"))?;
    let model = KlDecoder::new(&config, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || Ok(Outputs::from([("sample", model.decode(case.input("latents")?)?)]))))
}

fn cogvideox_decoder(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = CogVideoXVaeConfig::from_file(case.dir.join("config.json"))?;
    let model = CogVideoXDecoder::new(&config, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || Ok(Outputs::from([("sample", model.decode(case.input("latents")?)?)]))))
}

fn hunyuanvideo(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = HunyuanVideoConfig::from_file(case.dir.join("config.json"))?;
    let model = HunyuanVideoTransformer::new(&config, builder)?;
    all_used(model.unused())?;
    let mask = case.input("encoder_attention_mask")?.to_dtype(DType::U32)?;
    let lengths = prompt::lengths(&mask.to_vec2()?)?;
    Ok(Box::new(move || {
        let sample = model.forward(&HunyuanVideoInputs {
            hidden_states: case.input("hidden_states")?,
            timestep: case.input("timestep")?,
            encoder_hidden_states: case.input("encoder_hidden_states")?,
            text_lengths: &lengths,
            pooled_projections: case.input("pooled_projections")?,
            guidance: case.optional_input("guidance"),
        })?;
        Ok(Outputs::from([("sample", sample)]))
    }))
}

fn hunyuanvideo_decoder(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = HunyuanVideoVaeConfig::from_file(case.dir.join("config.json"))?;
    let model = HunyuanVideoDecoder::new(&config, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || {
        let sample = model.decode(case.input("latents")?, &Tiling::of_time())?;
        Ok(Outputs::from([("sample", sample)]))
    }))
}

fn encoder(case: &Case, builder: ModelBuilder) -> Result<Forward<'_>, Error> {
    let config = KlConfig::from_file(case.dir.join("config.json"))?;
    let model = KlEncoder::new(&config, builder)?;
    all_used(model.unused())?;
    Ok(Box::new(move || {
        let moments = model.encode(case.input("sample")?)?;
        Ok(Outputs::from([
            ("mean", moments.mean),
            ("logvar", moments.logvar),
            ("latents", moments.latents),
        ]))
    }))
}

fn scheduler(case: &Case) -> Result<Outcome, Error> {
    let config = FlowMatchConfig::from_file(case.dir.join("config.json"))?;
    let scheduler = FlowMatchEuler::new(config.clone())?;
    let kwargs = &case.about.kwargs;
    // The FLUX cases say in words that every run is given the pipeline's levels.
    let linspace = kwargs.get("sigmas_given").is_some();
    let schedule = |run: &Value, linspace: bool| -> Result<Schedule, Error> {
        let list = |key: &str| -> Option<Vec<f64>> {
            Some(run.get(key)?.as_array()?.iter().filter_map(Value::as_f64).collect())
        };
        let steps = run.get("num_inference_steps").and_then(Value::as_u64).map(|n| n as usize);
        let sigmas = match (linspace, steps) {
            (true, Some(steps)) => Some(linspace_sigmas(steps)),
            _ => list("sigmas"),
        };
        let mu = run.get("mu").and_then(Value::as_f64);
        if let (Some(mu), Some(tokens)) = (mu, run.get("image_seq_len").and_then(Value::as_u64)) {
            let ours = config.mu(tokens as usize);
            if (mu - ours).abs() > 1e-12 {
                return Err(format!("mu of {tokens} tokens is {ours}, not {mu}").into());
            }
        }
        let timesteps = list("timesteps");
        Ok(scheduler.schedule(&Request {
            steps,
            sigmas: sigmas.as_deref(),
            timesteps: timesteps.as_deref(),
            mu,
        })?)
    };
    let check = |name: &str, schedule: &Schedule| -> Result<(), Error> {
        let dev = crate::device::device();
        case.check(&format!("{name}.sigmas"), &Tensor::new(schedule.sigmas(), &dev)?)?;
        let timesteps = format!("{name}.timesteps");
        if case.has_output(&timesteps) {
            case.check(&timesteps, &Tensor::new(schedule.timesteps(), &dev)?)?;
        }
        Ok(())
    };
    let runs = kwargs.get("runs").and_then(Value::as_array).ok_or("no runs")?;
    for (i, run) in runs.iter().enumerate() {
        check(&i.to_string(), &schedule(run, linspace)?)?;
    }
    if let Some(run) = kwargs.get("default") {
        check("default", &schedule(run, false)?)?;
    }
    let stepped = match kwargs.get("step") {
        Some(run) => {
            let stepped = schedule(run, linspace)?;
            check("step", &stepped)?;
            stepped
        }
        None => schedule(&runs[0], linspace)?,
    };
    let velocities = match case.optional_input("step.velocities") {
        Some(velocities) => velocities,
        None => case.input("step.model_outputs")?,
    };
    let mut sample = case.input("step.sample")?.clone();
    let mut samples = Vec::new();
    for at in 0..stepped.len() {
        sample = stepped.step(at, &velocities.get(at)?, &sample)?;
        samples.push(sample.clone());
    }
    case.check("step.samples", &Tensor::stack(&samples, 0)?)?;
    case.done()
}

fn ddim(case: &Case) -> Result<Outcome, Error> {
    let scheduler = Ddim::new(DiscreteConfig::from_file(case.dir.join("config.json"))?)?;
    for (i, steps) in steps_of_runs(case)?.into_iter().enumerate() {
        check_timesteps(case, i, scheduler.schedule(steps)?.timesteps())?;
    }
    let schedule = scheduler.schedule(steps_of_runs(case)?[0])?;
    let outputs = case.input("step.model_outputs")?;
    let mut sample = case.input("step.sample")?.clone();
    let mut samples = Vec::new();
    for at in 0..schedule.timesteps().len() {
        sample = schedule.step(at, &outputs.get(at)?, &sample)?;
        samples.push(sample.clone());
    }
    case.check("step.samples", &Tensor::stack(&samples, 0)?)?;
    case.done()
}

fn dpm(case: &Case) -> Result<Outcome, Error> {
    let scheduler = Dpm::new(DiscreteConfig::from_file(case.dir.join("config.json"))?)?;
    for (i, steps) in steps_of_runs(case)?.into_iter().enumerate() {
        check_timesteps(case, i, scheduler.schedule(steps)?.timesteps())?;
    }
    let schedule = scheduler.schedule(steps_of_runs(case)?[0])?;
    let (outputs, noises) = (case.input("step.model_outputs")?, case.input("step.noises")?);
    let mut sample = case.input("step.sample")?.clone();
    let mut previous = None;
    let mut samples = Vec::new();
    for at in 0..schedule.timesteps().len() {
        let (output, noise) = (outputs.get(at)?, noises.get(at)?);
        let step = schedule.step(at, &output, &sample, &noise, previous.as_ref())?;
        (sample, previous) = (step.sample, Some(step.original));
        samples.push(sample.clone());
    }
    case.check("step.samples", &Tensor::stack(&samples, 0)?)?;
    case.done()
}

fn steps_of_runs(case: &Case) -> Result<Vec<usize>, Error> {
    let runs = case.about.kwargs.get("runs").and_then(Value::as_array).ok_or("no runs")?;
    let steps = runs.iter().filter_map(|run| run["num_inference_steps"].as_u64());
    match steps.map(|n| n as usize).collect::<Vec<_>>() {
        steps if steps.is_empty() => Err("no runs".into()),
        steps => Ok(steps),
    }
}

/// Timesteps are whole numbers: they must be equal, whatever a case tolerates of its samples.
fn check_timesteps(case: &Case, run: usize, timesteps: &[usize]) -> Result<(), Error> {
    let got: Vec<i64> = timesteps.iter().map(|&t| t as i64).collect();
    case.check_exact(&format!("{run}.timesteps"), &Tensor::new(got, &crate::device::device())?)
}

/// A whole pipeline from token ids and noise, its four models under one budget.
fn pipeline(case: &Case) -> Result<Outcome, Error> {
    let number = |key: &str| case.about.kwargs.get(key).and_then(Value::as_f64).ok_or("no number");
    let size = |key: &str| number(key).map(|n| n as usize);
    let (height, width) = (size("height")?, size("width")?);
    let steps = size("num_inference_steps")?;
    let mut first: Option<Vec<Tensor>> = None;
    for budget in [Budget::Unlimited, Budget::Min] {
        let pager = crate::device::pager()?;
        let open = |part: &str| -> Result<(ModelBuilder, std::path::PathBuf), Error> {
            let dir = case.dir.join(part);
            let stems = ["diffusion_pytorch_model", "model"];
            let checkpoint = Arc::new(Checkpoint::open_dir(&dir, &stems)?);
            Ok((ModelBuilder::new(&pager, part, checkpoint), dir.join("config.json")))
        };
        let (builder, config) = open("text_encoder")?;
        let clip = ClipText::new(&ClipConfig::from_file(config)?, Projection::No, builder)?;
        let (builder, config) = open("text_encoder_2")?;
        let t5 = T5Encoder::new(&T5Config::from_file(config)?, builder)?;
        let (builder, config) = open("transformer")?;
        let config = FluxConfig::from_file(config)?;
        let guided = config.guidance_embeds;
        let flux = FluxTransformer::new(&config, builder)?;
        let (builder, config) = open("vae")?;
        let config = KlConfig::from_file(config)?;
        let grid = (height / config.scale() / 2, width / config.scale() / 2);
        let vae = KlDecoder::new(&config, builder)?;
        let scheduler = FlowMatchConfig::from_file(scheduler_file(&case.dir))?;
        let scheduler = FlowMatchEuler::new(scheduler)?;
        let plan = pager.plan(budget)?;

        let pooled = clip.forward(case.input("input_ids")?)?.pooled;
        let prompt = t5.forward(case.input("input_ids_2")?, None)?;
        let mut sample = case.input("latents")?.clone();
        let c = scheduler.config();
        let (base, max) = (c.base_image_seq_len as f64, c.max_image_seq_len as f64);
        let mu = calculate_mu(sample.dim(1)?, base, max, c.base_shift, c.max_shift);
        let sigmas = linspace_sigmas(steps);
        let request = Request { sigmas: Some(&sigmas), mu: Some(mu), ..Request::default() };
        let schedule = scheduler.schedule(&request)?;
        let dev = crate::device::device();
        let img_ids = latents::image_ids(grid.0, grid.1, &dev)?;
        let txt_ids = latents::text_ids(prompt.dim(1)?, &dev)?;
        let guidance = Tensor::new(&[number("guidance_scale")? as f32], &dev)?;
        let mut named = vec![
            ("prompt_embeds".to_string(), prompt.clone()),
            ("pooled_prompt_embeds".into(), pooled.clone()),
            ("sigmas".into(), Tensor::new(schedule.sigmas(), &dev)?),
            ("timesteps".into(), Tensor::new(schedule.timesteps(), &dev)?),
        ];
        for (at, &timestep) in schedule.timesteps().iter().enumerate() {
            let velocity = flux.forward(&FluxInputs {
                hidden_states: &sample,
                encoder_hidden_states: &prompt,
                pooled_projections: &pooled,
                timestep: &Tensor::new(&[timestep / 1000.], &dev)?,
                img_ids: &img_ids,
                txt_ids: &txt_ids,
                guidance: guided.then_some(&guidance),
            })?;
            sample = schedule.step(at, &velocity, &sample)?;
            named.push((format!("step.{at}.velocity"), velocity));
            named.push((format!("step.{at}.latents"), sample.clone()));
        }
        let decoded = vae.decode(&latents::unpack(&sample, grid.0, grid.1)?)?;
        let image = ((&decoded / 2.)? + 0.5)?.clamp(0f32, 1f32)?;
        named.extend([
            ("latents".into(), sample),
            ("decoded".into(), decoded),
            ("image".into(), image),
        ]);
        let peak = pager.report().peak;
        if peak > plan.budget {
            return Err(format!("{peak} of weights under a budget of {}", plan.budget).into());
        }
        for (name, tensor) in &named {
            let tensor = tensor.to_dtype(DType::F32)?;
            case.check(name, &tensor)?;
        }
        let tensors: Vec<Tensor> = named.into_iter().map(|(_, tensor)| tensor).collect();
        match &first {
            Some(first) => {
                for (a, b) in tensors.iter().zip(first) {
                    same_bits("pipeline", a, b)?;
                }
            }
            None => first = Some(tensors),
        }
    }
    case.done()
}

fn scheduler_file(dir: &Path) -> std::path::PathBuf {
    dir.join("scheduler/scheduler_config.json")
}
