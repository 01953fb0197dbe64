//! Copies: of tensors whose values lie apart, and of lines of tables.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use crate::nn::cuda;

/// `x`, or a copy of it whose values lie side by side.
///
/// # Errors
/// Weights that are not leased.
pub fn contiguous(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if cuda::take(&[x])
        && let Some(copy) = cuda::contiguous(x)?
    {
        return Ok(copy);
    }
    x.contiguous()
}

/// The lines of `table` `[lines, width]` for `ids` `[rows]`, u32: `[rows, width]`.
///
/// # Errors
/// Ids that the table does not have; on GPUs, which are not waited for, NaN stands for their lines.
pub fn look_up(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::take(&[table]) && table.device().same_device(ids.device()) {
        return cuda::look(table, ids);
    }
    table.index_select(ids, 0)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn values_keep_their_order_and_lines_their_ids() -> Result<()> {
        let x = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
        let turned = contiguous(&x.t()?)?;
        assert!(turned.is_contiguous());
        assert_eq!(turned.to_vec2::<f32>()?, [[1., 3., 5.], [2., 4., 6.]]);
        let ids = Tensor::new(&[2u32, 0, 2], &Device::Cpu)?;
        assert_eq!(look_up(&x, &ids)?.to_vec2::<f32>()?, [[5., 6.], [1., 2.], [5., 6.]]);
        assert!(look_up(&x, &Tensor::new(&[3u32], &Device::Cpu)?).is_err());
        Ok(())
    }
}
