//! Scaled dot-product attention whose memory grows linearly with the number of tokens.
//!
//! Query rows are taken in chunks, so that the scores of one chunk stay near 32 MiB however long the
//! sequence is; of a long one, few heads at a time, so that there are enough rows in a product. The chunk is a
//! function of the shape and the kind of device: it belongs to the recipe. On a GPU what has no biases is
//! computed as a whole: by cuDNN where that is installed and computes the shape, else by a kernel of ours where it
//! does. The result comes with its heads merged, as the output projection takes it.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::nn::{add, contiguous, cpu, heads::merge};

/// The most scores (query rows × keys × heads × batch) that are held at once: 32 MiB in f32.
const SCORES: usize = 8 << 20;

/// The same for long sequences on other devices than the CPU: 64 MiB in bf16.
const LONG_SCORES: usize = 32 << 20;
/// Where all heads together leave fewer query rows than this for a chunk, heads are taken a few at a time: every
/// chunk reads all keys and values.
const ROWS: usize = 64;

/// How many query rows [`attention`] takes at a time for `planes` = batch × heads that are taken together.
///
/// As many as keep `planes · rows · keys` at most 2²³, rounded down to a multiple of 16 where there
/// are that many, at least one, at most `queries`.
pub fn chunk_rows(planes: usize, queries: usize, keys: usize) -> usize {
    rows_within(SCORES, planes, queries, keys)
}

fn rows_within(scores: usize, planes: usize, queries: usize, keys: usize) -> usize {
    let rows = scores / planes.saturating_mul(keys).max(1);
    let rows = if rows >= 16 { rows - rows % 16 } else { rows };
    rows.clamp(1, queries.max(1))
}

/// softmax(q · kᵀ · scale + bias₁ + bias₂ + …) · v with the heads merged:
/// [Attention Is All You Need](https://arxiv.org/abs/1706.03762), equation 1.
///
/// `q` is `[batch, heads, queries, d]`, `k` `[batch, groups, keys, d]`, `v` `[batch, groups, keys, e]`,
/// all f32 on the CPU; each of `biases` has four dimensions that broadcast to
/// `[batch, heads, queries, keys]` (a mask is a bias of large negative numbers). As many neighbouring
/// heads share keys and values as `groups` is smaller than `heads`
/// ([GQA](https://arxiv.org/abs/2305.13245)). The result is `[batch, queries, heads · e]`.
///
/// # Errors
/// Shapes that do not fit each other.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    biases: &[&Tensor],
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if biases.is_empty()
        && let Some(out) = crate::nn::cuda::attention(q, k, v, scale)?
    {
        return Ok(out);
    }
    let limit = if q.device().is_cpu() { SCORES } else { LONG_SCORES };
    few_heads_at_a_time(q, k, v, scale, biases, [SCORES, limit])
}

/// [`attention`] with the most scores at once, of all heads and of a few where that leaves few rows.
fn few_heads_at_a_time(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    biases: &[&Tensor],
    [all, few]: [usize; 2],
) -> Result<Tensor> {
    let (batch, heads, queries, _) = q.dims4()?;
    let (_, groups, keys, _) = v.dims4()?;
    if groups == 0 || !heads.is_multiple_of(groups) {
        candle_core::bail!("attention: {heads} heads over keys and values of {groups}");
    }
    if rows_within(all, batch * heads, queries, keys) >= ROWS.min(queries) {
        return in_chunks(q, k, v, scale, biases, all);
    }
    let sharing = heads / groups;
    let at_once = few / (2 * ROWS * sharing).saturating_mul(keys).max(1);
    let at_once = at_once.clamp(1, groups);
    let mut items = Vec::with_capacity(batch);
    for item in 0..batch {
        let mut parts = Vec::new();
        for from in (0..groups).step_by(at_once) {
            let count = at_once.min(groups - from);
            let part = |t: &Tensor, by: usize| -> Result<Tensor> {
                let t = if t.dim(0)? == 1 { t.clone() } else { t.narrow(0, item, 1)? };
                if t.dim(1)? == 1 { Ok(t) } else { t.narrow(1, from * by, count * by) }
            };
            let biases = biases.iter().map(|b| part(b, sharing)).collect::<Result<Vec<_>>>()?;
            let biases: Vec<&Tensor> = biases.iter().collect();
            let (q, k, v) = (part(q, sharing)?, part(k, 1)?, part(v, 1)?);
            parts.push(in_chunks(&q, &k, &v, scale, &biases, few)?);
        }
        items.push(Tensor::cat(&parts, 2)?);
    }
    Tensor::cat(&items, 0)
}

