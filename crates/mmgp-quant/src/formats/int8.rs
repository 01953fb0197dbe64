//! int8 weights, symmetric, one scale per output channel.
//!
//! Stored as quanto does (`{layer}.weight._data` I8 `[outputs, inputs]`, `{layer}.weight._scale`
//! `[outputs, 1]`), or made from a dense weight while it is read, where the source wants that. Codes
//! travel as bytes, since candle has no I8, and stay int8 on the device. The product expands 64 rows at
//! a time to `code · scale`: in f32, or, where the source says so, rounded to the dtype that scales are stored in, as
//! quanto and [`decode`](QuantTensor::decode) do. On CUDA it expands the whole weight to the compute
//! dtype, for the time of one product; or, where the source allows that, makes the rows of the input int8 and
//! multiplies in int8, with no expansion.
//!
//! Codes of rotated rows (`{layer}.weight._hadamard256` I8 `[outputs, inputs]`, scales as ever; see
//! [`Codes::RotatedInt8`]) are multiplied with an input whose rows are rotated too, in f32. Where none can be, and in
//! [`decode`](QuantTensor::decode), they are expanded to the weight that they stand for: rotated back, then rounded once.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use mmgp_io::Dtype;

use super::{
    dense::{floating, product, product_on_device, product_on_device_into, slice, writes_into},
    stored_in,
};
use crate::{
    Codes, Epilogue, Error, Form, Format, Input, Part, QuantTensor, Result, Source, Weights,
    decode::decoded,
    kernels::{
        cpu::{Rounding, Rows},
        rotation::{self, rotate_rows},
    },
};

/// The format of int8 weights with a scale per output channel.
pub(crate) struct Int8;

impl Int8 {
    const SCALES: &str = "_scale";

    /// The codes that are stored for all of `parts`.
    fn stored(source: &dyn Source, parts: &[Part]) -> Option<Codes> {
        [Codes::Int8, Codes::RotatedInt8].into_iter().find(|of| {
            parts.iter().all(|part| {
                let stored = source.stored(&format!("{}.{}", part.name, of.leaf()));
                stored.is_some_and(|s| s.dtype == Dtype::I8)
            })
        })
    }

    /// The codes that dense `parts` are to become.
    fn wanted(source: &dyn Source, parts: &[Part]) -> Option<Codes> {
        source.quantizes(parts).filter(|of| matches!(of, Codes::Int8 | Codes::RotatedInt8))
    }
}

/// The parts called `leaf` behind those of the weight, as wide as said, or of one column.
pub(super) fn named(parts: &[Part], leaf: &str, inputs: Option<usize>) -> Vec<Part> {
    let shape = |part: &Part| vec![part.shape[0], inputs.unwrap_or(1)];
    parts.iter().map(|p| Part { name: format!("{}.{leaf}", p.name), shape: shape(p) }).collect()
}

impl Format for Int8 {
    fn name(&self) -> &'static str {
        "int8"
    }

    fn recognises(&self, weights: &Weights, parts: &[Part]) -> bool {
        let source = weights.source();
        Self::stored(source, parts).is_some() || Self::wanted(source, parts).is_some()
    }

    fn open(&self, weights: &Weights, parts: &[Part]) -> Result<Box<dyn QuantTensor>> {
        let source = weights.source();
        let inputs = parts.first().and_then(|p| p.shape.get(1)).copied();
        let wanted = Self::wanted(source, parts);
        let of = wanted.or_else(|| Self::stored(source, parts)).unwrap_or_default();
        if of.with_inputs(inputs.unwrap_or(0)) != of {
            return Err(Error::Invalid(format!(
                "{}: `{}.{}` has {} inputs, which are no groups of {}",
                source.origin(),
                parts.first().map_or("", |part| &part.name),
                of.leaf(),
                inputs.unwrap_or(0),
                rotation::GROUP
            )));
        }
        if wanted.is_some() {
            let codes = source.tensor(parts, Form::Codes(of))?;
            let scales = (source.tensor(parts, Form::Scales)?, stored_in(source, parts));
            return Ok(Box::new(Int8Weight::new(of, codes, scales, source)));
        }
        let scales = named(parts, Self::SCALES, None);
        floating(source, &scales)?;
        let codes = source.tensor(&named(parts, of.leaf(), inputs), Form::AsStored)?;
        let scales = (source.tensor(&scales, Form::F32)?, stored_in(source, &scales));
        Ok(Box::new(Int8Weight::new(of, codes, scales, source)))
    }
}

