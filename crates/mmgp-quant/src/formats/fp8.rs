//! Weights in fp8 (e4m3), one scale per output channel or none.
//!
//! Stored as quanto does (`{layer}.weight._data` F8_E4M3 `[outputs, inputs]`, `{layer}.weight._scale` `[outputs, 1]`); or
//! plainly, as `{layer}.weight` in F8_E4M3, whose numbers are the weight; or made from a dense weight while it is
//! read, where the source wants that. Codes travel as bytes and stay so on the device. The product expands 64 rows at
//! a time to `code · scale` in f32. On CUDA it expands the whole weight to the compute dtype, for the time of one product;
//! or, where the source allows that and the GPU was seen to do it, makes the rows of the input e4m3 and multiplies in fp8,
//! with no expansion.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor};
use half::{bf16, f16};
use mmgp_io::Dtype;

use super::{
    dense::{floating, product, product_on_device, slice},
    int8::{of, widened},
};
use crate::{
    Codes, Error, Form, Format, Part, QuantTensor, Result, Source, Weights,
    kernels::{cpu::Rows, fp8, int8::Real},
};

/// The format of e4m3 weights.
pub(crate) struct Fp8;

impl Fp8 {
    const CODES: &str = "_data";
    const SCALES: &str = "_scale";
    /// How other programs call scales beside a plain `weight`, which are not read here.
    const OTHERS: [&str; 3] = ["scale_weight", "weight_scale", "weight_scale_inv"];

    /// Whether all are stored as e4m3.
    fn stored(source: &dyn Source, mut names: impl Iterator<Item = String>) -> bool {
        names.all(|name| source.stored(&name).is_some_and(|s| s.dtype == Dtype::F8E4M3))
    }

    fn with_scales(source: &dyn Source, parts: &[Part]) -> bool {
        Self::stored(source, parts.iter().map(|p| format!("{}.{}", p.name, Self::CODES)))
    }
}

impl Format for Fp8 {
    fn name(&self) -> &'static str {
        Codes::Fp8.name()
    }

    fn recognises(&self, weights: &Weights, parts: &[Part]) -> bool {
        let source = weights.source();
        source.quantizes(parts) == Some(Codes::Fp8)
            || Self::with_scales(source, parts)
            || Self::stored(source, parts.iter().map(|p| p.name.clone()))
    }

    fn open(&self, weights: &Weights, parts: &[Part]) -> Result<Box<dyn QuantTensor>> {
        let source = weights.source();
        let (codes, scales) = if source.quantizes(parts) == Some(Codes::Fp8) {
            let codes = source.tensor(parts, Form::Codes(Codes::Fp8))?;
            (codes, Some(source.tensor(parts, Form::Scales)?))
        } else if Self::with_scales(source, parts) {
            let inputs = parts.first().and_then(|p| p.shape.get(1)).copied();
            let scales = of(parts, Self::SCALES, None);
            floating(source, &scales)?;
            let codes = source.tensor(&of(parts, Self::CODES, inputs), Form::Bytes)?;
            (codes, Some(source.tensor(&scales, Form::AsStored)?))
        } else {
            for part in parts {
                let layer = part.name.strip_suffix(".weight").unwrap_or(&part.name);
                let names = Self::OTHERS.map(|leaf| format!("{layer}.{leaf}"));
                if let Some((name, other)) =
                    names.iter().find_map(|name| Some((name, source.stored(name)?)))
                {
                    return Err(Error::Invalid(format!(
                        "{}: tensor `{name}` {:?} scales the fp8 weight `{}`, which cannot be used here (expected \
                         `{}.{}` with `{}.{}`, or F8_E4M3 weights without scales)",
                        other.origin,
                        other.shape,
                        part.name,
                        part.name,
                        Self::CODES,
                        part.name,
                        Self::SCALES
                    )));
                }
            }
            (source.tensor(parts, Form::Bytes)?, None)
        };
        let activations = source.quantizes_activations() == Some(Codes::Fp8);
        Ok(Box::new(Fp8Weight { codes, scales, activations }))
    }
}

struct Fp8Weight {
    /// U8 `[outputs, inputs]`.
    codes: Tensor,
    /// bf16, f16 or f32 `[outputs, 1]`; all 1 if there are none.
    scales: Option<Tensor>,
    /// Whether products may make the input e4m3.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // the CPU does not
    activations: bool,
}

