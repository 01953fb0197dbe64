//! A pipeline's folder in diffusers' layout: its configs, and writing it.
//!
//! Configs are written first and read back by the models' own readers; `model_index.json`, which
//! makes a folder a pipeline, comes last. A family is a file of this crate that makes a [`Folder`].

use std::{
    cell::RefCell,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use mmgp_io::{Dtype, TensorSpec, write_sharded};
use mmgp_residency::{ModelBuilder, Pager, Sketch};
use serde_json::{Value, json};

use crate::values;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The configs of a pipeline, as their files have them.
#[derive(Clone, Debug)]
pub struct Folder {
    pub(crate) class: &'static str,
    pub(crate) models: Vec<Model>,
    /// Class and config.
    pub(crate) scheduler: (&'static str, Value),
    /// Folder, class, and the folder of the repository whose files stand for it.
    pub(crate) tokenizers: Vec<(&'static str, &'static str, &'static str)>,
}

/// A model of a pipeline.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    name: &'static str,
    class: &'static str,
    config: Value,
    dtype: Dtype,
    build: Build,
}

/// Builds a model over sketches, given the path of its config.
type Build = fn(&Path, &Sketches<'_>) -> Result<()>;

impl Model {
    pub(crate) fn new(
        name: &'static str,
        class: &'static str,
        config: Value,
        build: Build,
    ) -> Self {
        Self { name, class, config, dtype: Dtype::BF16, build }
    }

    /// With weights of this dtype, of 16 bits.
    pub(crate) fn stored_in(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// The tensors that the model asks for under the config at `path`.
    fn tensors(&self, path: &Path) -> Result<Vec<(String, Vec<usize>)>> {
        let pager = Pager::new(&Device::Cpu)?;
        let sketches = Sketches {
            pager: &pager,
            name: self.name,
            dtype: self.dtype,
            made: RefCell::default(),
        };
        (self.build)(path, &sketches)?;
        let mut tensors: Vec<_> =
            sketches.made.into_inner().iter().flat_map(Sketch::tensors).collect();
        // The halves of an autoencoder may both ask for one.
        let mut seen = std::collections::BTreeSet::new();
        tensors.retain(|(name, _)| seen.insert(name.clone()));
        Ok(tensors)
    }

    /// transformers and diffusers name their files and their library differently.
    fn is_transformers(&self) -> bool {
        self.name.starts_with("text_encoder")
    }
}

/// What a model is built over so that it tells which tensors it reads.
pub(crate) struct Sketches<'a> {
    pager: &'a Pager,
    name: &'static str,
    dtype: Dtype,
    made: RefCell<Vec<Sketch>>,
}

impl Sketches<'_> {
    /// For one model, or one half of an autoencoder.
    pub(crate) fn builder(&self) -> ModelBuilder {
        let (builder, sketch) = ModelBuilder::sketch(self.pager, self.name, self.dtype);
        self.made.borrow_mut().push(sketch);
        builder
    }
}

/// How a folder is written.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Other seeds give other weights.
    pub seed: u64,
    /// A file of weights is at most so large, in bytes, or holds a single tensor.
    pub shard_bytes: u64,
}

/// The weights of one model, written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its folder.
    pub model: &'static str,
    /// Tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Making and writing them, until they are on the disk.
    pub took: Duration,
}

impl Folder {
    /// The config of the model `name`, to be changed, if there is one.
    pub fn config(&mut self, name: &str) -> Option<&mut Value> {
        self.models.iter_mut().find(|model| model.name == name).map(|model| &mut model.config)
    }

    /// Writes the folder, which must not exist or be empty. `tell` hears of each model's weights.
    ///
    /// # Errors
    /// A folder that is in use; a config that no model can have; a disk that refuses.
    pub fn write(
        &self,
        dir: &Path,
        options: &Options,
        mut tell: impl FnMut(&Written),
    ) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
        let empty = fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?.next();
        ensure!(empty.is_none(), "{} is not empty: name a new folder", dir.display());

        for (name, _, from) in &self.tokenizers {
            copy_files(&Path::new(REPOSITORY).join(from), &dir.join(name))?;
        }
        write_json(&dir.join("scheduler/scheduler_config.json"), &self.scheduler.1)?;
        // Every config before any weights: a mistake in one costs nothing then.
        let mut sketched = Vec::new();
        for model in &self.models {
            let path = dir.join(model.name).join("config.json");
            write_json(&path, &model.config)?;
            sketched.push((model, model.tensors(&path)?));
        }
        for (model, tensors) in sketched {
            tell(&write_weights(model, &dir.join(model.name), &tensors, options)?);
        }
        write_json(&dir.join("model_index.json"), &self.index())
    }

    fn index(&self) -> Value {
        let mut index = json!({
            "_class_name": self.class,
            "_diffusers_version": "0.30.0.dev0",
            "scheduler": ["diffusers", self.scheduler.0],
        });
        for (name, class, _) in &self.tokenizers {
            index[name] = json!(["transformers", class]);
        }
        for model in &self.models {
            let library = if model.is_transformers() { "transformers" } else { "diffusers" };
            index[model.name] = json!([library, model.class]);
        }
        index
    }
}

fn write_weights(
    model: &Model,
    dir: &Path,
    tensors: &[(String, Vec<usize>)],
    options: &Options,
) -> Result<Written> {
    let begun = Instant::now();
    let stem = if model.is_transformers() { "model" } else { "diffusion_pytorch_model" };
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, shape)| TensorSpec::new(name, model.dtype, shape.clone()))
        .collect();
    let float = match model.dtype {
        Dtype::F16 => values::Float::F16,
        _ => values::Float::Bf16,
    };
    write_sharded(dir, stem, &specs, options.shard_bytes, |spec, write| {
        values::make(&spec.name, &spec.shape, float, options.seed, write)
    })?;
    let bytes = specs.iter().filter_map(TensorSpec::bytes).sum();
    Ok(Written { model: model.name, tensors: specs.len(), bytes, took: begun.elapsed() })
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    }
    fs::write(path, format!("{value:#}\n")).with_context(|| format!("{}", path.display()))
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("{}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("{}", from.display()))? {
        let path = entry?.path();
        let copy = to.join(path.file_name().unwrap_or_default());
        // Read and written, so that the copy has not the rights of the original.
        let bytes = fs::read(&path).with_context(|| format!("{}", path.display()))?;
        fs::write(&copy, bytes).with_context(|| format!("{}", copy.display()))?;
    }
    Ok(())
}
