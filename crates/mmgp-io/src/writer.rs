//! Writes a safetensors file, tensor by tensor, in pieces of any size.
//!
//! The header needs every shape before the first byte of data, so tensors are announced first; after that the writer holds one buffer,
//! whatever the file's size. It writes a temporary file in the target's folder and renames it at the end: the target is
//! either complete or untouched, and a map of a file that is replaced stays valid.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::ser::{SerializeMap as _, Serializer as _};
use tempfile::{NamedTempFile, TempPath};

use crate::dtype::{self, Dtype};
use crate::error::{Error, Fault, Result};
use crate::header::{MAX_HEADER, METADATA};
use crate::view::TensorView;

const BUFFER: usize = 1 << 20;

/// A tensor to be written: everything but its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, unique in the file.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, outermost dimension first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of this name, dtype and shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// Its bytes; `None` if that overflows or is no whole number of bytes.
    pub fn bytes(&self) -> Option<u64> {
        self.dtype.bytes_for(dtype::elements(&self.shape)?)
    }
}

impl From<&TensorView> for TensorSpec {
    fn from(view: &TensorView) -> Self {
        Self::new(view.name(), view.dtype(), view.shape())
    }
}

/// Whether a file that exists may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Replace it, at the end and at once.
    Yes,
    /// Refuse with [`Error::Exists`].
    No,
}

/// A safetensors file in the making. Dropped before [`finish`](Self::finish), it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    overwrite: Overwrite,
    out: BufWriter<NamedTempFile>,
    /// Name and length of each tensor.
    plan: Vec<(String, u64)>,
    current: usize,
    written: u64,
    /// Absolute offset of the next byte.
    offset: u64,
    failed: bool,
}

impl Writer {
    /// Begins a file at `path` with these tensors, in this order, back to back. The first starts at a multiple of 8 bytes; the
    /// others where the one before ends, so a caller who mixes dtypes and wants each aligned puts the wide ones first.
    ///
    /// # Errors
    /// [`Error::Exists`] if the file exists and must not be replaced; [`Error::Malformed`] for a name that occurs twice or is
    /// reserved, a size that overflows, or a header beyond the format's 100 MB; [`Error::Io`] if the folder cannot be written to.
    pub fn create(
        path: impl AsRef<Path>,
        specs: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        overwrite: Overwrite,
    ) -> Result<Self> {
        Self::create_aligned(path, specs, metadata, overwrite, 8)
    }

    /// [`create`](Self::create), with the first tensor at a multiple of `align` bytes in the file: the header is padded with spaces,
    /// since the format allows no gaps between tensors.
    ///
    /// # Errors
    /// Those of [`create`](Self::create).
    pub fn create_aligned(
        path: impl AsRef<Path>,
        specs: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        overwrite: Overwrite,
        align: usize,
    ) -> Result<Self> {
        let path = path.as_ref();
        let plan = plan(path, specs)?;
        let header = header(path, specs, &plan, metadata, align)?;
        if overwrite == Overwrite::No && path.symlink_metadata().is_ok() {
            return Err(Error::Exists { path: path.into() });
        }
        sweep(path);
        let needed = header.len() as u64 + plan.iter().map(|(_, len)| len).sum::<u64>();
        enough_space(path, needed)?;
        let mut writer = Self {
            path: path.to_path_buf(),
            overwrite,
            out: BufWriter::with_capacity(BUFFER, temporary(path)?),
            plan,
            current: 0,
            written: 0,
            offset: 0,
            failed: false,
        };
        writer.put(&(header.len() as u64).to_le_bytes())?;
        writer.put(&header)?;
        Ok(writer)
    }

