//! [Scaled dot-product attention](https://docs.nvidia.com/deeplearning/cudnn/backend/latest/operations/Attention.html),
//! one operation of the library's.
//!
//! It reads queries, keys and values wherever they lie, also within the rows of a joined projection, and holds no
//! scores in memory.

use candle_core::{
    CudaDevice, DType, Device, Result, Tensor, bail, cuda_backend::cudarc::driver::CudaStream,
};
use half::{bf16, f16};

use super::{
    super::{
        launch::{Element, Fresh, Place, held_to},
        shape::vectors,
    },
    Answer, Descriptor, Key, Library, Lies, Raw, attribute, kind, of, offers, queue,
};

/// The widest heads that it computes.
const WIDEST: usize = 256;

/// Queries, keys, values and the result, `[batch, heads, tokens, dim]` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Attention {
    dtype: DType,
    operands: [Lies; 4],
}

impl Attention {
    pub(super) fn described(
        &self,
        library: &'static Library,
    ) -> Answer<(Descriptor, Vec<Descriptor>)> {
        use attribute as a;
        let [q, k, v, o] = self.operands;
        let tensor = |lies: Lies, id| lies.described(library, id, self.dtype);
        let (q, k, v, o) = (tensor(q, 1)?, tensor(k, 2)?, tensor(v, 3)?, tensor(o, 4)?);
        // A number on the host.
        let scale = Lies { dims: [1; 4], strides: [1; 4] }.tensor(library, 5, DType::F32)?;
        scale.set(a::TENSOR_BY_VALUE, kind::BOOLEAN, &[1u8])?;
        let scale = scale.finalized("tensor")?;
        let operation = Descriptor::new(library, of::ATTENTION)?;
        for (name, tensor) in [
            (a::ATTENTION_Q, &q),
            (a::ATTENTION_K, &k),
            (a::ATTENTION_V, &v),
            (a::ATTENTION_O, &o),
            (a::ATTENTION_SCALE, &scale),
        ] {
            operation.refer(name, &[tensor])?;
        }
        Ok((operation.finalized("attention")?, vec![q, k, v, o, scale]))
    }
}

/// softmax(q · kᵀ · scale) · v with the heads merged, as [`attention`](crate::nn::attention) has it without
/// biases; `None` for what the library does not compute.
pub(in super::super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
) -> Result<Option<Tensor>> {
    match q.dtype() {
        DType::BF16 => attend::<bf16>(q, k, v, scale),
        DType::F16 => attend::<f16>(q, k, v, scale),
        _ => Ok(None),
    }
}

fn attend<T: Element>(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let (batch, heads, queries, dim) = q.dims4()?;
    let (_, groups, keys, _) = k.dims4()?;
    let fits = k.dims() == v.dims() && k.dim(0)? == batch && k.dim(3)? == dim;
    let whole = dim.is_multiple_of(T::VECTOR as usize) && dim <= WIDEST;
    if !fits || groups != heads || !whole || q.elem_count() == 0 || keys == 0 {
        return Ok(None);
    }
    let (q, k, v) = (vectors(q, T::VECTOR)?, vectors(k, T::VECTOR)?, vectors(v, T::VECTOR)?);
    let inputs = [Some(&q), Some(&k), Some(&v)];
    held_to::<T>(&inputs)?;
    let width = heads * dim;
    let mut out = Fresh::<T>::new(&q, (batch * queries * width) as u64)?;
    let [b, h, s, d, row] = [batch, heads, queries, dim, width].map(|n| n as i64);
    let merged = Lies { dims: [b, h, s, d], strides: [s * row, d, row, 1] };
    let operands = [lies(&q), lies(&k), lies(&v), merged];
    let key = Key::Attention(Attention { dtype: T::DTYPE, operands });
    let done = out.queue(&inputs, |stream, inputs, out| {
        let &[q, k, v] = inputs else { bail!("attention: operands without addresses") };
        // SAFETY: the operands lie as `key` says, locked and held to the memory that they have, and the result is as
        // large.
        unsafe { queued(device, stream, key, [q, k, v, out], scale) }
    })?;
    Ok(done.then(|| out.tensor((batch, queries, width))))
}

