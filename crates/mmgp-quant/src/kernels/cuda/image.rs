//! Kernels that were compiled ahead, and where they are loaded.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, OnceLock},
};

use candle_core::{
    CudaDevice, Result,
    cuda_backend::{
        WrapErr,
        cudarc::{
            driver::{CudaFunction, CudaModule},
            nvrtc::Ptx,
        },
    },
};
use parking_lot::Mutex;

/// A compiled image, loaded once per CUDA context at the first use; meant for a `static`.
///
/// Modules are kept for the life of the process, by the address of their context; each holds its
/// context, so an address never comes to mean another one. (candle's device keeps modules too, but
/// takes text alone, which the driver would have to compile.)
#[derive(Debug)]
pub struct KernelImage {
    bytes: &'static [u8],
    loaded: OnceLock<Mutex<HashMap<usize, Loaded>>>,
}

#[derive(Debug)]
struct Loaded {
    module: Arc<CudaModule>,
    functions: HashMap<String, CudaFunction>,
}

impl KernelImage {
    /// An image as nvcc wrote it: a fat binary, a cubin or PTX.
    pub const fn new(bytes: &'static [u8]) -> Self {
        Self { bytes, loaded: OnceLock::new() }
    }

    /// The image itself: what a self-test's result is about, beside the card and the driver.
    pub fn bytes(&self) -> &'static [u8] {
        self.bytes
    }

    /// The kernel called `name` on `dev`'s GPU.
    ///
    /// # Errors
    /// An image that the driver refuses, or that has no such kernel.
    pub fn function(&self, dev: &CudaDevice, name: &str) -> Result<CudaFunction> {
        let stream = dev.cuda_stream();
        let context = stream.context();
        let key = context.cu_ctx() as usize;
        let mut all = self.loaded.get_or_init(Mutex::default).lock();
        let loaded = match all.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let module = context.load_module(Ptx::from_binary(self.bytes.to_vec())).w()?;
                entry.insert(Loaded { module, functions: HashMap::new() })
            }
        };
        if let Some(function) = loaded.functions.get(name) {
            return Ok(function.clone());
        }
        let function = loaded.module.load_function(name).w()?;
        loaded.functions.insert(name.into(), function.clone());
        Ok(function)
    }
}
