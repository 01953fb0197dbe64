//! How a kernel of `nn.cu` is started, and the memory that its argument speaks of.
//!
//! Operands are locked, held to the memory that they have, and on one stream with what is written; who starts a
//! kernel vouches for the argument alone. Launches are queued on candle's stream and never synchronize the host.

use std::sync::Arc;

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType,
        cudarc::driver::{
            CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, SyncOnDrop,
        },
    },
    op::BackpropOp,
};
use half::{bf16, f16};
use mmgp_quant::KernelImage;

use super::shape::{Grid, end};

/// Machine code and PTX of `nn.cu`.
pub(super) static KERNELS: KernelImage =
    KernelImage::new(include_bytes!(concat!(env!("OUT_DIR"), "/nn.fatbin")));

/// A number that kernels exist for.
pub(super) trait Element: CudaDType + DeviceRepr + 'static {
    /// It as a dtype.
    const DTYPE: DType;
    /// What kernels call it.
    const SUFFIX: &'static str;
    /// The values of a vector of 16 bytes.
    const VECTOR: u64 = 16 / size_of::<Self>() as u64;
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    const SUFFIX: &'static str = "bf16";
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const SUFFIX: &'static str = "f16";
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    const SUFFIX: &'static str = "f32";
}

/// Refuses operands of another dtype than the kernel reads.
pub(super) fn held_to<T: Element>(inputs: &[Option<&Tensor>]) -> Result<()> {
    match inputs.iter().flatten().find(|input| input.dtype() != T::DTYPE) {
        Some(other) => {
            bail!("nn: an operand in {:?} beside others in {:?}", other.dtype(), T::DTYPE)
        }
        None => Ok(()),
    }
}

/// Calls a function over [`Element`]s with the one that is `$x`'s dtype.
macro_rules! by_dtype {
    ($x:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $x.dtype() {
            DType::BF16 => $function::<half::bf16>($($argument),*),
            DType::F16 => $function::<half::f16>($($argument),*),
            DType::F32 => $function::<f32>($($argument),*),
            other => candle_core::bail!("nn: no kernels for {other:?}"),
        }
    };
}
pub(super) use by_dtype;

/// A GPU's memory that kernels fill, to become a tensor.
#[derive(Debug)]
pub(super) struct Fresh<T> {
    device: CudaDevice,
    values: CudaSlice<T>,
}

impl<T: Element> Fresh<T> {
    /// Memory for `len` values on the GPU of `like`. What is in it is unknown: the caller has kernels
    /// write all of it before it is read.
    pub(super) fn new(like: &Tensor, len: u64) -> Result<Self> {
        Self::on(like.device(), len)
    }

    /// The same on a GPU that is named.
    pub(super) fn on(device: &Device, len: u64) -> Result<Self> {
        let Device::Cuda(device) = device else {
            bail!("nn: a kernel of the GPU was given a tensor of another device");
        };
        // SAFETY: `T` is plain numbers; kernels write them before others read, which is this type's contract.
        let values = unsafe { device.alloc::<T>(len as usize)? };
        Ok(Self { device: device.clone(), values })
    }

    /// Starts `kernel` on `inputs`, whose addresses `argue` gets in their order, 0 for `None`, and
    /// after them this memory's.
    ///
    /// # Safety
    /// With the argument that `argue` makes the kernel of this name reads and writes nothing but values
    /// that the layouts of `inputs` show, and of this memory what it has; `P` is its argument's type.
    pub(super) unsafe fn run<P: DeviceRepr>(
        &mut self,
        kernel: &str,
        grid: Grid,
        inputs: &[Option<&Tensor>],
        argue: impl FnOnce(&[u64], u64) -> P,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        let (out, _written) = self.values.device_ptr_mut(&stream);
        // SAFETY: handed on to the caller.
        unsafe { run(&self.device, &stream, kernel, grid, inputs, |inputs| argue(inputs, out)) }
    }

