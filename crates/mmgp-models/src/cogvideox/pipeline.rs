//! The CogVideoX pipelines: prompt to embeddings, noise (and a picture, where the model begins with
//! one) to latents, latents to frames.
//!
//! What is drawn, in which order and from which generator is as diffusers 0.42.1 does it.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_residency::Pager;

use crate::{
    Defaults, Error, Event, GuidanceSchedule, Latents, ModelIndex, OpenOptions, Picture, Pipeline,
    PipelinePart, Recipe, Request, Result, Tiles,
    cogvideox::{
        CogVideoXConfig, CogVideoXInputs, CogVideoXTransformer, dynamic_guidance, positions,
    },
    nn::{Samples, add_scaled, contiguous},
    noise::TorchGenerator,
    pipeline::{
        Kept, check_frames, check_image, check_numbers, check_side, fits, pictures, to_tensor,
        unused_of, weights_recipe,
    },
    schedulers::{
        ddim::{Ddim, DdimSchedule},
        discrete::DiscreteConfig,
        dpm::{Dpm, DpmSchedule},
    },
    text::{
        t5::{T5Config, T5Encoder},
        tokenizer::Tokenizer,
    },
    vae::{
        cogvideox::{CogVideoXDecoder, CogVideoXVaeConfig, Tiling},
        cogvideox_encoder::CogVideoXEncoder,
    },
};

/// The most tokens that are read of a prompt.
const LONGEST: usize = 1024;
/// Up to so many tokens the two samples of guidance go through a block in one call.
const TOGETHER: usize = 4096;

/// What a model of 1.5 that begins with a picture is told, whatever the picture.
const OFS: f32 = 2.;

/// A CogVideoX pipeline in diffusers' layout: `CogVideoXPipeline` or `CogVideoXImageToVideoPipeline`.
pub struct CogVideoXPipeline {
    tokenizer: Tokenizer,
    t5: T5Encoder,
    transformer: CogVideoXTransformer,
    decoder: CogVideoXDecoder,
    /// Of models that begin with a picture.
    encoder: Option<CogVideoXEncoder>,
    scheduler: Scheduler,
    config: CogVideoXConfig,
    vae: CogVideoXVaeConfig,
    defaults: Defaults,
    device: Device,
    compute: DType,
    options: OpenOptions,
    /// By text and tokens.
    kept: Kept<(String, usize), Tensor>,
}

/// What the folder's scheduler is.
enum Scheduler {
    Ddim(Ddim),
    Dpm(Dpm),
}

/// A run of it.
enum Schedule {
    Ddim(DdimSchedule),
    Dpm(DpmSchedule),
}

impl Scheduler {
    const CLASSES: [&str; 2] = ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"];

    fn open(index: &ModelIndex) -> Result<Self> {
        let file = index.part("scheduler", "scheduler_config.json", &Self::CLASSES)?;
        let config = DiscreteConfig::from_file(file)?;
        let dpm = index.classes().contains(&("scheduler", Self::CLASSES[1]));
        Ok(if dpm { Self::Dpm(Dpm::new(config)?) } else { Self::Ddim(Ddim::new(config)?) })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Ddim(_) => "DDIM",
            Self::Dpm(_) => "SDE-DPM-Solver++(2M)",
        }
    }

    fn schedule(&self, steps: usize) -> Result<Schedule> {
        Ok(match self {
            Self::Ddim(scheduler) => Schedule::Ddim(scheduler.schedule(steps)?),
            Self::Dpm(scheduler) => Schedule::Dpm(scheduler.schedule(steps)?),
        })
    }
}

impl Schedule {
    fn timesteps(&self) -> &[usize] {
        match self {
            Self::Ddim(schedule) => schedule.timesteps(),
            Self::Dpm(schedule) => schedule.timesteps(),
        }
    }
}

impl CogVideoXPipeline {
    /// The class of folders whose models begin with a picture.
    pub const FROM_PICTURE: &str = "CogVideoXImageToVideoPipeline";

