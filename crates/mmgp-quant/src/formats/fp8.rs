//! Weights in fp8 (e4m3), one scale per output channel or none.
//!
//! Stored as quanto does (`{layer}.weight._data` F8_E4M3 `[outputs, inputs]`, `{layer}.weight._scale` `[outputs, 1]`); or
//! plainly, as `{layer}.weight` in F8_E4M3, whose numbers are the weight; or made from a dense weight while it is
//! read, where the source wants that. Codes travel as bytes and stay so on the device. The product expands 64 rows at
//! a time to `code · scale` in f32. On CUDA it expands the whole weight to the compute dtype, for the time of one product;
//! or, where the source allows that and the GPU was seen to do it, makes the rows of the input e4m3 and multiplies in fp8,
//! with no expansion.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor};
use mmgp_io::Dtype;

use super::{
    dense::{floating, product, product_on_device, product_on_device_into, slice, writes_into},
    int8::named,
    stored_in,
};
use crate::{
    Codes, Epilogue, Error, Form, Format, Input, Part, QuantTensor, Result, Source, Weights,
    decode::decoded, kernels::cpu::Rows,
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
            (codes, Some((source.tensor(parts, Form::Scales)?, stored_in(source, parts))))
        } else if Self::with_scales(source, parts) {
            let inputs = parts.first().and_then(|p| p.shape.get(1)).copied();
            let scales = named(parts, Self::SCALES, None);
            floating(source, &scales)?;
            let codes = source.tensor(&named(parts, Self::CODES, inputs), Form::Bytes)?;
            (codes, Some((source.tensor(&scales, Form::F32)?, stored_in(source, &scales))))
        } else {
            for part in parts {
                let layer = part.name.strip_suffix("weight").unwrap_or(&part.name);
                let names = Self::OTHERS.map(|leaf| format!("{layer}{leaf}"));
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
        let (scales, dtype) = scales.unzip();
        // bf16 holds every code.
        let dtype = dtype.unwrap_or(DType::BF16);
        Ok(Box::new(Fp8Weight { codes, scales, dtype, activations }))
    }
}

struct Fp8Weight {
    /// U8 `[outputs, inputs]`.
    codes: Tensor,
    /// f32 `[outputs, 1]`; all 1 if there are none.
    scales: Option<Tensor>,
    /// What the scales were rounded to, and decoded weights are.
    dtype: DType,
    /// Whether products may make the input e4m3.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // the CPU does not
    activations: bool,
}

