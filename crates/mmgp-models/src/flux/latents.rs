//! Latents as tokens: FLUX sees squares of 2 × 2 latent pixels, each a token with a position.
//!
//! Positions have three axes: one that is 0 for pictures and text alike, then row and column.

use candle_core::{Device, Result, Tensor};

use crate::nn::contiguous;

/// Latents `[batch, channels, height, width]` to tokens `[batch, (height/2)(width/2), channels · 4]`,
/// row by row; a token's values are ordered channel, row, column.
///
/// # Errors
/// An odd height or width.
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = latents.dims4()?;
    let (rows, columns) = (height / 2, width / 2);
    let parts = latents.reshape((batch, channels, rows, 2, columns, 2))?;
    contiguous(&parts.permute((0, 2, 4, 1, 3, 5))?)?.reshape((batch, rows * columns, channels * 4))
}

/// Tokens back to latents: the inverse of [`pack`], for a grid of `rows` × `columns` tokens.
///
/// # Errors
/// Another number of tokens; a token width that is no multiple of 4.
pub fn unpack(tokens: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    let (batch, _, width) = tokens.dims3()?;
    let channels = width / 4;
    let parts = tokens.reshape((batch, rows, columns, channels, 2, 2))?;
    contiguous(&parts.permute((0, 3, 1, 4, 2, 5))?)?.reshape((
        batch,
        channels,
        rows * 2,
        columns * 2,
    ))
}

/// The positions of a grid of `rows` × `columns` picture tokens: `[rows · columns, 3]` of
/// (0, row, column), f32.
///
/// # Errors
/// None of its own.
pub fn image_ids(rows: usize, columns: usize, device: &Device) -> Result<Tensor> {
    let ids: Vec<f32> = (0..rows * columns)
        .flat_map(|at| [0., (at / columns) as f32, (at % columns) as f32])
        .collect();
    Tensor::from_vec(ids, (rows * columns, 3), device)
}

/// The positions of text tokens: `[tokens, 3]` of zeros, f32.
///
/// # Errors
/// None of its own.
pub fn text_ids(tokens: usize, device: &Device) -> Result<Tensor> {
    Tensor::zeros((tokens, 3), candle_core::DType::F32, device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpack_undoes_pack() -> Result<()> {
        let dev = Device::Cpu;
        let latents = Tensor::arange(0f32, 2. * 3. * 4. * 6., &dev)?.reshape((2, 3, 4, 6))?;
        let tokens = pack(&latents)?;
        assert_eq!(tokens.dims(), [2, 6, 12]);
        // Token (row 1, column 2) of item 0: channel 0 first, rows 2 and 3, columns 4 and 5.
        let token = tokens.get(0)?.get(5)?.to_vec1::<f32>()?;
        assert_eq!(token[..5], [16., 17., 22., 23., 40.]);
        let back = unpack(&tokens, 2, 3)?;
        assert_eq!((back - latents)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.);
        assert!(pack(&Tensor::zeros((1, 1, 3, 4), candle_core::DType::F32, &dev)?).is_err());
        Ok(())
    }

    #[test]
    fn positions_are_row_then_column() -> Result<()> {
        let ids = image_ids(2, 3, &Device::Cpu)?.to_vec2::<f32>()?;
        assert_eq!(ids[0], [0., 0., 0.]);
        assert_eq!(ids[5], [0., 1., 2.]);
        assert_eq!(text_ids(4, &Device::Cpu)?.dims(), [4, 3]);
        Ok(())
    }
}