    /// Opens the folder over `pager`. Reads configs, the tokenizer and headers, no weights.
    ///
    /// # Errors
    /// Anything in the folder that is missing, malformed, of another class, or does not fit the rest.
    pub fn open(
        dir: &Path,
        index: &ModelIndex,
        pager: &Pager,
        options: &OpenOptions,
    ) -> Result<Self> {
        options.expect(&["transformer", "text_encoder"])?;
        let part = |name: &str, class: &str| index.part(name, "config.json", &[class]);
        let config =
            CogVideoXConfig::from_file(part("transformer", "CogVideoXTransformer3DModel")?)?;
        let vae = CogVideoXVaeConfig::from_file(part("vae", "AutoencoderKLCogVideoX")?)?;
        let t5 = T5Config::from_file(part("text_encoder", "T5EncoderModel")?)?;
        fits(dir, "text_encoder", "d_model", config.text_embed_dim, t5.d_model)?;
        let from_picture = index.class()? == Self::FROM_PICTURE;
        let channels = if from_picture { 2 } else { 1 } * vae.latent_channels;
        fits(dir, "transformer", "in_channels", channels, config.in_channels)?;
        fits(dir, "transformer", "out_channels", vae.latent_channels, config.out_channels)?;
        let ratio = 1 << vae.time_doublings();
        fits(
            dir,
            "transformer",
            "temporal_compression_ratio",
            ratio,
            config.temporal_compression_ratio,
        )?;

        let builder = |name: &str, stems: &[&str]| {
            let open = || Ok(Arc::new(Checkpoint::open_dir(dir.join(name), stems)?));
            options.builder(pager, name, open)
        };
        let model_files = ["diffusion_pytorch_model", "model"];
        let vae_files = Arc::new(Checkpoint::open_dir(dir.join("vae"), &model_files)?);
        let vae_builder = |name: &str| options.builder(pager, name, || Ok(vae_files.clone()));
        let scheduler = Scheduler::open(index)?;
        let later = config.patch_size_t.is_some();
        let defaults = Defaults {
            steps: 50,
            guidance: 6.,
            // What its authors' own command does with each scheduler.
            guidance_schedule: match &scheduler {
                Scheduler::Ddim(_) => GuidanceSchedule::Constant,
                Scheduler::Dpm(_) => GuidanceSchedule::Dynamic,
            },
            max_sequence_length: config.max_text_seq_length,
            width: config.sample_width * vae.scale(),
            height: config.sample_height * vae.scale(),
            frames: config.sample_frames,
            fps: if later { 16. } else { 8. },
            budget: None,
        };
        Ok(Self {
            tokenizer: Tokenizer::open_dir(dir.join("tokenizer"))?,
            t5: T5Encoder::new(
                &t5,
                builder("text_encoder", &["model", "diffusion_pytorch_model"])?,
            )?,
            transformer: CogVideoXTransformer::new(&config, builder("transformer", &model_files)?)?,
            decoder: CogVideoXDecoder::new(&vae, vae_builder("vae")?)?,
            encoder: match from_picture {
                true => Some(CogVideoXEncoder::new(&vae, vae_builder("vae.encoder")?)?),
                false => None,
            },
            scheduler,
            config,
            vae,
            defaults: defaults.overridden_by(dir)?,
            device: pager.device().candle().clone(),
            compute: pager.device().compute_dtype(),
            options: options.clone(),
            kept: Kept::default(),
        })
    }

    /// Pixels to a side of a patch.
    fn patch(&self) -> usize {
        self.config.patch_size * self.vae.scale()
    }

    /// Latent frames of the video, and those that go before them so that patches over frames are whole.
    fn latent_frames(&self, request: &Request) -> (usize, usize) {
        let frames = (request.frames - 1) / self.config.temporal_compression_ratio + 1;
        let joined = self.config.patch_size_t.unwrap_or(1);
        (frames, frames.next_multiple_of(joined) - frames)
    }

    /// The latents' shape: `[1, frames, channels, height, width]`, with the frames that are not shown.
    fn shape(&self, request: &Request) -> [usize; 5] {
        let (frames, before) = self.latent_frames(request);
        let scale = self.vae.scale();
        let channels = self.vae.latent_channels;
        [1, before + frames, channels, request.height / scale, request.width / scale]
    }

    fn grid(&self, request: &Request) -> [usize; 3] {
        let (frames, before) = self.latent_frames(request);
        let joined = self.config.patch_size_t.unwrap_or(1);
        let patch = self.patch();
        [(frames + before) / joined, request.height / patch, request.width / patch]
    }

    fn samples(&self, request: &Request) -> Samples {
        let tokens: usize = self.grid(request).iter().product();
        match tokens <= TOGETHER {
            true => Samples::Together,
            false => Samples::Apart,
        }
    }

    /// Guidance above 1 needs what the model predicts for the negative prompt too.
    fn guides(request: &Request) -> bool {
        request.guidance > 1.
    }

    fn tiling(&self, request: &Request) -> Option<Tiling> {
        let tiling = Tiling::of_cogvideox(&self.vae);
        let larger = request.height > tiling.height || request.width > tiling.width;
        (larger && request.tiles == Tiles::On).then_some(tiling)
    }