    /// Appends bytes to a tensor: the one that is being written, or, once that is complete, the next. A tensor without bytes may be
    /// left out.
    ///
    /// # Errors
    /// [`Error::Malformed`] if another tensor's turn it is or the tensor would become too long, before anything is written;
    /// [`Error::Io`] if the disk refuses, after which the file cannot be finished.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        while let Some((turn, len)) = self.plan.get(self.current)
            && turn != name
            && self.written == *len
        {
            self.current += 1;
            self.written = 0;
        }
        let Some((turn, len)) = self.plan.get(self.current) else {
            return Err(self.fault(
                name,
                "no more tensors: all announced ones are complete",
                "more bytes",
            ));
        };
        if turn != name {
            let expected = format!("`{turn}`, which has {} of its {len} bytes", self.written);
            return Err(self.fault(name, expected, format!("{} bytes of this one", bytes.len())));
        }
        if bytes.len() as u64 > len - self.written {
            let expected = format!("{len} bytes in all");
            let found = format!("{} bytes after {} were written", bytes.len(), self.written);
            return Err(self.fault(name, expected, found));
        }
        self.put(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Checks that every tensor is complete, flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the first tensor that lacks bytes; [`Error::Exists`] if a file that must not be replaced has
    /// appeared meanwhile; [`Error::Io`]. In each case the target is as it was.
    pub fn finish(self) -> Result<()> {
        self.seal()?.publish()
    }

    /// All of [`finish`](Self::finish) but the renaming; keeps no file open.
    pub(crate) fn seal(mut self) -> Result<Sealed> {
        if self.failed {
            let error = io::Error::other("an earlier write failed");
            return Err(Error::io(&self.path, "finish", error));
        }
        for (i, (name, len)) in self.plan.iter().enumerate().skip(self.current) {
            let written = if i == self.current { self.written } else { 0 };
            if written != *len {
                return Err(self.fault(
                    name,
                    format!("{len} bytes before the end"),
                    format!("{written} bytes"),
                ));
            }
        }
        let path = self.path;
        self.out.flush().map_err(|e| Error::io(&path, "write", e))?;
        let temporary =
            self.out.into_inner().map_err(|e| Error::io(&path, "write", e.into_error()))?;
        temporary.as_file().sync_all().map_err(|e| Error::io(&path, "flush to disk", e))?;
        Ok(Sealed { path, overwrite: self.overwrite, temporary: temporary.into_temp_path() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let result = self.out.write_all(bytes);
        self.failed |= result.is_err();
        self.offset += bytes.len() as u64;
        result.map_err(|e| Error::io(&self.path, "write", e))
    }

    fn fault(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Fault::new(&self.path, expected, found, "write tensors whole and in the order announced")
            .tensor(name)
            .at(self.offset)
            .into()
    }
}

/// A complete file that does not have its name yet; dropped, it is removed.
pub(crate) struct Sealed {
    path: PathBuf,
    overwrite: Overwrite,
    temporary: TempPath,
}

impl Sealed {
    /// A small file, written at once.
    pub(crate) fn from_bytes(path: &Path, bytes: &[u8], overwrite: Overwrite) -> Result<Self> {
        let mut file = temporary(path)?;
        file.write_all(bytes).map_err(|e| Error::io(path, "write", e))?;
        file.as_file().sync_all().map_err(|e| Error::io(path, "flush to disk", e))?;
        Ok(Self { path: path.to_path_buf(), overwrite, temporary: file.into_temp_path() })
    }

    /// Gives the file its name.
    pub(crate) fn publish(self) -> Result<()> {
        let Self { path, overwrite, temporary } = self;
        let result = match overwrite {
            Overwrite::Yes => temporary.persist(&path),
            Overwrite::No => temporary.persist_noclobber(&path),
        };
        result.map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists { path: path.clone() },
            _ => Error::io(&path, "rename the finished file", e.error),
        })?;
        sync_folder(&path)
    }
}

/// Copies a file: the target is complete and synced, or as it was.
///
/// # Errors
/// A source that cannot be read, a folder that cannot be written to, a disk without room.
pub fn copy_file(from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let mut source = File::open(from).map_err(|e| Error::io(from, "open", e))?;
    sweep(to);
    enough_space(to, source.metadata().map_or(0, |m| m.len()))?;
    let mut file = temporary(to)?;
    io::copy(&mut source, &mut file).map_err(|e| Error::io(to, "copy", e))?;
    file.as_file().sync_all().map_err(|e| Error::io(to, "flush to disk", e))?;
    let temporary = file.into_temp_path();
    Sealed { path: to.into(), overwrite: Overwrite::Yes, temporary }.publish()
}

/// A new file beside `path`, with the permissions any new file gets.
fn temporary(path: &Path) -> Result<NamedTempFile> {
    let prefix = prefix(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(SUFFIX);
    #[cfg(unix)]
    let permissions = {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::Permissions::from_mode(0o666)
    };
    #[cfg(unix)]
    builder.permissions(permissions);
    let file = builder
        .tempfile_in(folder(path))
        .map_err(|e| Error::io(path, "create a file beside it", e))?;
    // Tells it from the leftovers of a process that was killed; a file system without locks has none.
    let _ = file.as_file().try_lock();
    Ok(file)
}

/// Removes what processes that were killed left of earlier attempts to write `path`. What another process is writing is locked.
fn sweep(path: &Path) {
    let prefix = prefix(path);
    let entries = std::fs::read_dir(folder(path)).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let middle = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(SUFFIX));
        if middle.is_some_and(|m| m.len() == 6 && m.chars().all(|c| c.is_ascii_alphanumeric()))
            && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok())
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes a small JSON file: complete and synced, or as it was.
///
/// # Errors
/// A folder that cannot be written to.
pub fn write_json(path: impl AsRef<Path>, value: &impl serde::Serialize) -> Result<()> {
    let path = path.as_ref();
    sweep(path);
    let text = serde_json::to_vec(value).map_err(|e| Error::io(path, "write", e.into()))?;
    Sealed::from_bytes(path, &text, Overwrite::Yes)?.publish()
}

/// What the disk that holds the folder `path` has free for this user, and what it has for users in all (what is
/// used and what is free; not what is set aside from both), in bytes; `None` if it does not say.
pub fn disk_space(path: impl AsRef<Path>) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(path.as_ref()).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    let used = bytes(stat.f_blocks.saturating_sub(stat.f_bfree));
    let free = bytes(stat.f_bavail);
    Some((free, used.saturating_add(free)))
}

