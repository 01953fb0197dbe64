//! What every pipeline that draws pictures or videos offers, whatever its family.
//!
//! A pipeline is opened over a pager: its models are placeholders then, and a plan can be made and
//! shown before anything is read. Everything that changes numbers is in the [`Request`] and the
//! [`Recipe`]; nothing that the plan decides is. Denoising ends in [`Latents`], which can be kept;
//! decoding makes frames of them, one after another, so that a long video is never whole in memory.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Checkpoint;
use mmgp_quant::{Codes, QuantPolicy};
use mmgp_residency::{Digest, ModelBuilder, Pager};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, config::Check};

/// The largest side of a picture, a bound against slips of the keyboard.
const LARGEST: usize = 16_384;

/// The most frames of a video, likewise.
const MOST_FRAMES: usize = 100_001;

/// How a pipeline's weights are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Models whose linear weights become codes while they are read.
    pub quantize: Vec<String>,
    /// What they become.
    pub codes: Codes,
    /// Layers of them that stay as they are: patterns of full stored names, `*` and `?`.
    pub exclude: Vec<String>,
    /// What products with int8 or fp8 weights take of their input.
    pub activations: Activations,
    /// Models whose weights are taken from another place than the pipeline's folder.
    pub replaced: Vec<Replaced>,
}

/// What products with int8 or fp8 weights take of their input; part of the recipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// It as it is, and the weight expanded to its dtype.
    #[default]
    AsTheyAre,
    /// With int8 weights rows made int8 with a scale for each, where the GPU multiplies int8 by int8; dense weights that
    /// become int8, and the rows for them, are rotated against outliers ([`Codes::RotatedInt8`]). Needs a GPU.
    Int8,
    /// With fp8 weights rows made fp8 (e4m3) with a scale for each, where the GPU multiplies them (compute
    /// capability 9.0), else as they are; needs a GPU.
    Fp8,
}

impl Activations {
    /// The codes that rows become, if any.
    pub fn codes(self) -> Option<Codes> {
        match self {
            Activations::AsTheyAre => None,
            Activations::Int8 => Some(Codes::Int8),
            Activations::Fp8 => Some(Codes::Fp8),
        }
    }
}

/// Where a model's weights are instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The model's name.
    pub model: String,
    /// The file.
    pub file: PathBuf,
    /// The digests of its blocks, the stem's first; empty if they are not known.
    pub digests: Vec<Digest>,
}

impl OpenOptions {
    /// Checks the models to quantize against those that can be.
    ///
    /// # Errors
    /// A name that is none of `models`.
    pub(crate) fn expect(&self, models: &[&str]) -> Result<()> {
        match self.quantize.iter().find(|name| !models.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => Err(Error::Input(format!(
                "`{name}` cannot be quantized: expected some of {}",
                models.join(", ")
            ))),
        }
    }

    /// A builder for the model `name`: over its weights in the pipeline's folder, or those that stand
    /// for them, quantizing if it is among those.
    ///
    /// # Errors
    /// Weights that cannot be opened; a pattern that is none; int8 or fp8 activations on the CPU.
    pub(crate) fn builder(
        &self,
        pager: &Pager,
        name: &str,
        folder: impl FnOnce() -> Result<Arc<Checkpoint>>,
    ) -> Result<ModelBuilder> {
        let replaced = self.replaced.iter().find(|r| r.model == name);
        let files = match replaced {
            Some(replaced) => Arc::new(Checkpoint::open(&replaced.file)?),
            None => folder()?,
        };
        let mut builder = ModelBuilder::new(pager, name, files);
        if let Some(replaced) = replaced {
            builder.expect(replaced.digests.clone());
        } else if self.quantize.iter().any(|quantized| quantized == name) {
            builder.quantize(QuantPolicy::new(self.codes, &self.exclude)?);
        }
        if let Some(codes) = self.activations.codes() {
            if pager.device().candle().is_cpu() {
                return Err(Error::Input(format!("{codes} activations need a GPU")));
            }
            builder.quantize_activations(codes);
        }
        Ok(builder)
    }
}