/// [`attention`] of all heads together, in chunks of query rows of at most `limit` scores.
fn in_chunks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    biases: &[&Tensor],
    limit: usize,
) -> Result<Tensor> {
    let (batch, heads, queries, d) = q.dims4()?;
    let (_, groups, keys, e) = v.dims4()?;
    let planes = batch * heads;
    // The heads of a group are more rows of one product.
    let (products, sharing) = (batch * groups, heads / groups);
    // Contiguous, because candle multiplies some strided batches wrongly on the CPU.
    let q = contiguous(q)?.reshape((planes, queries, d))?;
    let k = contiguous(k)?.reshape((products, keys, d))?.transpose(1, 2)?;
    let v = contiguous(v)?.reshape((products, keys, e))?;
    let out = Tensor::zeros((batch, queries, heads * e), q.dtype(), q.device())?;
    let rows = rows_within(limit, planes, queries, keys);
    let biases = biases.iter().map(|b| b.to_dtype(q.dtype())).collect::<Result<Vec<_>>>()?;
    for from in (0..queries).step_by(rows) {
        let rows = rows.min(queries - from);
        let own = contiguous(&q.narrow(1, from, rows)?)?.reshape((products, sharing * rows, d))?;
        let scores = own.matmul(&k)?.reshape((batch, heads, rows, keys))?;
        let biases = biases.iter().map(|bias| match bias.dim(2)? {
            1 => Ok(bias.clone()),
            _ => bias.narrow(2, from, rows),
        });
        let weights = softmax(scores, scale, &biases.collect::<Result<Vec<_>>>()?)?;
        let mixed = weights.reshape((products, sharing * rows, keys))?.matmul(&v)?;
        let merged = merge(&mixed.reshape((batch, heads, rows, e))?)?;
        if rows == queries {
            return Ok(merged);
        }
        out.slice_set(&merged, 1, from)?;
    }
    Ok(out)
}

/// [`attention`] without biases in which item `i` of the batch sees only its first `keys[i]` keys:
/// those behind are padding, on which no time is spent.
///
/// # Errors
/// Shapes that do not fit each other; not one number of keys for each item, or one that there is not.
pub fn attention_up_to(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    keys: &[usize],
) -> Result<Tensor> {
    let (batch, _, most, _) = k.dims4()?;
    if keys.len() != batch || keys.iter().any(|n| !(1..=most).contains(n)) {
        candle_core::bail!("attention: {keys:?} of {most} keys for a batch of {batch}");
    }
    let first = keys.first().copied().unwrap_or(most);
    if keys.iter().all(|&n| n == first) {
        return attention(q, &k.narrow(2, 0, first)?, &v.narrow(2, 0, first)?, scale, &[]);
    }
    #[cfg(feature = "cuda")]
    if let Some(out) = crate::nn::cuda::attention_up_to(q, k, v, scale, keys)? {
        return Ok(out);
    }
    let mut items = Vec::with_capacity(batch);
    for (item, &n) in keys.iter().enumerate() {
        let own = |t: &Tensor| t.narrow(0, item, 1);
        let (k, v) = (own(k)?.narrow(2, 0, n)?, own(v)?.narrow(2, 0, n)?);
        items.push(attention(&own(q)?, &k, &v, scale, &[])?);
    }
    Tensor::cat(&items, 0)
}

/// The mask that lets a token see itself and what is before it: `[1, 1, tokens, tokens]` of 0 and −∞.
///
/// # Errors
/// None of its own.
pub fn causal_mask(tokens: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..tokens * tokens)
        .map(|at| if at % tokens > at / tokens { f32::NEG_INFINITY } else { 0. })
        .collect();
    Tensor::from_vec(mask, (1, 1, tokens, tokens), device)
}

/// Softmax of `scores · scale` plus biases over the last dimension of `[batch, heads, queries, keys]`, in the memory of `scores`,
/// which must be the caller's own, where that is no chain of the library's operations.
pub(crate) fn softmax(mut scores: Tensor, scale: f64, biases: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if crate::nn::cuda::take(&[&scores]) && biases.len() <= 2 {
        let biases: Vec<&Tensor> = biases.iter().collect();
        scores.inplace_op1(&crate::nn::cuda::Softmaxed { scale, biases: &biases })?;
        return Ok(scores);
    }
    if biases.is_empty() {
        return scaled_softmax(scores, scale);
    }
    scores = (scores * scale)?;
    for bias in biases {
        scores = add(&scores, bias)?;
    }
    scaled_softmax(scores, 1.)
}