    /// Calls `queue` with the stream, the addresses of `inputs` and this memory's. Operands stay where they are
    /// until it is back.
    pub(super) fn queue<R>(
        &mut self,
        inputs: &[Option<&Tensor>],
        queue: impl FnOnce(&Arc<CudaStream>, &[u64], u64) -> Result<R>,
    ) -> Result<R> {
        let stream = self.device.cuda_stream();
        let (out, _written) = self.values.device_ptr_mut(&stream);
        addressed(&self.device, &stream, inputs, |inputs| queue(&stream, inputs, out))
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// How many values it has.
    pub(super) fn len(&self) -> u64 {
        self.values.len() as u64
    }

    /// The memory as a tensor.
    pub(super) fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        tensor_of(self.values, &self.device, shape)
    }
}

/// Starts `kernel` on `inputs`, whose addresses `argue` gets in their order, 0 for `None`, and after them those of `written`, the
/// memory of all of which is taken already.
///
/// # Safety
/// That of [`Fresh::run`], for all that is written.
pub(super) unsafe fn run_into<P: DeviceRepr>(
    device: &CudaDevice,
    written: &mut [&mut dyn Written],
    kernel: &str,
    grid: Grid,
    inputs: &[Option<&Tensor>],
    argue: impl FnOnce(&[u64], &[u64]) -> P,
) -> Result<()> {
    let stream = device.cuda_stream();
    let (addresses, held): (Vec<u64>, Vec<_>) =
        written.iter_mut().map(|memory| memory.address(&stream)).unzip();
    // SAFETY: handed on to the caller.
    let done = unsafe { run(device, &stream, kernel, grid, inputs, |at| argue(at, &addresses)) };
    drop(held);
    done
}

/// Memory that a kernel writes.
pub(super) trait Written {
    /// Where it lies, until what is returned with that is dropped.
    fn address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>);
}

impl<T: Element> Written for Fresh<T> {
    fn address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        self.values.device_ptr_mut(stream)
    }
}

impl Written for CudaSlice<u8> {
    fn address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        self.device_ptr_mut(stream)
    }
}

impl Written for CudaSlice<f32> {
    fn address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        self.device_ptr_mut(stream)
    }
}

