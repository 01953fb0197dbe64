//! The FLUX pipeline: prompt to tokens to embeddings, noise to latents, latents to a picture.
//!
//! Five models over one pager (the VAE's encoder is planned with the others but not run here). All
//! of them are placeholders until a pass leases their blocks.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_residency::Pager;

use crate::{
    Defaults, Event, GuidanceSchedule, Latents, ModelIndex, OpenOptions, Picture, Pipeline,
    PipelinePart, Recipe, Request, Result,
    flux::{FluxConfig, FluxInputs, FluxTransformer, latents},
    noise::torch_normal,
    pipeline::{
        Kept, check_numbers, check_picture, check_side, fits, pictures, unused_of, weights_recipe,
    },
    schedulers::flow_match_euler::{self, FlowMatchConfig, FlowMatchEuler, linspace_sigmas},
    text::{
        clip::{ClipConfig, ClipText, Projection},
        t5::{T5Config, T5Encoder},
        tokenizer::Tokenizer,
    },
    vae::kl::{KlConfig, KlDecoder, KlEncoder},
};

/// The most tokens that the T5 of any FLUX model was trained on.
const LONGEST: usize = 512;

/// A FLUX.1 pipeline in diffusers' layout.
pub struct FluxPipeline {
    tokenizer: Tokenizer,
    tokenizer_2: Tokenizer,
    clip: ClipText,
    t5: T5Encoder,
    transformer: FluxTransformer,
    decoder: KlDecoder,
    /// Not run here: it is in the folder, so it counts where a budget is a share of all weights.
    _encoder: KlEncoder,
    scheduler: FlowMatchEuler,
    config: FluxConfig,
    vae: KlConfig,
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
    states: Tensor,
    pooled: Tensor,
}

impl FluxPipeline {
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
        let config = FluxConfig::from_file(part("transformer", "FluxTransformer2DModel")?)?;
        let vae = KlConfig::from_file(part("vae", "AutoencoderKL")?)?;
        let clip = ClipConfig::from_file(part("text_encoder", "CLIPTextModel")?)?;
        let t5 = T5Config::from_file(part("text_encoder_2", "T5EncoderModel")?)?;
        let scheduler = index.part(
            "scheduler",
            "scheduler_config.json",
            &["FlowMatchEulerDiscreteScheduler"],
        )?;
        let scheduler = FlowMatchConfig::from_file(scheduler)?;
        fits(dir, "text_encoder_2", "d_model", config.joint_attention_dim, t5.d_model)?;
        fits(dir, "text_encoder", "hidden_size", config.pooled_projection_dim, clip.hidden_size)?;
        fits(dir, "vae", "latent_channels", config.in_channels / 4, vae.latent_channels)?;

