//! Text encoders, each a stem and a list of blocks, and the tokenizers before them.
//!
//! Embedding tables stay in the dtype they are stored in: T5-XXL's alone would take half a gigabyte
//! in f32. Rows are looked up, then widened.

pub mod clip;
pub mod llama;
mod spiece;
pub mod t5;
pub mod tokenizer;

use candle_core::{DType, Tensor};

use crate::{Error, Result, nn::look_up};

/// Token ids `[batch, tokens]` as u32, whatever integers they came as.
pub(crate) fn ids(ids: &Tensor) -> Result<Tensor> {
    match ids.rank() {
        2 => Ok(ids.to_dtype(DType::U32)?.contiguous()?),
        _ => Err(Error::Input(format!("token ids are [batch, tokens], not {:?}", ids.dims()))),
    }
}

/// The rows of an embedding table for ids `[batch, tokens]`, in the dtype `compute`:
/// `[batch, tokens, width]`. The table stays as it is stored.
pub(crate) fn embed(table: &Tensor, ids: &Tensor, compute: DType) -> candle_core::Result<Tensor> {
    let (batch, tokens) = ids.dims2()?;
    let rows = look_up(table, &ids.flatten_all()?)?;
    rows.to_dtype(compute)?.reshape((batch, tokens, ()))
}
