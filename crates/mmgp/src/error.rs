//! Errors of the facade: those of the crates below, and of writing results.

use std::{io, path::PathBuf};

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be loaded, run or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A result that could not be written. Nothing is left half-written.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that holds no picture.
    #[error("{}: no picture that can be read: {why}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file that holds no latents to decode.
    #[error("{}: {why}", path.display())]
    Latents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file that cannot be read or trusted.
    #[error(transparent)]
    Io(#[from] mmgp_io::Error),
    /// A model or pipeline that could not be built or run.
    #[error(transparent)]
    Models(#[from] mmgp_models::Error),
    /// An adapter that cannot be read, or fits nothing.
    #[error(transparent)]
    Lora(#[from] mmgp_lora::Error),
    /// A setting that means nothing.
    #[error(transparent)]
    Profiles(#[from] mmgp_profiles::Error),
    /// Weights that could not be placed.
    #[error(transparent)]
    Residency(#[from] mmgp_residency::Error),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Whether the run was cancelled rather than failed.
    pub fn is_cancelled(&self) -> bool {
        use mmgp_residency::Error::Cancelled;
        matches!(
            self,
            Error::Residency(Cancelled) | Error::Models(mmgp_models::Error::Residency(Cancelled))
        )
    }
}
