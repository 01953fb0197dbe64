//! Heads: taken from the rows of a projection, or projected where attention reads them, and merged again.

use std::cell::Cell;

use candle_core::{
    CpuStorage, CudaStorage, D, DType, Device, InplaceOp1, Layout, Result, Tensor,
    backend::BackendStorage, bail,
};
use mmgp_quant::{Epilogue, Linear};

use super::{
    Norm, attention_enabled, cudnn, enabled,
    launch::{Element, Fresh, Place, by_dtype, held_to},
    shape::{Grid, Lines, Rows, Turn, contiguous, countable},
};
use crate::nn::{HeadRows, Heads, Projected, RmsNorm, Rope, rope::Pairs};

/// The heads of `parts`, their tokens one part behind another: `[batch, heads, tokens of all, dim]`. Shapes were
/// checked by the caller, but are held to what lies in memory.
pub(crate) fn heads(heads: Heads, parts: &[HeadRows<'_>]) -> Result<Tensor> {
    match parts.first() {
        Some(part) => by_dtype!(part.rows, split(heads, parts)),
        None => bail!("heads: of no rows"),
    }
}

fn split<T: Element>(heads: Heads, parts: &[HeadRows<'_>]) -> Result<Tensor> {
    let batch = parts[0].rows.dim(0)?;
    let total: usize = parts.iter().map(|part| part.rows.dim(1)).sum::<Result<usize>>()?;
    let [count, dim, all] = [heads.count, heads.dim, total].map(|n| n as u64);
    let mut out = Fresh::<T>::new(parts[0].rows, batch as u64 * count * all * dim)?;
    let mut before = 0;
    for part in parts {
        // The columns that are heads of ours, at most what the rows have.
        let own = part.rows.narrow(D::Minus1, part.first, heads.width())?;
        let lines = Lines::of(&own)?;
        let (tokens, rows) = (lines.tokens, lines.rows() * count);
        countable(rows, dim)?;
        if lines.items != batch as u64 {
            bail!("heads: batches of {} and {batch}", lines.items);
        }
        let norm = match part.norm {
            Some(norm) => {
                Norm { kind: "rms", weight: Some(norm.weight()), bias: None, eps: norm.eps() }
            }
            None => Norm::NONE,
        };
        let norm = norm.checked(dim)?;
        let tables = part.rope.map(|rope| rope.tables());
        if let Some((cos, sin)) = tables {
            let wanted = [tokens as usize, heads.dim / 2];
            let fit =
                |t: &Tensor| t.dims() == wanted && t.is_contiguous() && t.dtype() == DType::F32;
            if !heads.dim.is_multiple_of(2) || !fit(cos) || !fit(sin) {
                bail!("heads: {heads:?} of {tokens} tokens turned by {:?}", cos.dims());
            }
        }
        let (cos, sin) = tables.unzip();
        if rows * dim > 0 {
            let inputs = [Some(&lines.tensor), norm.weight, cos, sin];
            held_to::<T>(&inputs[..2])?;
            let argue = |at: &[u64], out: u64| Rows {
                x: at[0],
                weight: at[1],
                cos: at[2],
                sin: at[3],
                out: out + before * dim * size_of::<T>() as u64,
                rows,
                tokens,
                heads: count,
                width: dim,
                x_item: lines.item,
                x_token: lines.token,
                x_head: dim,
                out_item: count * all * dim,
                out_token: dim,
                out_head: all * dim,
                eps: norm.eps,
                ..Rows::default()
            };
            let name = format!("rows_{}_{}", norm.kind, T::SUFFIX);
            // SAFETY: each row of `lines` has `count` heads of `dim` values, `weight` has `dim`, the tables half
            // as many for each token; the output has `all` tokens for each head, of which this part's are those
            // from `before` on, and `before + tokens <= all`.
            unsafe { out.run(&name, Grid::of_rows(rows, dim, T::VECTOR), &inputs, argue)? };
        }
        before += tokens;
    }
    Ok(out.tensor((batch, heads.count, total, heads.dim)))
}

/// The heads of queries, keys and values of `streams`, whose products lie in one tensor of rows, the tokens of one stream behind
/// those of another: views of it, in which queries and keys were normalised and turned. Shapes were checked by the caller.
/// `None` where products do not write there, or the kernel has no such heads.
pub(crate) fn project(heads: Heads, streams: &[Projected<'_>]) -> Result<Option<[Tensor; 3]>> {
    match streams.first() {
        Some(stream) => by_dtype!(stream.x, projected(heads, streams)),
        None => Ok(None),
    }
}

fn projected<T: Element>(heads: Heads, streams: &[Projected<'_>]) -> Result<Option<[Tensor; 3]>> {
    let Some([batch, total]) = projects::<T>(heads, streams)? else { return Ok(None) };
    let columns = 3 * heads.width();
    let rows = Fresh::<T>::on(streams[0].x.device(), (batch * total * columns) as u64)?;
    // Products write all of it before it is read; without them it is dropped.
    let rows = rows.tensor((batch, total, columns));
    if !project_into(heads, streams, &rows, 0)? {
        return Ok(None);
    }
    let all = rows.reshape((batch, total, 3 * heads.count, heads.dim))?;
    let part = |i: usize| all.narrow(2, i * heads.count, heads.count)?.transpose(1, 2);
    Ok(Some([part(0)?, part(1)?, part(2)?]))
}

/// The batch and the tokens of all streams, where products can write their heads side by side and the kernel turns such heads.
fn projects<T: Element>(heads: Heads, streams: &[Projected<'_>]) -> Result<Option<[usize; 2]>> {
    let (mut batches, mut total) = (Vec::with_capacity(streams.len()), 0);
    for stream in streams {
        let &[items, tokens, _] = stream.x.dims() else {
            bail!("heads: a stream of {:?}", stream.x.dims());
        };
        batches.push(items);
        total += tokens;
    }
    let batch = batches.first().copied().unwrap_or(0);
    // What the kernel reads beside them.
    let turns = |stream: &Projected<'_>| {
        let [q, k] = stream.norms;
        let alike = |norm: &RmsNorm| norm.weight().dtype() == stream.x.dtype();
        stream.rope.pairs() == Pairs::Neighbours && alike(q) && alike(k) && q.eps() == k.eps()
    };
    let vectors = heads.dim / T::VECTOR as usize;
    let fits = heads.dim.is_multiple_of(T::VECTOR as usize)
        && (1..=32).contains(&vectors)
        && batch * total > 0
        && streams.iter().all(turns)
        && batches.iter().all(|&items| items == batch)
        // Else the tokens of an item would not lie side by side.
        && (batch == 1 || streams.len() == 1)
        && !streams.iter().any(|stream| stream.linear.side().is_taken());
    Ok(fits.then_some([batch, total]))
}

/// Queries, keys and values of `streams`, for which [`projects`] answered, into the columns of `rows` from `first` on, the tokens
/// of one stream behind those of another; `rows` is `[batch, tokens of all, columns]`, contiguous. `false` where products do
/// not write there: what is in those columns then is unknown.
fn project_into(
    heads: Heads,
    streams: &[Projected<'_>],
    rows: &Tensor,
    first: usize,
) -> Result<bool> {
    let (batch, total, columns) = rows.dims3()?;
    let flat = rows.reshape((batch * total, columns))?.narrow(1, first, 3 * heads.width())?;
    let mut before = 0;
    for stream in streams {
        let count = batch * stream.x.dims()[1];
        let y = flat.narrow(0, before, count)?;
        before += count;
        if count > 0 && !stream.linear.forward_into(stream.x, Epilogue::None, &y)? {
            return Ok(false);
        }
    }
    before = 0;
    for stream in streams {
        let tokens = stream.x.dims()[1];
        if tokens > 0 {
            let turn = Turned { heads, first, norms: stream.norms, rope: stream.rope };
            rows.narrow(1, before, tokens)?.inplace_op1(&turn)?;
        }
        before += tokens;
    }
    Ok(true)
}

/// Attention of a stream's tokens to the first `keys` of them, the heads merged, and behind it along the last dimension gelu_tanh
/// of what `up` makes of the stream; `None` where products do not write there, or cuDNN does not compute that.
///
/// One memory has it all: queries, keys and values lie where the outputs of `up` come when they were read.
pub(crate) fn attention_beside_gelu(
    heads: Heads,
    stream: &Projected<'_>,
    keys: usize,
    scale: f64,
    up: &Linear,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = stream.x.device() else { return Ok(None) };
    let half = matches!(stream.x.dtype(), DType::BF16 | DType::F16);
    if !half || !enabled(device) || !attention_enabled(device) || up.side().is_taken() {
        return Ok(None);
    }
    by_dtype!(stream.x, beside_gelu(heads, stream, keys, scale, up))
}

fn beside_gelu<T: Element>(
    heads: Heads,
    stream: &Projected<'_>,
    keys: usize,
    scale: f64,
    up: &Linear,
) -> Result<Option<Tensor>> {
    let (n, m) = (heads.width(), up.outputs());
    let Some([batch, tokens]) = projects::<T>(heads, &[*stream])? else { return Ok(None) };
    let Device::Cuda(device) = stream.x.device() else { return Ok(None) };
    let within = AttentionWithin::new(heads, keys, scale);
    if m < 3 * n || !cudnn::attends_within::<T>(device, within.places(batch, tokens, n + m))? {
        return Ok(None);
    }
    let rows = Fresh::<T>::on(stream.x.device(), (batch * tokens * (n + m)) as u64)?;
    // Attention and the product write all of it before it is read as a whole; without them it is dropped.
    let rows = rows.tensor((batch, tokens, n + m));
    if !project_into(heads, &[*stream], &rows, n)? {
        return Ok(None);
    }
    rows.inplace_op1(&within)?;
    let behind = rows.reshape((batch * tokens, n + m))?.narrow(1, n, m)?;
    if !within.is_done() || !up.forward_into(stream.x, Epilogue::GeluTanh, &behind)? {
        return Ok(None);
    }
    Ok(Some(rows))
}

/// Attention within rows `[batch, tokens, columns]`, contiguous: of queries, keys and values that lie one behind another from
/// column `heads.width()` on, into the columns before.
pub(super) struct AttentionWithin {
    heads: Heads,
    /// The first of them are seen.
    keys: usize,
    scale: f64,
    done: Cell<bool>,
}

impl AttentionWithin {
    pub(super) fn new(heads: Heads, keys: usize, scale: f64) -> Self {
        Self { heads, keys, scale, done: Cell::new(false) }
    }

    /// Whether it was computed, which the library may not do for such rows.
    pub(super) fn is_done(&self) -> bool {
        self.done.get()
    }

    /// Where operands lie in rows of so many columns.
    fn places(&self, batch: usize, tokens: usize, columns: usize) -> cudnn::Rows {
        let Heads { count, dim } = self.heads;
        cudnn::Rows { batch, tokens, columns, heads: count, dim, keys: self.keys }
    }
}

impl InplaceOp1 for AttentionWithin {
    fn name(&self) -> &'static str {
        "attention within rows"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("attention within rows: the GPU's was given a tensor of the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let done = by_dtype!(storage, attended_within(self, storage, layout))?;
        self.done.set(done);
        Ok(())
    }
}

fn attended_within<T: Element>(
    within: &AttentionWithin,
    storage: &mut CudaStorage,
    layout: &Layout,
) -> Result<bool> {
    let (batch, tokens, columns) = layout.shape().dims3()?;
    let mut rows = Place::<T>::of(storage, layout)?;
    cudnn::attention_within(&mut rows, within.places(batch, tokens, columns), within.scale)
}

/// Normalises and turns queries and keys in rows `[batch, tokens, columns]`, contiguous, side by side from column `first` on.
pub(super) struct Turned<'a> {
    pub(super) heads: Heads,
    pub(super) first: usize,
    pub(super) norms: [&'a RmsNorm; 2],
    pub(super) rope: &'a Rope,
}

impl InplaceOp1 for Turned<'_> {
    fn name(&self) -> &'static str {
        "turn"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("turn: a kernel of the GPU was given a tensor of the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        by_dtype!(storage, turned(self, storage, layout))
    }
}

fn turned<T: Element>(turn: &Turned<'_>, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
    let &Turned { heads: Heads { count, dim }, first, norms: [q_norm, k_norm], rope } = turn;
    let (batch, tokens, columns) = layout.shape().dims3()?;
    let (cos, sin) = rope.tables();
    let fit =
        |t: &Tensor| t.dims() == [tokens, dim / 2] && t.is_contiguous() && t.dtype() == DType::F32;
    let weight = |norm: &RmsNorm| norm.weight().dims() == [dim] && norm.weight().is_contiguous();
    let whole = [dim, first, columns].iter().all(|n| n.is_multiple_of(T::VECTOR as usize));
    if !fit(cos) || !fit(sin) || !weight(q_norm) || !weight(k_norm) || !whole {
        bail!("turn: {:?} of {tokens} tokens by {:?}", turn.heads, cos.dims());
    }
    if first + 2 * count * dim > columns || q_norm.eps() != k_norm.eps() {
        bail!("turn: {:?} twice from column {first} of {columns}", turn.heads);
    }
    let [items, heads, width] = [batch, count, dim].map(|n| n as u64);
    let (tokens, columns) = (tokens as u64, columns as u64);
    let rows = items * tokens * heads;
    countable(rows, width)?;
    let inputs = [Some(q_norm.weight()), Some(k_norm.weight()), Some(cos), Some(sin)];
    held_to::<T>(&inputs[..2])?;
    let mut place = Place::<T>::of(storage, layout)?;
    let argue = |at: &[u64], out: u64| Turn {
        q: out + first as u64 * size_of::<T>() as u64,
        q_weight: at[0],
        k_weight: at[1],
        cos: at[2],
        sin: at[3],
        rows,
        tokens,
        heads,
        width,
        item: tokens * columns,
        token: columns,
        key: heads * width,
        eps: q_norm.eps(),
    };
    let grid = Grid::of_rows(rows, width, T::VECTOR);
    // SAFETY: of each row `2 · heads · width` values from `first` on are read and written, which `layout` shows and `place` was held
    // to, each by the thread that read it; weights have `width` values and tables half as many for each token.
    unsafe { place.run(&format!("turn_{}", T::SUFFIX), grid, &inputs, argue) }
}

/// `[batch, heads, tokens, dim]` to `[batch, tokens, heads · dim]`.
pub(crate) fn merge(x: &Tensor) -> Result<Tensor> {
    by_dtype!(x, merged(x))
}

fn merged<T: Element>(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, tokens, dim) = x.dims4()?;
    let x = if x.stride()[3] == 1 || dim <= 1 { x.clone() } else { contiguous(x)? };
    let stride = |at: usize| if x.dims()[at] > 1 { x.stride()[at] as u64 } else { 0 };
    let (item, head, token) = (stride(0), stride(1), stride(2));
    let [items, count, of_item, width] = [batch, heads, tokens, dim].map(|n| n as u64);
    let rows = items * count * of_item;
    countable(rows, width)?;
    let mut out = Fresh::<T>::new(&x, rows * width)?;
    if rows * width > 0 {
        let argue = |at: &[u64], out: u64| Rows {
            x: at[0],
            out,
            rows,
            tokens: of_item,
            heads: count,
            width,
            x_item: item,
            x_token: token,
            x_head: head,
            out_item: of_item * count * width,
            out_token: count * width,
            out_head: width,
            ..Rows::default()
        };
        let grid = Grid::of_rows(rows, width, T::VECTOR);
        // SAFETY: strides and counts are those of `x`, whose heads have `width` values side by side; the output
        // has as many.
        unsafe { out.run(&format!("rows_none_{}", T::SUFFIX), grid, &[Some(&x)], argue)? };
    }
    Ok(out.tensor((batch, tokens, heads * dim)))
}