    /// A text's states `[1, tokens, width]`.
    fn encode(&mut self, text: &str, tokens: usize, tell: &mut dyn FnMut(Event)) -> Result<Tensor> {
        let key = (text.to_string(), tokens);
        if let Some(states) = self.kept.get(&key) {
            return Ok(states);
        }
        tell(Event::Encoding);
        let encoding = self.tokenizer.encode(text, tokens)?;
        if let Some(text) = encoding.cut {
            tell(Event::Cut { encoder: "text_encoder".into(), limit: tokens, text });
        }
        let ids = Tensor::from_vec(encoding.ids, (1, tokens), &self.device)?;
        let states = self.t5.forward(&ids, None)?;
        self.kept.put(key, states.clone());
        Ok(states)
    }

    /// Latents `[1, 1, channels, height, width]` of the request's picture, drawn from `generator`.
    fn begin(
        &self,
        request: &Request,
        encoder: &CogVideoXEncoder,
        generator: &mut TorchGenerator,
    ) -> Result<Tensor> {
        let picture = request.image.as_ref();
        let picture = picture.ok_or_else(|| Error::Input(self.wants_picture()))?;
        let picture = to_tensor(picture, &self.device)?;
        let moments = encoder.encode(&picture, self.tiling(request).as_ref())?;
        let shape = moments.mean.dims();
        let noise = generator.normal(shape.iter().product());
        let noise = Tensor::from_vec(noise, shape, &self.device)?;
        let deviation = (moments.logvar * 0.5)?.exp()?;
        let drawn = (moments.mean + (deviation * noise)?)?;
        Ok((drawn * self.vae.picture_factor())?.unsqueeze(1)?)
    }

    /// What latents and frames depend on.
    fn check_size(&self, request: &Request) -> Result<()> {
        check_side("width", request.width, self.patch())?;
        check_side("height", request.height, self.patch())?;
        check_frames(request.frames, self.config.temporal_compression_ratio)
    }

    fn wants_picture(&self) -> String {
        format!("{} needs a picture for the video to begin with", self.class())
    }

    fn walk(
        &self,
        request: &Request,
        texts: &Tensor,
        tell: &mut dyn FnMut(Event),
    ) -> Result<Tensor> {
        let shape = self.shape(request);
        let mut generator = TorchGenerator::new(request.seed);
        let count = shape.iter().product();
        let picture = match &self.encoder {
            Some(encoder) => {
                let latents = self.begin(request, encoder, &mut generator)?;
                let [_, frames, ..] = shape;
                Some(latents.pad_with_zeros(1, 0, frames - 1)?)
            }
            None => None,
        };
        let noise = |values: Vec<f32>| Tensor::from_vec(values, &shape, &self.device);
        let mut x = noise(generator.normal(count))?;
        let positions = match self.config.use_rotary_positional_embeddings {
            true => {
                let [_, frames, _, height, width] = shape;
                Some(positions::rotary(&self.config, [frames, height, width], &self.device)?)
            }
            false => None,
        };
        let batch = texts.dim(0)?;
        let samples = self.samples(request);
        let ofs = match self.config.ofs_embed_dim {
            Some(_) => Some(Tensor::full(OFS, batch, &self.device)?),
            None => None,
        };
        let schedule = self.scheduler.schedule(request.steps)?;
        let mut original: Option<Tensor> = None;
        for (step, &timestep) in schedule.timesteps().iter().enumerate() {
            tell(Event::Step { index: step, of: schedule.timesteps().len() });
            let input = match &picture {
                Some(picture) => &Tensor::cat(&[&x, picture], 2)?,
                None => &x,
            };
            let inputs = CogVideoXInputs {
                hidden_states: &Tensor::cat(&vec![input; batch], 0)?,
                encoder_hidden_states: texts,
                timestep: &Tensor::from_vec(vec![timestep as f32; batch], batch, &self.device)?,
                image_positions: positions.as_ref(),
                ofs: ofs.as_ref(),
            };
            let mut output = self.transformer.forward_samples(&inputs, samples)?;
            if batch == 2 {
                let scale = match request.guidance_schedule {
                    GuidanceSchedule::Constant => request.guidance,
                    GuidanceSchedule::Dynamic => {
                        dynamic_guidance(request.guidance, request.steps, timestep)
                    }
                };
                let (without, with) = (output.narrow(0, 0, 1)?, output.narrow(0, 1, 1)?);
                output = add_scaled(&without, &add_scaled(&with, &without, -1.)?, scale)?;
            }
            match &schedule {
                Schedule::Ddim(schedule) => x = schedule.step(step, &output, &x)?,
                Schedule::Dpm(schedule) => {
                    // The device computes meanwhile, until something is copied to it.
                    if original.is_some() && !schedule.ends(step)? {
                        generator.skip(count); // the reference draws once for each order
                    }
                    let drawn = noise(generator.normal(count))?;
                    let next = schedule.step(step, &output, &x, &drawn, original.as_ref())?;
                    (x, original) = (next.sample, Some(next.original));
                }
            }
        }
        Ok(x)
    }
}

