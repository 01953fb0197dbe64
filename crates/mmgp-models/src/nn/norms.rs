//! Normalisations over the last dimension: LayerNorm, RMSNorm, and the modulated LayerNorm of
//! diffusion transformers.
//!
//! Sums are taken in f32 over short runs and in f64 over the runs, so that width costs no digits.

use candle_core::{D, DType, Result, Tensor};
#[cfg(feature = "cuda")]
use mmgp_quant::Codes;
use mmgp_quant::{Input, Linear, Weights};

use crate::nn::cpu;
#[cfg(feature = "cuda")]
use crate::nn::cuda;

/// (x − mean) / √(variance + ε) · weight + bias over the last dimension
/// ([Layer Normalization](https://arxiv.org/abs/1607.06450)).
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Asks for `weight` and `bias` `[width]`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(weights: &Weights, width: usize, eps: f64) -> mmgp_quant::Result<Self> {
        let (weight, bias) =
            (weights.tensor(&[width], "weight")?, weights.tensor(&[width], "bias")?);
        Ok(Self { weight, bias, eps })
    }

    /// `[…, width]` to the same shape.
    ///
    /// # Errors
    /// An input of another width; weights that are not leased.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if cuda::take(&[x, &self.weight, &self.bias]) {
            return cuda::layer_norm(x, Some((&self.weight, &self.bias)), None, self.eps);
        }
        if !is_f32_cpu(x) {
            let (weight, bias) = (up(&self.weight)?, up(&self.bias)?);
            let y = plain_norm(&up(x)?, self.eps)?.broadcast_mul(&weight)?.broadcast_add(&bias)?;
            return y.to_dtype(x.dtype());
        }
        let (weight, bias) = (&self.weight, &self.bias);
        cpu::read(weight, |w| {
            cpu::read(bias, |b| scaled_rows(x, w, b, self.eps, |y, w, b| y * w + b))
        })
    }

    /// [`LayerNorm::forward`], then `· (1 + scale) + shift`: [`layer_norm_modulated`] of a norm that
    /// has weights.
    ///
    /// `x` is `[batch, tokens, width]`, `scale` and `shift` are `[batch, width]`.
    ///
    /// # Errors
    /// Shapes that do not fit each other; weights that are not leased.
    pub fn forward_modulated(&self, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
        check_modulation(x, scale, shift)?;
        #[cfg(feature = "cuda")]
        if cuda::take(&[x, &self.weight, &self.bias, scale, shift]) {
            let weights = (&self.weight, &self.bias);
            return cuda::layer_norm(x, Some(weights), Some((scale, shift)), self.eps);
        }
        // (y w + b) (1 + s) + t = y (w (1 + s)) + (b (1 + s) + t): one row of each for a batch item.
        let scale = (up(scale)? + 1.)?;
        let bias = scale.broadcast_mul(&up(&self.bias)?)?.add(&up(shift)?)?;
        let weight = scale.broadcast_mul(&up(&self.weight)?)?;
        if !is_f32_cpu(x) {
            let y = plain_norm(&up(x)?, self.eps)?.broadcast_mul(&weight.unsqueeze(1)?)?;
            return y.broadcast_add(&bias.unsqueeze(1)?)?.to_dtype(x.dtype());
        }
        cpu::read(&weight, |w| {
            cpu::read(&bias, |b| scaled_rows(x, w, b, self.eps, |y, w, b| y * w + b))
        })
    }
}

/// x / √(mean(x²) + ε) · weight over the last dimension
/// ([Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467)).
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Asks for `weight` `[width]`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(weights: &Weights, width: usize, eps: f64) -> mmgp_quant::Result<Self> {
        Ok(Self { weight: weights.tensor(&[width], "weight")?, eps })
    }

    /// `[…, width]` to the same shape.
    ///
    /// # Errors
    /// An input of another width; weights that are not leased.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if cuda::take(&[x, &self.weight]) {
            return cuda::rms_norm(x, &self.weight, self.eps);
        }
        if !is_f32_cpu(x) {
            let (weight, eps) = (self.weight.to_dtype(x.dtype())?, self.eps as f32);
            return candle_nn::ops::rms_norm(&x.contiguous()?, &weight, eps); // sums in f32
        }
        let width = x.dim(D::Minus1)?;
        let x = x.contiguous()?;
        let mut out = vec![0f32; x.elem_count()];
        self.with_weight(width, |weight| {
            cpu::read(&x, |x| {
                cpu::rows(&mut out, width, |i, row| {
                    rms_row(&x[i * width..(i + 1) * width], weight, self.eps, row);
                });
                Ok(())
            })
        })?;
        cpu::tensor(out, x.shape())
    }

    /// The weight's values, `width` of them.
    pub(crate) fn with_weight<R>(
        &self,
        width: usize,
        f: impl FnOnce(&[f32]) -> Result<R>,
    ) -> Result<R> {
        cpu::read(&self.weight, |weight| {
            if weight.len() != width {
                candle_core::bail!("rms_norm: rows of {width}, a weight of {}", weight.len());
            }
            f(weight)
        })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub(crate) fn eps(&self) -> f64 {
        self.eps
    }
}

