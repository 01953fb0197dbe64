//! The store: what was quantized on the fly, and what passes cost, kept for the next start.
//!
//! An entry is a model's file in streaming order and, beside it and written after it, a note that
//! says what it was made of and what each block must look like in memory. An entry without a note is
//! not one. Blocks are looked at when they are first read; one that is damaged fails the run and the
//! entry is removed, so that the next run makes it anew.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use mmgp_io::{read_json, write_json};
use mmgp_residency::{Bytes, Digest};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, notes::Notes};

/// Part of every key: changes when what is written for the same source does, or how blocks lie in slots, of which digests are kept.
const VERSION: u32 = 3;
/// What a store holds at most by default.
const CAP: Bytes = Bytes(50_000_000_000);

/// A folder of models that were quantized on the fly, and, in `times` below it, of notes on what models' passes cost:
/// a few kB each, 256 at most.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    cap: Bytes,
    /// What stays free on the disk; a tenth of it by default.
    spare: Option<Bytes>,
}

/// A model in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The model's file.
    pub path: PathBuf,
    /// The folder that it was made from.
    pub source: PathBuf,
    /// Its size.
    pub bytes: Bytes,
    pub(crate) digests: Vec<Digest>,
}

/// The note beside an entry's file.
#[derive(Serialize, Deserialize)]
struct Note {
    source: PathBuf,
    recipe: String,
    bytes: u64,
    blocks: Vec<Digest>,
}

impl Store {
    /// The store in `folder`, which need not exist.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), cap: CAP, spare: None }
    }

    /// The store in the user's cache folder, or `None` if there is no home.
    pub fn of_user() -> Option<Self> {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        let cache = cache.filter(|path| path.is_absolute()).or_else(home)?;
        Some(Self::at(cache.join("mmgp")))
    }

    /// Holds at most `cap`; the entries that were used longest ago make room.
    #[must_use]
    pub fn with_cap(mut self, cap: Bytes) -> Self {
        self.cap = cap;
        self
    }

    /// Leaves `spare` of the disk free, instead of a tenth of it.
    #[must_use]
    pub fn with_spare(mut self, spare: Bytes) -> Self {
        self.spare = Some(spare);
        self
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The notes on what passes cost.
    pub(crate) fn times(&self) -> Notes {
        Notes::at(self.folder.join("times"))
    }

    /// All entries, the one used last first. What is no entry is passed over.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let fail = |source| Error::Write { path: self.folder.clone(), source };
        let files = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            files => files.map_err(fail)?,
        };
        let mut entries = Vec::new();
        for file in files {
            let path = file.map_err(fail)?.path();
            if path.extension().is_some_and(|e| e == "safetensors")
                && let Some(entry) = entry(&path)
            {
                let used = fs::metadata(note_of(&path)).and_then(|m| m.modified());
                entries.push((used.unwrap_or(UNIX_EPOCH), entry));
            }
        }
        entries.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.path.cmp(&b.1.path)));
        Ok(entries.into_iter().map(|(_, entry)| entry).collect())
    }

    /// Removes all entries, files of the store that are none, and notes on what passes cost; what the entries
    /// took.
    ///
    /// # Errors
    /// A folder that cannot be read, a file that cannot be removed.
    pub fn clear(&self) -> Result<Bytes> {
        let freed = self.entries()?.iter().map(|entry| entry.bytes.0).sum();
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for path in files.map(|file| file.path()) {
            let ours = |ending: &str| path.to_string_lossy().ends_with(ending);
            if [".safetensors", ".note.json", ".tmp"].into_iter().any(ours) {
                fs::remove_file(&path).map_err(|source| Error::Write { path, source })?;
            }
        }
        self.times().clear()?;
        Ok(Bytes(freed))
    }

    /// Removes the entry whose file is `path`, if it is one of this store.
    pub(crate) fn remove(&self, path: &Path) -> bool {
        let ours = path.parent() == Some(&self.folder);
        if ours {
            let _ = fs::remove_file(note_of(path));
            let _ = fs::remove_file(path);
        }
        ours
    }

    /// Where the model whose weights are in the folder `source` belongs when it is made by `recipe`.
    pub(crate) fn place(&self, source: &Path, recipe: &str) -> Result<PathBuf> {
        let fail = |error| Error::Write { path: source.into(), source: error };
        let source = source.canonicalize().map_err(fail)?;
        let mut files: Vec<PathBuf> =
            fs::read_dir(&source).map_err(fail)?.flatten().map(|file| file.path()).collect();
        files.sort();
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{VERSION}\n{}\n{recipe}\n", source.display()).as_bytes());
        for path in files.iter().filter(|path| path.is_file()) {
            let about = fs::metadata(path).map_err(fail)?;
            let changed = about.modified().unwrap_or(UNIX_EPOCH);
            let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hasher.update(format!("{name} {} {changed}\n", about.len()).as_bytes());
        }
        let key = &hasher.finalize().to_hex()[..24];
        let model = source.file_name().unwrap_or_default().to_string_lossy();
        Ok(self.folder.join(format!("{model}-{key}.safetensors")))
    }

    /// The entry at `path`, if it is whole as far as its note can tell. Counts as a use.
    pub(crate) fn get(&self, path: &Path) -> Option<Entry> {
        let entry = entry(path)?;
        if let Ok(note) = fs::File::options().append(true).open(note_of(path)) {
            let _ = note.set_modified(SystemTime::now());
        }
        Some(entry)
    }

    /// Completes the entry whose file was written to `path`.
    pub(crate) fn complete(
        &self,
        path: &Path,
        source: &Path,
        recipe: &str,
        digests: Vec<Digest>,
    ) -> Result<Entry> {
        let about =
            fs::metadata(path).map_err(|source| Error::Write { path: path.into(), source })?;
        let note = Note {
            source: source.into(),
            recipe: recipe.into(),
            bytes: about.len(),
            blocks: digests.clone(),
        };
        write_json(note_of(path), &note)?;
        let (path, source) = (path.into(), source.into());
        Ok(Entry { path, source, bytes: Bytes(about.len()), digests })
    }

    /// Makes room for `bytes` more, so that the cap is not passed and enough of the disk stays free;
    /// `false` if that cannot be.
    pub(crate) fn make_room(&self, bytes: Bytes) -> Result<bool> {
        fs::create_dir_all(&self.folder)
            .map_err(|source| Error::Write { path: self.folder.clone(), source })?;
        let mut entries = self.entries()?;
        loop {
            let held: u64 = entries.iter().map(|entry| entry.bytes.0).sum();
            let space = mmgp_io::disk_space(&self.folder);
            let fits = space.is_none_or(|(free, all)| {
                let spare = self.spare.map_or(all / 10, |spare| spare.0);
                free.checked_sub(bytes.0).is_some_and(|left| left >= spare)
            });
            if held + bytes.0 <= self.cap.0 && fits {
                return Ok(true);
            }
            match entries.pop() {
                Some(oldest) if bytes.0 <= self.cap.0 => drop(self.remove(&oldest.path)),
                _ => return Ok(false),
            }
        }
    }
}

fn note_of(path: &Path) -> PathBuf {
    path.with_extension("note.json")
}

fn entry(path: &Path) -> Option<Entry> {
    let note: Note = read_json(note_of(path)).ok()?;
    let whole = fs::metadata(path).is_ok_and(|about| about.len() == note.bytes);
    let Note { source, bytes, blocks, .. } = note;
    whole.then(|| Entry { path: path.into(), source, bytes: Bytes(bytes), digests: blocks })
}
