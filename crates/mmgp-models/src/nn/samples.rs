//! The samples of a batch, one after another or at once.
//!
//! Guidance by a second pass is a batch of two. Whichever way the samples go, they share the lease of a
//! block, so that its weights travel once a step; apart, a block's activations are those of one.

use candle_core::{Result, Tensor};

/// How the samples of a batch go through each block. Part of the recipe: products of more rows may
/// have other bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Samples {
    /// In one call: for few tokens, which alone would not fill a GPU.
    Together,
    /// A call each, within one lease.
    Apart,
}

impl Samples {
    /// The parts of `[batch, …]` that go together, one or as many as there are samples.
    ///
    /// # Errors
    /// None of its own.
    pub fn split(self, batch: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Samples::Together => Ok(vec![batch.clone()]),
            Samples::Apart => (0..batch.dim(0)?).map(|i| batch.narrow(0, i, 1)?.copy()).collect(),
        }
    }
}
