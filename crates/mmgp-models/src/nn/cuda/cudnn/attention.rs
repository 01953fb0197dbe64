//! [Scaled dot-product attention](https://docs.nvidia.com/deeplearning/cudnn/backend/latest/operations/Attention.html),
//! one operation of the library's.
//!
//! It reads queries, keys and values wherever they lie, also within the rows of a joined projection, and holds no
//! scores in memory.

use candle_core::{DType, Device, Result, Tensor, bail};
use half::{bf16, f16};

use super::{
    super::{
        launch::{Element, Fresh, held_to},
        shape::vectors,
    },
    Answer, Descriptor, Key, Library, Lies, Raw, attribute, kind, of, queue,
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
/// biases, and behind each row `room` values, a multiple of a vector's, that nobody wrote yet; `None` for what the library does
/// not compute.
pub(in super::super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    room: usize,
) -> Result<Option<Tensor>> {
    match q.dtype() {
        DType::BF16 => attend::<bf16>(q, k, v, scale, room),
        DType::F16 => attend::<f16>(q, k, v, scale, room),
        _ => Ok(None),
    }
}

fn attend<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    room: usize,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let (batch, heads, queries, dim) = q.dims4()?;
    let (_, groups, keys, _) = k.dims4()?;
    let fits = k.dims() == v.dims() && k.dim(0)? == batch && k.dim(3)? == dim;
    let whole = [dim, room].iter().all(|n| n.is_multiple_of(T::VECTOR as usize)) && dim <= WIDEST;
    if !fits || groups != heads || !whole || q.elem_count() == 0 || keys == 0 {
        return Ok(None);
    }
    let (q, k, v) = (vectors(q, T::VECTOR)?, vectors(k, T::VECTOR)?, vectors(v, T::VECTOR)?);
    let inputs = [Some(&q), Some(&k), Some(&v)];
    held_to::<T>(&inputs)?;
    let width = heads * dim + room;
    let mut out = Fresh::<T>::new(&q, (batch * queries * width) as u64)?;
    let [b, h, s, d, row] = [batch, heads, queries, dim, width].map(|n| n as i64);
    let merged = Lies { dims: [b, h, s, d], strides: [s * row, d, row, 1] };
    let operands = [lies(&q), lies(&k), lies(&v), merged];
    let key = Key::Attention(Attention { dtype: T::DTYPE, operands });
    let done = out.queue(&inputs, |stream, inputs, out| {
        let &[q, k, v] = inputs else { bail!("attention: operands without addresses") };
        let scale = scale as f32;
        let scale: Raw = (&raw const scale).cast_mut().cast();
        // SAFETY: the operands lie as `key` says, locked and held to the memory that they have, the result is as
        // large or larger, and the scale is one f32.
        unsafe { queue(device, stream, key, &[q as Raw, k as Raw, v as Raw, out as Raw, scale]) }
    })?;
    Ok(done.then(|| out.tensor((batch, queries, width))))
}

/// Where a tensor of four dimensions lies.
fn lies(t: &Tensor) -> Lies {
    let (mut dims, mut strides) = ([0; 4], [0; 4]);
    for (at, (&n, &stride)) in t.dims().iter().zip(t.stride()).enumerate().take(4) {
        (dims[at], strides[at]) = (n as i64, stride as i64);
    }
    Lies { dims, strides }
}