/// One row of an RMSNorm.
#[inline]
pub(crate) fn rms_row(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    let mean = sum(x, |v| v * v) / x.len() as f64;
    let inverse = (1. / (mean + eps).sqrt()) as f32;
    for ((y, &v), w) in out.iter_mut().zip(x).zip(weight) {
        *y = v * inverse * w;
    }
}

/// LayerNorm without weights, then `· (1 + scale) + shift`: how a diffusion transformer conditions
/// a block ([Scalable Diffusion Models with Transformers](https://arxiv.org/abs/2212.09748), adaLN).
///
/// `x` is `[batch, tokens, width]`, `scale` and `shift` are `[batch, width]`.
///
/// # Errors
/// Shapes that do not fit each other.
pub fn layer_norm_modulated(
    x: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    check_modulation(x, scale, shift)?;
    #[cfg(feature = "cuda")]
    if cuda::take(&[x, scale, shift]) {
        return cuda::layer_norm(x, None, Some((scale, shift)), eps);
    }
    if !is_f32_cpu(x) {
        let (scale, shift) = ((up(scale)?.unsqueeze(1)? + 1.)?, up(shift)?.unsqueeze(1)?);
        let y = plain_norm(&up(x)?, eps)?.broadcast_mul(&scale)?.broadcast_add(&shift)?;
        return y.to_dtype(x.dtype());
    }
    let (scale, shift) = (scale.contiguous()?, shift.contiguous()?);
    cpu::read(&scale, |scale| {
        cpu::read(&shift, |shift| scaled_rows(x, scale, shift, eps, |y, a, b| y * (1. + a) + b))
    })
}

fn check_modulation(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<()> {
    let (batch, _, width) = x.dims3()?;
    if scale.dims() != [batch, width] || shift.dims() != [batch, width] {
        candle_core::bail!("modulate: {:?} by {:?}, {:?}", x.dims(), scale.dims(), shift.dims());
    }
    Ok(())
}

/// Normalises rows and finishes each value with its `a` and `b`, of which there is one row for all
/// or one for each batch item.
fn scaled_rows(
    x: &Tensor,
    a: &[f32],
    b: &[f32],
    eps: f64,
    finish: impl Fn(f32, f32, f32) -> f32 + Send + Sync,
) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let rows = x.elem_count() / width.max(1);
    if width == 0 || a.len() != b.len() || !a.len().is_multiple_of(width) || a.is_empty() {
        candle_core::bail!("layer_norm: rows of {width}, weights of {} and {}", a.len(), b.len());
    }
    let per = (rows / (a.len() / width)).max(1);
    let x = x.contiguous()?;
    let mut out = vec![0f32; rows * width];
    cpu::read(&x, |x| {
        cpu::rows(&mut out, width, |i, row| {
            let x = &x[i * width..(i + 1) * width];
            let at = i / per * width;
            let (a, b) = (&a[at..at + width], &b[at..at + width]);
            let mean = (sum(x, |v| v) / width as f64) as f32;
            let variance = sum(x, |v| (v - mean) * (v - mean)) / width as f64;
            let inverse = (1. / (variance + eps).sqrt()) as f32;
            for (((y, &v), &a), &b) in row.iter_mut().zip(x).zip(a).zip(b) {
                *y = finish((v - mean) * inverse, a, b);
            }
        });
        Ok(())
    })?;
    cpu::tensor(out, x.shape())
}

/// The sum of `f` over a slice: in f32 over short runs, in f64 over their sums, so that the error
/// does not grow with the length.
#[inline]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let run = |x: &[f32]| -> f64 {
        let mut parts = [0f32; 16];
        let chunks = x.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().map(|&v| f(v)).sum();
        for chunk in chunks {
            parts.iter_mut().zip(chunk).for_each(|(p, &v)| *p += f(v));
        }
        f64::from(rest) + parts.iter().map(|&p| f64::from(p)).sum::<f64>()
    };
    x.chunks(1 << 10).map(run).sum()
}

/// LayerNorm without weights in the library's own operations.
pub(crate) fn plain_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + eps)?.sqrt()?)
}