/// Rows `[batch, tokens, columns]` whose columns are, one behind another and each `heads · dim` of them, a result of attention, its
/// queries, its keys and its values, of which the first `keys` are seen, and then others.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Rows {
    pub(in super::super) batch: usize,
    pub(in super::super) tokens: usize,
    pub(in super::super) columns: usize,
    pub(in super::super) heads: usize,
    pub(in super::super) dim: usize,
    pub(in super::super) keys: usize,
}

impl Rows {
    /// Attention within them, where it is one.
    fn attention<T: Element>(self) -> Option<Attention> {
        let Self { batch, tokens, columns, heads, dim, keys } = self;
        let whole = [dim, columns].iter().all(|n| n.is_multiple_of(T::VECTOR as usize));
        let fits = 4 * heads * dim <= columns && (1..=tokens).contains(&keys);
        if !whole || !fits || dim == 0 || dim > WIDEST || batch * heads == 0 {
            return None;
        }
        let [b, h, d, row, item] = [batch, heads, dim, columns, tokens * columns].map(|n| n as i64);
        let lies = |s: usize| Lies { dims: [b, h, s as i64, d], strides: [item, d, row, 1] };
        let operands = [lies(tokens), lies(keys), lies(keys), lies(tokens)];
        Some(Attention { dtype: T::DTYPE, operands })
    }
}

/// Whether the library computes attention within such rows of `T`.
pub(in super::super) fn attends_within<T: Element>(
    device: &CudaDevice,
    rows: Rows,
) -> Result<bool> {
    match rows.attention::<T>() {
        Some(attention) => offers(&device.cuda_stream(), Key::Attention(attention)),
        None => Ok(false),
    }
}

/// [`attention`] within `rows`, which lie in `memory`; `false` where the library does not compute that.
pub(in super::super) fn attention_within<T: Element>(
    memory: &mut Place<'_, T>,
    rows: Rows,
    scale: f64,
) -> Result<bool> {
    let Some(attention) = rows.attention::<T>() else { return Ok(false) };
    let Rows { batch, tokens, columns, heads, dim, .. } = rows;
    if memory.len() < (batch * tokens * columns) as u64 {
        bail!("attention: rows of {rows:?} in {} values", memory.len());
    }
    let device = memory.device().clone();
    memory.queue(|stream, first| {
        let part = |i: usize| first + (i * heads * dim * size_of::<T>()) as u64;
        let operands = [part(1), part(2), part(3), part(0)];
        // SAFETY: the operands lie as `attention` says within the rows, which this has for itself and which were held to their
        // memory; no column of the result is one of an operand.
        unsafe { queued(&device, stream, Key::Attention(attention), operands, scale) }
    })
}

/// Queues `key` with queries, keys, values and the result at these addresses.
///
/// # Safety
/// As [`queue`].
unsafe fn queued(
    device: &CudaDevice,
    stream: &CudaStream,
    key: Key,
    operands: [u64; 4],
    scale: f64,
) -> Result<bool> {
    let scale = scale as f32;
    let on_host: Raw = (&raw const scale).cast_mut().cast();
    let [q, k, v, out] = operands.map(|at| at as Raw);
    // SAFETY: the caller's, and the scale is one f32.
    unsafe { queue(device, stream, key, &[q, k, v, out, on_host]) }
}

/// Where a tensor of four dimensions lies.
fn lies(t: &Tensor) -> Lies {
    let (mut dims, mut strides) = ([0; 4], [0; 4]);
    for (at, (&n, &stride)) in t.dims().iter().zip(t.stride()).enumerate().take(4) {
        (dims[at], strides[at]) = (n as i64, stride as i64);
    }
    Lies { dims, strides }
}
