//! What can go wrong between a model's folder and its output.
//!
//! Errors about files carry the file; those of the crates below pass through with their own place.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A config says something that no such model can be.
    #[error("{}: `{key}`: expected {expected}, found {found}", file.display())]
    Config {
        /// The config file.
        file: PathBuf,
        /// The key in it.
        key: String,
        /// What would do.
        expected: String,
        /// What it says.
        found: String,
    },
    /// A tokenizer that cannot be loaded, or text that it cannot encode.
    #[error("{}: {message}", file.display())]
    Tokenizer {
        /// The tokenizer's file, or the folder where it was looked for.
        file: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Inputs that do not fit the model or each other.
    #[error("{0}")]
    Input(String),
    /// Frames could not wait on the disk.
    #[error(
        "{}: frames cannot be kept here while they are decoded: {source}; set TMPDIR to a folder with room",
        folder.display()
    )]
    Spool {
        /// The folder of the temporary file.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that cannot be read or trusted.
    #[error(transparent)]
    Io(#[from] mmgp_io::Error),
    /// A module that could not be built from its weights.
    #[error(transparent)]
    Quant(#[from] mmgp_quant::Error),
    /// Weights that could not be placed.
    #[error(transparent)]
    Residency(#[from] mmgp_residency::Error),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
