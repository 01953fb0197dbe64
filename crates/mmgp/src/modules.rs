//! The tensor library's kernels, of which there is no machine code: a driver compiles them when a machine first uses
//! them, and keeps what it made. Compiled one behind another, as they are used, they would take as long as all of them
//! together. What they take side by side was not measured yet.

use std::thread;

use candle_core::{
    CudaDevice, Error, Result,
    cuda_backend::kernels::{AFFINE, CAST, FILL, INDEXING, Module, REDUCE, TERNARY, UNARY},
};

/// What pictures and videos need. Sums, which would take three times as long as any of these, have kernels of ours
/// ([`add`](mmgp_models::nn::add)).
const USED: [&Module; 7] = [&UNARY, &INDEXING, &REDUCE, &CAST, &TERNARY, &FILL, &AFFINE];

/// What the driver is to compile: what a note that it did so is about.
pub(crate) fn sources() -> Vec<&'static [u8]> {
    USED.iter().map(|module| module.ptx().as_bytes()).collect()
}

/// Has the driver compile them for `device`'s GPU.
///
/// # Errors
/// What the driver refuses.
pub(crate) fn compile(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let load = |module: &Module| context.load_module(module.ptx().into()).map(drop);
    thread::scope(|scope| {
        let threads: Vec<_> = USED.iter().map(|module| scope.spawn(move || load(module))).collect();
        for compiled in threads {
            match compiled.join() {
                Ok(compiled) => compiled.map_err(Error::wrap)?,
                Err(_) => candle_core::bail!("a thread that has kernels compiled panicked"),
            }
        }
        Ok(())
    })
}
