//! One file a number format.

pub(crate) mod dense;
