//! What stands in a linear layer's side slot: all adapters of the layer, stacked.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use candle_core::Tensor;
use mmgp_quant::{Band, Side, add_low_rank};

/// The weight of each adapter at the step that runs now, shared by all layers.
#[derive(Debug, Default)]
pub(crate) struct Live(Vec<AtomicU32>);

impl Live {
    pub(crate) fn new(weights: impl Iterator<Item = f32>) -> Self {
        Self(weights.map(|w| AtomicU32::new(w.to_bits())).collect())
    }

    pub(crate) fn set(&self, weights: impl Iterator<Item = f32>) {
        for (cell, weight) in self.0.iter().zip(weights) {
            cell.store(weight.to_bits(), Ordering::Relaxed);
        }
    }

    fn get(&self, adapter: usize) -> f32 {
        self.0.get(adapter).map_or(0., |cell| f32::from_bits(cell.load(Ordering::Relaxed)))
    }
}

/// Ranks that one module of one adapter brings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    pub(crate) adapter: usize,
    pub(crate) ranks: usize,
    /// alpha / rank.
    pub(crate) scale: f32,
}

/// The adapters of one layer: `y += (s ∘ x Aᵀ) Bᵀ`.
pub(crate) struct Stacked {
    /// `[ΣR, inputs]`.
    pub(crate) a: Tensor,
    /// The first output and `B`, `[outputs, R]`, of each range of outputs; their `R` add up to `ΣR`.
    pub(crate) bands: Vec<(usize, Tensor)>,
    /// Whose the ranks are, in the order of `A`.
    pub(crate) shares: Vec<Share>,
    pub(crate) live: Arc<Live>,
}

impl Side for Stacked {
    fn add(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let mut scales = Vec::with_capacity(self.a.dim(0)?);
        for share in &self.shares {
            let scale = share.scale * self.live.get(share.adapter);
            scales.extend(std::iter::repeat_n(scale, share.ranks));
        }
        let bands: Vec<Band<'_>> =
            self.bands.iter().map(|(row, b)| Band { row: *row, b }).collect();
        add_low_rank(x, y, &self.a, &scales, &bands)
    }
}
