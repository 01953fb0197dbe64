//! Tiles that overlap and are blended, as diffusers' video autoencoders cut frames, and frames of time.
//!
//! Where tiles lie is a function of shape and options. Where what a tile must see of the frames before is
//! large ([`Tiling`]), it is decoded for all frames before the next; its pixels wait in a file of the
//! disk, so that memory does not grow with the number of frames, and then each frame is put together.

use std::ops::Range;

use candle_core::Tensor;

use crate::{
    Error, Result,
    nn::contiguous,
    vae::{cogvideox::CogVideoXVaeConfig, spool::Spool},
};

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

    /// `[batch, channels, t, h, w]` to frames `[batch, …, 1, h · scale, w · scale]`, which `each` is
    /// given in order. `decode` makes frames of a tile and gives them to its caller in portions.
    /// Latents that fit in one tile are decoded as a whole, and their portions passed on.
    pub(super) fn decode(
        &self,
        latents: &Tensor,
        scale: usize,
        decode: impl Fn(&Tensor, &mut dyn FnMut(Tensor) -> Result<()>) -> Result<()>,
        each: &mut dyn FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        let rows = Side::overlapping("height", self.height, self.overlap_height, scale)?;
        let columns = Side::overlapping("width", self.width, self.overlap_width, scale)?;
        let size = [latents.dim(3)?, latents.dim(4)?];
        if size[0] <= rows.tile && size[1] <= columns.tile {
            return decode(latents, each);
        }
        let mut spools = Vec::new();
        for top in rows.tiles(size[0]) {
            let mut line = Vec::new();
            for left in columns.tiles(size[1]) {
                let mut spool = Spool::new()?;
                decode(&cut(latents, &top, &left)?, &mut |frames| spool.push(&frames))?;
                line.push(spool);
            }
            spools.push(line);
        }
        let frames = spools.first().and_then(|line| line.first()).map_or(0, Spool::len);
        for frame in 0..frames {
            let tiles =
                |i: usize, j: usize| Ok(spools[i][j].frame(frame)?.to_device(latents.device())?);
            each(joined(size, size[0] * scale, &rows, &columns, tiles)?)?;
        }
        Ok(())
    }

    /// Pictures `[batch, channels, 1, height, width]` to `[batch, …, 1, height / scale, width / scale]`.
    /// Tiles lie as in [`decode`](Self::decode); what is blended are latents, `⌊tile / scale ·
    /// overlap⌋` of them.
    pub(super) fn encode(
        &self,
        pictures: &Tensor,
        scale: usize,
        encode: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rows = Side::of_pixels("height", self.height, self.overlap_height, scale)?;
        let columns = Side::of_pixels("width", self.width, self.overlap_width, scale)?;
        in_tiles(pictures, pictures.dim(3)? / scale, &rows, &columns, encode)
    }
}

/// `[batch, channels, t, h, w]` to `[batch, …, height, …]` by `make`, tile by tile; at once if one tile
/// holds all. Of tiles that are made, only the edges that a neighbour is blended with are kept beside
/// the result.
pub(crate) fn in_tiles(
    x: &Tensor,
    height: usize,
    rows: &Side,
    columns: &Side,
    make: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let size = [x.dim(3)?, x.dim(4)?];
    if size[0] <= rows.tile && size[1] <= columns.tile {
        return make(x);
    }
    let tops: Vec<_> = rows.tiles(size[0]).collect();
    let lefts: Vec<_> = columns.tiles(size[1]).collect();
    joined(size, height, rows, columns, |i, j| make(&cut(x, &tops[i], &lefts[j])?))
}

fn cut(x: &Tensor, rows: &Range<usize>, columns: &Range<usize>) -> Result<Tensor> {
    let line = x.narrow(3, rows.start, rows.len())?;
    Ok(contiguous(&line.narrow(4, columns.start, columns.len())?)?)
}

/// What the tiles of something of `size` make together, `height` rows of it, blended from the first row
/// and column on. `tile` gives the one in row `i` and column `j` of tiles.
fn joined(
    size: [usize; 2],
    height: usize,
    rows: &Side,
    columns: &Side,
    tile: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut out: Option<Tensor> = None;
    let mut at = 0;
    // The lowest rows of the tiles above.
    let mut above: Vec<Tensor> = Vec::new();
    for i in 0..rows.tiles(size[0]).count() {
        let mut line = Vec::new();
        let mut left: Option<Tensor> = None;
        for j in 0..columns.tiles(size[1]).count() {
            let mut tile = tile(i, j)?;
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
            line.push(contiguous(&kept.narrow(4, 0, columns.kept.min(tile.dim(4)?))?)?);
        }
        let line = contiguous(&Tensor::cat(&line, 4)?)?;
        let out = match &out {
            Some(out) => out,
            None => {
                let (batch, channels, frames, _, width) = line.dims5()?;
                let shape = (batch, channels, frames, height, width);
                out.insert(Tensor::zeros(shape, line.dtype(), line.device())?)
            }
        };
        out.slice_set(&line, 3, at)?;
        at += line.dim(3)?;
    }
    out.ok_or_else(|| Error::Input(format!("tiles of {size:?}")))
}

/// Where tiles lie along one side, or along time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Side {
    /// Size of a tile in what is cut: latent pixels where they are decoded, pixels where those are encoded.
    pub(crate) tile: usize,
    /// From one tile to the next in what is cut.
    pub(crate) step: usize,
    /// How much is blended of what is made.
    pub(crate) blend: usize,
    /// How much of a tile of what is made is taken.
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

    /// Where tiles lie in `size` of what is cut.
    fn tiles(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (tile, step) = (self.tile, self.step);
        (0..size).step_by(step).map(move |from| from..size.min(from + tile))
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

    /// Of a side whose pixels are cut, so that latents are made.
    fn of_pixels(side: &str, pixels: usize, overlap: f64, scale: usize) -> Result<Self> {
        let latent = Self::overlapping(side, pixels, overlap, scale)?;
        let step = (pixels as f64 * (1. - overlap)) as usize;
        let blend = (latent.tile as f64 * overlap) as usize;
        let kept = latent.tile - blend;
        if step != kept * scale {
            return Err(Error::Input(format!(
                "tile {side} {pixels} with overlap {overlap}: tiles start every {step} pixels, but \
                 {kept} latent pixels of {scale} are kept of each"
            )));
        }
        Ok(Self { tile: pixels, step, blend, kept })
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
        rest => {
            let rest = contiguous(&tile.narrow(dim, count, rest)?)?;
            Ok(contiguous(&Tensor::cat(&[&mixed, &rest], dim)?)?)
        }
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
        let rows = Side::of_pixels("height", tiling.height, tiling.overlap_height, 8)?;
        assert_eq!(rows, Side { tile: 240, step: 200, blend: 5, kept: 25 });
        let columns = Side::of_pixels("width", tiling.width, tiling.overlap_width, 8)?;
        assert_eq!(columns, Side { tile: 360, step: 288, blend: 9, kept: 36 });
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
            let mut got = Vec::new();
            let decode = |x: &Tensor, each: &mut dyn FnMut(Tensor) -> Result<()>| {
                // In two portions.
                let x = enlarge(x)?;
                each(x.narrow(2, 0, 1)?)?;
                each(x.narrow(2, 1, 1)?)
            };
            tiling.decode(&x, 2, decode, &mut |frame| {
                got.push(frame);
                Ok(())
            })?;
            let (got, want) = (Tensor::cat(&got, 2)?, enlarge(&x)?);
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
