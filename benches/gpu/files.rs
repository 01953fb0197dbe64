//! The model's files: random weights in bf16, the same as int8, and others beside them, each made once.
//!
//! The model's lie in streaming order. Dense weights are made right there, by all threads at once, each piece
//! where it belongs in a file of the final size; int8 is what [`Pager::save`] makes of them.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, disk_space};
use mmgp_models::flux::{FluxConfig, FluxTransformer};
use mmgp_quant::{Codes, QuantPolicy};
use mmgp_residency::{ALIGN, Bytes, ModelBuilder, Pager, Sketch};
use mmgp_synth::values::{self, Float};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::{adapters, rows::Form};

/// What the model is called in its pagers.
pub(crate) const MODEL: &str = "transformer";
const SEED: u64 = 0;
/// Where data starts in a file.
const START: usize = 4096;

/// A folder of files of one shape.
pub(crate) struct Files {
    dir: PathBuf,
    config: FluxConfig,
    tensors: Vec<TensorSpec>,
}

impl Files {
    /// In `dir`, or else where there is room: the memory that stands in for a disk, or the folder of
    /// temporary files.
    ///
    /// # Errors
    /// A config that no model can have; a folder that cannot be made.
    pub(crate) fn new(dir: Option<&Path>, config: &FluxConfig) -> Result<Self> {
        let tensors = streamed(sketch(config)?);
        let dense: u64 = tensors.iter().filter_map(TensorSpec::bytes).sum();
        let dir = match dir {
            Some(dir) => dir.to_path_buf(),
            // Half as much again for int8.
            None => roomy(Path::new("/dev/shm"), dense / 5 * 8).join("mmgp-gpu-bench"),
        };
        fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
        Ok(Self { dir, config: config.clone(), tensors })
    }

    /// The folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checkpoint of a form, made when it is not there.
    ///
    /// # Errors
    /// A disk that refuses; a file that is no such checkpoint.
    pub(crate) fn open(&self, form: Form) -> Result<Arc<Checkpoint>> {
        let form = if form == Form::W8a8 { Form::Int8 } else { form };
        let config = &self.config;
        let path = self.dir.join(format!(
            "flux-{}+{}-{}-{}.safetensors",
            config.num_layers,
            config.num_single_layers,
            config.hidden(),
            form.name()
        ));
        if !path.exists() {
            let begun = Instant::now();
            match form {
                Form::Bf16 => self.make(&self.tensors, &path)?,
                Form::Int8 | Form::W8a8 => self.quantize(Codes::Int8, &path)?,
                Form::Fp8 => self.quantize(Codes::Fp8, &path)?,
                Form::Rotated => self.quantize(Codes::RotatedInt8, &path)?,
            }
            let (bytes, took) = (fs::metadata(&path)?.len(), begun.elapsed().as_secs_f64());
            let speed = Bytes((bytes as f64 / took) as u64);
            eprintln!("{}: {} in {took:.1} s ({speed}/s)", path.display(), Bytes(bytes));
        }
        Ok(Arc::new(Checkpoint::open(&path)?))
    }

    /// Another checkpoint of random weights beside it, made when it is not there.
    ///
    /// # Errors
    /// A disk that refuses; a file that is no such checkpoint.
    pub(crate) fn other(&self, name: &str, tensors: &[TensorSpec]) -> Result<Arc<Checkpoint>> {
        let path = self.dir.join(format!("{name}.safetensors"));
        if !path.exists() {
            self.make(tensors, &path)?;
        }
        Ok(Arc::new(Checkpoint::open(&path)?))
    }

    /// Adapter number `at` of those of one rank for the model, made when it is not there.
    ///
    /// # Errors
    /// A disk that refuses.
    pub(crate) fn adapter(&self, rank: usize, at: usize) -> Result<PathBuf> {
        let (config, dir) = (&self.config, &self.dir);
        let path = dir.join(format!(
            "flux-{}+{}-{}-lora-{rank}-{at}.safetensors",
            config.num_layers,
            config.num_single_layers,
            config.hidden(),
        ));
        if !path.exists() {
            self.make(&adapters::tensors(&self.tensors, rank), &path)?;
        }
        Ok(path)
    }

    /// Writes random weights: every thread makes tensors and puts them in their place.
    fn make(&self, tensors: &[TensorSpec], path: &Path) -> Result<()> {
        let part = path.with_extension("part");
        let header = header(tensors)?;
        let mut at = header.len() as u64;
        let placed: Vec<(&TensorSpec, u64)> = tensors
            .iter()
            .map(|spec| {
                let here = at;
                at += spec.bytes().unwrap_or(0);
                (spec, here)
            })
            .collect();
        if let Some((free, _)) = disk_space(&self.dir) {
            let (needed, dir) = (Bytes(at), self.dir.display());
            ensure!(free >= at, "{dir} has {} free and {needed} are needed", Bytes(free));
        }
        let file = File::create(&part).with_context(|| format!("{}", part.display()))?;
        file.set_len(at)?;
        file.write_all_at(&header, 0)?;
        placed.par_iter().try_for_each(|(spec, start)| {
            let mut at = *start;
            values::make(&spec.name, &spec.shape, Float::Bf16, SEED, |piece| {
                file.write_all_at(piece, at)?;
                at += piece.len() as u64;
                Ok::<(), std::io::Error>(())
            })
        })?;
        fs::rename(&part, path)?;
        Ok(())
    }

