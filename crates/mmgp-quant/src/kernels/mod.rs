//! Kernels, by device. `unsafe` of this crate lives below this module only.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod fp8;
pub(crate) mod int8;
mod isa;
pub(crate) mod rotated_int8;
pub(crate) mod rotation;
