//! The tensor library's kernels, of which there is no machine code: a driver compiles them when a machine first uses
//! them, and keeps what it made. It compiles one at a time in a process, whatever the threads, so processes have it compile
//! them side by side.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use candle_core::{
    Error, Result,
    cuda_backend::{
        WrapErr,
        cudarc::driver::CudaContext,
        kernels::{AFFINE, CAST, FILL, INDEXING, Module, REDUCE, TERNARY, UNARY},
    },
};

/// What pictures and videos need, what takes longest first. Sums, which would take three times as long as any of these, have kernels
/// of ours ([`add`](mmgp_models::nn::add)).
const USED: [(&str, &Module); 7] = [
    ("unary", &UNARY),
    ("indexing", &INDEXING),
    ("reduce", &REDUCE),
    ("cast", &CAST),
    ("ternary", &TERNARY),
    ("fill", &FILL),
    ("affine", &AFFINE),
];

/// What the driver is to compile: what a note that it did so is about.
pub(crate) fn sources() -> Vec<&'static [u8]> {
    USED.iter().map(|(_, module)| module.ptx().as_bytes()).collect()
}

/// Has processes of `program` compile each of them for the GPU `ordinal`: `program compile-kernels NAME ORDINAL` is to come to
/// [`compile`].
///
/// # Errors
/// The first process that does not start or fails.
pub(crate) fn compile_by(program: &Path, ordinal: usize) -> Result<()> {
    let start = |(name, _): &(&'static str, &Module)| {
        let mut command = Command::new(program);
        command.args(["compile-kernels", name, &ordinal.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        (*name, command.spawn())
    };
    // All are waited for, so that none is left behind.
    let started: Vec<_> = USED.iter().map(start).collect();
    let ended: Vec<_> = started
        .into_iter()
        .map(|(name, child)| (name, child.and_then(|mut child: Child| child.wait())))
        .collect();
    for (name, status) in ended {
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => {
                candle_core::bail!("{} compile-kernels {name}: {status}", program.display())
            }
            Err(why) => return Err(Error::wrap(why)),
        }
    }
    Ok(())
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
