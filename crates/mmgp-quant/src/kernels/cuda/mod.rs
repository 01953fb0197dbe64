//! The kernels of NVIDIA GPUs: int8 and fp8 weights expanded to a floating-point dtype, biases added in place;
//! products by cublasLt (`product.rs`), in fp8 too (`fp8.rs`); and products in int8 (`w8a8.rs`, `hopper.rs`).
//!
//! Kernels are compiled ahead (`build.rs`) and loaded once per CUDA context, at the first use. Launches
//! are queued on candle's stream and never synchronize the host. Lengths and dtypes are checked here,
//! since weights that are not leased hold an empty storage of another dtype.

mod fp8;
#[cfg(w8a8_sm90)]
mod hopper;
mod image;
mod operand;
mod output;
mod product;
mod w8a8;

use candle_core::{
    CpuStorage, CudaStorage, DType, InplaceOp2, Layout, Result, Shape,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{
            CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, result, sys,
        },
    },
};
use half::{bf16, f16};

use crate::{Codes, Epilogue};

pub use self::{
    fp8::{disable_fp8, enable_fp8, fp8_enabled, fp8_multiplies, fp8_product},
    image::{Kernel, KernelImage, Parameter},
    product::product_library,
    w8a8::{Int8Kernel, w8a8, w8a8_by},
};
pub(crate) use self::{
    fp8::{fp8_name, fp8_product_into, fp8_product_of, fp8_reads_codes},
    operand::{coded, reads_codes},
    product::{add_product, product, product_into},
    w8a8::{quantize_name, w8a8_into, w8a8_name, w8a8_of},
};

/// Machine code and PTX of `int8.cu`.
static KERNELS: KernelImage =
    KernelImage::new(include_bytes!(concat!(env!("OUT_DIR"), "/int8.fatbin")));

/// The kernels as they were compiled: what a self-test's result is about, beside the card and the driver. The last
/// is a digest of the library for Hopper, empty if the build has none.
pub fn kernel_images() -> [&'static [u8]; 3] {
    let hopper = include_bytes!(concat!(env!("OUT_DIR"), "/w8a8_sm90.digest"));
    [KERNELS.bytes(), w8a8::KERNELS.bytes(), hopper]
}

/// The address of what is not there.
const NULL: u64 = 0;
/// Threads of a block.
const BLOCK: u32 = 256;
/// Blocks along x at most; threads step over what is left.
const GRID_X: u64 = 1 << 20;
/// Blocks along y at most, the limit of the hardware.
const GRID_Y: u64 = 65_535;

/// The name that kernels have for a dtype.
fn short(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::F32 => "f32",
        other => bail!("linear: {other:?} is not computed on CUDA, or the weight is not leased"),
    })
}

/// The name and the compute capability of the GPU that the driver counts as `ordinal`; no context is made.
pub(crate) fn card(ordinal: usize) -> Result<(String, (i32, i32))> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    result::init().w()?;
    let gpu = result::device::get(ordinal.try_into().unwrap_or(i32::MAX)).w()?;
    // SAFETY: `get` gave this device.
    let attribute = |which| unsafe { result::device::get_attribute(gpu, which) }.w();
    Ok((result::device::get_name(gpu).w()?, (attribute(MAJOR)?, attribute(MINOR)?)))
}

/// The kernel that expands codes to `to`.
pub(crate) fn expand_name(codes: Codes, to: DType) -> Result<String> {
    Ok(format!("expand_{}{}", infix(codes), short(to)?))
}

/// What stands in names of kernels for codes.
fn infix(codes: Codes) -> &'static str {
    match codes {
        Codes::Int8 => "",
        Codes::Fp8 => "fp8_",
        Codes::RotatedInt8 => "rotated_int8_",
    }
}

/// The kernel that adds biases.
pub(crate) fn add_bias_name(dtype: DType) -> Result<String> {
    Ok(format!("add_bias_{}", short(dtype)?))
}

/// What a product is called in errors.
pub(crate) fn product_name(dtype: DType, biased: bool, epilogue: Epilogue) -> Result<String> {
    let behind = match epilogue {
        Epilogue::None => "",
        Epilogue::GeluTanh => "_gelu",
    };
    Ok(format!("product_{}{}{behind}", short(dtype)?, if biased { "_bias" } else { "" }))
}

/// What `layout` shows of a storage that must be contiguous and hold `T`.
fn view<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let all = storage.as_cuda_slice::<T>()?;
    layout
        .contiguous_offsets()
        .and_then(|(from, to)| all.try_slice(from..to))
        .ok_or_else(|| candle_core::Error::msg("linear: an operand is not contiguous or not bound"))
}

fn blocks(threads: u64) -> u32 {
    threads.div_ceil(u64::from(BLOCK)).clamp(1, GRID_X) as u32
}

