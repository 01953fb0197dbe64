//! The numbers that codes stand for, as an operation over tensors.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use crate::{Codes, Real, formats::dense::slice};

/// `code · scale`, rounded once to `dtype` (bf16, f16 or f32), rotated back before that where rows were rotated: `codes` U8
/// `[rows, width]`, `scales` f32 `[rows, 1]`; without scales they are 1.
pub(crate) fn decoded(
    of: Codes,
    codes: &Tensor,
    scales: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    let decode = Decode { of, dtype };
    match scales {
        Some(scales) => codes.apply_op2_no_bwd(scales, &decode),
        None => codes.apply_op1_no_bwd(&decode),
    }
}

struct Decode {
    of: Codes,
    dtype: DType,
}

impl Decode {
    fn on_cpu(
        &self,
        (codes, lc): (&CpuStorage, &Layout),
        scales: &[f32],
    ) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real + bytemuck::Zeroable>(
            of: Codes,
            codes: &[u8],
            inputs: usize,
            scales: &[f32],
        ) -> Vec<T> {
            let mut weight = bytemuck::allocation::zeroed_vec(codes.len());
            of.decode(codes, inputs, scales, &mut weight);
            weight
        }
        let (rows, width) = lc.shape().dims2()?;
        if scales.len() != rows {
            bail!("{}: {} scales for {rows} outputs", self.of, scales.len());
        }
        let (of, codes) = (self.of, slice::<u8>(codes, lc)?);
        let storage = match self.dtype {
            DType::BF16 => CpuStorage::BF16(run::<bf16>(of, codes, width, scales)),
            DType::F16 => CpuStorage::F16(run::<f16>(of, codes, width, scales)),
            DType::F32 => CpuStorage::F32(run::<f32>(of, codes, width, scales)),
            other => bail!("{of}: weights are not decoded to {other:?}"),
        };
        Ok((storage, Shape::from((rows, width))))
    }
}

impl CustomOp1 for Decode {
    fn name(&self) -> &'static str {
        "decode"
    }

    fn cpu_fwd(&self, codes: &CpuStorage, lc: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((codes, lc), &vec![1.; lc.shape().dims2()?.0])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, codes: &CudaStorage, lc: &Layout) -> Result<(CudaStorage, Shape)> {
        crate::kernels::cuda::expand(self.of, (codes, lc), None, self.dtype)
    }
}

impl CustomOp2 for Decode {
    fn name(&self) -> &'static str {
        "decode"
    }

    fn cpu_fwd(
        &self,
        codes: &CpuStorage,
        lc: &Layout,
        scales: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((codes, lc), slice::<f32>(scales, ls)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        codes: &CudaStorage,
        lc: &Layout,
        scales: &CudaStorage,
        ls: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        crate::kernels::cuda::expand(self.of, (codes, lc), Some((scales, ls)), self.dtype)
    }
}
