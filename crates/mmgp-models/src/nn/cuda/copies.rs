//! Copies of values that lie apart: strided tensors, and lines of tables.

use candle_core::{DType, Result, Tensor, bail};

use super::{
    launch::{Element, Fresh, by_dtype, held_to},
    shape::{self, Gather, Grid, Look, axes, countable},
};

/// `x` with its values side by side; `None` for more than six axes.
pub(crate) fn contiguous(x: &Tensor) -> Result<Option<Tensor>> {
    by_dtype!(x, gathered(x))
}

fn gathered<T: Element>(x: &Tensor) -> Result<Option<Tensor>> {
    let Some([dims, strides]) = axes(x.layout()) else { return Ok(None) };
    let len = x.elem_count() as u64;
    let mut out = Fresh::<T>::new(x, len)?;
    if len > 0 {
        let argue = |at: &[u64], out: u64| Gather { x: at[0], out, len, dims, strides };
        let grid = Grid::of_columns(1, len, 4, 1);
        // SAFETY: dimensions and strides are those of `x`, and the output has as many values.
        unsafe { out.run(&format!("gather_{}", T::SUFFIX), grid, &[Some(x)], argue)? };
    }
    Ok(Some(out.tensor(x.shape())))
}

/// The lines of `table` `[lines, width]` for `ids` `[rows]`, u32: `[rows, width]`, NaN for ids that the table does not have.
pub(crate) fn look(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    by_dtype!(table, looked(table, ids))
}

fn looked<T: Element>(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ((lines, width), rows) = (table.dims2()?, ids.dims1()?);
    if ids.dtype() != DType::U32 {
        bail!("look: ids in {:?}", ids.dtype());
    }
    let (table, ids) = (shape::contiguous(table)?, ids.contiguous()?);
    held_to::<T>(&[Some(&table)])?;
    let [lines, width, rows] = [lines, width, rows].map(|n| n as u64);
    countable(rows.max(lines), width)?;
    let mut out = Fresh::<T>::new(&table, rows * width)?;
    if rows * width > 0 {
        let argue =
            |at: &[u64], out: u64| Look { table: at[0], ids: at[1], out, lines, rows, width };
        let grid = Grid::of_columns(rows, width, 1, T::VECTOR);
        // SAFETY: the table has `lines` rows of `width` values, of which no others are read; there are `rows` ids, and the output
        // has as many rows.
        unsafe {
            out.run(&format!("look_{}", T::SUFFIX), grid, &[Some(&table), Some(&ids)], argue)?
        };
    }
    Ok(out.tensor((rows as usize, width as usize)))
}
