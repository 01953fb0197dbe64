//! What can go wrong between a file and a forward pass.

use crate::Bytes;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why weights could not be placed, read or used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No plan fits: raised before anything is loaded.
    #[error(
        "budget {budget} is too small: model `{model}` needs {needed} at once, its stem ({stem}) and \
         its largest block `{block}` ({largest}); the smallest budget that works for all models is \
         {minimum} (`--budget min`)"
    )]
    BudgetTooSmall {
        /// What was asked for.
        budget: Bytes,
        /// The model that does not fit.
        model: String,
        /// What that model needs.
        needed: Bytes,
        /// Of it, the stem.
        stem: Bytes,
        /// The name of the largest block.
        block: String,
        /// Of it, the largest block.
        largest: Bytes,
        /// The smallest budget that every model runs in.
        minimum: Bytes,
    },
    /// A budget that is no budget.
    #[error(
        "`{0}` is no budget: give bytes (`6MB`, `1.5GB`, `512MiB`), a share of the weights (`25%`), `min`, `unlimited` or `auto`"
    )]
    BudgetSyntax(String),
    /// Weights of several models are in use at the same moment and do not fit together.
    #[error(
        "no room for {wanted} of `{block}` of model `{model}`: {held} of the budget of {budget} are \
         in use at this moment by leases of other models; give leases back earlier or raise the budget"
    )]
    InUse {
        /// The model that asked.
        model: String,
        /// The block that asked.
        block: String,
        /// Its slot's size.
        wanted: Bytes,
        /// What is held and cannot be given back now.
        held: Bytes,
        /// The budget.
        budget: Bytes,
    },
    /// Two blocks that share a slot are leased at the same time.
    #[error(
        "model `{model}`: block `{block}` was asked for while `{holder}`, which shares its slot, is \
         still leased; finish one visit before the next"
    )]
    StillLeased {
        /// The model.
        model: String,
        /// The block that was asked for.
        block: String,
        /// The block that holds the slot.
        holder: String,
    },
    /// A new plan was asked for while blocks are leased.
    #[error("the plan cannot change while `{block}` of model `{model}` is leased")]
    Busy {
        /// The model.
        model: String,
        /// A block of it that is leased.
        block: String,
    },
    /// The run was cancelled between two blocks.
    #[error("cancelled")]
    Cancelled,
    /// A model that cannot be paged, or was built the wrong way.
    #[error("model `{model}`: {reason}")]
    NotPageable {
        /// The model.
        model: String,
        /// Why not.
        reason: String,
    },
    /// A block's bytes are not those that were written.
    #[error(
        "{file}: block `{block}` is damaged: its bytes are not those that were written; the file is to be made anew"
    )]
    Corrupt {
        /// The file.
        file: std::path::PathBuf,
        /// The block.
        block: String,
    },
    /// The device refused something.
    #[error("GPU: {0}")]
    Device(String),
    /// A weight that was to be quantized holds what no number format can.
    #[error(
        "{file}: tensor `{tensor}`, row {row}, column {column}: expected a finite number, found NaN \
         or infinity, which cannot be quantized; leave the layer dense with --exclude"
    )]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The row.
        row: usize,
        /// The place in it.
        column: usize,
    },
    /// The file could not be read.
    #[error(transparent)]
    Io(std::sync::Arc<mmgp_io::Error>),
    /// A module could not be built from its weights.
    #[error(transparent)]
    Quant(std::sync::Arc<mmgp_quant::Error>),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(std::sync::Arc<candle_core::Error>),
}

impl Error {
    /// A weight that holds no finite number at this place.
    pub(crate) fn not_finite(view: &mmgp_io::TensorView, row: usize, column: usize) -> Self {
        let file = view.file().path().display().to_string();
        Error::NotFinite { file, tensor: view.name().into(), row, column }
    }

    /// A block whose digest is not the one that it must have.
    pub(crate) fn corrupt(image: &crate::BlockImage) -> Self {
        let file = image.tensors.iter().flat_map(|t| &t.segments).next();
        let file = file.map(|segment| segment.source.file().path().to_path_buf());
        Error::Corrupt { file: file.unwrap_or_default(), block: image.name.clone() }
    }
}

impl From<mmgp_io::Error> for Error {
    fn from(e: mmgp_io::Error) -> Self {
        Error::Io(e.into())
    }
}

impl From<mmgp_quant::Error> for Error {
    fn from(e: mmgp_quant::Error) -> Self {
        Error::Quant(e.into())
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::Candle(e.into())
    }
}
