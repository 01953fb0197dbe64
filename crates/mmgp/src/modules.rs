//! The tensor library's kernels, of which there is no machine code: a driver compiles them when a machine first uses
//! them, and keeps what it made. It compiles one at a time in a process, whatever the threads, so processes have it compile
//! them side by side.

use std::path::Path;

use candle_core::{
    Result,
    cuda_backend::{
        WrapErr,
        cudarc::driver::CudaContext,
        kernels::{AFFINE, CAST, FILL, Module},
    },
};

use crate::compilers;

/// What all models need. What would take longer has kernels of ours (in [`nn`](mmgp_models::nn)); what videos need beside that, as the
/// products of tensors in their decoders, is compiled when it is used.
const USED: [(&str, &Module); 3] = [("cast", &CAST), ("fill", &FILL), ("affine", &AFFINE)];

/// What the driver is to compile: what a note that it did so is about.
pub(crate) fn sources() -> Vec<&'static [u8]> {
    USED.iter().map(|(_, module)| module.ptx().as_bytes()).collect()
}

/// Has processes of `program` compile each of them for the GPU `ordinal`, at most so many `at_once`, each of which has a context
/// on the GPU meanwhile: `program compile-kernels NAME ORDINAL` is to come to [`compile`].
///
/// # Errors
/// The first process that does not start, fails, or takes too long, in words.
pub(crate) fn compile_by(
    program: &Path,
    ordinal: usize,
    at_once: usize,
) -> std::result::Result<(), String> {
    let names: Vec<&str> = USED.iter().map(|(name, _)| *name).collect();
    compilers::run(program, &names, ordinal, at_once, compilers::PATIENCE)
}

/// Has the driver compile the one called `name` for the GPU `ordinal`.
///
/// # Errors
/// None of that name; what the driver refuses.
pub fn compile(name: &str, ordinal: usize) -> Result<()> {
    let Some((_, module)) = USED.iter().find(|(known, _)| *known == name) else {
        candle_core::bail!("no kernels are called {name:?}");
    };
    CudaContext::new(ordinal).w()?.load_module(module.ptx().into()).w()?;
    Ok(())
}