struct Int8Weight {
    /// Of rows as they are, or rotated.
    of: Codes,
    /// U8 `[outputs, inputs]`, two's complement.
    codes: Tensor,
    /// f32 `[outputs, 1]`.
    scales: Tensor,
    /// What the scales were rounded to, and decoded weights are.
    dtype: DType,
    /// Whether products round `code · scale` to that too.
    rounded: bool,
    /// Whether products may make the input int8.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // the CPU does not
    activations: bool,
}

impl QuantTensor for Int8Weight {
    fn format(&self) -> &'static str {
        self.of.name()
    }

    fn product(&self, x: &Input, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.multiplies_codes(x) {
            use crate::kernels::cuda::{Int8Kernel, w8a8_of};
            let codes = (self.of, &self.codes);
            if let Some(y) = w8a8_of(x, codes, &self.scales, bias, Int8Kernel::Fastest)? {
                return Ok(y);
            }
        }
        let x = &x.rows()?;
        if !x.device().is_cpu() {
            return product_on_device(x, &self.expanded(x.dtype())?, bias);
        }
        let rounding = match (self.rounded, self.dtype) {
            (true, DType::BF16) => Rounding::Bf16,
            (true, DType::F16) => Rounding::F16,
            _ => Rounding::F32,
        };
        let by = Product { rounding, rotated: self.of == Codes::RotatedInt8 };
        let y = x.apply_op3_no_bwd(&self.codes, &self.scales, &by)?;
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
            use crate::kernels::cuda::{Int8Kernel, w8a8_into};
            let (codes, to) = ((self.of, &self.codes), (epilogue, y));
            if w8a8_into(x, codes, &self.scales, bias, to, Int8Kernel::Fastest)? {
                return Ok(true);
            }
        }
        let x = &x.rows()?;
        product_on_device_into(x, &self.expanded(x.dtype())?, bias, epilogue, y)
    }

    #[cfg(feature = "cuda")]
    fn reads(&self, x: &Input) -> Option<Codes> {
        let read = self.activations && crate::kernels::cuda::reads_codes(x, self.codes.dims());
        read.then_some(self.of)
    }

    fn decode(&self) -> candle_core::Result<Tensor> {
        self.expanded(self.dtype)
    }
}

impl Int8Weight {
    /// Of codes, and scales with the dtype that they were rounded to.
    fn new(
        of: Codes,
        codes: Tensor,
        (scales, dtype): (Tensor, DType),
        source: &dyn Source,
    ) -> Self {
        // quanto has no rotated codes.
        let rounded = source.rounds_int8() && of == Codes::Int8;
        let activations = source.quantizes_activations() == Some(Codes::Int8);
        Self { of, codes, scales, dtype, rounded, activations }
    }

    /// Whether products multiply int8 by int8, which those of codes do.
    #[cfg(feature = "cuda")]
    fn multiplies_codes(&self, x: &Input) -> bool {
        x.device().is_cuda() && (self.activations || matches!(x, Input::Codes(_)))
    }

    /// The whole weight in `dtype`, through that of the stored scales where that rounding is wanted.
    fn expanded(&self, dtype: DType) -> candle_core::Result<Tensor> {
        let through = if self.rounded && self.dtype != DType::F32 { self.dtype } else { dtype };
        decoded(self.of, &self.codes, Some(&self.scales), through)?.to_dtype(dtype)
    }
}