/// Memory of a GPU as a tensor.
pub(super) fn tensor_of<T: CudaDType>(
    values: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(values, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Values that a storage has, `storage` being what an operation in place was given.
pub(super) struct Place<'a, T> {
    device: CudaDevice,
    values: &'a mut CudaSlice<T>,
    first: u64,
}

impl<'a, T: Element> Place<'a, T> {
    /// What a contiguous `layout` shows of `storage`.
    pub(super) fn of(storage: &'a mut CudaStorage, layout: &Layout) -> Result<Self> {
        let device = storage.device().clone();
        let values = storage.as_cuda_slice_mut::<T>()?;
        match layout.contiguous_offsets() {
            Some((first, end)) if end <= values.len() => {
                Ok(Self { device, values, first: first as u64 })
            }
            _ => bail!("nn: an operand is not contiguous or not bound"),
        }
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// How many values the storage has from the first on.
    pub(super) fn len(&self) -> u64 {
        self.values.len() as u64 - self.first
    }

    /// Calls `queue` with the stream and the address of the first value.
    pub(super) fn queue<R>(
        &mut self,
        queue: impl FnOnce(&Arc<CudaStream>, u64) -> Result<R>,
    ) -> Result<R> {
        let stream = self.device.cuda_stream();
        let (at, _written) = self.values.device_ptr_mut(&stream);
        queue(&stream, at + self.first * size_of::<T>() as u64)
    }

    /// As [`Fresh::run`], for these values.
    ///
    /// # Safety
    /// That of [`Fresh::run`].
    pub(super) unsafe fn run<P: DeviceRepr>(
        &mut self,
        kernel: &str,
        grid: Grid,
        inputs: &[Option<&Tensor>],
        argue: impl FnOnce(&[u64], u64) -> P,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        let (out, _written) = self.values.device_ptr_mut(&stream);
        let out = out + self.first * size_of::<T>() as u64;
        // SAFETY: handed on to the caller.
        unsafe { run(&self.device, &stream, kernel, grid, inputs, |inputs| argue(inputs, out)) }
    }
}

/// Memory for what kernels tell each other, gone when the last of them is queued.
#[derive(Debug)]
pub(super) struct Scratch(CudaSlice<f32>);

impl Scratch {
    /// Memory for `len` f32 on `device`; what is in it is unknown.
    pub(super) fn new(device: &CudaDevice, len: u64) -> Result<Self> {
        // SAFETY: plain numbers, which a kernel writes before another reads them.
        Ok(Self(unsafe { device.alloc::<f32>(len as usize)? }))
    }

    /// Its address. It is freed on the stream that it came from, which is candle's only one, so
    /// behind the kernels that were queued while it lived.
    pub(super) fn address(&self, device: &CudaDevice) -> u64 {
        self.0.device_ptr(&device.cuda_stream()).0
    }
}

/// Starts `kernel` with the argument that `argue` makes of the addresses of `inputs`.
///
/// # Safety
/// That of [`Fresh::run`].
unsafe fn run<P: DeviceRepr>(
    device: &CudaDevice,
    stream: &CudaStream,
    kernel: &str,
    grid: Grid,
    inputs: &[Option<&Tensor>],
    argue: impl FnOnce(&[u64]) -> P,
) -> Result<()> {
    let kernel = KERNELS.function(device, kernel)?;
    let config = LaunchConfig {
        grid_dim: (grid.blocks.0, grid.blocks.1, 1),
        block_dim: (grid.threads.0, grid.threads.1, 1),
        shared_mem_bytes: 0,
    };
    addressed(device, stream, inputs, |addresses| {
        let argument = argue(addresses);
        // SAFETY: the caller vouches for the argument. The inputs are locked, what their layouts show is within
        // their memory, and all of it is ordered by this stream.
        unsafe { kernel.launch(stream, config, &[&argument]) }
    })
}

/// Calls `queue` with the addresses of `inputs`, 0 for `None`, which are locked until it is back.
fn addressed<R>(
    device: &CudaDevice,
    stream: &CudaStream,
    inputs: &[Option<&Tensor>],
    queue: impl FnOnce(&[u64]) -> Result<R>,
) -> Result<R> {
    let locked: Vec<_> = inputs.iter().map(|input| input.map(Tensor::storage_and_layout)).collect();
    let mut addresses = Vec::with_capacity(inputs.len());
    let mut read = Vec::with_capacity(inputs.len());
    for (input, locked) in inputs.iter().zip(&locked) {
        let (Some(tensor), Some((storage, layout))) = (input, locked) else {
            addresses.push(0);
            continue;
        };
        let Storage::Cuda(storage) = &**storage else {
            bail!("nn: a kernel of the GPU was given a tensor of another device");
        };
        if storage.device().cuda_stream() != device.cuda_stream() {
            bail!("nn: operands of several devices");
        }
        let (address, sync) = match tensor.dtype() {
            DType::BF16 => address::<bf16>(storage, layout, stream)?,
            DType::F16 => address::<f16>(storage, layout, stream)?,
            DType::F32 => address::<f32>(storage, layout, stream)?,
            DType::U32 => address::<u32>(storage, layout, stream)?,
            other => bail!("nn: no kernels for {other:?}"),
        };
        addresses.push(address);
        read.push(sync);
    }
    let done = queue(&addresses);
    drop(read);
    done
}

/// Where the values that `layout` shows of a storage begin, held to the memory that it has.
fn address<'a, T: CudaDType + DeviceRepr + 'static>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    let values = storage.as_cuda_slice::<T>()?; // unbound memory is of another dtype
    let first = layout.start_offset();
    if end(layout) > values.len() {
        bail!("nn: an operand is larger than its memory");
    }
    let (address, sync) = values.device_ptr(stream);
    Ok((address + (first * size_of::<T>()) as u64, sync))
}