/// What is to be drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The prompt.
    pub prompt: String,
    /// What to keep away from; only for pipelines that guide by a second pass.
    pub negative: String,
    /// The picture that a video begins with, for pipelines that take one.
    #[serde(skip)]
    pub image: Option<Picture>,
    /// Seed of the noise, as torch's CPU generator takes it.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// 1 is a picture.
    pub frames: usize,
    /// Guidance scale; models without a guidance embedding or a second pass ignore it.
    pub guidance: f64,
    /// How the guidance scale goes over the run.
    pub guidance_schedule: GuidanceSchedule,
    /// Tokens that the long text encoder sees; shorter prompts are padded to it.
    pub max_sequence_length: usize,
    /// Whether frames are decoded in tiles.
    pub tiles: Tiles,
}

/// How the guidance scale goes over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuidanceSchedule {
    /// The same at every step.
    #[default]
    Constant,
    /// As the family's reference changes it.
    Dynamic,
}

/// Whether the VAE of a video decodes frames in tiles that overlap, as the family's reference cuts
/// them. Tiles need less memory and change pixels a little, so they are a part of the recipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tiles {
    /// Where a frame is larger than a tile.
    #[default]
    On,
    /// Never.
    Off,
}

/// What a pipeline takes where the user says nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// How it goes over the run.
    pub guidance_schedule: GuidanceSchedule,
    /// Tokens of the long text encoder.
    pub max_sequence_length: usize,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// 1 for pipelines that draw pictures.
    pub frames: usize,
    /// Frames a second of a video that is written.
    pub fps: f64,
    /// The memory budget as the command takes it, if the pipeline's folder names one.
    pub budget: Option<String>,
}

impl Defaults {
    /// A request for `prompt` with these defaults and seed 42.
    pub fn request(&self, prompt: &str) -> Request {
        Request {
            prompt: prompt.to_string(),
            negative: String::new(),
            image: None,
            seed: 42,
            steps: self.steps,
            width: self.width,
            height: self.height,
            frames: self.frames,
            guidance: self.guidance,
            guidance_schedule: self.guidance_schedule,
            max_sequence_length: self.max_sequence_length,
            tiles: Tiles::On,
        }
    }

    /// Overridden by the `generate.json` in `dir`, if there is one.
    ///
    /// # Errors
    /// A file that is no such JSON, names unknown keys or impossible values.
    pub(crate) fn overridden_by(mut self, dir: &Path) -> Result<Self> {
        let file = dir.join("generate.json");
        if !file.try_exists().unwrap_or(false) {
            return Ok(self);
        }
        let own: GenerateFile = mmgp_io::read_json(&file)?;
        let check = Check::new(&file);
        check.that(own.steps != Some(0), "steps", "at least 1", 0)?;
        check.that(own.frames != Some(0), "frames", "at least 1", 0)?;
        check.positive("fps", own.fps.unwrap_or(self.fps))?;
        self.steps = own.steps.unwrap_or(self.steps);
        self.guidance = own.guidance.unwrap_or(self.guidance);
        self.guidance_schedule = own.guidance_schedule.unwrap_or(self.guidance_schedule);
        self.max_sequence_length = own.max_sequence_length.unwrap_or(self.max_sequence_length);
        self.width = own.width.unwrap_or(self.width);
        self.height = own.height.unwrap_or(self.height);
        self.frames = own.frames.unwrap_or(self.frames);
        self.fps = own.fps.unwrap_or(self.fps);
        self.budget = own.budget.or(self.budget);
        Ok(self)
    }
}

/// `generate.json`: what a pipeline's folder wants by default.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GenerateFile {
    steps: Option<usize>,
    guidance: Option<f64>,
    guidance_schedule: Option<GuidanceSchedule>,
    max_sequence_length: Option<usize>,
    width: Option<usize>,
    height: Option<usize>,
    frames: Option<usize>,
    fps: Option<f64>,
    budget: Option<String>,
}

