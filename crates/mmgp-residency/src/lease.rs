//! What a model's forward sees: passes, and blocks inside them.

use crate::{
    Pager, Result,
    pager::{At, Lease},
};

/// A model whose weights are paged: its stem `S` and its blocks `B` are reached only inside leases.
pub struct Paged<S, B> {
    pager: Pager,
    model: usize,
    stem: S,
    blocks: Vec<B>,
    unused: Vec<String>,
}

impl<S, B> Paged<S, B> {
    pub(crate) fn new(
        pager: Pager,
        model: usize,
        stem: S,
        blocks: Vec<B>,
        unused: Vec<String>,
    ) -> Self {
        Self { pager, model, stem, blocks, unused }
    }

    /// Begins a walk over the blocks. The stem is leased until the pass is dropped.
    ///
    /// # Errors
    /// A file that cannot be read; no room beside what other models have leased; cancellation.
    pub fn pass(&self) -> Result<Pass<'_, S, B>> {
        self.pager.begin_pass(self.model)?;
        let stem = self.pager.lease(At { model: self.model, block: 0 })?;
        Ok(Pass { model: self, _stem: stem })
    }

    /// The number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the model is all stem.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Stored tensors that nobody asked for.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Calls `f`, and again as long as memory runs out and some can be given back.
    fn run<R>(&self, mut f: impl FnMut() -> candle_core::Result<R>) -> Result<R> {
        loop {
            match f() {
                Err(error) if self.pager.may_run_again(self.model, &error)? => {}
                result => return Ok(result?),
            }
        }
    }

    /// The pager that the model belongs to.
    pub fn pager(&self) -> &Pager {
        &self.pager
    }
}

impl<S, B> Drop for Paged<S, B> {
    fn drop(&mut self) {
        self.pager.remove(self.model);
    }
}

/// One walk over a model's blocks.
pub struct Pass<'a, S, B> {
    model: &'a Paged<S, B>,
    _stem: Lease,
}

impl<'a, S, B> Pass<'a, S, B> {
    /// Runs `f` on the stem. It must be a pure function of what it captures: it may be called again
    /// when memory had to be given back.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn stem<R>(&self, mut f: impl FnMut(&S) -> candle_core::Result<R>) -> Result<R> {
        self.model.run(|| f(&self.model.stem))
    }

    /// The blocks in order, each leased when it is reached. Finish one visit before the next.
    pub fn blocks(&self) -> impl Iterator<Item = Result<Visit<'a, S, B>>> + use<'a, S, B> {
        let model = self.model;
        model.blocks.iter().enumerate().map(move |(index, block)| {
            let lease = model.pager.lease(At { model: model.model, block: index + 1 })?;
            Ok(Visit { model, block, index, _lease: lease })
        })
    }
}

/// A block whose weights are on the device until this is dropped.
pub struct Visit<'a, S, B> {
    model: &'a Paged<S, B>,
    block: &'a B,
    index: usize,
    _lease: Lease,
}

impl<S, B> Visit<'_, S, B> {
    /// The block's place in the pass, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Runs `f` on the block and ends the visit. `f` must be a pure function of what it captures:
    /// it may be called again when memory had to be given back.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn run<R>(self, mut f: impl FnMut(&B) -> candle_core::Result<R>) -> Result<R> {
        self.model.run(|| f(self.block))
    }
}
