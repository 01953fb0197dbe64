//! The FLUX pipeline: prompt to tokens to embeddings, noise to latents, latents to a picture.
//!
//! Five models over one pager (the VAE's encoder is planned with the others but not run here). All
//! of them are placeholders until a pass leases their blocks.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_residency::Pager;

use crate::{
    Defaults, Error, Event, ModelIndex, OpenOptions, Picture, Pipeline, PipelinePart, Recipe,
    Request, Result,
    flux::{FluxConfig, FluxInputs, FluxTransformer, latents},
    noise::torch_normal,
    schedulers::flow_match_euler::{self, FlowMatchConfig, FlowMatchEuler, linspace_sigmas},
    text::{
        clip::{ClipConfig, ClipText, Projection},
        t5::{T5Config, T5Encoder},
        tokenizer::Tokenizer,
    },
    vae::kl::{KlConfig, KlDecoder, KlEncoder},
};

/// Prompts whose embeddings are kept.
const KEPT: usize = 8;
/// The most tokens that the T5 of any FLUX model was trained on.
const LONGEST: usize = 512;
/// The largest side of a picture, a bound against slips of the keyboard.
const LARGEST: usize = 16_384;

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
    kept: Vec<Encoded>,
}

/// A prompt's embeddings.
#[derive(Clone)]
struct Encoded {
    prompt: String,
    tokens: usize,
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
        let fits = |file: &str, key: &str, expected: String, found: usize| match expected
            == found.to_string()
        {
            true => Ok(()),
            false => Err(Error::Config {
                file: dir.join(file).join("config.json"),
                key: key.into(),
                expected,
                found: found.to_string(),
            }),
        };
        fits("text_encoder_2", "d_model", config.joint_attention_dim.to_string(), t5.d_model)?;
        fits(
            "text_encoder",
            "hidden_size",
            config.pooled_projection_dim.to_string(),
            clip.hidden_size,
        )?;
        fits("vae", "latent_channels", (config.in_channels / 4).to_string(), vae.latent_channels)?;

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
            width: vae.sample_size,
            height: vae.sample_size,
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
            kept: Vec::new(),
        })
    }

    /// Pixels to a side of a token.
    fn patch(&self) -> usize {
        2 * self.vae.scale()
    }

    fn encode(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Encoded> {
        let tokens = request.max_sequence_length;
        let same = |e: &Encoded| e.prompt == request.prompt && e.tokens == tokens;
        if let Some(kept) = self.kept.iter().find(|e| same(e)) {
            return Ok(kept.clone());
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
        let encoded = Encoded { prompt: request.prompt.clone(), tokens, states, pooled };
        if self.kept.len() == KEPT {
            self.kept.remove(0);
        }
        self.kept.push(encoded.clone());
        Ok(encoded)
    }

    fn denoise(
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
        let txt_ids = latents::text_ids(prompt.tokens, &self.device)?;
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
        let of = |model: &str, tensors: &[String]| -> Vec<(String, String)> {
            tensors.iter().map(|tensor| (model.to_string(), tensor.clone())).collect()
        };
        // What neither half of the VAE uses; each half ignores the other's weights.
        [
            of("text_encoder", self.clip.unused()),
            of("text_encoder_2", self.t5.unused()),
            of("transformer", self.transformer.unused()),
            of("vae", self.decoder.unused()),
        ]
        .concat()
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
        let models = self.options.quantize.join(" and ");
        let except = match self.options.exclude.join(" ") {
            patterns if patterns.is_empty() => String::new(),
            patterns => format!(" but {patterns}"),
        };
        let products = match self.compute {
            DType::F32 => "f32".to_string(),
            half => format!("{half:?}").to_lowercase(),
        };
        recipe.push(match (models.as_str(), self.device.is_cpu()) {
            ("", _) => ("weights", format!("as stored, products in {products}")),
            (models, true) => {
                ("weights", format!("int8 in {models}{except}, code times scale in f32"))
            }
            (models, false) => (
                "weights",
                format!("int8 in {models}{except}, expanded to {products} before each product"),
            ),
        });
        if !self.device.is_cpu() {
            recipe.push(("device", "CUDA".to_string()));
        }
        if self.config.guidance_embeds {
            recipe.push(("guidance", request.guidance.to_string()));
        }
        recipe
    }

    fn check(&self, request: &Request) -> Result<()> {
        let wrong = |what: String| Err(Error::Input(what));
        let patch = self.patch();
        for (name, pixels) in [("width", request.width), ("height", request.height)] {
            if pixels == 0 || pixels > LARGEST || !pixels.is_multiple_of(patch) {
                let near = (pixels.clamp(patch, LARGEST) / patch) * patch;
                return wrong(format!(
                    "{name} {pixels}: expected a multiple of {patch} from {patch} to {LARGEST} \
                     (the nearest below is {near})"
                ));
            }
        }
        if request.steps == 0 {
            return wrong("steps 0: expected at least 1".into());
        }
        let tokens = request.max_sequence_length;
        if !(2..=LONGEST).contains(&tokens) {
            return wrong(format!("max_sequence_length {tokens}: expected 2 to {LONGEST} tokens"));
        }
        if !request.guidance.is_finite() {
            return wrong(format!("guidance {}: expected a number", request.guidance));
        }
        Ok(())
    }

    fn forget_prompts(&mut self) {
        self.kept.clear();
    }

    fn generate(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Picture> {
        self.check(request)?;
        self.transformer.pager().begin_run();
        let prompt = self.encode(request, tell)?;
        let x = self.denoise(request, &prompt, tell)?;
        tell(Event::Decoding);
        let (rows, columns) = (request.height / self.patch(), request.width / self.patch());
        let decoded = self.decoder.decode(&latents::unpack(&x, rows, columns)?)?;
        Ok(Picture {
            width: request.width,
            height: request.height,
            rgb: pixels(&decoded)?,
            latents: x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
        })
    }
}

/// A decoded picture `[1, 3, height, width]`, about -1..1, to rows of RGB bytes.
fn pixels(decoded: &Tensor) -> Result<Vec<u8>> {
    let decoded = decoded.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    let planes = decoded.squeeze(0)?.flatten_from(1)?.to_vec2::<f32>()?;
    let byte = |v: f32| ((v / 2. + 0.5).clamp(0., 1.) * 255.).round_ties_even() as u8;
    let at = |i: usize| planes.iter().map(move |plane| byte(plane[i]));
    Ok((0..planes.first().map_or(0, Vec::len)).flat_map(at).collect())
}
