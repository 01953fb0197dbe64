//! What adapters aim at: a linear layer under the names its weights are stored by.
//!
//! A layer of the file and a [`Linear`](crate::Linear) are not the same thing: several stored layers
//! that read one input are one product here. A [`Target`] says which rows of the product each stored
//! layer became, and has the side slot that an adapter's part is put into. A source hears of every
//! target while a model is built ([`Source::register`](crate::Source::register)).

use crate::SideSlot;

/// A linear layer as adapters find it.
#[derive(Clone, Debug)]
pub struct Target {
    /// The stored layers that it joins, first rows first.
    pub parts: Vec<TargetPart>,
    /// The width of the input.
    pub inputs: usize,
    /// The width of the output, the rows of all parts together.
    pub outputs: usize,
    /// Where an adapter adds to the output.
    pub side: SideSlot,
}

/// One stored layer of a [`Target`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPart {
    /// Its full stored path, without `.weight`.
    pub name: String,
    /// The first column of the output that it computes.
    pub row: usize,
    /// How many it computes.
    pub rows: usize,
}
