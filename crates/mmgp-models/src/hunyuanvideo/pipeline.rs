//! The HunyuanVideo pipeline: prompt to embeddings, noise to latents, latents to frames.
//!
//! What is drawn, and what the text encoders read, is as diffusers 0.42.1 does it.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_residency::Pager;

use super::{
    HunyuanVideoConfig, HunyuanVideoDecoder, HunyuanVideoInputs, HunyuanVideoTransformer,
    HunyuanVideoVaeConfig, Tiling, prompt,
};
use crate::{
    Defaults, Error, Event, GuidanceSchedule, Latents, ModelIndex, OpenOptions, Picture, Pipeline,
    PipelinePart, Recipe, Request, Result, Tiles,
    noise::torch_normal,
    pipeline::{
        Kept, check_frames, check_numbers, check_side, fits, pictures, unused_of, weights_recipe,
    },
    schedulers::flow_match_euler::{self, FlowMatchConfig, FlowMatchEuler, linspace_sigmas},
    text::{
        clip::{ClipConfig, ClipText, Projection},
        llama::{LlamaConfig, LlamaEncoder},
        tokenizer::Tokenizer,
    },
};

/// A HunyuanVideo pipeline in diffusers' layout: `HunyuanVideoPipeline`.
pub struct HunyuanVideoPipeline {
    tokenizer: Tokenizer,
    tokenizer_2: Tokenizer,
    llama: LlamaEncoder,
    clip: ClipText,
    transformer: HunyuanVideoTransformer,
    decoder: HunyuanVideoDecoder,
    scheduler: FlowMatchEuler,
    config: HunyuanVideoConfig,
    vae: HunyuanVideoVaeConfig,
    defaults: Defaults,
    device: Device,
    compute: DType,
    options: OpenOptions,
    /// By prompt and tokens.
    kept: Kept<(String, usize), Encoded>,
}

/// A prompt's embeddings.
#[derive(Clone)]
struct Encoded {
    /// `[1, tokens, width]`, and how many of them are no padding.
    states: Tensor,
    length: usize,
    pooled: Tensor,
}

