//! The video autoencoder, as diffusers' `AutoencoderKLHunyuanVideo` saves it: its decoder.
//!
//! A video is decoded in tiles of a few latent frames that overlap and are blended, and the finished
//! frames of each go to the caller at once, so that memory does not grow with the number of frames; a
//! tile of time is cut into tiles of space, so that it does not grow with their size either, but for the
//! pixels themselves. Where tiles lie is a function of shape and options. The parts are in `vae_parts`.

use candle_core::{DType, Tensor};
use mmgp_residency::{ModelBuilder, Paged};

use super::{HunyuanVideoVaeConfig, vae_parts::Decoder};
use crate::{
    Error, Result,
    nn::contiguous,
    vae::tiling::{Side, blend, in_tiles},
};

/// Tiles along one side, in pixels, or along time, in frames: how large they are, and how far the next
/// one begins behind the one before. What they share is blended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Pixels or frames of a tile: a multiple of the compression.
    pub size: usize,
    /// Pixels or frames from one tile to the next: a multiple of the compression, not above `size`.
    pub stride: usize,
}

/// How a video is cut into tiles; part of the recipe, since norms see a tile and not the video.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Along height and width; `None` takes frames as a whole.
    pub space: Option<[Tile; 2]>,
    /// Along time. A video that one tile holds is not cut.
    pub frames: Tile,
}

impl Default for Tiling {
    /// What diffusers' `enable_tiling()` sets.
    fn default() -> Self {
        let space = Tile { size: 256, stride: 192 };
        Self { space: Some([space; 2]), frames: Tile { size: 16, stride: 12 } }
    }
}

impl Tiling {
    /// What diffusers does without `enable_tiling()`: tiles of time alone.
    pub fn of_time() -> Self {
        Self { space: None, ..Self::default() }
    }
}

/// The decoder of an `AutoencoderKLHunyuanVideo` whose weights are paged.
pub struct HunyuanVideoDecoder {
    model: Paged<Decoder, ()>,
    steps: usize,
    compute: DType,
    config: HunyuanVideoVaeConfig,
}

impl HunyuanVideoDecoder {
    /// Asks `builder` for the decoder's tensors. Nothing is read; the encoder's are left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &HunyuanVideoVaeConfig, mut builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let root = builder.stem();
        let decoder = Decoder::new(config, &root)?;
        builder.ignore("encoder.");
        builder.ignore("quant_conv.");
        let (steps, compute) = (decoder.steps(), root.compute_dtype());
        let model = builder.finish(decoder, Vec::new())?;
        Ok(Self { model, steps, compute, config: config.clone() })
    }

    /// Latents as a denoiser leaves them, `[batch, latent_channels, t, h, w]`, to frames
    /// `[batch, out_channels, frames, h · scale, w · scale]`, about −1 to 1, not clamped; f32.
    /// [`HunyuanVideoVaeConfig::frames`] says how many.
    ///
    /// # Errors
    /// Another number of channels, no frames; tiles that do not fit the model, see [`Tile`]; weights
    /// that cannot be read.
    pub fn decode(&self, latents: &Tensor, tiling: &Tiling) -> Result<Tensor> {
        let mut parts = Vec::new();
        self.decode_frames(latents, tiling, |part| {
            parts.push(part);
            Ok(())
        })?;
        Ok(Tensor::cat(&parts, 2)?)
    }

    /// The same, but `each` is given the finished frames of one tile of time after another, in order:
    /// `[batch, out_channels, n, h · scale, w · scale]`, f32. Beside them there are the activations of
    /// one tile and the frames that the next tile of time is blended with. No weights are leased while
    /// `each` runs.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode) and of `each`.
    pub fn decode_frames(
        &self,
        latents: &Tensor,
        tiling: &Tiling,
        mut each: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        let expected = self.config.latent_channels;
        let count = match *latents.dims() {
            [batch, channels, frames, height, width]
                if channels == expected && ![batch, frames, height, width].contains(&0) =>
            {
                frames
            }
            _ => {
                return Err(Error::Input(format!(
                    "latents of shape {:?}: expected [batch, {expected}, frames, height, width]",
                    latents.dims()
                )));
            }
        };
        let scale = self.config.scale();
        let side = |name: &str, tile: Tile, scale: usize| {
            Side::strided(name, tile.size, tile.stride, scale)
        };
        let times = side("frames", tiling.frames, self.config.temporal_compression_ratio)?;
        let space = match tiling.space {
            Some([height, width]) => {
                Some((side("height", height, scale)?, side("width", width, scale)?))
            }
            None => None,
        };
        let decode = |latents: &Tensor| match &space {
            Some((rows, columns)) => {
                in_tiles(latents, latents.dim(3)? * scale, rows, columns, |z| self.run(z))
            }
            None => self.run(latents),
        };
        if count <= times.tile {
            return each(decode(latents)?);
        }
        let mut before: Option<Tensor> = None;
        for from in (0..count).step_by(times.step) {
            // One latent more than a tile has: it gives the one frame that the tile before has too.
            let own = (times.tile + 1).min(count - from);
            if from > 0 && own == 1 {
                break;
            }
            let mut x = decode(&latents.narrow(2, from, own)?)?;
            let mut kept = times.kept + 1;
            if let Some(before) = &before {
                x = blend(before, x.narrow(2, 1, x.dim(2)? - 1)?, 2)?;
                kept = times.kept;
            }
            before = Some(times.edge(&x, 2)?);
            each(contiguous(&x.narrow(2, 0, kept.min(x.dim(2)?))?)?)?;
        }
        Ok(())
    }

    /// Stored tensors that neither decoder nor encoder use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }

    /// One tile.
    fn run(&self, latents: &Tensor) -> Result<Tensor> {
        let z = contiguous(&latents.to_dtype(DType::F32)?)?;
        let z = (z / self.config.scaling_factor)?;
        let mut x = z.to_dtype(self.compute)?;
        let pass = self.model.pass()?;
        for i in 0..self.steps {
            x = pass.stem(|decoder| decoder.step(i, &x))?;
        }
        Ok(x.to_dtype(DType::F32)?)
    }
}