/// Everything that changes numbers, `(what, how)`, fixed before planning.
pub type Recipe = Vec<(&'static str, String)>;

/// What a pipeline tells while it runs.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The prompt is being encoded.
    Encoding,
    /// Part of the prompt does not fit an encoder and is not seen by it.
    Cut {
        /// The encoder's name.
        encoder: String,
        /// How many tokens it sees.
        limit: usize,
        /// The text that was cut.
        text: String,
    },
    /// A denoising step is queued from here on. What was queued before may still be computing.
    Step {
        /// Its number, from 0.
        index: usize,
        /// How many there are.
        of: usize,
    },
    /// A denoising step is over on the device. Not told by pipelines, but by who runs them and asks the device.
    Stepped {
        /// Its number, from 0.
        index: usize,
        /// How many there are.
        of: usize,
        /// What it took on the device, with whatever that waited for.
        took: Duration,
    },
    /// The latents are being decoded.
    Decoding,
}

/// A model of a pipeline and where its weights are in the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelinePart {
    /// The model's name, which is that of its folder.
    pub name: &'static str,
    /// The name of its weights' file, without an ending.
    pub stem: &'static str,
}

/// A picture, or a frame of a video.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Rows of RGB, 8 bits each.
    pub rgb: Vec<u8>,
}

/// What denoising ends in.
#[derive(Clone, Debug, PartialEq)]
pub struct Latents {
    /// As the family's transformer has them.
    pub shape: Vec<usize>,
    /// In f32, the last dimension innermost.
    pub values: Vec<f32>,
}

impl Latents {
    pub(crate) fn of(tensor: &Tensor) -> Result<Self> {
        let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
        Ok(Self { shape: tensor.dims().to_vec(), values })
    }

    /// The tensor on `device`, whose shape must be `expected`.
    pub(crate) fn tensor(&self, expected: &[usize], device: &Device) -> Result<Tensor> {
        if self.shape != expected || self.values.len() != expected.iter().product::<usize>() {
            return Err(Error::Input(format!(
                "latents of shape {:?} ({} values): a request of this size has {expected:?}",
                self.shape,
                self.values.len()
            )));
        }
        Ok(Tensor::from_slice(&self.values, expected, device)?)
    }
}

/// A whole run in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// What denoising ended in.
    pub latents: Latents,
    /// One for a picture.
    pub frames: Vec<Picture>,
}

/// A pipeline that draws pictures or videos from prompts.
pub trait Pipeline {
    /// Its class, such as `FluxPipeline`.
    fn class(&self) -> &str;

    /// The models that are stems and blocks, and so gain from files in streaming order.
    fn parts(&self) -> &[PipelinePart];

    /// What it takes where the user says nothing.
    fn defaults(&self) -> &Defaults;

    /// Stored tensors that no model asked for, `(model, tensor)`.
    fn unused(&self) -> Vec<(String, String)>;

    /// What decides the numbers of this request's result.
    fn recipe(&self, request: &Request) -> Recipe;

    /// Whether the request can be drawn; cheap, reads nothing.
    ///
    /// # Errors
    /// Sizes, steps or lengths that the pipeline cannot do, with what it can.
    fn check(&self, request: &Request) -> Result<()>;

    /// Forgets the prompt embeddings that were kept: to be called when something that changes them
    /// did, such as an adapter of a text encoder.
    fn forget_prompts(&mut self);