/// `codes · scales` in `dtype` (bf16, f16 or f32), rounded once: `codes` U8 `[outputs, inputs]`, `scales` f32
/// `[outputs, 1]`; without scales they are 1.
pub(crate) fn expand(
    of: Codes,
    codes: (&CudaStorage, &Layout),
    scales: Option<(&CudaStorage, &Layout)>,
    dtype: DType,
) -> Result<(CudaStorage, Shape)> {
    match dtype {
        DType::BF16 => expand_to::<bf16>(of, codes, scales, dtype),
        DType::F16 => expand_to::<f16>(of, codes, scales, dtype),
        DType::F32 => expand_to::<f32>(of, codes, scales, dtype),
        other => bail!("{of}: weights are not expanded to {other:?}"),
    }
}

fn expand_to<T: CudaDType + DeviceRepr>(
    of: Codes,
    (codes, lc): (&CudaStorage, &Layout),
    scales: Option<(&CudaStorage, &Layout)>,
    dtype: DType,
) -> Result<(CudaStorage, Shape)> {
    let (outputs, inputs) = lc.shape().dims2()?;
    let dev = codes.device();
    let name = expand_name(of, dtype)?;
    let codes = view::<u8>(codes, lc)?;
    let scales = scales.map(|(scales, ls)| view::<f32>(scales, ls)).transpose()?;
    if let Some(scales) = &scales
        && scales.len() != outputs
    {
        bail!("{of}: {} scales for {outputs} outputs", scales.len());
    }
    if of.with_inputs(inputs) != of {
        bail!("{of}: rows of {inputs} codes are no groups");
    }
    let total = outputs * inputs;
    // SAFETY: `T` is plain numbers, and the kernel below writes all `total` of them.
    let mut out = unsafe { dev.alloc::<T>(total)? };
    if total > 0 {
        let kernel = KERNELS.function(dev, &name)?;
        let grid_dim = (blocks((total as u64).div_ceil(16)), 1, 1);
        let config = LaunchConfig { grid_dim, block_dim: (BLOCK, 1, 1), shared_mem_bytes: 0 };
        let (total, inputs) = (total as u64, inputs as u64);
        let stream = dev.cuda_stream();
        let (codes, _read) = codes.device_ptr(&stream);
        let (scales, _too) = scales.as_ref().map(|scales| scales.device_ptr(&stream)).unzip();
        let scales = scales.unwrap_or(NULL);
        let (to, _written) = out.device_ptr_mut(&stream);
        // SAFETY: the parameters are those of the kernel of this name; `codes` and `out` have `total`
        // elements and `scales`, where they are, one for each of `total / inputs` rows, all on this stream's device.
        unsafe { kernel.launch(&stream, config, &[&codes, &scales, &to, &total, &inputs])? };
    }
    Ok((CudaStorage::wrap_cuda_slice(out, dev.clone()), Shape::from((outputs, inputs))))
}

/// `y + bias` in place: `y` `[rows, outputs]`, `bias` `[outputs]`, both of one dtype.
pub(crate) struct AddBias;

impl InplaceOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add bias"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("a bias is added within the product on the CPU")
    }

    fn cuda_fwd(
        &self,
        y: &mut CudaStorage,
        ly: &Layout,
        bias: &CudaStorage,
        lb: &Layout,
    ) -> Result<()> {
        match y.dtype() {
            DType::BF16 => add_bias::<bf16>((y, ly), (bias, lb)),
            DType::F16 => add_bias::<f16>((y, ly), (bias, lb)),
            DType::F32 => add_bias::<f32>((y, ly), (bias, lb)),
            other => bail!("linear: no bias is added to {other:?}"),
        }
    }
}

fn add_bias<T: CudaDType + DeviceRepr>(
    (y, ly): (&mut CudaStorage, &Layout),
    (bias, lb): (&CudaStorage, &Layout),
) -> Result<()> {
    let (rows, outputs) = ly.shape().dims2()?;
    let dev = y.device().clone();
    let name = add_bias_name(y.dtype())?;
    let bias = view::<T>(bias, lb)?;
    if bias.len() != outputs {
        bail!("linear: {} biases for {outputs} outputs", bias.len());
    }
    let all = y.as_cuda_slice_mut::<T>()?;
    let range = ly.contiguous_offsets().filter(|&(_, to)| to <= all.len());
    let Some(mut y) = range.and_then(|(from, to)| all.try_slice_mut(from..to)) else {
        bail!("linear: the output is not contiguous");
    };
    if rows == 0 || outputs == 0 {
        return Ok(());
    }
    let kernel = KERNELS.function(&dev, &name)?;
    let (rows, outputs) = (rows as u64, outputs as u64);
    let per_thread = 16 / size_of::<T>() as u64;
    let vectors = if outputs % per_thread == 0 { outputs / per_thread } else { outputs };
    let grid_dim = (blocks(vectors), rows.min(GRID_Y) as u32, 1);
    let config = LaunchConfig { grid_dim, block_dim: (BLOCK, 1, 1), shared_mem_bytes: 0 };
    let stream = dev.cuda_stream();
    let (bias, _read) = bias.device_ptr(&stream);
    let (y, _written) = y.device_ptr_mut(&stream);
    // SAFETY: the parameters are those of the kernel of this name; `y` has `rows · outputs` elements and
    // `bias` has `outputs`, both on this stream's device, and `y` is borrowed mutably.
    unsafe { kernel.launch(&stream, config, &[&y, &bias, &rows, &outputs]) }
}
