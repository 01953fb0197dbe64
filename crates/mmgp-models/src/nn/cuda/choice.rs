//! Who computes on a GPU: the tensor library's own operations, or what was tested there.

use std::{collections::HashMap, sync::OnceLock};

use candle_core::{CudaDevice, DType, Device, Tensor};
use mmgp_quant::Input;
use parking_lot::RwLock;

use super::{
    cudnn,
    self_test::{self_test, self_test_attention, self_test_convolution, self_test_flash},
};

/// What computes on a GPU instead of the tensor library's own operations.
#[derive(Clone, Copy, Debug, Default)]
struct Choice {
    kernels: bool,
    flash: bool,
    attention: bool,
    convolution: bool,
}

/// Choices by the address of the CUDA context. Contexts of devices live as long as the process once a kernel was
/// loaded into them.
fn choices() -> &'static RwLock<HashMap<usize, Choice>> {
    static CHOICES: OnceLock<RwLock<HashMap<usize, Choice>>> = OnceLock::new();
    CHOICES.get_or_init(RwLock::default)
}

fn context(device: &CudaDevice) -> usize {
    device.cuda_stream().context().cu_ctx() as usize
}

fn choice(device: &CudaDevice) -> Choice {
    choices().read().get(&context(device)).copied().unwrap_or_default()
}

/// Has the functions of [`nn`](crate::nn) use the kernels on `device`'s GPU from now on. The caller knows that
/// [`self_test`] passed on this card with this driver and this [`kernel_image`](super::kernel_image).
pub fn enable(device: &CudaDevice) {
    choices().write().entry(context(device)).or_default().kernels = true;
}

/// Has them use the kernel for attention there, too, for what cuDNN does not compute. The caller knows that
/// [`self_test_flash`] passed on this card with this driver and this [`flash_image`](super::flash_image).
pub fn enable_flash(device: &CudaDevice) {
    choices().write().entry(context(device)).or_default().flash = true;
}

/// Has them use cuDNN's attention there, too. The caller knows that [`self_test_attention`] passed on this card
/// with this driver and this [`cudnn_version`], in what is computed in.
pub fn enable_attention(device: &CudaDevice) {
    choices().write().entry(context(device)).or_default().attention = true;
}

/// Has them use cuDNN's convolution there, too. The caller knows that [`self_test_convolution`] passed on this card
/// with this driver, this [`kernel_image`](super::kernel_image) and this [`cudnn_version`], in what is computed in.
pub fn enable_convolution(device: &CudaDevice) {
    choices().write().entry(context(device)).or_default().convolution = true;
}

/// Has them use the tensor library's own operations there, as they do before something was enabled.
pub fn disable(device: &CudaDevice) {
    choices().write().insert(context(device), Choice::default());
}

/// Tests kernels and, where it is installed, cuDNN's operations, and has them used there.
///
/// # Errors
/// Those of the tests.
pub fn enable_tested(device: &CudaDevice) -> mmgp_quant::Result<()> {
    self_test(device)?;
    enable(device);
    self_test_flash(device)?;
    enable_flash(device);
    if cudnn_version().is_ok() {
        for dtype in [DType::BF16, DType::F16] {
            self_test_attention(device, dtype)?;
            self_test_convolution(device, dtype)?;
        }
        enable_attention(device);
        enable_convolution(device);
    }
    Ok(())
}

/// Whether kernels are used on `device`'s GPU.
pub fn enabled(device: &CudaDevice) -> bool {
    choice(device).kernels
}

/// Whether the kernel for attention is used on `device`'s GPU, for what cuDNN does not compute.
pub fn flash_enabled(device: &CudaDevice) -> bool {
    choice(device).flash
}

/// Whether cuDNN's attention is used on `device`'s GPU.
pub fn attention_enabled(device: &CudaDevice) -> bool {
    choice(device).attention
}

/// Whether cuDNN's convolution is used on `device`'s GPU.
pub fn convolution_enabled(device: &CudaDevice) -> bool {
    choice(device).convolution
}

/// The version of cuDNN on this machine, 91400 for 9.14.0; why it is not used.
///
/// # Errors
/// It cannot be opened, or is older than attention needs.
pub fn cudnn_version() -> Result<usize, &'static str> {
    cudnn::version()
}

/// Whether kernels are used for what a layer reads, as [`take`] has it; codes come from kernels alone.
pub(crate) fn take_input(x: &Input) -> bool {
    match x {
        Input::Numbers(x) => take(&[x]),
        Input::Codes(_) => matches!(x.device(), Device::Cuda(device) if enabled(device)),
    }
}

/// Whether kernels are used for `tensors`: they are on one GPU where they may be, and of one dtype that there are
/// kernels for. Says once where nobody decided.
pub(crate) fn take(tensors: &[&Tensor]) -> bool {
    let Some((first, others)) = tensors.split_first() else {
        return false;
    };
    let Device::Cuda(device) = first.device() else {
        return false;
    };
    let chosen = choices().read().get(&context(device)).copied();
    let chosen = chosen.unwrap_or_else(|| {
        tracing::info!(
            "the GPU's own kernels were not tested here: the tensor library's operations are used"
        );
        disable(device);
        Choice::default()
    });
    let alike = |t: &&Tensor| t.dtype() == first.dtype() && t.device().same_device(first.device());
    chosen.kernels
        && matches!(first.dtype(), DType::BF16 | DType::F16 | DType::F32)
        && others.iter().all(alike)
}