/// Whether the disk has room for `needed` bytes beside `path`; a file system that does not say has.
fn enough_space(path: &Path, needed: u64) -> Result<()> {
    let Some((free, _)) = disk_space(folder(path)) else { return Ok(()) };
    if free < needed {
        return Err(Error::NoSpace { path: path.into(), needed, free });
    }
    Ok(())
}

const SUFFIX: &str = ".tmp";

/// How the names of temporary files for `path` begin. Long names leave no room for more.
fn prefix(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().take(40).collect();
    format!(".{name}.")
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// A rename is only on the disk when its folder is. Some file systems cannot flush a folder; the file has its name all the same.
fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) {
        let dir = folder(path);
        match File::open(dir).and_then(|dir| dir.sync_all()) {
            Err(e)
                if !matches!(
                    e.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) =>
            {
                return Err(Error::io(dir, "flush to disk", e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Name and length of each tensor, checked.
pub(crate) fn plan(path: &Path, specs: &[TensorSpec]) -> Result<Vec<(String, u64)>> {
    let refuse = |spec: &TensorSpec, expected: &str, found: String| {
        Error::from(
            Fault::new(path, expected, found, "change the tensors to be written")
                .tensor(&spec.name),
        )
    };
    let mut names = BTreeSet::new();
    let mut total = 0u64;
    let mut plan = Vec::with_capacity(specs.len());
    for spec in specs {
        if spec.name == METADATA {
            return Err(refuse(spec, "a tensor's name", "a name that the format reserves".into()));
        }
        if !names.insert(spec.name.as_str()) {
            return Err(refuse(spec, "every name once", "a second tensor of this name".into()));
        }
        let sized = spec.bytes().and_then(|bytes| Some((bytes, total.checked_add(bytes)?)));
        let Some((bytes, sum)) = sized else {
            let found = format!("{} {:?}", spec.dtype, spec.shape);
            return Err(refuse(
                spec,
                "a size that is a whole number of bytes and fits 64 bits",
                found,
            ));
        };
        total = sum;
        plan.push((spec.name.clone(), bytes));
    }
    Ok(plan)
}

/// The header's JSON, padded with spaces so that what follows it starts at a multiple of `align`.
fn header(
    path: &Path,
    specs: &[TensorSpec],
    plan: &[(String, u64)],
    metadata: &BTreeMap<String, String>,
    align: usize,
) -> Result<Vec<u8>> {
    #[derive(serde::Serialize)]
    struct Info<'a> {
        dtype: &'a str,
        shape: &'a [usize],
        data_offsets: [u64; 2],
    }
    let mut json = Vec::new();
    let mut start = 0;
    let mut serializer = serde_json::Serializer::new(&mut json);
    let written = serializer.serialize_map(None).and_then(|mut map| {
        if !metadata.is_empty() {
            map.serialize_entry(METADATA, metadata)?;
        }
        for (spec, (_, len)) in specs.iter().zip(plan) {
            let info = Info {
                dtype: spec.dtype.name(),
                shape: &spec.shape,
                data_offsets: [start, start + len],
            };
            map.serialize_entry(&spec.name, &info)?;
            start += len;
        }
        map.end()
    });
    written.map_err(|e| Error::io(path, "write the header", e.into()))?;
    json.resize((8 + json.len()).next_multiple_of(align.max(1)) - 8, b' ');
    if json.len() as u64 > MAX_HEADER {
        return Err(Fault::new(
            path,
            format!("a header of at most {MAX_HEADER} bytes"),
            format!("{} bytes of names and metadata", json.len()),
            "split the checkpoint into shards, or shorten its metadata",
        )
        .into());
    }
    Ok(json)
}
