//! Kernels that were compiled ahead: where they are loaded, and how they are queued.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CString, c_void},
    ptr,
    sync::{Arc, OnceLock},
};

use candle_core::{
    CudaDevice, Result, bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{
            CudaContext, CudaStream, DeviceRepr, LaunchConfig, result,
            sys::{
                self,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
                CUfunction_attribute::{
                    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED,
                    CU_FUNC_ATTRIBUTE_PTX_VERSION as COMPILED_FOR,
                },
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION as EARLY,
            },
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
    module: sys::CUmodule,
    /// Whether the card starts a kernel before the one before it ends.
    early: bool,
    functions: HashMap<String, Kernel>,
    _context: Arc<CudaContext>,
}

// SAFETY: the module is a handle of the driver's, which any thread may use; it is never unloaded.
unsafe impl Send for Loaded {}

impl KernelImage {
    /// An image as nvcc wrote it: a fat binary, a cubin or PTX. Each kernel in it that was compiled for compute capability 9.0
    /// or more begins with `griddepcontrol.wait`.
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
    pub fn function(&self, dev: &CudaDevice, name: &str) -> Result<Kernel> {
        let stream = dev.cuda_stream();
        let context = stream.context();
        let key = context.cu_ctx() as usize;
        let mut all = self.loaded.get_or_init(Mutex::default).lock();
        let loaded = match all.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.load(context)?),
        };
        if let Some(function) = loaded.functions.get(name) {
            return Ok(function.clone());
        }
        let Ok(called) = CString::new(name) else { bail!("{name:?}: no name of a kernel") };
        context.bind_to_thread().w()?;
        // SAFETY: the module is loaded, in the context that is bound.
        let function = unsafe { result::module::get_function(loaded.module, called) }.w()?;
        // SAFETY: the function is of that module.
        let made_for = unsafe { result::function::get_function_attribute(function, COMPILED_FOR) };
        let kernel = Kernel { function, early: loaded.early && made_for.w()? >= 90 };
        loaded.functions.insert(name.into(), kernel.clone());
        Ok(kernel)
    }

    fn load(&self, context: &Arc<CudaContext>) -> Result<Loaded> {
        let early = context.attribute(MAJOR).w()? >= 9;
        context.bind_to_thread().w()?;
        // Where the driver may read words of it.
        let bytes = self.bytes.to_vec();
        // SAFETY: an image as nvcc wrote it, which says itself where it ends.
        let module = unsafe { result::module::load_data(bytes.as_ptr().cast()) }.w()?;
        Ok(Loaded { module, early, functions: HashMap::new(), _context: context.clone() })
    }
}

/// A kernel of an image, loaded in one context.
#[derive(Clone, Debug)]
pub struct Kernel {
    function: sys::CUfunction,
    /// Whether it may start before the kernel before it ends, for which it then waits itself.
    early: bool,
}

// SAFETY: the function is a handle of the driver's, which any thread may use; its module is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A parameter of a kernel.
pub trait Parameter {
    /// Where it lies on the host.
    fn address(&self) -> *mut c_void;
}

impl<T: DeviceRepr> Parameter for T {
    fn address(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

impl Kernel {
    /// Lets blocks share more memory than 48 KiB, `bytes` of it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn share(&self, bytes: u32) -> Result<()> {
        // SAFETY: the function's module is loaded.
        unsafe { result::function::set_function_attribute(self.function, SHARED, bytes as i32) }.w()
    }

    /// Queues it on `stream`, behind all that was queued there. Cards that can bring its blocks up while the kernel before it ends,
    /// where it was compiled for them: of compute capability 9.0 and 12.x as images are made here.
    ///
    /// # Safety
    /// The kernel begins as [`KernelImage::new`] says, `stream` is of the context that the kernel was loaded in, `parameters` are those of the kernel in their order and of their
    /// types, and with them it reads and writes nothing but memory that is ordered by `stream`.
    ///
    /// # Errors
    /// What the driver refuses.
    pub unsafe fn launch(
        &self,
        stream: &CudaStream,
        config: LaunchConfig,
        parameters: &[&dyn Parameter],
    ) -> Result<()> {
        stream.context().bind_to_thread().w()?;
        let mut parameters: Vec<_> = parameters.iter().map(|p| p.address()).collect();
        let mut early = sys::CUlaunchAttribute {
            id: EARLY,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: config.grid_dim.0,
            gridDimY: config.grid_dim.1,
            gridDimZ: config.grid_dim.2,
            blockDimX: config.block_dim.0,
            blockDimY: config.block_dim.1,
            blockDimZ: config.block_dim.2,
            sharedMemBytes: config.shared_mem_bytes,
            hStream: stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.early),
        };
        let nothing = ptr::null_mut();
        // SAFETY: the driver copies parameters before it returns; they are as the caller says.
        let status = unsafe {
            sys::cuLaunchKernelEx(&config, self.function, parameters.as_mut_ptr(), nothing)
        };
        status.result().w()
    }
}
