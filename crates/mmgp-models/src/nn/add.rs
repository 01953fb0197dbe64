//! Sums of tensors.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use crate::nn::cuda;

/// `x + y`, where the shape of `y` broadcasts to that of `x`.
///
/// # Errors
/// Shapes that do not fit each other; tensors of several devices or dtypes.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    add_scaled(x, y, 1.)
}

/// `x + factor · y`, where the shape of `y` broadcasts to that of `x`; both operations round.
///
/// # Errors
/// Those of [`add`].
pub fn add_scaled(x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::take(&[x, y])
        && let Some(sum) = cuda::add(x, y, factor)?
    {
        return Ok(sum);
    }
    let y = if factor == 1. { y.clone() } else { (y * factor)? };
    if x.dims() == y.dims() { x + y } else { x + y.broadcast_as(x.dims())? }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_added_is_scaled_and_broadcast() -> Result<()> {
        let dev = Device::Cpu;
        let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &dev)?;
        assert_eq!(add(&x, &x)?.to_vec2::<f32>()?, [[2., 4.], [6., 8.]]);
        let row = Tensor::new(&[10f32, 20.], &dev)?;
        assert_eq!(add_scaled(&x, &row, -1.)?.to_vec2::<f32>()?, [[-9., -18.], [-7., -16.]]);
        let column = Tensor::new(&[[100f32], [200.]], &dev)?;
        assert_eq!(add(&x, &column)?.to_vec2::<f32>()?, [[101., 102.], [203., 204.]]);
        assert!(add(&row, &x).is_err(), "the sum has the shape of the first");
        Ok(())
    }
}
