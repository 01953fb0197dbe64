//! One file a subcommand.

pub(crate) mod convert;
pub(crate) mod generate;
mod quantize;
pub(crate) mod store;
