//! The input of a quantized product: numbers, of which a kernel makes codes in memory taken for that, or codes that are there.

use candle_core::{
    CudaDevice, DType, Layout, Result, Storage, Tensor, bail,
    cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, SyncOnDrop},
};
use parking_lot::RwLockReadGuard;

use super::{
    NULL,
    product::{Half, address, aligned},
    w8a8::{LONGEST, MOST_INPUTS},
};
use crate::{Codes, Input};

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