/// In f32, in which statistics are taken.
fn up(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)
}

pub(crate) fn is_f32_cpu(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// [`layer_norm_modulated`] as all of `readers` read it: as codes, where that is what all of them make of it first.
///
/// # Errors
/// Those of [`layer_norm_modulated`].
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // elsewhere norms are numbers
pub fn layer_norm_modulated_for(
    x: &Tensor,
    modulation: [&Tensor; 2],
    eps: f64,
    readers: &[&Linear],
) -> Result<Input> {
    let [scale, shift] = modulation;
    #[cfg(feature = "cuda")]
    if let Some(codes) = codes_for(x, readers)
        && x.rank() == 3
        && cuda::take(&[x, scale, shift])
    {
        return Ok(cuda::Normed { x, gated: None, modulation, eps }.run(Some(codes))?.1);
    }
    layer_norm_modulated(x, scale, shift, eps).map(Input::from)
}

/// The codes that all of `readers` make of an input like `x`.
#[cfg(feature = "cuda")]
pub(super) fn codes_for(x: &Tensor, readers: &[&Linear]) -> Option<Codes> {
    let x = Input::from(x);
    let mut codes = readers.iter().map(|reader| reader.reads(&x));
    let first = codes.next()??;
    codes.all(|other| other == Some(first)).then_some(first)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::MemorySource;

    use super::*;

    fn near(a: &Tensor, b: &Tensor) -> Result<()> {
        assert_eq!(a.dims(), b.dims());
        let worst = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 2e-5, "{worst}"); // of values up to 20
        Ok(())
    }

    #[test]
    fn rows_equal_the_formulas() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0.5f32, 1.5, s, &dev);
        let (w, b, x) = (rand(&[44])?, rand(&[44])?, rand(&[2, 5, 44])?);
        let source = MemorySource::new(&dev).with("weight", w.clone()).with("bias", b.clone());
        let weights = Weights::new(source);
        // A view whose rows are not where its shape says.
        let x = x.transpose(0, 1)?;
        let want = plain_norm(&x, 1e-5)?.broadcast_mul(&w)?.broadcast_add(&b)?;
        near(&LayerNorm::new(&weights, 44, 1e-5)?.forward(&x)?, &want)?;
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
        let want = x.broadcast_div(&rms)?.broadcast_mul(&w)?;
        near(&RmsNorm::new(&weights, 44, 1e-6)?.forward(&x)?, &want)?;
        assert!(RmsNorm::new(&weights, 44, 1e-6)?.forward(&rand(&[2, 22])?).is_err());
        assert!(LayerNorm::new(&weights, 44, 1e-6)?.forward(&rand(&[2, 43])?).is_err());
        Ok(())
    }

    #[test]
    fn each_batch_item_has_its_modulation() -> Result<()> {
        let dev = Device::Cpu;
        let x = Tensor::randn(0f32, 2., (2, 3, 12), &dev)?;
        let emb = Tensor::randn(0f32, 1., (2, 36), &dev)?;
        let (scale, shift) = (emb.narrow(1, 12, 12)?, emb.narrow(1, 0, 12)?);
        let want = plain_norm(&x, 1e-6)?.broadcast_mul(&(scale.unsqueeze(1)? + 1.)?)?;
        let want = want.broadcast_add(&shift.unsqueeze(1)?)?;
        near(&layer_norm_modulated(&x, &scale, &shift, 1e-6)?, &want)?;
        assert!(layer_norm_modulated(&x, &scale, &emb, 1e-6).is_err());
        Ok(())
    }

    #[test]
    fn modulation_comes_after_weight_and_bias() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0.5f32, 1., s, &dev);
        let (w, b, x) = (rand(&[12])?, rand(&[12])?, rand(&[2, 3, 12])?);
        let (scale, shift) = (rand(&[2, 12])?, rand(&[2, 12])?);
        let source = MemorySource::new(&dev).with("weight", w.clone()).with("bias", b.clone());
        let norm = LayerNorm::new(&Weights::new(source), 12, 1e-5)?;
        let want = plain_norm(&x, 1e-5)?.broadcast_mul(&w)?.broadcast_add(&b)?;
        let want = want.broadcast_mul(&(scale.unsqueeze(1)? + 1.)?)?;
        let want = want.broadcast_add(&shift.unsqueeze(1)?)?;
        near(&norm.forward_modulated(&x, &scale, &shift)?, &want)?;
        assert!(norm.forward_modulated(&x, &scale, &shift.narrow(0, 0, 1)?).is_err());
        Ok(())
    }
}