impl QuantTensor for Fp8Weight {
    fn format(&self) -> &'static str {
        Fp8.name()
    }

    fn product(&self, x: &Input, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.multiplies_codes(x) {
            use crate::kernels::cuda::fp8_product_of;
            if let Some(y) = fp8_product_of(x, &self.codes, self.scales.as_ref(), bias)? {
                return Ok(y);
            }
        }
        let x = &x.rows()?;
        if !x.device().is_cpu() {
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

    fn product_into(
        &self,
        x: &Input,
        bias: Option<&Tensor>,
        epilogue: Epilogue,
        y: &Tensor,
    ) -> candle_core::Result<bool> {
        if !writes_into(x) {
            return Ok(false); // before a weight is expanded for nothing
        }
        #[cfg(feature = "cuda")]
        if self.multiplies_codes(x) {
            let (scales, to) = (self.scales.as_ref(), (epilogue, y));
            if crate::kernels::cuda::fp8_product_into(x, &self.codes, scales, bias, to)? {
                return Ok(true);
            }
        }
        let x = &x.rows()?;
        product_on_device_into(x, &self.expanded(x.dtype())?, bias, epilogue, y)
    }

    #[cfg(feature = "cuda")]
    fn reads(&self, x: &Input) -> Option<Codes> {
        use crate::kernels::cuda::{fp8_enabled, fp8_reads_codes};
        let candle_core::Device::Cuda(device) = x.device() else { return None };
        let read = self.activations && fp8_enabled(device);
        (read && fp8_reads_codes(x, self.codes.dims())).then_some(Codes::Fp8)
    }

    fn decode(&self) -> candle_core::Result<Tensor> {
        self.expanded(self.dtype)
    }
}

impl Fp8Weight {
    /// Whether products multiply fp8 by fp8, which those of codes do.
    #[cfg(feature = "cuda")]
    fn multiplies_codes(&self, x: &Input) -> bool {
        let candle_core::Device::Cuda(device) = x.device() else { return false };
        let makes = self.activations && crate::kernels::cuda::fp8_enabled(device);
        makes || matches!(x, Input::Codes(_))
    }

    /// The whole weight in `dtype`.
    fn expanded(&self, dtype: DType) -> candle_core::Result<Tensor> {
        decoded(Codes::Fp8, &self.codes, self.scales.as_ref(), dtype)
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
        let ones = vec![1.; outputs];
        let scales = match scales {
            Some((scales, ls)) => slice::<f32>(scales, ls)?,
            None => &ones,
        };
        if scales.len() != outputs {
            candle_core::bail!("fp8: {} scales for {outputs} outputs", scales.len());
        }
        let rows = Rows::Fp8 { codes: slice::<u8>(codes, lc)?, scales };
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::{Bias, MemorySource, from_e4m3};

    const DIMS: (usize, usize) = (70, 33);

    fn codes() -> Tensor {
        let codes = (0..DIMS.0 * DIMS.1).map(|i| (i as u32).wrapping_mul(2_654_435_761) >> 24);
        let codes = codes.map(|c| if c & 0x7f == 0x7f { 0 } else { c as u8 }).collect();
        Tensor::from_vec(codes, DIMS, &Device::Cpu).unwrap()
    }

    fn rand(shape: &[usize], dtype: DType) -> Tensor {
        let values = Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
        values.to_dtype(dtype).unwrap()
    }

    /// The weight by the definition of its parts, in f64.
    fn weight(scales: Option<&Tensor>) -> Tensor {
        let codes: Vec<u8> = codes().flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f64> = codes.into_iter().map(|c| f64::from(from_e4m3(c))).collect();
        let weight = Tensor::from_vec(values, DIMS, &Device::Cpu).unwrap();
        match scales {
            Some(scales) => weight.broadcast_mul(&scales.to_dtype(DType::F64).unwrap()).unwrap(),
            None => weight,
        }
    }

    fn largest(t: &Tensor) -> f64 {
        t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn products_are_those_of_codes_and_scales_with_and_without() {
        let x = rand(&[5, DIMS.1], DType::F32);
        let bias = rand(&[DIMS.0], DType::F32);
        for scale in [Some(DType::BF16), Some(DType::F16), Some(DType::F32), None] {
            let scales = scale.map(|dtype| rand(&[DIMS.0, 1], dtype));
            let source = MemorySource::new(&Device::Cpu).with("bias", bias.clone());
            let source = match &scales {
                Some(scales) => {
                    source.with_fp8("weight._data", codes()).with("weight._scale", scales.clone())
                }
                None => source.with_fp8("weight", codes()),
            };
            let layer = Weights::new(source).linear(DIMS.1, DIMS.0, Bias::Yes).unwrap();
            assert_eq!(layer.format(), "fp8");
            let weight = weight(scales.as_ref());
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let expected = wide(&x).matmul(&weight.t().unwrap()).unwrap();
            let expected = expected.broadcast_add(&wide(&bias)).unwrap();
            let y = wide(&layer.forward(&x).unwrap());
            // Sums of 33 numbers in f32.
            let off = largest(&(&y - &expected).unwrap()) / largest(&expected);
            assert!(off < 1e-5, "{scale:?}: off by {off}");

            // Decoded: rounded once to the dtype of the scales; without them exact.
            let decoded = layer.decode().unwrap();
            assert_eq!(decoded.dtype(), scale.unwrap_or(DType::BF16));
            let rounded =
                wide(&weight.to_dtype(DType::F32).unwrap().to_dtype(decoded.dtype()).unwrap());
            assert_eq!(largest(&(wide(&decoded) - rounded).unwrap()), 0., "{scale:?}");
        }
    }

    #[test]
    fn joined_layers_equal_the_single_ones() {
        let source = MemorySource::new(&Device::Cpu)
            .with_fp8("q.weight", codes())
            .with_fp8("k.weight", codes());
        let w = Weights::new(source);
        let joined = w.linear_joined(&[("q", DIMS.0), ("k", DIMS.0)], DIMS.1, Bias::No).unwrap();
        let single = w.pp("k").linear(DIMS.1, DIMS.0, Bias::No).unwrap();
        let x = rand(&[3, DIMS.1], DType::F32);
        let half = joined.forward(&x).unwrap().narrow(1, DIMS.0, DIMS.0).unwrap();
        let off = (half - single.forward(&x).unwrap()).unwrap().to_dtype(DType::F64).unwrap();
        assert!(largest(&off) < 1e-2, "sums of numbers up to 448");
    }

    #[test]
    fn what_is_odd_is_an_error_that_names_it() {
        let open = |source: MemorySource| {
            let layer = Weights::new(source).linear(DIMS.1, DIMS.0, Bias::No);
            layer.map(drop).unwrap_err().to_string()
        };
        let plain = || MemorySource::new(&Device::Cpu).with_fp8("weight", codes());
        for name in ["scale_weight", "weight_scale", "weight_scale_inv"] {
            let error = open(plain().with(name, rand(&[1], DType::F32)));
            for part in [&format!("`{name}`"), "`weight`", "[1]", "weight._scale"] {
                assert!(error.contains(part), "no {part} in: {error}");
            }
        }
        let coded = || MemorySource::new(&Device::Cpu).with_fp8("weight._data", codes());
        assert!(open(coded()).contains("`weight._scale`"));
        let error = open(coded().with("weight._scale", rand(&[3, 1], DType::F32)));
        assert!(error.contains("[3, 1]") && error.contains("[70, 1]"), "{error}");
        let integers = Tensor::zeros((DIMS.0, 1), DType::U32, &Device::Cpu).unwrap();
        let error = open(coded().with("weight._scale", integers));
        assert!(error.contains("U32") && error.contains("BF16, F16 or F32"), "{error}");
        let error = open(MemorySource::new(&Device::Cpu).with_fp8("weight", codes().t().unwrap()));
        assert!(error.contains("[33, 70]") && error.contains("[70, 33]"), "{error}");
        // Not all of the joined ones.
        let source = MemorySource::new(&Device::Cpu)
            .with_fp8("q.weight", codes())
            .with("k.weight", rand(&[DIMS.0, DIMS.1], DType::F32));
        let layers = [("q", DIMS.0), ("k", DIMS.0)];
        let error = Weights::new(source).linear_joined(&layers, DIMS.1, Bias::No).unwrap_err();
        assert!(error.to_string().contains("F8_E4M3"), "{error}");
    }
}
