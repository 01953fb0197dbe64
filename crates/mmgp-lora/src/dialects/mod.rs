//! How LoRA files name their tensors: the table that turns keys into modules.
//!
//! A dialect is one file here and one line in [`DIALECTS`]. Keys are read one by one; the first
//! dialect that knows a key decides what it means.

pub(crate) mod peft;

/// One way of naming the tensors of an adapter.
pub(crate) struct Dialect {
    /// For messages.
    pub(crate) name: &'static str,
    /// What a key means, or `None` if it is not of this dialect.
    pub(crate) key: fn(&str) -> Option<Key<'_>>,
}

/// All dialects, in the order in which they are asked.
pub(crate) const DIALECTS: &[Dialect] = &[peft::DIALECT];

/// What a key of an adapter's file means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key<'a> {
    /// The model that it is for, if the key says so: `transformer`, `text_encoder`, …
    pub(crate) component: Option<&'a str>,
    /// The module, as the model's own file names it.
    pub(crate) module: &'a str,
    /// Which of the module's tensors it is.
    pub(crate) leaf: Leaf,
}

/// Which tensor of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaf {
    /// `A`, `[rank, inputs]`.
    Down,
    /// `B`, `[outputs, rank]`.
    Up,
    /// A scalar: what comes out is scaled by alpha / rank.
    Alpha,
    /// A kind of adapter that is not read here.
    Unsupported(&'static str),
}
