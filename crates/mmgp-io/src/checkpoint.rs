//! One model's weights behind one face, whether they lie in one file, in shards with an index, or in shards without.
//!
//! Opening reads headers only. All names of a checkpoint are distinct, and where an index exists, index and shards agree; anything else
//! is an error here, so that no later code needs to ask which file wins.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Fault, Quoted, Result};
use crate::header;
use crate::index::Index;
use crate::mapped::SourceFile;
use crate::view::TensorView;

const INDEX_REMEDY: &str =
    "index and shards are not of one checkpoint: download or convert it again";

/// The tensors of one model by name, in one file or many. Nothing but headers is read to open it.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Arc<SourceFile>>,
    file_metadata: Vec<BTreeMap<String, String>>,
    tensors: BTreeMap<Arc<str>, TensorView>,
    metadata: BTreeMap<String, String>,
    bytes: u64,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or all shards of a `….safetensors.index.json`.
    ///
    /// # Errors
    /// Whatever keeps a file from being read and trusted: see [`Error`]. An index and its shards must agree on where each tensor is.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.extension().is_some_and(|end| end.eq_ignore_ascii_case("json")) {
            return Self::open_index(path);
        }
        let mut checkpoint = Self::empty(path);
        checkpoint.add(path, None)?;
        Ok(checkpoint)
    }

    /// Opens the weights in a component folder of a diffusers or transformers model.
    ///
    /// For each stem in turn (`diffusion_pytorch_model`, `model`) it looks for `{stem}.safetensors`, its index, and then the same of the
    /// variants `fp16` and `bf16`; the first that exists is opened.
    ///
    /// # Errors
    /// [`Error::NoWeights`] with everything that was looked for and what is there instead; else as [`open`](Self::open).
    pub fn open_dir(dir: impl AsRef<Path>, stems: &[&str]) -> Result<Self> {
        let dir = dir.as_ref();
        if !fs::metadata(dir).map_err(|e| Error::io(dir, "open", e))?.is_dir() {
            return Err(
                Fault::new(dir, "a model's folder", "a file", "open the file itself").into()
            );
        }
        let looked_for: Vec<String> = stems.iter().flat_map(|stem| candidates(stem)).collect();
        // A dangling link is a candidate too: opening it says what is wrong, skipping it would hide it.
        match looked_for
            .iter()
            .map(|name| dir.join(name))
            .find(|path| path.symlink_metadata().is_ok())
        {
            Some(path) => Self::open(path),
            None => Err(Error::NoWeights {
                dir: dir.to_path_buf(),
                looked_for,
                present: weight_files(dir)?,
            }),
        }
    }

    /// Opens several files as one checkpoint, without an index.
    ///
    /// # Errors
    /// [`Error::DuplicateTensor`] if a name occurs in two of them; [`Error::Malformed`] for an empty list.
    pub fn from_files(files: &[PathBuf]) -> Result<Self> {
        let Some(first) = files.first() else {
            return Err(Fault::new(
                Path::new(""),
                "at least one file",
                "none",
                "name the files to open",
            )
            .into());
        };
        let mut checkpoint = Self::empty(first);
        for file in files {
            checkpoint.add(file, None)?;
        }
        Ok(checkpoint)
    }

    /// The tensor of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(name)
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], with the names most like it.
    pub fn tensor(&self, name: &str) -> Result<&TensorView> {
        self.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.into(),
            near: self.nearest(name),
        })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All tensors, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = &TensorView> {
        self.tensors.values()
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The `__metadata__` of all files together; where two files give one key different values, the first file's stands.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The `__metadata__` of each file alone, in the order of [`files`](Self::files).
    pub fn file_metadata(&self) -> &[BTreeMap<String, String>] {
        &self.file_metadata
    }

    /// The files it lies in: of an index in name order, else as given.
    pub fn files(&self) -> &[Arc<SourceFile>] {
        &self.files
    }

    /// The bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was opened, for messages: the file, the index, or the first of several files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            files: Vec::new(),
            file_metadata: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            bytes: 0,
        }
    }

    fn open_index(path: &Path) -> Result<Self> {
        let index = Index::read(path)?;
        let dir = path.parent().unwrap_or(Path::new(""));
        let mut checkpoint = Self::empty(path);
        for (shard, tensor) in index.shards() {
            let file = dir.join(shard);
            if !file.exists() {
                return Err(Error::MissingShard {
                    index: path.to_path_buf(),
                    shard: shard.into(),
                    tensor: tensor.into(),
                });
            }
            checkpoint.add(&file, Some((&index, shard)))?;
        }
        // A tensor found in another shard was refused above, so one that is absent is absent from its own.
        for (tensor, shard) in &index.weight_map {
            if !checkpoint.contains(tensor) {
                return Err(Fault::new(
                    path,
                    format!("this tensor in `{}`, as mapped", Quoted(shard)),
                    "no such tensor there",
                    INDEX_REMEDY,
                )
                .tensor(tensor)
                .into());
            }
        }
        Ok(checkpoint)
    }

    /// Adds the tensors of one file; under an index, only such as the index does not map to another file.
    fn add(&mut self, path: &Path, index: Option<(&Index, &str)>) -> Result<()> {
        let file = SourceFile::open(path)?;
        let header = header::read(&file)?;
        for entry in header.entries {
            if let Some((index, shard)) = index
                && let Some(elsewhere) = index.weight_map.get(&*entry.name)
                && elsewhere != shard
            {
                return Err(Fault::new(
                    path,
                    format!(
                        "this tensor in `{}` alone, as {} maps it",
                        Quoted(elsewhere),
                        self.path.display()
                    ),
                    "the tensor here too",
                    INDEX_REMEDY,
                )
                .tensor(&*entry.name)
                .at(entry.range.start)
                .into());
            }
            let view = TensorView::new(entry, Arc::clone(&file));
            if let Some(first) = self.tensors.get(view.name()) {
                return Err(Error::DuplicateTensor {
                    tensor: view.name().into(),
                    first: first.file().path().to_path_buf(),
                    second: path.to_path_buf(),
                });
            }
            self.bytes += view.len();
            self.tensors.insert(view.shared_name(), view);
        }
        for (key, value) in &header.metadata {
            if !self.metadata.contains_key(key) {
                self.metadata.insert(key.clone(), value.clone());
            }
        }
        self.files.push(file);
        self.file_metadata.push(header.metadata);
        Ok(())
    }

    /// Up to three names that share most of their beginning and end with `name`: finds a wrong prefix, a wrong suffix, one typing error.
    fn nearest(&self, name: &str) -> Vec<String> {
        let mut scored: Vec<(usize, &str)> = self
            .tensors
            .keys()
            .map(|known| (likeness(name.as_bytes(), known.as_bytes()), &**known))
            .filter(|(score, known)| score * 2 > name.len().min(known.len()))
            .collect();
        scored.sort_by(|a, b| {
            b.0.cmp(&a.0).then_with(|| a.1.len().cmp(&b.1.len())).then_with(|| a.1.cmp(b.1))
        });
        scored.into_iter().take(3).map(|(_, known)| known.to_owned()).collect()
    }
}

/// Bytes in the common beginning and the common end of two names.
fn likeness(a: &[u8], b: &[u8]) -> usize {
    let begin = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let end =
        a[begin..].iter().rev().zip(b[begin..].iter().rev()).take_while(|(x, y)| x == y).count();
    begin + end
}

/// The file names under which a stem's weights are published, in order of preference.
fn candidates(stem: &str) -> Vec<String> {
    let mut names = vec![format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json")];
    for variant in ["fp16", "bf16"] {
        names.push(format!("{stem}.{variant}.safetensors"));
        // As the libraries write it, and as it is also found.
        names.push(format!("{stem}.safetensors.index.{variant}.json"));
        names.push(format!("{stem}.{variant}.safetensors.index.json"));
    }
    names
}

/// Up to eight weight files of any kind in a folder, in name order.
fn weight_files(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, "list", e))? {
        let entry = entry.map_err(|e| Error::io(dir, "list", e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let end = name.rsplit_once('.').map_or("", |(_, end)| end);
        if ["safetensors", "sft", "gguf", "bin", "pt", "pth", "ckpt"].contains(&end) {
            names.push(name);
        }
    }
    names.sort();
    names.truncate(8);
    Ok(names)
}