impl HunyuanVideoPipeline {
    /// Opens the folder over `pager`. Reads configs, tokenizers and headers, no weights.
    ///
    /// # Errors
    /// Anything in the folder that is missing, malformed, of another class, or does not fit the rest.
    pub fn open(
        dir: &Path,
        index: &ModelIndex,
        pager: &Pager,
        options: &OpenOptions,
    ) -> Result<Self> {
        options.expect(&["transformer", "text_encoder", "text_encoder_2"])?;
        let part = |name: &str, class: &str| index.part(name, "config.json", &[class]);
        let config =
            HunyuanVideoConfig::from_file(part("transformer", "HunyuanVideoTransformer3DModel")?)?;
        let vae = HunyuanVideoVaeConfig::from_file(part("vae", "AutoencoderKLHunyuanVideo")?)?;
        let llama = LlamaConfig::from_file(part("text_encoder", "LlamaModel")?)?;
        let clip = ClipConfig::from_file(part("text_encoder_2", "CLIPTextModel")?)?;
        let scheduler = index.part(
            "scheduler",
            "scheduler_config.json",
            &["FlowMatchEulerDiscreteScheduler"],
        )?;
        let scheduler = FlowMatchConfig::from_file(scheduler)?;
        fits(dir, "text_encoder", "hidden_size", config.text_embed_dim, llama.hidden_size)?;
        fits(dir, "text_encoder_2", "hidden_size", config.pooled_projection_dim, clip.hidden_size)?;
        fits(dir, "transformer", "in_channels", vae.latent_channels, config.in_channels)?;
        let out = config.out_channels.unwrap_or(config.in_channels);
        fits(dir, "transformer", "out_channels", vae.latent_channels, out)?;

        let builder = |name: &str, stems: &[&str]| {
            let open = || Ok(Arc::new(Checkpoint::open_dir(dir.join(name), stems)?));
            options.builder(pager, name, open)
        };
        let encoder_files = ["model", "diffusion_pytorch_model"];
        let model_files = ["diffusion_pytorch_model", "model"];
        let defaults = Defaults {
            steps: 50,
            guidance: 6.,
            guidance_schedule: GuidanceSchedule::Constant,
            max_sequence_length: prompt::MAX_TOKENS,
            width: 1280,
            height: 720,
            frames: 129,
            fps: 24.,
            budget: None,
        };
        let llama_weights = builder("text_encoder", &encoder_files)?;
        Ok(Self {
            tokenizer: Tokenizer::open_dir(dir.join("tokenizer"))?,
            tokenizer_2: Tokenizer::open_dir(dir.join("tokenizer_2"))?,
            llama: LlamaEncoder::new(&llama, prompt::HIDDEN_STATE, llama_weights)?,
            clip: ClipText::new(&clip, Projection::No, builder("text_encoder_2", &encoder_files)?)?,
            transformer: HunyuanVideoTransformer::new(
                &config,
                builder("transformer", &model_files)?,
            )?,
            decoder: HunyuanVideoDecoder::new(&vae, builder("vae", &model_files)?)?,
            scheduler: FlowMatchEuler::new(scheduler)?,
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

    /// The latents' shape: `[1, channels, frames, height, width]`.
    fn shape(&self, request: &Request) -> [usize; 5] {
        let scale = self.vae.scale();
        let frames = (request.frames - 1) / self.vae.temporal_compression_ratio + 1;
        let channels = self.vae.latent_channels;
        [1, channels, frames, request.height / scale, request.width / scale]
    }

    /// Tiles of time always, as the reference has them, and of space where frames are larger than one.
    fn tiling(request: &Request) -> Tiling {
        match request.tiles {
            Tiles::On => Tiling::default(),
            Tiles::Off => Tiling::of_time(),
        }
    }

    fn encode(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Encoded> {
        let tokens = request.max_sequence_length;
        let key = (request.prompt.clone(), tokens);
        if let Some(kept) = self.kept.get(&key) {
            return Ok(kept);
        }
        tell(Event::Encoding);
        let wrapped =
            self.tokenizer.encode(&prompt::wrap(&request.prompt), prompt::CROP + tokens)?;
        if let Some(text) = wrapped.cut.as_deref().and_then(prompt::cut) {
            tell(Event::Cut { encoder: "text_encoder".into(), limit: tokens, text: text.into() });
        }
        let context = self.clip.context();
        let short = self.tokenizer_2.encode(&request.prompt, context)?;
        if let Some(text) = short.cut {
            tell(Event::Cut { encoder: "text_encoder_2".into(), limit: context, text });
        }
        let row = |ids: Vec<u32>| {
            let shape = (1, ids.len());
            Tensor::from_vec(ids, shape, &self.device)
        };
        let mask = row(wrapped.mask.clone())?;
        let states = self.llama.forward(&row(wrapped.ids)?, Some(&mask), prompt::HIDDEN_STATE)?;
        let (states, lengths) = prompt::crop(&states, &[wrapped.mask])?;
        let length = lengths.first().copied().unwrap_or(0);
        let pooled = self.clip.forward(&row(short.ids)?)?.pooled;
        let encoded = Encoded { states, length, pooled };
        self.kept.put(key, encoded.clone());
        Ok(encoded)
    }

    fn walk(
        &self,
        request: &Request,
        prompt: &Encoded,
        tell: &mut dyn FnMut(Event),
    ) -> Result<Tensor> {
        let shape = self.shape(request);
        let noise = torch_normal(request.seed, shape.iter().product());
        let mut x = Tensor::from_vec(noise, &shape, &self.device)?;
        let guidance = match self.config.guidance_embeds {
            true => Some(Tensor::new(&[request.guidance as f32 * 1000.], &self.device)?),
            false => None,
        };
        let sigmas = linspace_sigmas(request.steps);
        let schedule = self
            .scheduler
            .schedule(&flow_match_euler::Request { sigmas: Some(&sigmas), ..Default::default() })?;
        for step in 0..schedule.len() {
            tell(Event::Step { index: step, of: schedule.len() });
            let velocity = self.transformer.forward(&HunyuanVideoInputs {
                hidden_states: &x,
                timestep: &Tensor::new(&[schedule.timesteps()[step]], &self.device)?,
                encoder_hidden_states: &prompt.states,
                text_lengths: &[prompt.length],
                pooled_projections: &prompt.pooled,
                guidance: guidance.as_ref(),
            })?;
            x = schedule.step(step, &velocity, &x)?;
        }
        Ok(x)
    }
}

impl Pipeline for HunyuanVideoPipeline {
    fn class(&self) -> &str {
        "HunyuanVideoPipeline"
    }

    fn parts(&self) -> &[PipelinePart] {
        &[
            PipelinePart { name: "transformer", stem: "diffusion_pytorch_model" },
            PipelinePart { name: "text_encoder", stem: "model" },
            PipelinePart { name: "text_encoder_2", stem: "model" },
        ]
    }

    fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    fn unused(&self) -> Vec<(String, String)> {
        unused_of(&[
            ("text_encoder", self.llama.unused()),
            ("text_encoder_2", self.clip.unused()),
            ("transformer", self.transformer.unused()),
            ("vae", self.decoder.unused()),
        ])
    }

    fn recipe(&self, request: &Request) -> Recipe {
        let mut recipe = vec![
            ("pipeline", self.class().to_string()),
            ("size", format!("{}x{}, {} frames", request.width, request.height, request.frames)),
            ("steps", request.steps.to_string()),
            ("max_sequence_length", request.max_sequence_length.to_string()),
            ("noise", "torch CPU generator".to_string()),
            ("attention", "softmax over whole rows, queries in chunks".to_string()),
        ];
        recipe.extend(weights_recipe(&self.options, &self.device, self.compute));
        if self.config.guidance_embeds {
            recipe.push(("guidance", request.guidance.to_string()));
        }
        let Tiling { space, frames } = Self::tiling(request);
        let time = format!("tiles of {} frames", frames.size);
        recipe.push(match space {
            Some([height, width]) => ("decode", format!("{time}, {}x{}", width.size, height.size)),
            None => ("decode", time),
        });
        recipe
    }

    fn check(&self, request: &Request) -> Result<()> {
        check_side("width", request.width, self.patch())?;
        check_side("height", request.height, self.patch())?;
        check_numbers(request, prompt::MAX_TOKENS)?;
        check_frames(request.frames, self.vae.temporal_compression_ratio)?;
        let wrong = |what: &str| Err(Error::Input(format!("{} {what}", self.class())));
        if !request.negative.is_empty() {
            return wrong("takes no negative prompt: its guidance is an input of the model");
        }
        if request.image.is_some() {
            return wrong("begins with noise and takes no picture");
        }
        if request.guidance_schedule != GuidanceSchedule::Constant {
            return wrong("has no dynamic guidance");
        }
        Ok(())
    }

    fn forget_prompts(&mut self) {
        self.kept.clear();
    }

    fn denoise(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Latents> {
        self.check(request)?;
        self.transformer.pager().begin_run();
        let prompt = self.encode(request, tell)?;
        Latents::of(&self.walk(request, &prompt, tell)?)
    }

    fn decode(
        &mut self,
        request: &Request,
        latents: &Latents,
        tell: &mut dyn FnMut(Event),
        each: &mut dyn FnMut(Picture) -> Result<()>,
    ) -> Result<()> {
        self.check(request)?;
        let x = latents.tensor(&self.shape(request), &self.device)?;
        tell(Event::Decoding);
        let each = |part: Tensor| pictures(&part)?.into_iter().try_for_each(&mut *each);
        self.decoder.decode_frames(&x, &Self::tiling(request), each)
    }
}
