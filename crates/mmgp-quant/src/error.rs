//! What can go wrong while a module's weights are asked for.

use mmgp_io::Dtype;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a module could not be built. Every variant names the tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source holds no tensor of this name.
    #[error("{origin}: tensor `{name}` is missing{hint}")]
    Missing {
        /// The file or files that were searched.
        origin: String,
        /// The tensor's full name.
        name: String,
        /// What else the user may look at; starts with `; ` or is empty.
        hint: String,
    },
    /// The tensor is there with another shape.
    #[error("{origin}: tensor `{name}` has shape {found:?}, the model expects {expected:?}")]
    Shape {
        /// The file that holds the tensor.
        origin: String,
        /// The tensor's full name.
        name: String,
        /// The shape that the model's config implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The tensor is stored in a number format that nothing here reads.
    #[error(
        "{origin}: tensor `{name}` is stored as {found}, which cannot be used here (expected {expected})"
    )]
    Format {
        /// The file that holds the tensor.
        origin: String,
        /// The tensor's full name.
        name: String,
        /// The dtype in the file.
        found: Dtype,
        /// The dtypes that would do.
        expected: &'static str,
    },
    /// A request that no file could satisfy: a mistake in a config or a model.
    #[error("{0}")]
    Invalid(String),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