struct Product {
    rounding: Rounding,
    /// Whether rows of the input are rotated first, as those of the weight were.
    rotated: bool,
}

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "int8 linear"
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
        let (outputs, inputs) = lc.shape().dims2()?;
        let scales = slice::<f32>(scales, ls)?;
        if scales.len() != outputs {
            candle_core::bail!("int8: {} scales for {outputs} outputs", scales.len());
        }
        let rounding = self.rounding;
        let rows = Rows::Int8 { codes: slice::<u8>(codes, lc)?, scales, rounding };
        if !self.rotated {
            return product((x, lx), rows, (outputs, inputs), None);
        }
        let mut x = slice::<f32>(x, lx)?.to_vec();
        rotate_rows(&mut x, inputs);
        let lx = Layout::contiguous(lx.shape());
        product((&CpuStorage::F32(x), &lx), rows, (outputs, inputs), None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::{Bias, CodedRows, Input, Linear, MemorySource};

    const DIMS: (usize, usize) = (70, 512);

    fn rand(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    /// Codes and scales of `dtype` that a dense weight becomes.
    fn quantized(of: Codes, weight: &Tensor) -> (Tensor, Tensor) {
        let (outputs, inputs) = weight.dims2().unwrap();
        let values: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
        let (mut codes, mut scales) = (vec![0; values.len()], vec![0f32; outputs]);
        of.quantize(&values, inputs, &mut codes, &mut scales).unwrap();
        let codes = Tensor::from_vec(codes, (outputs, inputs), &Device::Cpu).unwrap();
        (codes, Tensor::from_vec(scales, (outputs, 1), &Device::Cpu).unwrap())
    }

    fn layer(of: Codes, weight: &Tensor) -> Linear {
        let (codes, scales) = quantized(of, weight);
        let source = MemorySource::new(&Device::Cpu)
            .with(format!("weight.{}", of.leaf()), codes)
            .with("weight._scale", scales);
        let (outputs, inputs) = weight.dims2().unwrap();
        Weights::new(source).linear(inputs, outputs, Bias::No).unwrap()
    }

    fn largest(t: &Tensor) -> f32 {
        t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_rotated_weight_stands_for_what_it_was() {
        let (weight, x) = (rand(&[DIMS.0, DIMS.1]), rand(&[5, DIMS.1]));
        let rotated = layer(Codes::RotatedInt8, &weight);
        assert_eq!(rotated.format(), "rotated_int8");
        // Half a code of each weight, of at most 127 for about four deviations; rotated back that is as much again in the mean.
        let decoded = rotated.decode().unwrap();
        assert!(largest(&(&decoded - &weight).unwrap()) < 0.1);
        // The product rotates its input: it is that of the weight that was decoded, but for sums in f32.
        let expected = x.matmul(&decoded.t().unwrap()).unwrap();
        let y = rotated.forward(&x).unwrap();
        assert!(largest(&(&y - &expected).unwrap()) < 1e-3);
        // The same codes without the mark are another weight.
        let (codes, scales) = quantized(Codes::RotatedInt8, &weight);
        let source = MemorySource::new(&Device::Cpu)
            .with("weight._data", codes)
            .with("weight._scale", scales);
        let plain = Weights::new(source).linear(DIMS.1, DIMS.0, Bias::No).unwrap();
        assert_eq!(plain.format(), "int8");
        assert!(largest(&(plain.forward(&x).unwrap() - expected).unwrap()) > 10.);
    }

    #[test]
    fn rotated_rows_stand_for_numbers() {
        let x = rand(&[3, DIMS.1]);
        let (codes, scales) = quantized(Codes::RotatedInt8, &x);
        let dims = vec![1, 3, DIMS.1];
        let of = Codes::RotatedInt8;
        let input = Input::Codes(CodedRows { of, codes, scales, dtype: DType::F32, dims });
        let numbers = input.numbers().unwrap();
        assert_eq!(numbers.dims(), [1, 3, DIMS.1]);
        assert!(largest(&(numbers.squeeze(0).unwrap() - &x).unwrap()) < 0.1);
        let weight = rand(&[DIMS.0, DIMS.1]);
        for of in [Codes::Int8, Codes::RotatedInt8] {
            let layer = layer(of, &weight);
            let expected = layer.forward(&numbers).unwrap();
            let y = layer.forward_input(&input).unwrap();
            assert_eq!(largest(&(y - expected).unwrap()), 0.);
        }
    }

    #[test]
    fn rotated_rows_are_whole_groups_and_not_joined_with_others() {
        let weight = rand(&[8, 320]);
        let (codes, scales) = quantized(Codes::Int8, &weight);
        let source = MemorySource::new(&Device::Cpu)
            .with("up.weight._hadamard256", codes)
            .with("up.weight._scale", scales);
        let error = Weights::new(source).pp("up").linear(320, 8, Bias::No).unwrap_err().to_string();
        for part in ["`up.weight._hadamard256`", "320", "256"] {
            assert!(error.contains(part), "no {part} in: {error}");
        }
        let (codes, scales) = quantized(Codes::Int8, &rand(&[8, 256]));
        let source = MemorySource::new(&Device::Cpu)
            .with("q.weight._hadamard256", codes.clone())
            .with("q.weight._scale", scales.clone())
            .with("k.weight._data", codes)
            .with("k.weight._scale", scales);
        let layers = [("q", 8), ("k", 8)];
        assert!(Weights::new(source).linear_joined(&layers, 256, Bias::No).is_err());
    }
}
