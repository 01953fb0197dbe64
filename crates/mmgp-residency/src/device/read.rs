//! How the tensors of a slot on the host are made of what files hold: as it lies, converted, spread
//! over strided rows, or quantized. Pieces bound the memory beside the slot.

use std::ops::Range;

use candle_core::CpuStorage;
#[cfg(feature = "cuda")]
use candle_core::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use mmgp_io::{Dtype, TensorView};
use mmgp_quant::{Codes, Real, from_e4m3};
use rayon::prelude::*;

use crate::{Error, ImageTensor, Making, Result, Segment, placeholder::empty};

/// Bytes that one reading task handles, and the size of its buffer where it converts.
const PIECE: usize = 4 << 20;

/// Values of a slot's tensor, wherever they lie.
pub(super) enum Target<'a> {
    U8(&'a mut [u8]),
    F16(&'a mut [f16]),
    BF16(&'a mut [bf16]),
    F32(&'a mut [f32]),
}

impl<'a> Target<'a> {
    /// All values of a storage; `None` for dtypes that slots do not hold.
    pub(super) fn of(storage: &'a mut CpuStorage) -> Option<Self> {
        Some(match storage {
            CpuStorage::U8(v) => Self::U8(v),
            CpuStorage::F16(v) => Self::F16(v),
            CpuStorage::BF16(v) => Self::BF16(v),
            CpuStorage::F32(v) => Self::F32(v),
            _ => return None,
        })
    }

    /// Bytes as values of `dtype`; `None` for dtypes that slots do not hold, or bytes that are not
    /// aligned for it.
    #[cfg(feature = "cuda")]
    pub(super) fn over(bytes: &'a mut [u8], dtype: candle_core::DType) -> Option<Self> {
        use bytemuck::try_cast_slice_mut as cast;
        use candle_core::DType;
        Some(match dtype {
            DType::U8 => Self::U8(bytes),
            DType::F16 => Self::F16(cast(bytes).ok()?),
            DType::BF16 => Self::BF16(cast(bytes).ok()?),
            DType::F32 => Self::F32(cast(bytes).ok()?),
            _ => return None,
        })
    }

    fn narrow(&mut self, range: Range<usize>) -> Target<'_> {
        match self {
            Self::U8(v) => Target::U8(&mut v[range]),
            Self::F16(v) => Target::F16(&mut v[range]),
            Self::BF16(v) => Target::BF16(&mut v[range]),
            Self::F32(v) => Target::F32(&mut v[range]),
        }
    }
}

/// Whether a tensor's bytes in a slot are those of its segments, one behind another.
#[cfg(feature = "cuda")]
pub(super) fn is_as_stored(tensor: &ImageTensor) -> bool {
    let as_it_is = |stored| {
        matches!(
            (tensor.dtype, stored),
            (DType::U8, Dtype::U8 | Dtype::I8 | Dtype::F8E4M3)
                | (DType::BF16, Dtype::BF16)
                | (DType::F16, Dtype::F16)
                | (DType::F32, Dtype::F32)
        )
    };
    tensor.making == Making::Values
        && tensor.segments.iter().all(|s| s.stride.is_none() && as_it_is(s.source.dtype()))
}

/// Reads a whole tensor.
pub(super) fn read_tensor(tensor: &ImageTensor, target: &mut CpuStorage) -> Result<()> {
    for segment in tensor.segments.iter() {
        if let Some(stride) = segment.stride {
            read_rows(tensor, segment, stride, target)?;
        }
    }
    match Target::of(target) {
        Some(target) => read_elements(tensor, 0..tensor.elements(), target),
        None => Err(no_way(tensor, "slots do not hold it")),
    }
}

/// Reads the elements `range` of a tensor into `target`, which has so many. Segments with strided rows
/// are left out.
pub(super) fn read_elements(
    tensor: &ImageTensor,
    range: Range<usize>,
    mut target: Target<'_>,
) -> Result<()> {
    for segment in tensor.segments.iter().filter(|s| s.stride.is_none()) {
        let view = &segment.source;
        let end = segment.element + view.elements() as usize;
        let (from, to) = (range.start.max(segment.element), range.end.min(end));
        if from >= to {
            continue;
        }
        let first = from - segment.element;
        let part = target.narrow(from - range.start..to - range.start);
        match (part, view.dtype()) {
            (Target::U8(v), Dtype::U8 | Dtype::I8 | Dtype::F8E4M3) => read_as_is(view, first, v)?,
            (Target::BF16(v), Dtype::BF16) => read_as_is(view, first, v)?,
            (Target::F16(v), Dtype::F16) => read_as_is(view, first, v)?,
            (Target::F32(v), Dtype::F32) => read_as_is(view, first, v)?,
            (Target::F32(v), Dtype::BF16) => {
                convert(view, first, v, |to, from: &[bf16]| from.convert_to_f32_slice(to))?;
            }
            (Target::F32(v), Dtype::F16) => {
                convert(view, first, v, |to, from: &[f16]| from.convert_to_f32_slice(to))?;
            }
            (Target::F32(v), Dtype::F64) => {
                convert(view, first, v, each(|v: f64| v as f32))?;
            }
            (Target::BF16(v), Dtype::F32) => {
                convert(view, first, v, |to, from: &[f32]| to.convert_from_f32_slice(from))?;
            }
            (Target::BF16(v), Dtype::F16) => {
                convert(view, first, v, each(|v: f16| bf16::from_f32(v.to_f32())))?;
            }
            (Target::BF16(v), Dtype::F64) => convert(view, first, v, each(bf16::from_f64))?,
            (Target::F32(v), Dtype::F8E4M3) => convert(view, first, v, each(from_e4m3))?,
            (Target::BF16(v), Dtype::F8E4M3) => {
                convert(view, first, v, each(|v| bf16::from_f32(from_e4m3(v))))?; // exact
            }
            (Target::F16(v), Dtype::F8E4M3) => {
                convert(view, first, v, each(|v| f16::from_f32(from_e4m3(v))))?; // exact
            }
            (_, stored) => {
                return Err(no_way(tensor, &format!("it is stored as {stored}")));
            }
        }
    }
    Ok(())
}

/// A conversion of slices out of one of values.
fn each<T: Copy, U>(convert: impl Fn(T) -> U + Sync) -> impl Fn(&mut [U], &[T]) + Sync {
    move |to, from| to.iter_mut().zip(from).for_each(|(to, &from)| *to = convert(from))
}

/// Reads a matrix whose rows do not stand one behind another in the slot's tensor. Such matrices are
/// small: it is read whole and its rows are copied from there.
fn read_rows(
    tensor: &ImageTensor,
    segment: &Segment,
    stride: usize,
    target: &mut CpuStorage,
) -> Result<()> {
    fn spread<T: Copy>(rows: &[T], columns: usize, target: &mut [T], stride: usize) {
        for (from, to) in rows.chunks_exact(columns.max(1)).zip(target.chunks_mut(stride.max(1))) {
            to[..columns].copy_from_slice(from);
        }
    }
    let whole = Segment { element: 0, stride: None, ..segment.clone() };
    let mut rows = empty(tensor.dtype, whole.source.elements() as usize)?;
    let part = ImageTensor { segments: vec![whole], ..tensor.clone() };
    read_tensor(&part, &mut rows)?;
    let (from, columns) = (segment.element, segment.source.shape().last().copied().unwrap_or(1));
    match (&rows, target) {
        (CpuStorage::U8(r), CpuStorage::U8(t)) => spread(r, columns, &mut t[from..], stride),
        (CpuStorage::F16(r), CpuStorage::F16(t)) => spread(r, columns, &mut t[from..], stride),
        (CpuStorage::BF16(r), CpuStorage::BF16(t)) => spread(r, columns, &mut t[from..], stride),
        (CpuStorage::F32(r), CpuStorage::F32(t)) => spread(r, columns, &mut t[from..], stride),
        _ => {
            debug_assert!(false, "storages of one tensor have one dtype");
            return Err(Error::NotPageable {
                model: "host device".into(),
                reason: format!("the rows of `{}` came in another dtype", tensor.name),
            });
        }
    }
    Ok(())
}

/// Reads a dense weight and leaves its codes and scales. Rows are read and quantized piece by
/// piece; no more of the dense weight is in memory than a piece for each thread.
pub(super) fn quantize_tensor(
    tensor: &ImageTensor,
    codes: &mut CpuStorage,
    scales: &mut CpuStorage,
) -> Result<()> {
    let Making::Codes(to) = tensor.making else {
        return Err(no_way(tensor, "it is not to be quantized"));
    };
    let inputs = tensor.shape.get(1).copied().unwrap_or(0);
    let (CpuStorage::U8(codes), CpuStorage::F32(scales)) = (codes, scales) else {
        return Err(no_way(tensor, "codes do not travel as bytes, with scales in f32"));
    };
    if inputs == 0 {
        return Ok(());
    }
    for Segment { source: view, element, .. } in &tensor.segments {
        let (from, count) = (*element, view.elements() as usize);
        let codes = &mut codes[from..from + count];
        let scales = &mut scales[from / inputs..(from + count) / inputs];
        match view.dtype() {
            Dtype::BF16 => quantize_rows(to, view, inputs, codes, scales, bf16::to_f32)?,
            Dtype::F16 => quantize_rows(to, view, inputs, codes, scales, f16::to_f32)?,
            Dtype::F32 => quantize_rows(to, view, inputs, codes, scales, |scale: f32| scale)?,
            stored => return Err(no_way(tensor, &format!("it is stored as {stored}"))),
        }
    }
    Ok(())
}

/// The scales are rounded to the dtype of the weight, and kept wide.
fn quantize_rows<T: Real + bytemuck::Pod>(
    to: Codes,
    view: &TensorView,
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [f32],
    wide: impl Fn(T) -> f32 + Sync,
) -> Result<()> {
    let rows = (PIECE / (inputs * size_of::<T>())).max(1);
    let pieces = codes.par_chunks_mut(rows * inputs).zip(scales.par_chunks_mut(rows));
    pieces.enumerate().try_for_each(|(piece, (codes, scales))| {
        let (first, mut weight) = (piece * rows, vec![T::zeroed(); codes.len()]);
        let offset = (first * inputs * size_of::<T>()) as u64;
        view.read_into(offset, bytemuck::cast_slice_mut(&mut weight))?;
        let mut own = vec![T::zeroed(); scales.len()];
        to.quantize_rows(&weight, inputs, codes, &mut own)
            .map_err(|fault| Error::not_finite(view, first + fault.row, fault.column))?;
        scales.iter_mut().zip(own).for_each(|(kept, scale)| *kept = wide(scale));
        Ok(())
    })
}

pub(super) fn no_way(tensor: &ImageTensor, why: &str) -> Error {
    let file = tensor.segments.first().map(|s| s.source.file().path().display().to_string());
    Error::NotPageable {
        model: file.unwrap_or_else(|| "host device".into()),
        reason: format!("tensor `{}` cannot become {:?}: {why}", tensor.name, tensor.dtype),
    }
}

fn read_as_is<T: bytemuck::Pod + Send>(
    view: &TensorView,
    first: usize,
    target: &mut [T],
) -> Result<()> {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(target);
    let first = first * size_of::<T>();
    bytes
        .par_chunks_mut(PIECE)
        .enumerate()
        .try_for_each(|(i, piece)| Ok(view.read_into((first + i * PIECE) as u64, piece)?))
}

fn convert<T: bytemuck::Pod + Send, U: Send>(
    view: &TensorView,
    first: usize,
    target: &mut [U],
    convert: impl Fn(&mut [U], &[T]) + Sync,
) -> Result<()> {
    let elements = PIECE / size_of::<T>();
    target.par_chunks_mut(elements).enumerate().try_for_each(|(i, to)| {
        let mut from = vec![T::zeroed(); to.len()];
        let offset = (first + i * elements) * size_of::<T>();
        view.read_into(offset as u64, bytemuck::cast_slice_mut(&mut from))?;
        convert(to, &from);
        Ok(())
    })
}
