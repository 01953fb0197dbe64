//! Patches of video latents: how they are cut and put together, and their embedding where it is stored
//! as a convolution.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Weights};

use crate::nn::{add, contiguous};

/// How latents are cut: `frames` × `side` × `side` values of each channel make a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Frames of a patch.
    pub frames: usize,
    /// Its height and width.
    pub side: usize,
}

impl Patch {
    /// The values of a patch of `channels`.
    pub fn values(self, channels: usize) -> usize {
        channels * self.frames * self.side * self.side
    }

    /// `[batch, frames, channels, height, width]` to `[batch, patches, values]`, the values of a patch
    /// channel by channel, frame by frame, row by row.
    ///
    /// # Errors
    /// Latents of another rank, or that are no whole patches.
    pub fn cut(self, x: &Tensor) -> Result<Tensor> {
        let (batch, frames, channels, height, width) = x.dims5()?;
        let (t, p) = (self.frames, self.side);
        let whole = |n: usize, by: usize| by > 0 && n.is_multiple_of(by);
        if !whole(frames, t) || !whole(height, p) || !whole(width, p) {
            candle_core::bail!("patches: {:?} in {self:?}", x.dims());
        }
        let (f, h, w) = (frames / t, height / p, width / p);
        let parts = x.reshape(vec![batch, f, t, channels, h, p, w, p])?;
        contiguous(&parts.permute([0, 1, 4, 6, 3, 2, 5, 7])?)?.reshape((
            batch,
            f * h * w,
            self.values(channels),
        ))
    }

    /// What [`Patch::cut`] undoes: `grid` is the patches in frames, rows and columns.
    ///
    /// # Errors
    /// Another number of patches or values.
    pub fn join(self, x: &Tensor, [f, h, w]: [usize; 3]) -> Result<Tensor> {
        let (batch, _, values) = x.dims3()?;
        let (t, p) = (self.frames, self.side);
        let channels = values / self.values(1).max(1);
        let parts = x.reshape(vec![batch, f, h, w, channels, t, p, p])?;
        contiguous(&parts.permute([0, 1, 5, 4, 2, 6, 3, 7])?)?.reshape((
            batch,
            f * t,
            channels,
            h * p,
            w * p,
        ))
    }
}

/// The embedding of patches as a convolution stores it: its windows do not overlap, so that it is a
/// product with each patch.
#[derive(Debug)]
pub struct PatchConv {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl PatchConv {
    /// Asks for `weight` of `shape`, the outputs first, then the channels and sides of a patch, and
    /// `bias`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(weights: &Weights, shape: &[usize], bias: Bias) -> mmgp_quant::Result<Self> {
        let weight = weights.tensor(shape, "weight")?;
        let bias = match bias {
            Bias::Yes => Some(weights.tensor(&shape[..1], "bias")?),
            Bias::No => None,
        };
        Ok(Self { weight, bias })
    }

    /// `[batch, patches, values]`, as [`Patch::cut`] gives them, to `[batch, patches, outputs]`.
    ///
    /// # Errors
    /// Another number of values; weights that are not leased.
    pub fn forward(&self, rows: &Tensor) -> Result<Tensor> {
        let (batch, patches, values) = rows.dims3()?;
        let weight = self.weight.flatten_from(1)?.t()?;
        let y = rows.reshape((batch * patches, values))?.matmul(&weight)?;
        let y = match &self.bias {
            Some(bias) => add(&y, bias)?,
            None => y,
        };
        y.reshape((batch, patches, ()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn patches_hold_channels_then_frames_then_rows() -> Result<()> {
        let patch = Patch { frames: 2, side: 2 };
        let shape = [1, 4, 3, 4, 6];
        let count: usize = shape.iter().product();
        let x = Tensor::arange(0f32, count as f32, &Device::Cpu)?.reshape(&shape[..])?;
        let rows = patch.cut(&x)?;
        assert_eq!(rows.dims(), [1, 2 * 2 * 3, 24]);
        let at = |f, c, h, w| (((f * 3 + c) * 4 + h) * 6 + w) as f32;
        // The patch of frames 2 and 3, rows 2 and 3, columns 4 and 5 is the last one.
        let last = rows.squeeze(0)?.to_vec2::<f32>()?.pop().unwrap_or_default();
        let mut want = Vec::new();
        for (c, f) in (0..3).flat_map(|c| [2, 3].map(|f| (c, f))) {
            for h in [2, 3] {
                want.extend([4, 5].map(|w| at(f, c, h, w)));
            }
        }
        assert_eq!(last, want);
        let back = patch.join(&rows, [2, 2, 3])?;
        assert_eq!(back.dims(), shape);
        assert_eq!(back.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
        for (frames, side) in [(5, 2), (2, 4), (0, 2), (2, 0)] {
            assert!(Patch { frames, side }.cut(&x).is_err());
            assert!(Patch { frames, side }.join(&rows, [2, 2, 3]).is_err());
        }
        Ok(())
    }
}