impl QuantTensor for Fp8Weight {
    fn format(&self) -> &'static str {
        Fp8.name()
    }

    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
        if !x.device().is_cpu() {
            #[cfg(feature = "cuda")]
            if self.activations
                && let candle_core::Device::Cuda(device) = x.device()
                && crate::kernels::cuda::fp8_enabled(device)
                && let Some(y) =
                    crate::kernels::cuda::fp8_product(x, &self.codes, self.scales.as_ref(), bias)?
            {
                return Ok(y);
            }
            return product_on_device(x, &self.expanded(x.dtype())?, bias);
        }
        let y = match &self.scales {
            Some(scales) => x.apply_op3_no_bwd(&self.codes, scales, &Product)?,
            None => x.apply_op2_no_bwd(&self.codes, &Product)?,
        };
        match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    fn decode(&self) -> candle_core::Result<Tensor> {
        // bf16 holds every code.
        self.expanded(self.scales.as_ref().map_or(DType::BF16, Tensor::dtype))
    }
}

impl Fp8Weight {
    /// The whole weight in `dtype`.
    fn expanded(&self, dtype: DType) -> candle_core::Result<Tensor> {
        let decode = Decode { dtype };
        match &self.scales {
            Some(scales) => self.codes.apply_op2_no_bwd(scales, &decode)?.to_dtype(dtype),
            None => self.codes.apply_op1_no_bwd(&decode)?.to_dtype(dtype),
        }
    }
}

struct Product;

impl Product {
    fn run(
        x: (&CpuStorage, &Layout),
        (codes, lc): (&CpuStorage, &Layout),
        scales: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (outputs, inputs) = lc.shape().dims2()?;
        let scales = match scales {
            Some((scales, ls)) => widened(scales, ls)?,
            None => vec![1.; outputs],
        };
        if scales.len() != outputs {
            candle_core::bail!("fp8: {} scales for {outputs} outputs", scales.len());
        }
        let rows = Rows::Fp8 { codes: slice::<u8>(codes, lc)?, scales: &scales };
        product(x, rows, (outputs, inputs), None)
    }
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "fp8 linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        codes: &CpuStorage,
        lc: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Self::run((x, lx), (codes, lc), None)
    }
}

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "fp8 linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        codes: &CpuStorage,
        lc: &Layout,
        scales: &CpuStorage,
        ls: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Self::run((x, lx), (codes, lc), Some((scales, ls)))
    }
}

/// `code · scale` of a whole weight, rounded once to `dtype`; on the CPU that is the scale's, and bf16 without.
pub(crate) struct Decode {
    // Only kernels of GPUs can round to another dtype than the scale's.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) dtype: DType,
}

impl Decode {
    fn run<T: Real + bytemuck::Zeroable>(
        codes: &[u8],
        (outputs, inputs): (usize, usize),
        scales: &[T],
    ) -> candle_core::Result<Vec<T>> {
        if scales.len() != outputs {
            candle_core::bail!("fp8: {} scales for {outputs} outputs", scales.len());
        }
        let mut weight = bytemuck::allocation::zeroed_vec(codes.len());
        fp8::decode(codes, inputs, scales, &mut weight);
        Ok(weight)
    }
}

impl CustomOp1 for Decode {
    fn name(&self) -> &'static str {
        "fp8 decode"
    }

    fn cpu_fwd(&self, codes: &CpuStorage, lc: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let dims = lc.shape().dims2()?;
        let ones = vec![bf16::ONE; dims.0];
        let weight = Self::run(slice::<u8>(codes, lc)?, dims, &ones)?;
        Ok((CpuStorage::BF16(weight), Shape::from(dims)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        codes: &CudaStorage,
        lc: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        crate::kernels::cuda::expand(Codes::Fp8, (codes, lc), None, self.dtype)
    }
}

impl CustomOp2 for Decode {
    fn name(&self) -> &'static str {
        "fp8 decode"
    }

    fn cpu_fwd(
        &self,
        codes: &CpuStorage,
        lc: &Layout,
        scales: &CpuStorage,
        ls: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let dims = lc.shape().dims2()?;
        let all = slice::<u8>(codes, lc)?;
        let storage = match scales {
            CpuStorage::BF16(_) => CpuStorage::BF16(Self::run(all, dims, slice(scales, ls)?)?),
            CpuStorage::F16(_) => CpuStorage::F16(Self::run(all, dims, slice::<f16>(scales, ls)?)?),
            CpuStorage::F32(_) => CpuStorage::F32(Self::run(all, dims, slice(scales, ls)?)?),
            _ => candle_core::bail!("fp8: the scales are not leased, or of another dtype"),
        };
        Ok((storage, Shape::from(dims)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        codes: &CudaStorage,
        lc: &Layout,
        scales: &CudaStorage,
        ls: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        crate::kernels::cuda::expand(Codes::Fp8, (codes, lc), Some((scales, ls)), self.dtype)
    }
}
