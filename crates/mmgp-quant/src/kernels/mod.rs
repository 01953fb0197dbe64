//! Kernels, by device. `unsafe` of this crate lives below this module only.

pub(crate) mod cpu;
pub(crate) mod int8;
mod isa;
