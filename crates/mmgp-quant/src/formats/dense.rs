//! Dense weights: bf16, f16 or f32 as they lie in the file.
//!
//! On the CPU the product widens the weight tile by tile, straight from the bytes that travelled; on
//! other devices the weight has the compute dtype already and the library's product is used.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor, WithDType};
use half::{bf16, f16};
use mmgp_io::Dtype;

use crate::{
    Epilogue, Error, Form, Format, Input, Part, QuantTensor, Result, Source, Weights,
    kernels::cpu::{Rows, product_nt},
};

/// The format of plain floating-point weights.
pub(crate) struct Dense;

impl Format for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn recognises(&self, _weights: &Weights, _parts: &[Part]) -> bool {
        true // the last to be asked: what is missing or odd gets its error from `open`
    }

    fn open(&self, weights: &Weights, parts: &[Part]) -> Result<Box<dyn QuantTensor>> {
        floating(weights.source(), parts)?;
        let form = if weights.device().is_cpu() { Form::AsStored } else { Form::Compute };
        Ok(Box::new(DenseWeight(weights.source().tensor(parts, form)?)))
    }
}

/// Whether those of `parts` that are stored are of a dtype that is computed on.
pub(super) fn floating(source: &dyn Source, parts: &[Part]) -> Result<()> {
    for part in parts {
        if let Some(stored) = source.stored(&part.name)
            && !matches!(stored.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
        {
            return Err(Error::Format {
                origin: stored.origin,
                name: part.name.clone(),
                found: stored.dtype,
                expected: "BF16, F16 or F32",
            });
        }
    }
    Ok(())
}

struct DenseWeight(Tensor);

impl QuantTensor for DenseWeight {
    fn format(&self) -> &'static str {
        Dense.name()
    }

    fn product(&self, x: &Input, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let x = &x.rows()?;
        match (x.device().is_cpu(), bias) {
            (true, Some(bias)) => x.apply_op3_no_bwd(&self.0, bias, &Product),
            (true, None) => x.apply_op2_no_bwd(&self.0, &Product),
            (false, _) => product_on_device(x, &self.0, bias),
        }
    }

    fn product_into(
        &self,
        x: &Input,
        bias: Option<&Tensor>,
        epilogue: Epilogue,
        y: &Tensor,
    ) -> candle_core::Result<bool> {
        product_on_device_into(&x.rows()?, &self.0, bias, epilogue, y)
    }

    fn decode(&self) -> candle_core::Result<Tensor> {
        self.0.copy()
    }
}

/// Whether there are products into columns for inputs like `x`.
pub(super) fn writes_into(x: &Input) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::BF16 | DType::F16)
}

/// [`product_on_device`] with an epilogue, as [`QuantTensor::product_into`] has it.
pub(super) fn product_on_device_into(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    epilogue: Epilogue,
    y: &Tensor,
) -> candle_core::Result<bool> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::kernels::cuda::product_into(x, w, bias, epilogue, y);
    }
    let _ = (x, w, bias, epilogue, y); // elsewhere there is no such product
    Ok(false)
}

/// `x · wᵀ (+ bias)` by any device but the CPU, `x` `[rows, inputs]` and `w` `[outputs, inputs]` contiguous.
pub(crate) fn product_on_device(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        use crate::kernels::cuda::{AddBias, product};
        if let Some(y) = product(x, w, bias)? {
            return Ok(y);
        }
        let y = x.matmul(&w.t()?)?;
        // In place, because the library's own addition takes longer than the product.
        if let Some(bias) = bias {
            y.inplace_op2(bias, &AddBias)?;
        }
        return Ok(y);
    }
    let y = x.matmul(&w.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `x · Wᵀ (+ bias)` on the CPU, as a custom operation because only those see storages.
struct Product;

impl Product {
    fn run(
        x: (&CpuStorage, &Layout),
        (w, layout): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let rows = match w {
            CpuStorage::BF16(_) => Rows::Bf16(slice::<bf16>(w, layout)?),
            CpuStorage::F16(_) => Rows::F16(slice::<f16>(w, layout)?),
            CpuStorage::F32(_) => Rows::F32(slice::<f32>(w, layout)?),
            _ => candle_core::bail!("linear: the weight is not leased, or no dense weight"),
        };
        product(x, rows, layout.shape().dims2()?, bias)
    }
}

/// `x · wᵀ (+ bias)` of storages whose lengths are checked here; `w` is `[outputs, inputs]`.
pub(crate) fn product(
    (x, layout): (&CpuStorage, &Layout),
    w: Rows<'_>,
    (outputs, inputs): (usize, usize),
    bias: Option<(&CpuStorage, &Layout)>,
) -> candle_core::Result<(CpuStorage, Shape)> {
    let (rows, width) = layout.shape().dims2()?;
    if width != inputs {
        candle_core::bail!("linear: input of width {width}, weight [{outputs}, {inputs}]");
    }
    let x = slice::<f32>(x, layout)?;
    let bias = bias.map(|(s, l)| slice::<f32>(s, l)).transpose()?;
    if let Some(bias) = bias
        && bias.len() != outputs
    {
        candle_core::bail!("linear: {} biases for {outputs} outputs", bias.len());
    }
    let out = product_nt(x, w, bias, rows, outputs, inputs);
    Ok((CpuStorage::F32(out), Shape::from((rows, outputs))))
}

pub(crate) fn slice<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [T]> {
    let all = storage.as_slice::<T>()?;
    layout.contiguous_offsets().and_then(|(from, to)| all.get(from..to)).ok_or_else(|| {
        candle_core::Error::msg("linear: an operand is not contiguous or not bound").bt()
    })
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Self::run((x, lx), (w, lw), None)
    }
}

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        "linear with bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Self::run((x, lx), (w, lw), Some((b, lb)))
    }
}