/// Softmax of `scores · scale` over the last dimension; on the CPU in the memory of `scores`.
fn scaled_softmax(scores: Tensor, scale: f64) -> Result<Tensor> {
    if !scores.device().is_cpu() || scores.dtype() != DType::F32 {
        return candle_nn::ops::softmax_last_dim(&(scores * scale)?);
    }
    let width = scores.dim(D::Minus1)?;
    let scale = scale as f32;
    cpu::update(&scores, |all| {
        cpu::rows(all, width, |_, row| {
            // Scaling by a negative number would turn the maximum around; none of our models does.
            let max = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v * scale));
            for v in row.iter_mut() {
                *v = cpu::exp(*v * scale - max);
            }
            // Eight partial sums: faster than one, and closer to the true sum.
            let mut parts = [0f32; 8];
            let chunks = row.chunks_exact(8);
            let rest: f32 = chunks.remainder().iter().sum();
            for chunk in chunks {
                parts.iter_mut().zip(chunk).for_each(|(p, v)| *p += v);
            }
            let inverse = 1. / (parts.iter().sum::<f32>() + rest);
            row.iter_mut().for_each(|v| *v *= inverse);
        });
    })?;
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula in f64, one number at a time.
    fn naive(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: &Tensor) -> Result<Vec<f64>> {
        let f64s = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (b, h, n, d) = q.dims4()?;
        let (m, e) = (k.dim(2)?, v.dim(3)?);
        let bias = f64s(&bias.broadcast_as((b, h, n, m))?.contiguous()?)?;
        let (q, k, v) = (f64s(q)?, f64s(k)?, f64s(v)?);
        let mut out = vec![0.; b * n * h * e];
        for (p, i) in (0..b * h).flat_map(|p| (0..n).map(move |i| (p, i))) {
            let score = |j: usize| -> f64 {
                let dot: f64 =
                    (0..d).map(|c| q[(p * n + i) * d + c] * k[(p * m + j) * d + c]).sum();
                dot * scale + bias[(p * n + i) * m + j]
            };
            let scores: Vec<f64> = (0..m).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for (j, c) in (0..m).flat_map(|j| (0..e).map(move |c| (j, c))) {
                let at = ((p / h * n + i) * h + p % h) * e + c;
                out[at] += (scores[j] - max).exp() / sum * v[(p * m + j) * e + c];
            }
        }
        Ok(out)
    }

    #[test]
    fn equals_the_formula_at_batch_two() -> Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let (q, k) = (rand(&[2, 3, 5, 6])?, rand(&[2, 3, 7, 6])?);
        // As it comes out of a projection: tokens before heads.
        let v = rand(&[2, 7, 3, 4])?.transpose(1, 2)?;
        let zero = Tensor::zeros((1, 1, 1, 1), DType::F32, &dev)?;
        let (a, b) = (rand(&[1, 3, 5, 7])?, rand(&[2, 1, 1, 7])?);
        let cases: [(Vec<&Tensor>, Tensor); 2] =
            [(vec![], zero), (vec![&a, &b], a.broadcast_add(&b)?)];
        for (biases, sum) in &cases {
            let got = attention(&q, &k, &v, 0.3, biases)?;
            assert_eq!(got.dims(), [2, 5, 12]);
            let got = got.flatten_all()?.to_vec1::<f32>()?;
            for (got, want) in got.iter().zip(naive(&q, &k, &v, 0.3, sum)?) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn few_heads_at_a_time_are_all_of_them() -> Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        // Five groups of two heads; a limit that leaves a row for a chunk of all heads.
        let (q, k) = (rand(&[2, 10, 130, 6])?, rand(&[2, 5, 33, 6])?);
        let v = rand(&[2, 5, 33, 4])?;
        let whole = |bias: &Tensor| in_chunks(&q, &k, &v, 0.4, &[bias], usize::MAX);
        for bias in [rand(&[2, 10, 130, 33])?, rand(&[1, 1, 130, 33])?, rand(&[2, 1, 1, 33])?] {
            let want = whole(&bias)?;
            // Two groups at a time, then one, in chunks of as many rows as fit.
            for few in [2 * 2 * ROWS * 2 * 33, 2 * ROWS * 2 * 33, 5 * 33] {
                let got = few_heads_at_a_time(&q, &k, &v, 0.4, &[&bias], [10 * 33, few])?;
                assert_eq!(got.dims(), want.dims());
                let worst = (got - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(worst < 1e-5, "{few}: {worst}");
            }
        }
        Ok(())
    }

    #[test]
    fn neighbouring_heads_share_keys_and_values() -> Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let (q, k, v) = (rand(&[2, 6, 5, 4])?, rand(&[2, 2, 7, 4])?, rand(&[2, 2, 7, 3])?);
        let bias = rand(&[2, 6, 5, 7])?;
        let spread = |t: &Tensor| {
            let (b, g, n, d) = t.dims4()?;
            t.unsqueeze(2)?.broadcast_as((b, g, 3, n, d))?.contiguous()?.reshape((b, 6, n, d))
        };
        let want = naive(&q, &spread(&k)?, &spread(&v)?, 0.5, &bias)?;
        let got = attention(&q, &k, &v, 0.5, &[&bias])?;
        assert_eq!(got.dims(), [2, 5, 18]);
        for (got, want) in got.flatten_all()?.to_vec1::<f32>()?.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
        }
        let k = rand(&[2, 4, 7, 4])?;
        assert!(attention(&q, &k, &k, 0.5, &[]).is_err());
        Ok(())
    }

    #[test]
    fn keys_behind_the_last_are_not_seen() -> Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let (q, k, v) = (rand(&[2, 4, 5, 6])?, rand(&[2, 2, 7, 6])?, rand(&[2, 2, 7, 3])?);
        let inf = f32::NEG_INFINITY;
        for keys in [[7, 7], [3, 3], [7, 1], [2, 5]] {
            let mask: Vec<f32> = keys
                .iter()
                .flat_map(|&n| (0..7).map(move |j| if j < n { 0. } else { inf }))
                .collect();
            let mask = Tensor::from_vec(mask, (2, 1, 1, 7), &dev)?;
            let want = attention(&q, &k, &v, 0.4, &[&mask])?;
            let got = attention_up_to(&q, &k, &v, 0.4, &keys)?;
            assert_eq!(got.dims(), want.dims());
            let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 1e-6, "{keys:?} {worst}");
        }
        for keys in [&[7][..], &[7, 0], &[8, 7], &[7, 7, 7]] {
            assert!(attention_up_to(&q, &k, &v, 0.4, keys).is_err(), "{keys:?}");
        }
        Ok(())
    }

    #[test]
    fn chunks_do_not_show() -> Result<()> {
        let dev = Device::Cpu;
        let (h, n, d) = (2, 2500, 4);
        assert!(chunk_rows(h, n, n) < n);
        let rand = || Tensor::randn(0f32, 1., (1, h, n, d), &dev);
        let (q, k, v, bias) =
            (rand()?, rand()?, rand()?, Tensor::randn(0f32, 1., (1, h, n, n), &dev)?);
        for biases in [vec![], vec![&bias]] {
            let got = attention(&q, &k, &v, 0.5, &biases)?;
            let mut scores = (q.matmul(&k.t()?)? * 0.5)?;
            for bias in &biases {
                scores = (scores + *bias)?;
            }
            let want = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
            let want = want.transpose(1, 2)?.reshape((1, n, h * d))?;
            let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 1e-6, "{worst}");
        }
        Ok(())
    }

    #[test]
    fn scores_of_a_full_flux_attention_stay_small() {
        let rows = chunk_rows(24, 4608, 4608);
        assert!((16..=256).contains(&rows) && 24 * rows * 4608 * 4 <= 64 << 20);
        assert_eq!(chunk_rows(1, 5, 7), 5);
        assert_eq!(chunk_rows(usize::MAX, 5, usize::MAX), 1);
        assert_eq!(chunk_rows(0, 0, 0), 1);
    }

    #[test]
    fn a_causal_mask_hides_the_future() -> Result<()> {
        let mask = causal_mask(3, &Device::Cpu)?.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
        let inf = f32::NEG_INFINITY;
        assert_eq!(mask, [[0., inf, inf], [0., 0., inf], [0., 0., 0.]]);
        Ok(())
    }
}