    fn quantize(&self, codes: Codes, path: &Path) -> Result<()> {
        let dense = self.open(Form::Bf16)?;
        let pager = Pager::new(&Device::Cpu)?;
        let mut builder = ModelBuilder::new(&pager, MODEL, dense);
        builder.quantize(QuantPolicy::new(codes, &[])?);
        let _model = FluxTransformer::new(&self.config, builder)?;
        pager.save(MODEL, path, &BTreeMap::new(), Overwrite::Yes)?;
        Ok(())
    }
}

/// The tensors that the model asks for, in the order of asking.
fn sketch(config: &FluxConfig) -> Result<Vec<TensorSpec>> {
    let pager = Pager::new(&Device::Cpu)?;
    let (builder, sketch) = ModelBuilder::sketch(&pager, MODEL, Dtype::BF16);
    FluxTransformer::new(config, builder)?;
    Ok(sketched(&sketch))
}

/// What was asked for, in bf16.
pub(crate) fn sketched(sketch: &Sketch) -> Vec<TensorSpec> {
    let spec = |(name, shape): (String, Vec<usize>)| TensorSpec::new(name, Dtype::BF16, shape);
    sketch.tensors().into_iter().map(spec).collect()
}

/// Streaming order, as [`Pager::save`] writes it: weights first in each block, what breaks the
/// alignment of others behind all blocks.
fn streamed(mut tensors: Vec<TensorSpec>) -> Vec<TensorSpec> {
    for block in tensors.chunk_by_mut(|a, b| block_of(&a.name) == block_of(&b.name)) {
        block.sort_by_key(|spec| spec.shape.len() != 2);
    }
    let aligned = |spec: &TensorSpec| spec.bytes().is_some_and(|b| b.is_multiple_of(ALIGN));
    let (mut front, mut tail): (Vec<_>, Vec<_>) = tensors.into_iter().partition(aligned);
    front.append(&mut tail);
    front
}

/// `transformer_blocks.3` of a tensor's name; nothing for the stem.
fn block_of(name: &str) -> Option<(&str, &str)> {
    let mut parts = name.split('.');
    let list = parts.next().filter(|part| part.ends_with("blocks"))?;
    Some((list, parts.next()?))
}

/// Everything before the data of a safetensors file.
fn header(tensors: &[TensorSpec]) -> Result<Vec<u8>> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0;
    for spec in tensors {
        let end = at + spec.bytes().with_context(|| format!("{} is too large", spec.name))?;
        let info =
            json!({ "dtype": spec.dtype.name(), "shape": spec.shape, "data_offsets": [at, end] });
        map.insert(spec.name.clone(), info);
        at = end;
    }
    let mut text = serde_json::to_vec(&Value::Object(map))?;
    text.resize((text.len() + 8).next_multiple_of(START) - 8, b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

/// `dir` if it has room for so many bytes, else the folder of temporary files.
fn roomy(dir: &Path, bytes: u64) -> PathBuf {
    match disk_space(dir) {
        Some((free, _)) if free > bytes => dir.to_path_buf(),
        _ => env::temp_dir(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrow() -> FluxConfig {
        let mut config = FluxConfig::default();
        (config.num_layers, config.num_single_layers) = (2, 2);
        (config.num_attention_heads, config.guidance_embeds) = (1, true);
        (config.joint_attention_dim, config.pooled_projection_dim) = (96, 20);
        config.out_channels = Some(3);
        config
    }

    #[test]
    fn the_dense_file_is_what_saving_it_would_write() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(Some(dir.path()), &narrow()).unwrap();
        let made = files.open(Form::Bf16).unwrap();

        let pager = Pager::new(&Device::Cpu).unwrap();
        let builder = ModelBuilder::new(&pager, MODEL, made.clone());
        let model = FluxTransformer::new(&narrow(), builder).unwrap();
        assert!(model.unused().is_empty());
        let saved = dir.path().join("saved.safetensors");
        pager.save(MODEL, &saved, &BTreeMap::new(), Overwrite::No).unwrap();
        let saved = Checkpoint::open(&saved).unwrap();
        let list = |c: &Checkpoint| {
            let mut all: Vec<_> =
                c.iter().map(|v| (v.range().start, v.name().to_string())).collect();
            all.sort();
            let first = all[0].0;
            assert_eq!(first % START as u64, 0);
            all.into_iter().map(|(at, name)| (at - first, name)).collect::<Vec<_>>()
        };
        // Of six bytes, so that there is a tail.
        assert_eq!(list(&made).last().unwrap().1, "proj_out.bias");
        assert_eq!(list(&made), list(&saved));
        for view in made.iter() {
            assert_eq!(view.bytes(), saved.tensor(view.name()).unwrap().bytes(), "{}", view.name());
        }
    }

    #[test]
    fn files_are_made_once_and_quantized_from_one_another() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(Some(dir.path()), &narrow()).unwrap();
        let int8 = files.open(Form::Int8).unwrap();
        assert!(int8.get("transformer_blocks.0.attn.to_q.weight._data").is_some());
        let written = || {
            let entries = fs::read_dir(dir.path()).unwrap().map(Result::unwrap);
            let mut all: Vec<_> = entries
                .map(|e| (e.file_name(), e.metadata().unwrap().modified().unwrap()))
                .collect();
            all.sort();
            all
        };
        let before = written();
        assert_eq!(before.len(), 2);
        files.open(Form::Bf16).unwrap();
        files.open(Form::Int8).unwrap();
        assert_eq!(written(), before);
    }
}