impl Pipeline for CogVideoXPipeline {
    fn class(&self) -> &str {
        match &self.encoder {
            Some(_) => Self::FROM_PICTURE,
            None => "CogVideoXPipeline",
        }
    }

    fn parts(&self) -> &[PipelinePart] {
        &[
            PipelinePart { name: "transformer", stem: "diffusion_pytorch_model" },
            PipelinePart { name: "text_encoder", stem: "model" },
        ]
    }

    fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    fn unused(&self) -> Vec<(String, String)> {
        unused_of(&[
            ("text_encoder", self.t5.unused()),
            ("transformer", self.transformer.unused()),
            ("vae", self.decoder.unused()),
        ])
    }

    fn recipe(&self, request: &Request) -> Recipe {
        let mut recipe = vec![
            ("pipeline", self.class().to_string()),
            ("size", format!("{}x{}, {} frames", request.width, request.height, request.frames)),
            ("steps", format!("{} of {}", request.steps, self.scheduler.name())),
            ("max_sequence_length", request.max_sequence_length.to_string()),
            ("noise", "torch CPU generator".to_string()),
            ("attention", "softmax over whole rows, queries in chunks".to_string()),
        ];
        recipe.extend(weights_recipe(&self.options, &self.device, self.compute));
        if Self::guides(request) {
            let how = match request.guidance_schedule {
                GuidanceSchedule::Constant => "",
                GuidanceSchedule::Dynamic => ", dynamic",
            };
            let samples = match self.samples(request) {
                Samples::Together => "one batch",
                Samples::Apart => "two passes within each block",
            };
            let from = match request.negative.as_str() {
                "" => "the empty prompt".into(),
                negative => format!("{negative:?}"),
            };
            recipe.push(("guidance", format!("{}{how}, from {from}, {samples}", request.guidance)));
        }
        recipe.push(match self.tiling(request) {
            Some(tiling) => ("decode", format!("tiles of {}x{}", tiling.width, tiling.height)),
            None => ("decode", "whole frames".into()),
        });
        recipe
    }

    fn check(&self, request: &Request) -> Result<()> {
        self.check_size(request)?;
        check_numbers(request, LONGEST)?;
        let wrong = |what: String| Err(Error::Input(what));
        match (&self.encoder, &request.image) {
            (Some(_), None) => return wrong(self.wants_picture()),
            (None, Some(_)) => {
                return wrong(format!("{} begins with noise and takes no picture", self.class()));
            }
            (Some(_), Some(image)) => check_image(image, request)?,
            (None, None) => {}
        }
        if self.config.use_learned_positional_embeddings {
            let learned = [self.config.sample_height, self.config.sample_width];
            let [height, width] = learned.map(|side| side * self.vae.scale());
            let learned =
                (self.config.max_text_seq_length, self.config.sample_frames, height, width);
            let found =
                (request.max_sequence_length, request.frames, request.height, request.width);
            if found != learned {
                return wrong(format!(
                    "this model has learned positions for {} tokens, {} frames of {}x{}, and no others",
                    learned.0, learned.1, learned.3, learned.2
                ));
            }
        }
        if !request.negative.is_empty() && !Self::guides(request) {
            return wrong("a negative prompt needs a guidance scale above 1".into());
        }
        self.scheduler.schedule(request.steps).map(|_| ())
    }

    fn forget_prompts(&mut self) {
        self.kept.clear();
    }

    fn denoise(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Latents> {
        self.check(request)?;
        self.transformer.pager().begin_run();
        let tokens = request.max_sequence_length;
        let prompt = self.encode(&request.prompt, tokens, tell)?;
        let texts = match Self::guides(request) {
            true => {
                let negative = self.encode(&request.negative, tokens, tell)?;
                Tensor::cat(&[negative, prompt], 0)?
            }
            false => prompt,
        };
        Latents::of(&self.walk(request, &texts, tell)?)
    }

    fn decode(
        &mut self,
        request: &Request,
        latents: &Latents,
        tell: &mut dyn FnMut(Event),
        each: &mut dyn FnMut(Picture) -> Result<()>,
    ) -> Result<()> {
        self.check_size(request)?; // the picture is in the latents
        let x = latents.tensor(&self.shape(request), &self.device)?;
        let (frames, before) = self.latent_frames(request);
        let x = contiguous(&x.narrow(1, before, frames)?.permute([0, 2, 1, 3, 4])?)?;
        tell(Event::Decoding);
        let each = |part: Tensor| pictures(&part)?.into_iter().try_for_each(&mut *each);
        match self.tiling(request) {
            Some(tiling) => self.decoder.decode_tiled_frames(&x, &tiling, each),
            None => self.decoder.decode_frames(&x, each),
        }
    }
}
