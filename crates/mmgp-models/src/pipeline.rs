//! What every text-to-picture pipeline offers, whatever its family.
//!
//! A pipeline is opened over a pager: its models are placeholders then, and a plan can be made and
//! shown before anything is read. Everything that changes numbers is in the [`Request`] and the
//! [`Recipe`]; nothing that the plan decides is.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use mmgp_io::Checkpoint;
use mmgp_quant::QuantPolicy;
use mmgp_residency::{Digest, ModelBuilder, Pager};
use serde::Deserialize;

use crate::{Error, Result};

/// How a pipeline's weights are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Models whose linear weights become int8 while they are read.
    pub quantize: Vec<String>,
    /// Layers of them that stay as they are: patterns of full stored names, `*` and `?`.
    pub exclude: Vec<String>,
    /// Models whose weights are taken from another place than the pipeline's folder.
    pub replaced: Vec<Replaced>,
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
    /// Weights that cannot be opened; a pattern that is none.
    pub(crate) fn builder(
        &self,
        pager: &Pager,
        name: &str,
        folder: impl FnOnce() -> Result<Arc<Checkpoint>>,
    ) -> Result<ModelBuilder> {
        if let Some(replaced) = self.replaced.iter().find(|r| r.model == name) {
            let files = Arc::new(Checkpoint::open(&replaced.file)?);
            let mut builder = ModelBuilder::new(pager, name, files);
            builder.expect(replaced.digests.clone());
            return Ok(builder);
        }
        let mut builder = ModelBuilder::new(pager, name, folder()?);
        if self.quantize.iter().any(|quantized| quantized == name) {
            builder.quantize(QuantPolicy::int8(&self.exclude)?);
        }
        Ok(builder)
    }
}

/// What is to be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt.
    pub prompt: String,
    /// Seed of the noise, as torch's CPU generator takes it.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Guidance scale; models without a guidance embedding ignore it.
    pub guidance: f64,
    /// Tokens that the long text encoder sees; shorter prompts are padded to it.
    pub max_sequence_length: usize,
}

/// What a pipeline takes where the user says nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Tokens of the long text encoder.
    pub max_sequence_length: usize,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// The memory budget as the command takes it, if the pipeline's folder names one.
    pub budget: Option<String>,
}

impl Defaults {
    /// A request for `prompt` with these defaults and seed 42.
    pub fn request(&self, prompt: &str) -> Request {
        Request {
            prompt: prompt.to_string(),
            seed: 42,
            steps: self.steps,
            width: self.width,
            height: self.height,
            guidance: self.guidance,
            max_sequence_length: self.max_sequence_length,
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
        if own.steps == Some(0) {
            return Err(Error::Config {
                file,
                key: "steps".into(),
                expected: "at least 1".into(),
                found: "0".into(),
            });
        }
        self.steps = own.steps.unwrap_or(self.steps);
        self.guidance = own.guidance.unwrap_or(self.guidance);
        self.max_sequence_length = own.max_sequence_length.unwrap_or(self.max_sequence_length);
        self.width = own.width.unwrap_or(self.width);
        self.height = own.height.unwrap_or(self.height);
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
    max_sequence_length: Option<usize>,
    width: Option<usize>,
    height: Option<usize>,
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
    /// A denoising step begins.
    Step {
        /// Its number, from 0.
        index: usize,
        /// How many there are.
        of: usize,
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

/// A picture and the latents it was decoded from.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Rows of RGB, 8 bits each.
    pub rgb: Vec<u8>,
    /// The final latents in f32, as the denoiser leaves them.
    pub latents: Vec<f32>,
}

/// A pipeline that draws pictures from prompts.
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

    /// Draws. Prompt embeddings are kept, so that the next picture of the same prompt needs no
    /// encoder.
    ///
    /// # Errors
    /// Those of [`check`](Self::check); files that cannot be read; cancellation.
    fn generate(&mut self, request: &Request, tell: &mut dyn FnMut(Event)) -> Result<Picture>;
}
