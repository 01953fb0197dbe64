//! One file a number format.

pub(crate) mod dense;
pub(crate) mod fp8;
pub(crate) mod int8;
