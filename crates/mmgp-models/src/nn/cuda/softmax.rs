//! Softmax of attention's scores.

use candle_core::{
    CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor, backend::BackendStorage,
    bail,
};

use super::{
    launch::{Element, Place, by_dtype, held_to},
    shape::{Grid, Softmax, contiguous, countable},
};

/// softmax(scores · scale + biases) over the last dimension of scores `[batch, heads, queries, keys]`, contiguous, in their
/// place, which must be the caller's own: `x.inplace_op1(…)`. Biases are of the same dtype, broadcast to that shape, at most two.
pub(crate) struct Softmaxed<'a> {
    pub(crate) scale: f64,
    pub(crate) biases: &'a [&'a Tensor],
}

impl InplaceOp1 for Softmaxed<'_> {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("softmax: a kernel of the GPU was given a tensor of the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        by_dtype!(storage, run(self, storage, layout))
    }
}

fn run<T: Element>(of: &Softmaxed<'_>, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
    let (items, heads, queries, width) = layout.shape().dims4()?;
    if of.biases.len() > 2 {
        bail!("softmax: {} biases", of.biases.len());
    }
    let mut biases = Vec::new();
    for bias in of.biases {
        let bias = bias.broadcast_as(layout.shape())?;
        let apart = bias.stride()[3] != 1 && width > 1;
        biases.push(if apart { contiguous(&bias)? } else { bias });
    }
    let inputs = [biases.first(), biases.get(1)];
    held_to::<T>(&inputs)?;
    let [heads, queries, width] = [heads, queries, width].map(|n| n as u64);
    let rows = items as u64 * heads * queries;
    countable(rows, width)?;
    if rows * width == 0 {
        return Ok(());
    }
    let stride = |bias: usize, axis: usize| biases.get(bias).map_or(0, |b| b.stride()[axis] as u64);
    let mut place = Place::<T>::of(storage, layout)?;
    let argue = |at: &[u64], x: u64| Softmax {
        x,
        a: at[0],
        b: at[1],
        rows,
        heads,
        queries,
        width,
        a_item: stride(0, 0),
        a_head: stride(0, 1),
        a_query: stride(0, 2),
        b_item: stride(1, 0),
        b_head: stride(1, 1),
        b_query: stride(1, 2),
        scale: of.scale,
    };
    let grid = Grid::of_rows(rows, width, T::VECTOR);
    // SAFETY: `layout` has `rows` rows of `width` values, which `place` was held to, each read and written by one thread; strides of
    // biases are those of their layouts in that shape, with the values of a row side by side.
    unsafe { place.run(&format!("softmax_{}", T::SUFFIX), grid, &inputs, argue) }
}
