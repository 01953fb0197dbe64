//! Activation functions, elementwise.
//!
//! Those with an exponential have a kernel of their own on the CPU, where the tensor library's run
//! on one thread; the others are the tensor library's.

use candle_core::{D, DType, Result, Tensor};
use mmgp_quant::{Input, Linear};

use crate::nn::cpu;
#[cfg(feature = "cuda")]
use crate::nn::cuda;

/// An activation function, by the names that model configs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x · Φ(x), exact ([GELU](https://arxiv.org/abs/1606.08415), section 2)
    Gelu,
    /// Its approximation by tanh, from the same section
    GeluTanh,
    /// x · σ(1.702 x), from the same section
    QuickGelu,
    /// x · σ(x)
    Silu,
}

impl Activation {
    /// The function that a config calls `name`, if it is one of these.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "relu" => Self::Relu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "silu" | "swish" => Self::Silu,
            _ => return None,
        })
    }

    /// Applies it to each element; any shape, f32 on the CPU.
    ///
    /// # Errors
    /// Weights that are not leased.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if cuda::take(&[x]) {
            return cuda::activate(self, x, None);
        }
        let kernel: fn(f32) -> f32 = match self {
            Self::Relu => return x.relu(),
            Self::Gelu => return x.gelu_erf(),
            _ if !x.device().is_cpu() || x.dtype() != DType::F32 => {
                return match self {
                    Self::GeluTanh => x.gelu(),
                    Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
                    _ => x.silu(),
                };
            }
            // Each arm is its own loop, so that the compiler sees one function and vectorises it.
            Self::GeluTanh => return map(x, gelu_tanh),
            Self::QuickGelu => |v| v / (1. + cpu::exp(-1.702 * v)),
            Self::Silu => return map(x, silu),
        };
        map(x, kernel)
    }

    /// Applies it to what `linear` makes of `x`: within the product, on GPUs where that is done.
    ///
    /// # Errors
    /// Those of [`Linear::forward`].
    pub fn of(self, linear: &Linear, x: &Input) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self == Self::GeluTanh
            && cuda::take_input(x)
            && let Some(y) = cuda::gelu_of(linear, x)?
        {
            return Ok(y);
        }
        self.apply(&linear.forward_input(x)?)
    }

    /// Applies it to each element of `gate` and multiplies by `x`, which has the same shape: a gated linear
    /// unit ([GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202)).
    ///
    /// # Errors
    /// Shapes that differ; weights that are not leased.
    pub fn apply_times(self, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if cuda::take(&[gate, x]) {
            return cuda::activate(self, gate, Some(x));
        }
        self.apply(gate)? * x
    }

    /// f(a) · b of `x` = `[a, b]` along its last dimension, `[…, 2n]` to `[…, n]`: what stands between
    /// the products of a gated feed-forward ([GLU variants](https://arxiv.org/abs/2002.05202)).
    ///
    /// # Errors
    /// An odd width; weights that are not leased.
    pub fn gate(self, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(D::Minus1)?;
        if !width.is_multiple_of(2) {
            candle_core::bail!("gate: {:?} has no two halves", x.dims());
        }
        let n = width / 2;
        if self != Self::Silu || !x.device().is_cpu() || x.dtype() != DType::F32 {
            let part = |first: usize| x.narrow(D::Minus1, first, n)?.contiguous();
            return self.apply_times(&part(0)?, &part(n)?);
        }
        let x = x.contiguous()?;
        let mut out = vec![0f32; x.elem_count() / 2];
        cpu::read(&x, |x| {
            cpu::rows(&mut out, n, |i, row| {
                let (a, b) = x[i * width..(i + 1) * width].split_at(n);
                row.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (&a, b))| *y = silu(a) * b);
            });
            Ok(())
        })?;
        let mut shape = x.dims().to_vec();
        shape.pop();
        shape.push(n);
        cpu::tensor(out, shape)
    }
}

/// `[a, gelu_tanh(linear(x))]` along the last dimension: what the output projection of a fused attention and
/// feed-forward block reads.
///
/// `a` is `[batch, tokens, n]`, `x` `[batch, tokens, inputs of the layer]`, the result `[batch, tokens, n + outputs]`.
///
/// # Errors
/// Shapes that do not fit each other; weights that are not leased.
pub fn join_gelu(a: &Tensor, linear: &Linear, x: &Input) -> Result<Tensor> {
    let (batch, tokens, _) = a.dims3()?;
    if x.dims() != [batch, tokens, linear.inputs()] {
        candle_core::bail!("join_gelu: {:?} and {:?} for {linear:?}", a.dims(), x.dims());
    }
    #[cfg(feature = "cuda")]
    if cuda::take(&[a]) && cuda::take_input(x) {
        return cuda::join_gelu_of(a, linear, x);
    }
    joined_gelu(a, &linear.forward_input(x)?)
}

