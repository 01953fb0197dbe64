//! Converting a pipeline: its models in streaming order, one file each, dense, int8 or fp8.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use mmgp_io::{Overwrite, base64_json, copy_file, read_json};
use mmgp_residency::Saved;

use crate::{Error, Offload, Result};

/// A model that was written.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The model's name.
    pub model: String,
    /// The file.
    pub path: PathBuf,
    /// What it became.
    pub saved: Saved,
}

impl Offload {
    /// Writes the pipeline in `from` to the folder `to`: models of blocks as one file each in streaming
    /// order, those that the settings quantize as int8 or fp8; all other files as they are. A folder gets its
    /// `model_index.json` last, so what is not complete is no pipeline. `tell` hears of each model.
    ///
    /// Nothing is held but a piece of one tensor. A process that is killed leaves each file as it was
    /// before, or complete.
    ///
    /// # Errors
    /// A pipeline that cannot be opened; files that exist, unless they may be overwritten; a disk
    /// without room.
    pub fn convert(
        &mut self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        overwrite: Overwrite,
        mut tell: impl FnMut(&Converted),
    ) -> Result<Vec<Converted>> {
        const INDEX: &str = "model_index.json";
        let (from, to) = (from.as_ref(), to.as_ref());
        let pipeline = self.pipeline(from)?;
        let same = |a: &Path, b: &Path| {
            a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a))
        };
        if same(from, to) {
            let source =
                io::Error::new(io::ErrorKind::InvalidInput, "source and target are one folder");
            return Err(Error::Write { path: to.into(), source });
        }
        if overwrite == Overwrite::No && to.join(INDEX).exists() {
            return Err(mmgp_io::Error::Exists { path: to.join(INDEX) }.into());
        }
        let mut converted = Vec::new();
        let parts = pipeline.parts();
        let index = to.join(INDEX);
        if index.exists() {
            // From here on, and until it is written again, the target is no pipeline.
            fs::remove_file(&index).map_err(|source| Error::Write { path: index, source })?;
        }
        for part in parts {
            let folder = to.join(part.name);
            fs::create_dir_all(&folder)
                .map_err(|source| Error::Write { path: folder.clone(), source })?;
            let config: serde_json::Value = read_json(from.join(part.name).join("config.json"))?;
            let metadata = BTreeMap::from([("config_base64".to_string(), base64_json(&config))]);
            let path = folder.join(format!("{}.safetensors", part.stem));
            let saved = self.pager().save(part.name, &path, &metadata, overwrite)?;
            converted.push(Converted { model: part.name.into(), path, saved });
            tell(&converted[converted.len() - 1]);
        }
        let models: Vec<&str> = parts.iter().map(|part| part.name).collect();
        copy_rest(from, to, &models, INDEX)?;
        copy_file(from.join(INDEX), to.join(INDEX))?;
        Ok(converted)
    }
}

/// Everything but the weights of `models` and the file `last` of the top folder.
fn copy_rest(from: &Path, to: &Path, models: &[&str], last: &str) -> Result<()> {
    let read = |source| Error::Write { path: from.into(), source };
    fs::create_dir_all(to).map_err(|source| Error::Write { path: to.into(), source })?;
    for entry in fs::read_dir(from).map_err(read)? {
        let entry = entry.map_err(read)?;
        let (source, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let target = to.join(&*name);
        if source.is_dir() {
            let model = models.contains(&&*name);
            copy_folder(&source, &target, model)?;
        } else if name != last {
            copy_file(source, target)?;
        }
    }
    Ok(())
}

/// A part's folder; of a model that was written, the weights stay behind.
fn copy_folder(from: &Path, to: &Path, model: bool) -> Result<()> {
    let weights = |name: &str| {
        [".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".ckpt"]
            .iter()
            .any(|ending| name.ends_with(ending))
    };
    let read = |source| Error::Write { path: from.into(), source };
    fs::create_dir_all(to).map_err(|source| Error::Write { path: to.into(), source })?;
    for entry in fs::read_dir(from).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name();
        if entry.path().is_file() && !(model && weights(&name.to_string_lossy())) {
            copy_file(entry.path(), to.join(name))?;
        }
    }
    Ok(())
}
