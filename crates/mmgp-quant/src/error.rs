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
    /// A GPU that the kernels do not run on.
    #[error(
        "{name} (sm_{}{}): mmgp needs compute capability 8.0 or newer (an RTX 30, an A100, or what \
         came after them)",
        capability.0,
        capability.1
    )]
    OldCard {
        /// The GPU's name.
        name: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// A kernel of the GPU computes something else than the CPU.
    #[error(
        "self-test: kernel `{kernel}` on {shape:?}, element {at}: expected {expected}, found {found}; \
         the GPU, its driver or this build computes wrongly: try another driver, or the CPU"
    )]
    Kernel {
        /// The kernel's name.
        kernel: String,
        /// The shape of its output.
        shape: [usize; 2],
        /// The first element that differs, counted through the memory that was compared.
        at: usize,
        /// What the CPU computes.
        expected: f32,
        /// What the GPU computed.
        found: f32,
    },
    /// A request that no file could satisfy: a mistake in a config or a model.
    #[error("{0}")]
    Invalid(String),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
