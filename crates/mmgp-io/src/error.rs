//! What can go wrong with a file, said so that the reader can act on it.
//!
//! Most of what a file can do wrong has one shape, the [`Fault`]: a place (file, tensor, byte offset), what was expected there, what was
//! found, and the way out. The other variants are those a caller may want to tell apart: something is missing, something exists.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a file could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, after "cannot": `open`, `map`, …
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A positioned read failed; at the end of the file it says so by [`io::ErrorKind::UnexpectedEof`].
    #[error(
        "{}: cannot read {wanted} bytes at byte {offset}: {source}; if the file was replaced or truncated while in use, open it again",
        path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Absolute offset of the first wanted byte.
        offset: u64,
        /// How many bytes were wanted.
        wanted: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not what it should be, or a caller asked for what it does not hold.
    #[error(transparent)]
    Malformed(Box<Fault>),
    /// The checkpoint has no tensor of this name.
    #[error("{}: no tensor `{}`{}", path.display(), Quoted(name), Near(near))]
    MissingTensor {
        /// What was opened: a file, an index or a folder.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// Names the checkpoint has that look most like it, best first.
        near: Vec<String>,
    },
    /// An index names a file that is not there.
    #[error(
        "{}: shard `{}` (for tensor `{}`) is missing from the same folder; download it, or point at a complete checkpoint",
        index.display(),
        Quoted(shard),
        Quoted(tensor)
    )]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The file name it gives.
        shard: String,
        /// The first tensor mapped to that file.
        tensor: String,
    },
    /// A tensor's name occurs in two files of one checkpoint.
    #[error(
        "tensor `{}` is both in {} and in {}; which one is meant cannot be told: leave one of the files out",
        Quoted(tensor),
        first.display(),
        second.display()
    )]
    DuplicateTensor {
        /// The name.
        tensor: String,
        /// The file that had it first.
        first: PathBuf,
        /// The file that has it again.
        second: PathBuf,
    },
    /// A component folder holds no weights that can be opened.
    #[error("{}: no weights found; looked for {}{}", dir.display(), looked_for.join(", "), Present(present))]
    NoWeights {
        /// The folder.
        dir: PathBuf,
        /// The file names tried, in order.
        looked_for: Vec<String>,
        /// Weight files of any kind that are there instead, at most eight.
        present: Vec<String>,
    },
    /// A JSON file that is not JSON, or not of the expected form.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in bytes, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// The file is larger than anything of its kind.
    #[error("{}: larger than {limit} bytes, the most a JSON file may have; is this the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The disk has no room for the file. Nothing was written.
    #[error("{}: needs {needed} bytes on a disk with {free} free; make room or name another folder", path.display())]
    NoSpace {
        /// The file that was to be written.
        path: PathBuf,
        /// Its size.
        needed: u64,
        /// What the disk has left for this user.
        free: u64,
    },
    /// The file to be written exists and must not be replaced.
    #[error("{}: exists already; choose another path, or allow overwriting", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), action, source }
    }

    /// The file, index or folder that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. }
            | Self::Read { path, .. }
            | Self::MissingTensor { path, .. }
            | Self::Json { path, .. }
            | Self::TooLarge { path, .. }
            | Self::NoSpace { path, .. }
            | Self::Exists { path } => path,
            Self::Malformed(fault) => &fault.path,
            Self::MissingShard { index, .. } => index,
            Self::DuplicateTensor { second, .. } => second,
            Self::NoWeights { dir, .. } => dir,
        }
    }
}

/// A place, what was expected there, what was found, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// The tensor, where there is one to name.
    pub tensor: Option<String>,
    /// Absolute byte offset in the file, where there is one.
    pub offset: Option<u64>,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// What the user can do about it.
    pub remedy: String,
}

impl Fault {
    pub(crate) fn new(
        path: &Path,
        expected: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            path: path.to_path_buf(),
            tensor: None,
            offset: None,
            expected: expected.into(),
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn tensor(mut self, name: impl Into<String>) -> Self {
        self.tensor = Some(name.into());
        self
    }

    pub(crate) fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Malformed(Box::new(fault))
    }
}

impl std::error::Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(tensor) = &self.tensor {
            write!(f, ": tensor `{}`", Quoted(tensor))?;
        }
        if let Some(offset) = self.offset {
            write!(f, ": at byte {offset}")?;
        }
        write!(f, ": expected {}, found {}; {}", self.expected, self.found, self.remedy)
    }
}

/// A string out of a file, fit for a terminal: control characters escaped, cut after 200.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(200) {
            Some((cut, _)) => {
                write!(f, "{}… ({} bytes)", self.0[..cut].escape_debug(), self.0.len())
            }
            None => write!(f, "{}", self.0.escape_debug()),
        }
    }
}

struct Near<'a>(&'a [String]);

impl fmt::Display for Near<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(", nor one with a name like it; is this the right file?");
        }
        f.write_str("; the nearest names are ")?;
        for (i, name) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}`{}`", Quoted(name))?;
        }
        Ok(())
    }
}

struct Present<'a>(&'a [String]);

impl fmt::Display for Present<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pickled =
            |name: &String| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end));
        match self.0 {
            [] => f.write_str("; the folder holds no weight files at all"),
            names if names.iter().all(pickled) => write!(
                f,
                "; there is only {}, in PyTorch's pickle format, which can run code and is not read: convert it to safetensors",
                names.join(", ")
            ),
            names => write!(f, "; there is {}: give that path itself", names.join(", ")),
        }
    }
}