/// `[a, gelu_tanh(x)]` along the last dimension of `[batch, tokens, …]` each, by the CPU's kernel or the tensor library.
pub(crate) fn joined_gelu(a: &Tensor, x: &Tensor) -> Result<Tensor> {
    let ((batch, tokens, n), (.., m)) = (a.dims3()?, x.dims3()?);
    if !x.device().is_cpu() || x.dtype() != DType::F32 {
        return Tensor::cat(&[a, &x.contiguous()?.gelu()?], D::Minus1);
    }
    let (a, x) = (a.contiguous()?, x.contiguous()?);
    let mut out = vec![0f32; batch * tokens * (n + m)];
    cpu::read(&a, |a| {
        cpu::read(&x, |x| {
            cpu::rows(&mut out, n + m, |i, row| {
                row[..n].copy_from_slice(&a[i * n..(i + 1) * n]);
                let from = &x[i * m..(i + 1) * m];
                row[n..].iter_mut().zip(from).for_each(|(y, &v)| *y = gelu_tanh(v));
            });
            Ok(())
        })
    })?;
    cpu::tensor(out, (batch, tokens, n + m))
}

fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Send + Sync) -> Result<Tensor> {
    const PIECE: usize = 1 << 14;
    let x = x.contiguous()?;
    let mut out = vec![0f32; x.elem_count()];
    let whole = out.len() - out.len() % PIECE;
    cpu::read(&x, |x| {
        let (body, tail) = out.split_at_mut(whole);
        cpu::rows(body, PIECE, |i, row| {
            row.iter_mut().zip(&x[i * PIECE..]).for_each(|(y, &v)| *y = f(v));
        });
        tail.iter_mut().zip(&x[whole..]).for_each(|(y, &v)| *y = f(v));
        Ok(())
    })?;
    cpu::tensor(out, x.shape())
}

#[inline(always)]
pub(crate) fn silu(v: f32) -> f32 {
    v / (1. + cpu::exp(-v))
}

/// ½ x (1 + tanh u) = x · σ(2u)
#[inline(always)]
fn gelu_tanh(v: f32) -> f32 {
    const ROOT: f32 = 0.797_884_6; // √(2/π)
    v / (1. + cpu::exp(-2. * ROOT * v * (1. + 0.044715 * v * v)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::{Bias, MemorySource, Weights};

    use super::*;

    #[test]
    fn kernels_equal_the_formulas() -> Result<()> {
        let dev = Device::Cpu;
        let x = Tensor::arange_step(-30f32, 30., 0.001, &dev)?; // no multiple of a piece
        let cases = [
            (Activation::Silu, x.silu()?),
            (Activation::GeluTanh, x.gelu()?),
            (Activation::QuickGelu, (&x * candle_nn::ops::sigmoid(&(&x * 1.702)?)?)?),
            (Activation::Relu, x.relu()?),
        ];
        for (activation, want) in cases {
            let worst = (activation.apply(&x)? - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 2e-6, "{activation:?} {worst}");
        }
        let y = Tensor::randn(0f32, 1., x.dims(), &dev)?;
        let want = (x.silu()? * &y)?;
        let worst = (Activation::Silu.apply_times(&x, &y)? - want)?.abs()?.max_all()?;
        assert!(worst.to_scalar::<f32>()? < 1e-5);
        assert!(Activation::Silu.apply_times(&x, &y.narrow(0, 0, 1)?).is_err());
        assert_eq!(Activation::parse("gelu"), Some(Activation::Gelu));
        assert_eq!(Activation::parse("mish"), None);
        Ok(())
    }

    #[test]
    fn the_first_half_is_activated_and_gates_the_second() -> Result<()> {
        let dev = Device::Cpu;
        let x = Tensor::randn(0f32, 2., (2, 3, 10), &dev)?;
        let (a, b) = (x.narrow(2, 0, 5)?, x.narrow(2, 5, 5)?);
        for (activation, f) in [(Activation::Silu, a.silu()?), (Activation::Gelu, a.gelu_erf()?)] {
            let got = activation.gate(&x)?;
            assert_eq!(got.dims(), [2, 3, 5]);
            let worst = (got - (f * &b)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 2e-6, "{activation:?} {worst}");
        }
        assert!(Activation::Silu.gate(&x.narrow(2, 0, 7)?).is_err());
        Ok(())
    }

    #[test]
    fn what_a_layer_makes_is_activated_and_joined() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let a = Tensor::randn(0f32, 1., (2, 3, 4), &dev)?;
        let x = Tensor::randn(0f32, 1., (2, 3, 6), &dev)?;
        let source = MemorySource::new(&dev)
            .with("weight", Tensor::randn(0f32, 1., (5, 6), &dev)?)
            .with("bias", Tensor::randn(0f32, 1., 5, &dev)?);
        let linear = Weights::new(source).linear(6, 5, Bias::Yes)?;
        let activated = linear.forward(&x)?.gelu()?;
        let far = |got: &Tensor, want: &Tensor| (got - want)?.abs()?.max_all()?.to_scalar::<f32>();
        let few = x.narrow(1, 0, 2)?;
        let x = x.into();
        assert!(far(&Activation::GeluTanh.of(&linear, &x)?, &activated)? < 1e-6);
        let want = Tensor::cat(&[&a, &activated], 2)?;
        assert!(far(&join_gelu(&a, &linear, &x)?, &want)? < 1e-6);
        assert!(join_gelu(&a, &linear, &few.into()).is_err());
        Ok(())
    }
}
