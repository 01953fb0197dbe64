//! One file a number format.

pub(crate) mod dense;
pub(crate) mod fp8;
pub(crate) mod int8;

use candle_core::DType;
use mmgp_io::Dtype;

use crate::{Part, Source};

/// The dtype that `parts` are stored in, where they share one of bf16 and f16, else f32: what scales in it decode to.
fn stored_in(source: &dyn Source, parts: &[Part]) -> DType {
    let dtype = |part: &Part| match source.stored(&part.name).map(|stored| stored.dtype) {
        Some(Dtype::BF16) => DType::BF16,
        Some(Dtype::F16) => DType::F16,
        _ => DType::F32,
    };
    let mut dtypes = parts.iter().map(dtype);
    let first = dtypes.next().unwrap_or(DType::F32);
    if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
}
