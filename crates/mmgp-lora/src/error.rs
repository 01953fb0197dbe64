//! What can be wrong with an adapter, said with file, tensor, what was expected and what was found.

use std::{fmt, path::PathBuf};

use mmgp_io::Dtype;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an adapter could not be read, fitted or put beside a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file holds no tensors.
    #[error(
        "{}: expected an adapter, found a file without tensors; was the download complete?",
        file.display()
    )]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// No tensor of the file is named as any known dialect names an adapter's.
    #[error(
        "{}: expected names such as `transformer.….lora_A.weight`, found {count} tensors of other \
         names, the first `{}`; is this an adapter, and one of {dialects}?",
        file.display(), Quoted(first)
    )]
    NotAnAdapter {
        /// The file.
        file: PathBuf,
        /// The number of its tensors.
        count: usize,
        /// The first of their names.
        first: String,
        /// The dialects that are read.
        dialects: String,
    },
    /// One matrix of a pair is missing.
    #[error(
        "{}: tensor `{}` stands alone, expected {missing} of the same module beside it; the file is \
         incomplete",
        file.display(), Quoted(found)
    )]
    Half {
        /// The file.
        file: PathBuf,
        /// The tensor that is there.
        found: String,
        /// What is not: `lora_A` or `lora_B`.
        missing: &'static str,
    },
    /// Two tensors of one file mean the same.
    #[error(
        "{}: tensors `{}` and `{}` are for the same matrix; which one is meant cannot be told",
        file.display(), Quoted(first), Quoted(second)
    )]
    Duplicate {
        /// The file.
        file: PathBuf,
        /// The one.
        first: String,
        /// The other.
        second: String,
    },
    /// A shape that fits neither its partner nor the model.
    #[error(
        "{}: tensor `{}` has shape {found:?}, expected {expected}",
        file.display(), Quoted(tensor)
    )]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What would fit, and why.
        expected: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A dtype that adapters are not stored in.
    #[error(
        "{}: tensor `{}` is stored as {found}, expected BF16, F16, F32 or F64",
        file.display(), Quoted(tensor)
    )]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: Dtype,
    },
    /// A value that is no number.
    #[error(
        "{}: tensor `{}`, at byte {offset}: expected finite numbers, found {found}; the adapter is \
         damaged or its training diverged",
        file.display(), Quoted(tensor)
    )]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where in the file the first such value lies.
        offset: u64,
        /// The value, in f32.
        found: f32,
    },
    /// A kind of adapter that is known by its name and not read here.
    #[error(
        "{}: tensor `{}` belongs to {kind}, which is not supported; expected pairs of lora_A and \
         lora_B",
        file.display(), Quoted(tensor)
    )]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it belongs to.
        kind: &'static str,
    },
    /// Keys that fit no layer of the pipeline.
    #[error(transparent)]
    Unknown(Box<Unknown>),
    /// The adapter's configuration is not what it should be.
    #[error("{}: {entry}: expected {expected}, found {found}", file.display())]
    Metadata {
        /// The file.
        file: PathBuf,
        /// The entry, such as `lora_adapter_metadata, transformer.lora_alpha`.
        entry: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Weights over the steps that cannot be read.
    #[error(
        "`{}` gives no weights over the steps: {reason}; write `0.8`, `0.5,0.8,1` for weights that \
         share the steps, and `;` between phases",
        Quoted(text)
    )]
    WeightSyntax {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// First steps of phases that are none.
    #[error(
        "first steps of phases {firsts:?}: expected them ascending, from 1 to {} (of {count} steps)",
        count.saturating_sub(1)
    )]
    Phases {
        /// What was given.
        firsts: Vec<usize>,
        /// The number of steps.
        count: usize,
    },
    /// Another number of weights than of adapters.
    #[error("expected weights for {expected} adapters, found {found}")]
    WeightCount {
        /// The adapters that are loaded.
        expected: usize,
        /// The weights given.
        found: usize,
    },
    /// A model that the set is for and that is not loaded.
    #[error("model `{model}` is not loaded; there are {}", present.join(", "))]
    NoModel {
        /// The model.
        model: String,
        /// What there is.
        present: Vec<String>,
    },
    /// Another set is beside the model.
    #[error("model `{model}` carries another set's adapters; load into that set or drop it first")]
    Taken {
        /// The model.
        model: String,
    },
    /// The file could not be read or trusted.
    #[error(transparent)]
    Io(#[from] mmgp_io::Error),
    /// The tensors could not be attached to their blocks.
    #[error(transparent)]
    Residency(#[from] mmgp_residency::Error),
}

/// Keys of an adapter that fit no layer of the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unknown {
    /// The adapter's file.
    pub file: PathBuf,
    /// How many keys fit nothing.
    pub count: usize,
    /// Of how many.
    pub of: usize,
    /// The first of them, at most three, each with the most similar name of a layer if one is.
    pub first: Vec<(String, Option<String>)>,
}

impl std::error::Error for Unknown {}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, count, of, first } = self;
        write!(f, "{}: {count} of {of} keys fit no layer of this pipeline: ", file.display())?;
        for (i, (key, near)) in first.iter().enumerate() {
            write!(f, "{}`{}`", if i == 0 { "" } else { ", " }, Quoted(key))?;
            if let Some(near) = near {
                write!(f, " (most like `{near}`)")?;
            }
        }
        if first.len() < *count {
            f.write_str(", …")?;
        }
        f.write_str("; is the adapter for another model? Lenient loading skips such keys")
    }
}

/// A string out of a file, fit for a terminal: control characters escaped, cut after 200.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(200) {
            Some((cut, _)) => write!(f, "{}…", self.0[..cut].escape_debug()),
            None => write!(f, "{}", self.0.escape_debug()),
        }
    }
}