        let open = |name: &str, stems: &[&str]| -> Result<Arc<Checkpoint>> {
            Ok(Arc::new(Checkpoint::open_dir(dir.join(name), stems)?))
        };
        let encoder_files = ["model", "diffusion_pytorch_model"];
        let model_files = ["diffusion_pytorch_model", "model"];
        let builder =
            |name: &str, stems: &[&str]| options.builder(pager, name, || open(name, stems));
        let vae_builder = |name: &str, files: &Arc<Checkpoint>| {
            options.builder(pager, name, || Ok(files.clone()))
        };
        let vae_files = open("vae", &model_files)?;
        let dev = config.guidance_embeds;
        let defaults = Defaults {
            steps: if dev { 28 } else { 4 },
            guidance: if dev { 3.5 } else { 0. },
            max_sequence_length: if dev { 512 } else { 256 },
            guidance_schedule: GuidanceSchedule::Constant,
            width: vae.sample_size,
            height: vae.sample_size,
            frames: 1,
            fps: 1.,
            budget: None,
        };
        Ok(Self {
            tokenizer: Tokenizer::open_dir(dir.join("tokenizer"))?,
            tokenizer_2: Tokenizer::open_dir(dir.join("tokenizer_2"))?,
            clip: ClipText::new(&clip, Projection::No, builder("text_encoder", &encoder_files)?)?,
            t5: T5Encoder::new(&t5, builder("text_encoder_2", &encoder_files)?)?,
            transformer: FluxTransformer::new(&config, builder("transformer", &model_files)?)?,
            decoder: KlDecoder::new(&vae, vae_builder("vae", &vae_files)?)?,
            _encoder: KlEncoder::new(&vae, vae_builder("vae.encoder", &vae_files)?)?,
            defaults: defaults.overridden_by(dir)?,
            scheduler: FlowMatchEuler::new(scheduler)?,
            config,
            vae,
            device: pager.device().candle().clone(),
            compute: pager.device().compute_dtype(),
            options: options.clone(),
            kept: Kept::default(),
        })
    }

    /// Pixels to a side of a token.
    fn patch(&self) -> usize {
        2 * self.vae.scale()
    }

    fn encode(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Encoded> {
        let tokens = request.max_sequence_length;
        let key = (request.prompt.clone(), tokens);
        if let Some(kept) = self.kept.get(&key) {
            return Ok(kept);
        }
        tell(Event::Encoding);
        let mut ids = |tokenizer: &Tokenizer, encoder: &str, length: usize| -> Result<Tensor> {
            let encoding = tokenizer.encode(&request.prompt, length)?;
            if let Some(text) = encoding.cut {
                tell(Event::Cut { encoder: encoder.into(), limit: length, text });
            }
            Ok(Tensor::from_vec(encoding.ids, (1, length), &self.device)?)
        };
        let short = ids(&self.tokenizer, "text_encoder", self.clip.context())?;
        let long = ids(&self.tokenizer_2, "text_encoder_2", tokens)?;
        let pooled = self.clip.forward(&short)?.pooled;
        let states = self.t5.forward(&long, None)?;
        let encoded = Encoded { states, pooled };
        self.kept.put(key, encoded.clone());
        Ok(encoded)
    }

    /// The latents' shape: a token for every patch.
    fn shape(&self, request: &Request) -> [usize; 3] {
        let (rows, columns) = (request.height / self.patch(), request.width / self.patch());
        [1, rows * columns, self.config.in_channels]
    }

    fn walk(
        &self,
        request: &Request,
        prompt: &Encoded,
        tell: &mut dyn FnMut(Event),
    ) -> Result<Tensor> {
        let (rows, columns) = (request.height / self.patch(), request.width / self.patch());
        let channels = self.config.in_channels / 4;
        let noise = torch_normal(request.seed, channels * rows * columns * 4);
        let noise = Tensor::from_vec(noise, (1, channels, rows * 2, columns * 2), &self.device)?;
        let mut x = latents::pack(&noise)?;
        let img_ids = latents::image_ids(rows, columns, &self.device)?;
        let txt_ids = latents::text_ids(request.max_sequence_length, &self.device)?;
        let guidance = match self.config.guidance_embeds {
            true => Some(Tensor::new(&[request.guidance as f32], &self.device)?),
            false => None,
        };
        let sigmas = linspace_sigmas(request.steps);
        let mu = self.scheduler.config().mu(rows * columns);
        let schedule = self.scheduler.schedule(&flow_match_euler::Request {
            sigmas: Some(&sigmas),
            mu: Some(mu),
            ..Default::default()
        })?;
        for step in 0..schedule.len() {
            tell(Event::Step { index: step, of: schedule.len() });
            let timestep = Tensor::new(&[schedule.timesteps()[step] / 1000f32], &self.device)?;
            let velocity = self.transformer.forward(&FluxInputs {
                hidden_states: &x,
                encoder_hidden_states: &prompt.states,
                pooled_projections: &prompt.pooled,
                timestep: &timestep,
                img_ids: &img_ids,
                txt_ids: &txt_ids,
                guidance: guidance.as_ref(),
            })?;
            x = schedule.step(step, &velocity, &x)?;
        }
        Ok(x)
    }
}

impl Pipeline for FluxPipeline {
    fn class(&self) -> &str {
        "FluxPipeline"
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
        // What neither half of the VAE uses; each half ignores the other's weights.
        unused_of(&[
            ("text_encoder", self.clip.unused()),
            ("text_encoder_2", self.t5.unused()),
            ("transformer", self.transformer.unused()),
            ("vae", self.decoder.unused()),
        ])
    }

    fn recipe(&self, request: &Request) -> Recipe {
        let mut recipe = vec![
            ("pipeline", self.class().to_string()),
            ("size", format!("{}x{}", request.width, request.height)),
            ("steps", request.steps.to_string()),
            ("max_sequence_length", request.max_sequence_length.to_string()),
            ("noise", "torch CPU generator".to_string()),
            ("attention", "softmax over whole rows, queries in chunks".to_string()),
        ];
        recipe.extend(weights_recipe(&self.options, &self.device, self.compute));
        if self.config.guidance_embeds {
            recipe.push(("guidance", request.guidance.to_string()));
        }
        recipe
    }

    fn check(&self, request: &Request) -> Result<()> {
        check_picture(request, self.class())?;
        check_side("width", request.width, self.patch())?;
        check_side("height", request.height, self.patch())?;
        check_numbers(request, LONGEST)
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
        let (rows, columns) = (request.height / self.patch(), request.width / self.patch());
        let decoded = self.decoder.decode(&latents::unpack(&x, rows, columns)?)?;
        pictures(&decoded.unsqueeze(2)?)?.into_iter().try_for_each(each)
    }
}
