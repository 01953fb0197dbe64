//! The input of a quantized product: numbers, of which a kernel makes codes in memory taken for that, or codes that are there.

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail,
    cuda_backend::{
        CudaDType,
        cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, DeviceRepr, SyncOnDrop},
    },
    op::BackpropOp,
};
use half::{bf16, f16};
use parking_lot::RwLockReadGuard;

use super::{
    NULL,
    product::{Half, address, aligned},
    w8a8::{LONGEST, MOST_INPUTS, Shape, quantize},
};
use crate::{CodedRows, Codes, Epilogue, Input};

/// Whether quantized products take rows like `x` as codes, for a weight of these dimensions.
pub(crate) fn reads_codes(x: &Input, weight: &[usize]) -> bool {
    let &[outputs, inputs] = weight else { return false };
    let rows = x.dims().iter().product::<usize>() / inputs.max(1);
    x.device().is_cuda()
        && matches!(x.dtype(), DType::BF16 | DType::F16)
        && [rows, outputs].iter().all(|n| (1..=LONGEST).contains(n))
        && (1..=MOST_INPUTS).contains(&inputs)
        && inputs.is_multiple_of(16)
}

/// The codes that the rows of `x` `[…, inputs]` become before a product that reads such.
///
/// # Errors
/// Other dtypes than bf16 and f16; `inputs` that are no multiple of 8, or no groups for a rotation; whatever the driver refuses.
pub(crate) fn coded(of: Codes, x: &Tensor) -> Result<CodedRows> {
    match x.dtype() {
        DType::BF16 => coded_from::<bf16>(of, x),
        DType::F16 => coded_from::<f16>(of, x),
        other => bail!("{of} linear: input {other:?}"),
    }
}

fn coded_from<T: Half>(of: Codes, x: &Tensor) -> Result<CodedRows> {
    let (dtype, dims) = (x.dtype(), x.dims().to_vec());
    let inputs = dims.last().copied().unwrap_or(0);
    let rows = x.elem_count() / inputs.max(1);
    if !inputs.is_multiple_of(8) || of.with_inputs(inputs) != of || rows > LONGEST {
        bail!("{of} linear: input {dims:?}");
    }
    let Device::Cuda(device) = x.device() else {
        bail!("{of} linear: a product of the GPU was given a tensor of another device");
    };
    let stream = device.cuda_stream();
    let x = aligned::<T>(&x.contiguous()?, device)?;
    // SAFETY: plain numbers, and the kernel writes each before anything reads it.
    let (mut codes, mut scales) =
        unsafe { (device.alloc::<u8>(rows * inputs)?, device.alloc::<f32>(rows)?) };
    if rows > 0 {
        let x = x.storage_and_layout();
        let (x, _x) = address::<T>(&x.0, x.1, &stream)?;
        let (codes, _codes) = codes.device_ptr_mut(&stream);
        let (scales, _scales) = scales.device_ptr_mut(&stream);
        let epilogue = Epilogue::None;
        let shape = Shape { rows, outputs: 0, inputs, dtype, epilogue, y_row: 0 };
        // SAFETY: `address` held the rows to their memory, and the buffers have the lengths that `shape` says. All are
        // ordered by `stream`.
        unsafe { quantize(device, of, shape, x, (codes, scales))? };
    }
    let codes = tensor(codes, device, (rows, inputs));
    Ok(CodedRows { of, codes, scales: tensor(scales, device, (rows, 1)), dtype, dims })
}

fn tensor<T: CudaDType + DeviceRepr>(
    values: CudaSlice<T>,
    device: &CudaDevice,
    shape: (usize, usize),
) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// The rows and the width of an input that is numbers `[rows, inputs]`, or codes of the kind that is wanted.
pub(super) fn shape(x: &Input, wanted: Codes) -> Result<(usize, usize)> {
    match x {
        Input::Numbers(x) => x.dims2(),
        Input::Codes(rows) => {
            let (count, width) = rows.codes.dims2()?;
            let fits = rows.of == wanted && rows.scales.elem_count() == count;
            if !fits || rows.dims.iter().product::<usize>() != count * width {
                bail!(
                    "{wanted} linear: {} rows {:?} of {:?}",
                    rows.of,
                    rows.codes.dims(),
                    rows.dims
                );
            }
            Ok((count, width))
        }
    }
}

/// An input that begins where kernels can read it.
pub(super) enum Operand {
    Numbers(Tensor),
    Codes([Tensor; 2]),
}

/// Memory for what the quantization writes: codes, and a scale for each row. None for codes, which are there.
pub(super) type Room = Option<(CudaSlice<u8>, CudaSlice<f32>)>;

impl Operand {
    /// Of an input in `T`.
    pub(super) fn of<T: Half>(x: &Input, device: &CudaDevice) -> Result<Self> {
        Ok(match x {
            Input::Numbers(x) => Self::Numbers(aligned::<T>(x, device)?),
            Input::Codes(rows) => {
                let codes = aligned::<u8>(&rows.codes, device)?;
                Self::Codes([codes, aligned::<f32>(&rows.scales, device)?])
            }
        })
    }

    /// Room for its codes.
    pub(super) fn room(&self, device: &CudaDevice, rows: usize, inputs: usize) -> Result<Room> {
        if matches!(self, Self::Codes(_)) {
            return Ok(None);
        }
        // SAFETY: plain numbers, and the quantization writes each before another kernel reads it.
        let room = unsafe { (device.alloc::<u8>(rows * inputs)?, device.alloc::<f32>(rows)?) };
        Ok(Some(room))
    }

    pub(super) fn locked(&self) -> Locked<'_> {
        match self {
            Self::Numbers(x) => Locked::Numbers(x.storage_and_layout()),
            Self::Codes([codes, scales]) => {
                Locked::Codes([codes.storage_and_layout(), scales.storage_and_layout()])
            }
        }
    }
}

type Lock<'a> = (RwLockReadGuard<'a, Storage>, &'a Layout);

/// An operand whose memory stays where it is.
pub(super) enum Locked<'a> {
    Numbers(Lock<'a>),
    Codes([Lock<'a>; 2]),
}

/// Where an operand's parts lie.
pub(super) struct Parts<'a> {
    /// Null for an operand that is codes.
    pub(super) numbers: u64,
    pub(super) codes: u64,
    pub(super) scales: u64,
    _held: Vec<SyncOnDrop<'a>>,
}

impl Locked<'_> {
    /// Held to the memory that it has; the room is that of the same operand.
    pub(super) fn at<'a, T: Half>(
        &'a self,
        room: &'a mut Room,
        stream: &'a CudaStream,
    ) -> Result<Parts<'a>> {
        match (self, room) {
            (Self::Numbers(x), Some((codes, scales))) => {
                let (numbers, read) = address::<T>(&x.0, x.1, stream)?;
                let (codes, written) = codes.device_ptr_mut(stream);
                let (scales, too) = scales.device_ptr_mut(stream);
                Ok(Parts { numbers, codes, scales, _held: vec![read, written, too] })
            }
            (Self::Codes([codes, scales]), None) => {
                let (codes, held) = address::<u8>(&codes.0, codes.1, stream)?;
                let (scales, too) = address::<f32>(&scales.0, scales.1, stream)?;
                Ok(Parts { numbers: NULL, codes, scales, _held: vec![held, too] })
            }
            _ => bail!("linear: an operand and the room of another"),
        }
    }
}
