//! Tiles that overlap and are blended, as diffusers' video autoencoders cut frames, and frames of time.
//!
//! Where tiles lie is a function of shape and options. A tile is decoded for all frames before the
//! next; of those that are done, only the edges that a neighbour is blended with are kept beside the
//! result.

use candle_core::Tensor;

use crate::{Error, Result, vae::cogvideox::CogVideoXVaeConfig};

/// How frames are cut into tiles: diffusers' `tile_sample_min_height`, `tile_sample_min_width`,
/// `tile_overlap_factor_height` and `tile_overlap_factor_width`.
///
/// Along each side, with `s` pixels per latent pixel, tiles of `tile / s` latent pixels start every
/// `⌊tile / s · (1 − overlap)⌋`; `⌊tile · overlap⌋` pixels are blended, and the rest of a tile but
/// its last `⌊tile · overlap⌋` is taken as it is. Sizes at which these do not meet are refused: there
/// diffusers' frames have another size, or seams.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tiling {
    /// Height of a tile in pixels.
    pub height: usize,
    /// Width of a tile in pixels.
    pub width: usize,
    /// The part of its height that a tile shares with the one below, from 0 to below 1.
    pub overlap_height: f64,
    /// The part of its width that a tile shares with the one to the right, from 0 to below 1.
    pub overlap_width: f64,
}

impl Tiling {
    /// What `AutoencoderKLCogVideoX.enable_tiling()` sets: half of the trained size, a sixth and a
    /// fifth of it shared.
    pub fn of_cogvideox(config: &CogVideoXVaeConfig) -> Self {
        Self {
            height: config.sample_height / 2,
            width: config.sample_width / 2,
            overlap_height: 1. / 6.,
            overlap_width: 1. / 5.,
        }
    }

    /// `[batch, channels, t, h, w]` to `[batch, …, h · scale, w · scale]` by `decode`, tile by tile.
    pub(super) fn decode(
        &self,
        latents: &Tensor,
        scale: usize,
        decode: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rows = Side::overlapping("height", self.height, self.overlap_height, scale)?;
        let columns = Side::overlapping("width", self.width, self.overlap_width, scale)?;
        in_tiles(latents, scale, &rows, &columns, decode)
    }
}

/// `[batch, channels, t, h, w]` to `[batch, …, h · scale, w · scale]` by `decode`, tile by tile; at once
/// if one tile holds all.
pub(crate) fn in_tiles(
    latents: &Tensor,
    scale: usize,
    rows: &Side,
    columns: &Side,
    decode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (height, width) = (latents.dim(3)?, latents.dim(4)?);
    if height <= rows.tile && width <= columns.tile {
        return decode(latents);
    }
    let mut out: Option<Tensor> = None;
    // The lowest rows of the tiles above.
    let mut above: Vec<Tensor> = Vec::new();
    for (i, y) in (0..height).step_by(rows.step).enumerate() {
        let mut line = Vec::new();
        let mut left: Option<Tensor> = None;
        for (j, x) in (0..width).step_by(columns.step).enumerate() {
            let part = latents.narrow(3, y, rows.tile.min(height - y))?;
            let part = part.narrow(4, x, columns.tile.min(width - x))?.contiguous()?;
            let mut tile = decode(&part)?;
            if i > 0 {
                tile = blend(&above[j], tile, 3)?;
            }
            if let Some(left) = &left {
                tile = blend(left, tile, 4)?;
            }
            left = Some(columns.edge(&tile, 4)?);
            match i {
                0 => above.push(rows.edge(&tile, 3)?),
                _ => above[j] = rows.edge(&tile, 3)?,
            }
            let kept = tile.narrow(3, 0, rows.kept.min(tile.dim(3)?))?;
            line.push(kept.narrow(4, 0, columns.kept.min(tile.dim(4)?))?.contiguous()?);
        }
        let line = Tensor::cat(&line, 4)?.contiguous()?;
        let out = match &out {
            Some(out) => out,
            None => {
                let (batch, channels, frames, _, width) = line.dims5()?;
                let shape = (batch, channels, frames, height * scale, width);
                out.insert(Tensor::zeros(shape, line.dtype(), line.device())?)
            }
        };
        out.slice_set(&line, 3, y * scale)?;
    }
    out.ok_or_else(|| Error::Input(format!("latents of shape {:?}", latents.dims())))
}

/// Where tiles lie along one side, or along time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Side {
    /// Size of a tile, in latent pixels.
    pub(crate) tile: usize,
    /// From one tile to the next, in latent pixels.
    pub(crate) step: usize,
    /// Pixels that are blended.
    pub(crate) blend: usize,
    /// Pixels of a tile that are taken.
    pub(crate) kept: usize,
}

impl Side {
    /// Tiles of `pixels`, one every `stride` pixels; both are multiples of `scale`.
    pub(crate) fn strided(side: &str, pixels: usize, stride: usize, scale: usize) -> Result<Self> {
        let whole = |n: usize| n > 0 && n.is_multiple_of(scale);
        if !whole(pixels) || !whole(stride) || stride > pixels {
            return Err(Error::Input(format!(
                "tile {side} {pixels}, one every {stride}: expected multiples of {scale} above 0, the \
                 second not above the first"
            )));
        }
        let (tile, step) = (pixels / scale, stride / scale);
        Ok(Self { tile, step, blend: pixels - stride, kept: stride })
    }

    /// What a tile's neighbour is blended with: its last pixels along `dim`, in memory of their own.
    pub(crate) fn edge(&self, tile: &Tensor, dim: usize) -> Result<Tensor> {
        let size = tile.dim(dim)?;
        let count = self.blend.min(size);
        Ok(tile.narrow(dim, size - count, count)?.copy()?)
    }

