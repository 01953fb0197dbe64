//! Attention by a kernel of ours (`attention.cu`), for what cuDNN does not compute, and where it is not installed.
//!
//! As cuDNN's it reads queries, keys and values wherever they lie and holds no scores in memory. Beside what that
//! computes, neighbouring heads may share keys and values, and items of a batch may see different numbers of keys.
//! A row of the result does not depend on what else is computed with it.

use std::f64::consts::LOG2_E;

use candle_core::{
    DType, Device, Result, Tensor, bail, cuda_backend::cudarc::driver::LaunchConfig,
};
use half::{bf16, f16};
use mmgp_quant::KernelImage;

use super::{
    launch::{Element, Fresh, held_to},
    shape::{Attention, Grid, ITEMS, counted, head_width, query_bytes, vectors},
};

/// Machine code and PTX of `attention.cu`.
pub(super) static KERNELS: KernelImage =
    KernelImage::new(include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")));

/// softmax(q · kᵀ · scale) · v with the heads merged, as [`attention`](crate::nn::attention) has it without
/// biases; item `i` sees its first `lengths[i]` keys, where they are given. `None` for what is not computed: values
/// of more than 128 a head, or of no whole vectors.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    lengths: Option<&[usize]>,
) -> Result<Option<Tensor>> {
    match q.dtype() {
        DType::BF16 => attend::<bf16>(q, k, v, scale, lengths),
        DType::F16 => attend::<f16>(q, k, v, scale, lengths),
        _ => Ok(None),
    }
}

fn attend<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    lengths: Option<&[usize]>,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let (batch, heads, queries, dim) = q.dims4()?;
    let (_, groups, keys, _) = k.dims4()?;
    let fits = k.dims() == v.dims() && k.dim(0)? == batch && k.dim(3)? == dim;
    if !fits || q.elem_count() == 0 || k.elem_count() == 0 || !heads.is_multiple_of(groups) {
        return Ok(None);
    }
    let all = vec![keys; batch];
    let lengths = lengths.unwrap_or(&all);
    if lengths.len() != batch || lengths.iter().any(|n| !(1..=keys).contains(n)) {
        bail!("attention: {lengths:?} of {keys} keys for a batch of {batch}");
    }
    // The largest score must stay it, and what hides keys remains infinite.
    let exponents = scale * LOG2_E;
    let scales = exponents > 0. && (exponents as f32).is_normal();
    let (Some(width), true) = (head_width(dim as u64), dim.is_multiple_of(T::VECTOR as usize))
    else {
        return Ok(None);
    };
    let (q, k, v) = (vectors(q, T::VECTOR)?, vectors(k, T::VECTOR)?, vectors(v, T::VECTOR)?);
    let inputs = [Some(&q), Some(&k), Some(&v)];
    held_to::<T>(&inputs)?;
    let [[q_item, q_head, q_token], [k_item, k_head, k_token], [v_item, v_head, v_token]] =
        [strides(&q), strides(&k), strides(&v)];
    let countable = [keys as u64, q_token, k_token, v_token].into_iter().all(counted);
    let grid = |items: usize| Grid::of_queries(queries as u64, (items * heads) as u64);
    let (true, true, Some(_)) = (scales, countable, grid(batch.min(ITEMS))) else {
        return Ok(None);
    };
    let mut out = Fresh::<T>::new(&q, (batch * queries * heads * dim) as u64)?;
    let kernel = KERNELS.function(device, &format!("attention_{width}_{}", T::SUFFIX))?;
    let shared = query_bytes(width);
    kernel.share(shared)?;
    out.queue(&inputs, |stream, inputs, out| {
        let &[q, k, v] = inputs else { bail!("attention: operands without addresses") };
        for (from, lengths) in (0..).step_by(ITEMS).zip(lengths.chunks(ITEMS)) {
            let Some(grid) = grid(lengths.len()) else { bail!("attention: blocks without number") };
            let behind = |address: u64, item: u64| address + from * item * size_of::<T>() as u64;
            let mut argument = Attention {
                q: behind(q, q_item),
                k: behind(k, k_item),
                v: behind(v, v_item),
                out: behind(out, (queries * heads * dim) as u64),
                heads: heads as u64,
                sharing: (heads / groups) as u64,
                queries: queries as u64,
                dim: dim as u64,
                q_item,
                q_head,
                q_token,
                k_item,
                k_head,
                k_token,
                v_item,
                v_head,
                v_token,
                scale: exponents,
                ..Attention::default()
            };
            argument.keys.iter_mut().zip(lengths).for_each(|(to, &n)| *to = n as u64);
            let config = LaunchConfig {
                grid_dim: (grid.blocks.0, grid.blocks.1, 1),
                block_dim: (grid.threads.0, grid.threads.1, 1),
                shared_mem_bytes: shared,
            };
            // SAFETY: strides and counts are those of the operands, which are locked and held to the memory that
            // they have: of an item's keys those before its length are read, which are not more than there are. They
            // are vectors that begin where vectors may. The output has a row for each query.
            unsafe { kernel.launch(stream, config, &[&argument])? };
        }
        Ok(())
    })?;
    Ok(Some(out.tensor((batch, queries, heads * dim))))
}

/// How far items, heads and tokens lie apart, in elements, 0 where there is one.
fn strides(t: &Tensor) -> [u64; 3] {
    [0, 1, 2].map(|at| if t.dims()[at] > 1 { t.stride()[at] as u64 } else { 0 })
}
