//! The side slot of a linear layer: where adapters add their part to its output.

use std::{fmt, sync::Arc};

use candle_core::Tensor;
use parking_lot::RwLock;

/// Something that adds to a linear layer's output, such as a LoRA side path.
pub trait Side: Send + Sync {
    /// `y` plus this side's share of it. `x` is the layer's input, contiguous `[rows, inputs]`, `y`
    /// its output `[rows, outputs]`.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    fn add(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor>;
}

/// Holds at most one [`Side`]; several adapters on one layer are one side. Clones share the slot.
#[derive(Clone, Default)]
pub struct SideSlot(Arc<RwLock<Option<Arc<dyn Side>>>>);

impl SideSlot {
    /// Puts `side` in, replacing what was there.
    pub fn set(&self, side: Arc<dyn Side>) {
        *self.0.write() = Some(side);
    }

    /// Empties the slot.
    pub fn clear(&self) {
        *self.0.write() = None;
    }

    /// Whether there is a side in it.
    pub fn is_taken(&self) -> bool {
        self.0.read().is_some()
    }

    /// `y` with the side added, if there is one.
    ///
    /// # Errors
    /// Those of [`Side::add`].
    pub fn apply(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        // The guard is released before the side computes: adding takes long, reading does not.
        let side = self.0.read().clone();
        match side {
            Some(side) => side.add(x, y),
            None => Ok(y),
        }
    }
}

impl fmt::Debug for SideSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SideSlot({})", if self.is_taken() { "taken" } else { "empty" })
    }
}