    fn overlapping(side: &str, pixels: usize, overlap: f64, scale: usize) -> Result<Self> {
        if !(0. ..1.).contains(&overlap) {
            return Err(Error::Input(format!("tile {side}: overlap {overlap} is not in 0..1")));
        }
        let tile = pixels / scale;
        let step = (tile as f64 * (1. - overlap)) as usize;
        let blend = (pixels as f64 * overlap) as usize;
        let kept = pixels - blend;
        if step == 0 || kept != step * scale || pixels != tile * scale {
            return Err(Error::Input(format!(
                "tile {side} {pixels} with overlap {overlap}: tiles of {tile} latent pixels, of \
                 {scale} pixels each, start every {step}, but {kept} pixels are kept of each; \
                 choose a multiple of {scale} so that both agree"
            )));
        }
        Ok(Self { tile, step, blend, kept })
    }
}

/// `tile`, of which the first frames (`dim` 2), rows (3) or columns (4) pass over from the last of
/// `edge`: pixel `i` of `n` is `edge · (1 − i / n) + tile · i / n`.
pub(crate) fn blend(edge: &Tensor, tile: Tensor, dim: usize) -> Result<Tensor> {
    let (have, size) = (edge.dim(dim)?, tile.dim(dim)?);
    let count = have.min(size);
    if count == 0 {
        return Ok(tile);
    }
    let ramp = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f32> = (0..count).map(|i| f(i as f64 / count as f64) as f32).collect();
        let ramp = Tensor::from_vec(values, count, tile.device())?.to_dtype(tile.dtype())?;
        let mut shape = vec![count];
        shape.resize(tile.rank().saturating_sub(dim), 1);
        Ok(ramp.reshape(shape)?)
    };
    let old = edge.narrow(dim, have - count, count)?.broadcast_mul(&ramp(&|t| 1. - t)?)?;
    let new = tile.narrow(dim, 0, count)?.broadcast_mul(&ramp(&|t| t)?)?;
    let mixed = (old + new)?;
    match size - count {
        0 => Ok(mixed),
        rest => Ok(Tensor::cat(&[&mixed, &tile.narrow(dim, count, rest)?], dim)?.contiguous()?),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn sides_are_those_of_the_published_model() -> Result<()> {
        let tiling = Tiling::of_cogvideox(&CogVideoXVaeConfig::default());
        let rows = Side::overlapping("height", tiling.height, tiling.overlap_height, 8)?;
        assert_eq!(rows, Side { tile: 30, step: 25, blend: 40, kept: 200 });
        let columns = Side::overlapping("width", tiling.width, tiling.overlap_width, 8)?;
        assert_eq!(columns, Side { tile: 45, step: 36, blend: 72, kept: 288 });
        for (pixels, overlap) in [(240, 1.), (240, -0.1), (240, f64::NAN), (241, 0.25), (0, 0.)] {
            assert!(Side::overlapping("height", pixels, overlap, 8).is_err());
        }
        let error = Side::overlapping("height", 240, 0.35, 8).unwrap_err().to_string();
        assert!(error.contains("height 240 with overlap 0.35"), "{error}");
        let strided = Side::strided("height", 240, 200, 8)?;
        assert_eq!(strided, Side { tile: 30, step: 25, blend: 40, kept: 200 });
        for (pixels, stride) in [(240, 0), (240, 248), (241, 200), (240, 196), (0, 0)] {
            let error = Side::strided("width", pixels, stride, 8).unwrap_err().to_string();
            assert!(error.contains("tile width") && error.contains("multiples of 8"), "{error}");
        }
        Ok(())
    }

    /// Tiles of a plain enlargement are equal where they overlap, so blending must change nothing.
    #[test]
    fn tiles_that_agree_leave_no_seam() -> Result<()> {
        let tiling = Tiling { height: 16, width: 24, overlap_height: 0.25, overlap_width: 1. / 3. };
        for (h, w) in [(11, 7), (8, 12), (9, 12), (3, 13), (20, 1)] {
            let x = Tensor::randn(0f32, 1., (2, 3, 2, h, w), &Device::Cpu)?;
            let enlarge = |x: &Tensor| -> Result<Tensor> {
                let (b, c, t, h, w) = x.dims5()?;
                let x = x.reshape((b * c, t, h, w))?.upsample_nearest2d(2 * h, 2 * w)?;
                Ok(x.reshape((b, c, t, 2 * h, 2 * w))?)
            };
            let (got, want) = (tiling.decode(&x, 2, enlarge)?, enlarge(&x)?);
            assert_eq!(got.dims(), want.dims());
            let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 1e-6, "{h} × {w}: {worst}");
        }
        Ok(())
    }

    #[test]
    fn edges_pass_over_linearly() -> Result<()> {
        let of = |v: &[f32], shape| Tensor::from_slice(v, shape, &Device::Cpu);
        let edge = of(&[9., 4., 8.], (1, 1, 1, 1, 3))?;
        let tile = of(&[0., 2.], (1, 1, 1, 1, 2))?;
        let got = blend(&edge, tile, 4)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(got, [4., 5.]);
        let tile = Tensor::ones((1, 1, 1, 4, 3), DType::F32, &Device::Cpu)?;
        let edge = tile.affine(5., 0.)?.narrow(3, 0, 2)?;
        let got = blend(&edge, tile, 3)?.mean(4)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(got, [5., 3., 1., 1.]);
        let tile = Tensor::ones((1, 1, 4, 2, 3), DType::F32, &Device::Cpu)?;
        let edge = tile.affine(5., 0.)?.narrow(2, 0, 2)?;
        let got = blend(&edge, tile, 2)?.mean((3, 4))?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(got, [5., 3., 1., 1.]);
        Ok(())
    }
}