    /// From prompt and noise to latents. Prompt embeddings are kept, so that the next picture of the
    /// same prompt needs no encoder.
    ///
    /// # Errors
    /// Those of [`check`](Self::check); files that cannot be read; cancellation.
    fn denoise(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Latents>;

    /// From the latents that [`denoise`](Self::denoise) made of the same request to frames, which
    /// `each` is given in order.
    ///
    /// # Errors
    /// Latents of another size; those of `denoise` and of `each`.
    fn decode(
        &mut self,
        request: &Request,
        latents: &Latents,
        tell: &mut dyn FnMut(Event),
        each: &mut dyn FnMut(Picture) -> Result<()>,
    ) -> Result<()>;

    /// Both, with all frames in memory.
    ///
    /// # Errors
    /// Those of both.
    fn generate(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Output> {
        let latents = self.denoise(request, tell)?;
        let mut frames = Vec::new();
        self.decode(request, &latents, tell, &mut |frame| {
            frames.push(frame);
            Ok(())
        })?;
        Ok(Output { latents, frames })
    }
}

/// Stored tensors that no part of a pipeline uses, by the parts' names.
pub(crate) fn unused_of(parts: &[(&str, &[String])]) -> Vec<(String, String)> {
    let of = |(model, tensors): &(&str, &[String])| {
        let named = |tensor: &String| ((*model).to_string(), tensor.clone());
        tensors.iter().map(named).collect::<Vec<_>>()
    };
    parts.iter().flat_map(of).collect()
}

/// Checks that `request` is for one picture from a prompt alone.
pub(crate) fn check_picture(request: &Request, class: &str) -> Result<()> {
    let wrong = |what: String| Err(Error::Input(what));
    if request.frames != 1 {
        return wrong(format!("frames {}: {class} draws pictures, of 1 frame", request.frames));
    }
    if !request.negative.is_empty() {
        return wrong(format!("{class} takes no negative prompt"));
    }
    if request.image.is_some() {
        return wrong(format!("{class} begins with noise and takes no picture"));
    }
    if request.guidance_schedule != GuidanceSchedule::Constant {
        return wrong(format!("{class} has no dynamic guidance"));
    }
    if request.tiles == Tiles::Off {
        return wrong(format!("{class} decodes without tiles, there are none to leave out"));
    }
    Ok(())
}

/// Checks that `pixels` of the side `name` are whole patches.
pub(crate) fn check_side(name: &str, pixels: usize, patch: usize) -> Result<()> {
    if pixels == 0 || pixels > LARGEST || !pixels.is_multiple_of(patch) {
        let near = (pixels.clamp(patch, LARGEST) / patch) * patch;
        return Err(Error::Input(format!(
            "{name} {pixels}: expected a multiple of {patch} from {patch} to {LARGEST} (the nearest \
             below is {near})"
        )));
    }
    Ok(())
}

/// Checks that frames are one and a multiple of `ratio` more, which a latent frame stands for.
pub(crate) fn check_frames(frames: usize, ratio: usize) -> Result<()> {
    if frames == 0 || frames > MOST_FRAMES || frames % ratio != 1 % ratio {
        let near = (frames.clamp(1, MOST_FRAMES) - 1) / ratio * ratio + 1;
        return Err(Error::Input(format!(
            "frames {frames}: expected 1 more than a multiple of {ratio}, up to {MOST_FRAMES} (the \
             nearest below is {near})"
        )));
    }
    Ok(())
}

/// Checks that what a part of the pipeline in `dir` has as `key` is what the others expect.
pub(crate) fn fits(dir: &Path, part: &str, key: &str, expected: usize, found: usize) -> Result<()> {
    match expected == found {
        true => Ok(()),
        false => Err(Error::Config {
            file: dir.join(part).join("config.json"),
            key: key.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }),
    }
}

/// Checks what means the same to all pipelines: steps, guidance, and tokens up to `longest`.
pub(crate) fn check_numbers(request: &Request, longest: usize) -> Result<()> {
    if request.steps == 0 {
        return Err(Error::Input("steps 0: expected at least 1".into()));
    }
    let tokens = request.max_sequence_length;
    if !(2..=longest).contains(&tokens) {
        return Err(Error::Input(format!(
            "max_sequence_length {tokens}: expected 2 to {longest} tokens"
        )));
    }
    if !request.guidance.is_finite() {
        return Err(Error::Input(format!("guidance {}: expected a number", request.guidance)));
    }
    Ok(())
}

/// What decides the numbers of products: how weights are stored and multiplied, on which device.
pub(crate) fn weights_recipe(options: &OpenOptions, device: &Device, compute: DType) -> Recipe {
    let models = options.quantize.join(" and ");
    let except = match options.exclude.join(" ") {
        patterns if patterns.is_empty() => String::new(),
        patterns => format!(" but {patterns}"),
    };
    let products = match compute {
        DType::F32 => "f32".to_string(),
        half => format!("{half:?}").to_lowercase(),
    };
    let codes = options.codes;
    let activations = options.activations.codes().filter(|&codes| multiplies(device, codes));
    let weights = match (models.as_str(), device.is_cpu(), activations) {
        ("", _, Some(of)) => {
            format!("as stored, products in {products}, of {of} with activations {of} per row")
        }
        ("", _, None) => format!("as stored, products in {products}"),
        (models, true, _) => format!("{codes} in {models}{except}, code times scale in f32"),
        (models, false, Some(Codes::Int8)) if codes == Codes::Int8 => {
            format!(
                "{codes} in {models}{except}, activations {codes} per row, both rotated in groups of \
                 256 where rows have whole ones"
            )
        }
        (models, false, Some(of)) if of == codes => {
            format!("{codes} in {models}{except}, activations {of} per row")
        }
        (models, false, _) => {
            format!("{codes} in {models}{except}, expanded to {products} before each product")
        }
    };
    let mut recipe = vec![("weights", weights)];
    if let Some(kernels) = kernels(device) {
        recipe.push(("device", format!("CUDA, {kernels}")));
    }
    recipe
}

/// Whether the device multiplies such codes, where that is allowed.
fn multiplies(device: &Device, codes: Codes) -> bool {
    match (device, codes) {
        #[cfg(feature = "cuda")]
        (Device::Cuda(device), Codes::Fp8) => mmgp_quant::fp8_enabled(device),
        _ => true,
    }
}

/// What computes between the products on a GPU.
fn kernels(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device
        && crate::nn::cuda::enabled(device)
    {
        use crate::nn::cuda::{
            attention_enabled, convolution_enabled, cudnn_version, flash_enabled,
        };
        let cudnn = cudnn_version().map_or(String::new(), |version| {
            format!("cuDNN {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
        });
        let by = |enabled: bool, else_: &str| match enabled {
            true => format!("by {cudnn}"),
            false => else_.to_string(),
        };
        let attention = match (attention_enabled(device), flash_enabled(device)) {
            (true, true) => format!("by {cudnn} or else the flash kernel"),
            (false, true) => "by the flash kernel".into(),
            (whole, false) => by(whole, "in chunks"),
        };
        let convolution = by(convolution_enabled(device), "by the tensor library");
        return Some(format!("fused kernels, attention {attention}, convolutions {convolution}"));
    }
    (!device.is_cpu()).then(|| "the tensor library's operations".into())
}

/// Checks that a picture is whole and of the request's size.
pub(crate) fn check_image(image: &Picture, request: &Request) -> Result<()> {
    let (width, height) = (request.width, request.height);
    match (image.width, image.height) == (width, height) && image.rgb.len() == 3 * width * height {
        true => Ok(()),
        false => Err(Error::Input(format!(
            "a picture of {}x{} ({} bytes): expected one of {width}x{height}, as the video",
            image.width,
            image.height,
            image.rgb.len()
        ))),
    }
}

/// A picture as `[1, 3, height, width]` of -1..1, f32.
pub(crate) fn to_tensor(picture: &Picture, device: &Device) -> Result<Tensor> {
    let shape = (picture.height, picture.width, 3);
    let bytes = Tensor::from_slice(&picture.rgb, shape, device)?.to_dtype(DType::F32)?;
    let values = (((bytes / 255.)? * 2.)? - 1.)?;
    Ok(values.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?)
}

/// Decoded frames `[1, 3, frames, height, width]` of about -1..1, as pictures.
pub(crate) fn pictures(decoded: &Tensor) -> Result<Vec<Picture>> {
    let (_, _, frames, height, width) = decoded.dims5()?;
    let decoded = decoded.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.squeeze(0)?;
    let byte = |v: f32| ((v / 2. + 0.5).clamp(0., 1.) * 255.).round_ties_even() as u8;
    let mut pictures = Vec::with_capacity(frames);
    for at in 0..frames {
        let planes = decoded.narrow(1, at, 1)?.flatten_from(1)?.to_vec2::<f32>()?;
        let pixel = |i: usize| planes.iter().map(move |plane| byte(plane[i]));
        let rgb = (0..height * width).flat_map(pixel).collect();
        pictures.push(Picture { width, height, rgb });
    }
    Ok(pictures)
}

/// The results of the last few prompts.
#[derive(Debug)]
pub(crate) struct Kept<K, V>(Vec<(K, V)>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: PartialEq, V: Clone> Kept<K, V> {
    const MOST: usize = 8;

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        self.0.iter().find(|(kept, _)| kept == key).map(|(_, value)| value.clone())
    }

    pub(crate) fn put(&mut self, key: K, value: V) {
        if self.0.len() == Self::MOST {
            self.0.remove(0);
        }
        self.0.push((key, value));
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
