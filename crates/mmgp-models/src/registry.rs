//! The pipelines there are: `_class_name` of a folder's `model_index.json` decides.
//!
//! A new family is one folder beside `flux/` and one line in [`FAMILIES`].

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use mmgp_residency::Pager;
use serde_json::Value;

use crate::{Error, OpenOptions, Pipeline, Result};
use crate::{cogvideox::CogVideoXPipeline, flux::FluxPipeline, hunyuanvideo::HunyuanVideoPipeline};

/// Opens a pipeline's folder, given its `model_index.json`.
type Open = fn(&Path, &ModelIndex, &Pager, &OpenOptions) -> Result<Box<dyn Pipeline>>;

const FAMILIES: &[(&str, Open)] = &[
    ("FluxPipeline", |d, i, p, o| boxed(FluxPipeline::open(d, i, p, o))),
    ("CogVideoXPipeline", |d, i, p, o| boxed(CogVideoXPipeline::open(d, i, p, o))),
    (CogVideoXPipeline::FROM_PICTURE, |d, i, p, o| boxed(CogVideoXPipeline::open(d, i, p, o))),
    ("HunyuanVideoPipeline", |d, i, p, o| boxed(HunyuanVideoPipeline::open(d, i, p, o))),
];

fn boxed(pipeline: Result<impl Pipeline + 'static>) -> Result<Box<dyn Pipeline>> {
    Ok(Box::new(pipeline?))
}

/// A folder's `model_index.json`: which class stands in which subfolder.
#[derive(Debug)]
pub struct ModelIndex {
    file: PathBuf,
    entries: BTreeMap<String, Value>,
}

impl ModelIndex {
    /// Reads it.
    ///
    /// # Errors
    /// A folder without one, or a file that is no JSON object.
    pub fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("model_index.json");
        if !file.is_file() {
            return Err(Error::Input(format!(
                "{}: no pipeline here: expected a folder with a `model_index.json` (diffusers' \
                 layout), found {}",
                dir.display(),
                if dir.is_dir() { "a folder without one" } else { "no such folder" }
            )));
        }
        let entries = mmgp_io::read_json(&file)?;
        Ok(Self { file, entries })
    }

    /// The pipeline's class.
    ///
    /// # Errors
    /// A file that names none.
    pub fn class(&self) -> Result<&str> {
        self.entries
            .get("_class_name")
            .and_then(Value::as_str)
            .ok_or_else(|| self.wrong("_class_name", "the name of a pipeline class"))
    }

    /// The parts of the pipeline and their classes, `(name, class)`.
    pub fn classes(&self) -> Vec<(&str, &str)> {
        self.entries
            .iter()
            .filter_map(|(name, part)| Some((name.as_str(), part.get(1)?.as_str()?)))
            .collect()
    }

    /// Checks that the part `name`, whose config is the file `config` in its folder, is of one of
    /// `classes`, and returns the config's path.
    ///
    /// # Errors
    /// A part that is absent or of another class.
    pub fn part(&self, name: &str, config: &str, classes: &[&str]) -> Result<PathBuf> {
        let class = self.entries.get(name).and_then(|part| part.get(1)).and_then(Value::as_str);
        if !class.is_some_and(|class| classes.contains(&class)) {
            return Err(self.wrong(name, &classes.join(" or ")));
        }
        let file = self.file.with_file_name(name).join(config);
        let own = Self { entries: mmgp_io::read_json(&file)?, file: file.clone() };
        match own.entries.get("_class_name").and_then(Value::as_str) {
            Some(class) if !classes.contains(&class) => {
                Err(own.wrong("_class_name", &classes.join(" or ")))
            }
            _ => Ok(file),
        }
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.entries.get(key);
        Error::Config {
            file: self.file.clone(),
            key: key.into(),
            expected: expected.into(),
            found: found.map_or("nothing".into(), Value::to_string),
        }
    }
}

/// Opens the pipeline in `dir` over `pager`. Reads configs, tokenizers and headers, no weights.
///
/// # Errors
/// Anything in the folder that is missing, malformed or of an unknown class.
pub fn open_pipeline(
    dir: &Path,
    pager: &Pager,
    options: &OpenOptions,
) -> Result<Box<dyn Pipeline>> {
    let index = ModelIndex::read(dir)?;
    let class = index.class()?;
    match FAMILIES.iter().find(|(name, _)| *name == class) {
        Some((_, open)) => open(dir, &index, pager, options),
        None => {
            let known: Vec<_> = FAMILIES.iter().map(|(name, _)| *name).collect();
            Err(index.wrong("_class_name", &format!("one of {}", known.join(", "))))
        }
    }
}
