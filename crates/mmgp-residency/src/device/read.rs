//! How the tensors of a slot on the host are made of what files hold: as it lies, converted, spread
//! over strided rows, or quantized. Pieces bound the memory beside the slot.

use candle_core::CpuStorage;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use mmgp_io::{Dtype, TensorView};
use mmgp_quant::Real;
use rayon::prelude::*;

use crate::{Error, ImageTensor, Result, Segment, placeholder::empty};

/// Bytes that one reading task handles, and the size of its buffer where it converts.
const PIECE: usize = 4 << 20;

pub(super) fn read_tensor(tensor: &ImageTensor, target: &mut CpuStorage) -> Result<()> {
    for segment in &tensor.segments {
        if let Some(stride) = segment.stride {
            read_rows(tensor, segment, stride, target)?;
            continue;
        }
        let view = &segment.source;
        let range = segment.element..segment.element + view.elements() as usize;
        match (&mut *target, view.dtype()) {
            (CpuStorage::U8(v), Dtype::U8 | Dtype::I8) => read_as_is(view, &mut v[range])?,
            (CpuStorage::BF16(v), Dtype::BF16) => read_as_is(view, &mut v[range])?,
            (CpuStorage::F16(v), Dtype::F16) => read_as_is(view, &mut v[range])?,
            (CpuStorage::F32(v), Dtype::F32) => read_as_is(view, &mut v[range])?,
            (CpuStorage::F32(v), Dtype::BF16) => {
                widen(view, &mut v[range], |to, from: &[bf16]| from.convert_to_f32_slice(to))?;
            }
            (CpuStorage::F32(v), Dtype::F16) => {
                widen(view, &mut v[range], |to, from: &[f16]| from.convert_to_f32_slice(to))?;
            }
            (CpuStorage::F32(v), Dtype::F64) => widen(view, &mut v[range], |to, from: &[f64]| {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = *from as f32);
            })?,
            (_, stored) => {
                return Err(no_way(tensor, &format!("it is stored as {stored}")));
            }
        }
    }
    Ok(())
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

/// Reads a dense weight and leaves its int8 codes and scales. Rows are read and quantized piece by
/// piece; no more of the dense weight is in memory than a piece for each thread.
pub(super) fn quantize_tensor(
    tensor: &ImageTensor,
    codes: &mut CpuStorage,
    scales: &mut CpuStorage,
) -> Result<()> {
    let inputs = tensor.shape.get(1).copied().unwrap_or(0);
    let CpuStorage::U8(codes) = codes else {
        return Err(no_way(tensor, "codes do not travel as bytes"));
    };
    if inputs == 0 {
        return Ok(());
    }
    for Segment { source: view, element, .. } in &tensor.segments {
        let (from, count) = (*element, view.elements() as usize);
        let codes = &mut codes[from..from + count];
        let rows = from / inputs..(from + count) / inputs;
        match (view.dtype(), &mut *scales) {
            (Dtype::BF16, CpuStorage::BF16(s)) => {
                quantize_rows(view, inputs, codes, &mut s[rows], |s: bf16| s)?;
            }
            (Dtype::F16, CpuStorage::F16(s)) => {
                quantize_rows(view, inputs, codes, &mut s[rows], |s: f16| s)?;
            }
            (Dtype::F32, CpuStorage::F32(s)) => {
                quantize_rows(view, inputs, codes, &mut s[rows], |s: f32| s)?;
            }
            // Joined layers of different dtypes: their scales, rounded to their own, meet in f32.
            (Dtype::BF16, CpuStorage::F32(s)) => {
                quantize_rows(view, inputs, codes, &mut s[rows], bf16::to_f32)?;
            }
            (Dtype::F16, CpuStorage::F32(s)) => {
                quantize_rows(view, inputs, codes, &mut s[rows], f16::to_f32)?;
            }
            (stored, _) => return Err(no_way(tensor, &format!("it is stored as {stored}"))),
        }
    }
    Ok(())
}

fn quantize_rows<T: Real + bytemuck::Pod, S: Send>(
    view: &TensorView,
    inputs: usize,
    codes: &mut [u8],
    scales: &mut [S],
    keep: impl Fn(T) -> S + Sync,
) -> Result<()> {
    let rows = (PIECE / (inputs * size_of::<T>())).max(1);
    let pieces = codes.par_chunks_mut(rows * inputs).zip(scales.par_chunks_mut(rows));
    pieces.enumerate().try_for_each(|(piece, (codes, scales))| {
        let (first, mut weight) = (piece * rows, vec![T::zeroed(); codes.len()]);
        let offset = (first * inputs * size_of::<T>()) as u64;
        view.read_into(offset, bytemuck::cast_slice_mut(&mut weight))?;
        let mut own = vec![T::zeroed(); scales.len()];
        mmgp_quant::quantize_rows(&weight, inputs, codes, &mut own)
            .map_err(|fault| Error::not_finite(view, first + fault.row, fault.column))?;
        scales.iter_mut().zip(own).for_each(|(to, scale)| *to = keep(scale));
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

fn read_as_is<T: bytemuck::Pod + Send>(view: &TensorView, target: &mut [T]) -> Result<()> {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(target);
    bytes
        .par_chunks_mut(PIECE)
        .enumerate()
        .try_for_each(|(i, piece)| Ok(view.read_into((i * PIECE) as u64, piece)?))
}

fn widen<T: bytemuck::Pod + Send>(
    view: &TensorView,
    target: &mut [f32],
    convert: impl Fn(&mut [f32], &[T]) + Sync,
) -> Result<()> {
    let elements = PIECE / size_of::<T>();
    target.par_chunks_mut(elements).enumerate().try_for_each(|(i, to)| {
        let mut from = vec![T::zeroed(); to.len()];
        view.read_into((i * PIECE) as u64, bytemuck::cast_slice_mut(&mut from))?;
        convert(to, &from);
        Ok(())
    })
}
