//! One file a number format.

pub(crate) mod dense;
pub(crate) mod fp8;
pub(crate) mod int8;

use candle_core::{DType, Tensor};

use crate::Codes;

/// `code · scale` of codes U8 `[rows, width]` with a scale for each row, `[rows, 1]`, in `dtype`.
pub(crate) fn decoded(
    of: Codes,
    codes: &Tensor,
    scales: &Tensor,
    dtype: DType,
) -> candle_core::Result<Tensor> {
    match of {
        Codes::Int8 | Codes::RotatedInt8 => {
            codes.apply_op2_no_bwd(scales, &int8::Decode { of, dtype })
        }
        Codes::Fp8 => codes.apply_op2_no_bwd(scales, &fp8::Decode { dtype }),
    }?
    .to_dtype(dtype)
}
