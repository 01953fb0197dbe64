//! The video autoencoder of [CogVideoX](https://arxiv.org/abs/2408.06072), as diffusers'
//! `AutoencoderKLCogVideoX` saves it: its decoder.
//!
//! Latent frames are decoded two at a time, three at the first time if their number is odd, and the
//! pixels of each batch go to the caller at once, so that memory does not grow with the number of
//! frames. The parts are in `cogvideox_parts`, tiles in `tiling`.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{DType, Tensor};
use mmgp_residency::{ModelBuilder, Paged};
use serde::Deserialize;

use super::cogvideox_parts::{Decoder, Past};
pub use super::tiling::Tiling;
use crate::{
    Error, Result,
    config::{Check, WIDTH},
    nn::contiguous,
};

/// Latent frames that are decoded together.
const BATCH: usize = 2;

/// `AutoencoderKLCogVideoX`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct CogVideoXVaeConfig {
    /// Channels of a picture that is encoded.
    pub in_channels: usize,
    /// Channels of the frames that are decoded.
    pub out_channels: usize,
    /// One per level, `CogVideoXDownBlock3D`.
    pub down_block_types: Vec<String>,
    /// One per level, `CogVideoXUpBlock3D`.
    pub up_block_types: Vec<String>,
    /// Channels of each level, from the frames down.
    pub block_out_channels: Vec<usize>,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Residual blocks of an encoder level; a decoder level has one more.
    pub layers_per_block: usize,
    /// The activation, `silu`.
    pub act_fn: String,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Frames a latent frame stands for, a power of two.
    pub temporal_compression_ratio: f64,
    /// Height of the frames it was trained on.
    pub sample_height: usize,
    /// Width of the frames it was trained on.
    pub sample_width: usize,
    /// What the denoiser's latents are multiplied by.
    pub scaling_factor: f64,
    /// Whether the latents of a picture are divided by the factor instead.
    pub invert_scale_latents: bool,
    /// Whether a convolution follows the encoder; no published model has one, and it is refused.
    pub use_quant_conv: bool,
    /// Whether a convolution precedes the decoder; no published model has one, and it is refused.
    pub use_post_quant_conv: bool,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for CogVideoXVaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DOWN.into(); 4],
            up_block_types: vec![UP.into(); 4],
            block_out_channels: vec![128, 256, 256, 512],
            latent_channels: 16,
            layers_per_block: 3,
            act_fn: "silu".into(),
            norm_num_groups: 32,
            temporal_compression_ratio: 4.,
            sample_height: 480,
            sample_width: 720,
            scaling_factor: 1.15258426,
            invert_scale_latents: false,
            use_quant_conv: false,
            use_post_quant_conv: false,
            file: PathBuf::from("config"),
        }
    }
}

const DOWN: &str = "CogVideoXDownBlock3D";
const UP: &str = "CogVideoXUpBlock3D";

impl CogVideoXVaeConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// A file that is no such config; values that no such model can have.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let file = path.as_ref().to_path_buf();
        let config = Self { file, ..mmgp_io::read_json(path)? };
        config.validate()?;
        Ok(config)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// The first value that no such model can have, with file, key, expected and found.
    pub fn validate(&self) -> Result<()> {
        let check = Check::new(&self.file);
        check.range("in_channels", self.in_channels, 1..=1024)?;
        check.range("out_channels", self.out_channels, 1..=1024)?;
        check.range("latent_channels", self.latent_channels, 1..=1024)?;
        check.range("layers_per_block", self.layers_per_block, 1..=64)?;
        let levels = self.block_out_channels.len();
        check.that((1..=16).contains(&levels), "block_out_channels", "1 to 16 levels", levels)?;
        for (key, types, kind) in [
            ("down_block_types", &self.down_block_types, DOWN),
            ("up_block_types", &self.up_block_types, UP),
        ] {
            check.that(
                types.len() == levels && types.iter().all(|t| t == kind),
                key,
                format_args!("{levels} × {kind}, one per entry of block_out_channels"),
                types,
            )?;
        }
        let groups = self.norm_num_groups;
        check.range("norm_num_groups", groups, WIDTH)?;
        for &channels in &self.block_out_channels {
            check.range("block_out_channels", channels, WIDTH)?;
            check.that(
                channels.is_multiple_of(groups),
                "block_out_channels",
                format_args!("multiples of norm_num_groups {groups}"),
                &self.block_out_channels,
            )?;
        }
        let silu = matches!(self.act_fn.as_str(), "silu" | "swish");
        check.that(silu, "act_fn", "silu", &self.act_fn)?;
        let most = self.scale();
        let ratio = self.temporal_compression_ratio;
        check.that(
            (0..levels).any(|doublings| ratio == f64::from(1u32 << doublings)),
            "temporal_compression_ratio",
            format_args!("a power of two up to {most}, for {levels} levels"),
            ratio,
        )?;
        check.range("sample_height", self.sample_height, 1..=(1 << 20))?;
        check.range("sample_width", self.sample_width, 1..=(1 << 20))?;
        check.positive("scaling_factor", self.scaling_factor)?;
        let (quant, post) = (self.use_quant_conv, self.use_post_quant_conv);
        check.that(!quant, "use_quant_conv", "false", quant)?;
        check.that(!post, "use_post_quant_conv", "false", post)
    }

    /// What the latents of a picture are multiplied by for a denoiser that begins with it.
    pub(crate) fn picture_factor(&self) -> f64 {
        match self.invert_scale_latents {
            true => 1. / self.scaling_factor,
            false => self.scaling_factor,
        }
    }

    /// How many pixels a latent pixel stands for along each side.
    pub fn scale(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// How many levels of the decoder, from the latents on, double the frames.
    pub(crate) fn time_doublings(&self) -> usize {
        self.temporal_compression_ratio.log2() as usize
    }

    /// How many frames `latent` latent frames decode to: `r · (latent − 1) + 1` if their number is
    /// odd, `r · latent` if it is even, with `r` the temporal compression.
    pub fn frames(&self, latent: usize) -> usize {
        let ratio = 1 << self.time_doublings();
        match latent % 2 {
            0 => latent * ratio,
            _ => (latent - 1) * ratio + 1,
        }
    }
}

/// The latent frames of each batch.
fn batches(frames: usize) -> impl Iterator<Item = Range<usize>> {
    let odd = frames % BATCH;
    (0..(frames / BATCH).max(1)).map(move |k| {
        let from = BATCH * k + if k == 0 { 0 } else { odd };
        from..(BATCH * (k + 1) + odd).min(frames)
    })
}

/// The decoder of an `AutoencoderKLCogVideoX` whose weights are paged.
pub struct CogVideoXDecoder {
    model: Paged<Decoder, ()>,
    steps: usize,
    compute: DType,
    config: CogVideoXVaeConfig,
}

impl CogVideoXDecoder {
    /// Asks `builder` for the decoder's tensors. Nothing is read; the encoder's are left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &CogVideoXVaeConfig, mut builder: ModelBuilder) -> Result<Self> {
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
    /// [`CogVideoXVaeConfig::frames`] says how many.
    ///
    /// # Errors
    /// Another number of channels, no frames; weights that cannot be read.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut parts = Vec::new();
        self.decode_frames(latents, |part| {
            parts.push(part);
            Ok(())
        })?;
        Ok(Tensor::cat(&parts, 2)?)
    }

    /// The same, but `each` is given the frames of one batch after another, in order:
    /// `[batch, out_channels, n, h · scale, w · scale]`, f32. Beside them there is one batch's
    /// activations, and of every convolution over time the two frames that it must see again. Each
    /// batch is a pass of its own; no weights are leased while `each` runs.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode) and of `each`.
    pub fn decode_frames(
        &self,
        latents: &Tensor,
        mut each: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        let (_, channels, frames, height, width) = latents.dims5()?;
        if channels != self.config.latent_channels || [frames, height, width].contains(&0) {
            return Err(Error::Input(format!(
                "latents of shape {:?}: expected [batch, {}, frames, height, width]",
                latents.dims(),
                self.config.latent_channels
            )));
        }
        let mut pasts = vec![Past::new(); self.steps];
        for frames in batches(frames) {
            let z = contiguous(&latents.narrow(2, frames.start, frames.len())?)?;
            let z = (z.to_dtype(DType::F32)? / self.config.scaling_factor)?;
            let z = z.to_dtype(self.compute)?;
            let mut x = z.clone();
            let pass = self.model.pass()?;
            for (i, past) in pasts.iter_mut().enumerate() {
                (x, *past) = pass.stem(|decoder| decoder.step(i, &x, &z, past))?;
            }
            drop(pass);
            each(x.to_dtype(DType::F32)?)?;
        }
        Ok(())
    }

    /// [`decode_frames`](Self::decode_frames) in tiles that overlap and are blended, for frames whose
    /// activations are too large: in memory there are a tile's activations and one frame, the tiles'
    /// pixels wait in a temporary file. The result differs from the whole frames', since norms see a
    /// tile and not the frame. Latents that fit in one tile are decoded as a whole.
    ///
    /// # Errors
    /// Those of `decode_frames`; tiles that do not fit the model, see [`Tiling`]; a disk that is full.
    pub fn decode_tiled_frames(
        &self,
        latents: &Tensor,
        tiling: &Tiling,
        mut each: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        let decode = |tile: &Tensor, each: &mut dyn FnMut(Tensor) -> Result<()>| {
            self.decode_frames(tile, each)
        };
        tiling.decode(latents, self.config.scale(), decode, &mut each)
    }

    /// The same, with all frames in one tensor.
    ///
    /// # Errors
    /// Those of `decode_tiled_frames`.
    pub fn decode_tiled(&self, latents: &Tensor, tiling: &Tiling) -> Result<Tensor> {
        let mut parts = Vec::new();
        self.decode_tiled_frames(latents, tiling, |part| {
            parts.push(part);
            Ok(())
        })?;
        Ok(Tensor::cat(&parts, 2)?)
    }

    /// Stored tensors that neither decoder nor encoder use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_values_are_named() {
        let base = CogVideoXVaeConfig::default();
        let with = |change: fn(&mut CogVideoXVaeConfig)| {
            let mut config = base.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(base.validate().is_ok());
        for (error, key) in [
            (with(|c| c.norm_num_groups = 0), "`norm_num_groups`"),
            (with(|c| c.norm_num_groups = 48), "multiples of norm_num_groups 48"),
            (with(|c| c.block_out_channels.clear()), "`block_out_channels`"),
            (with(|c| c.up_block_types[3] = "UpDecoderBlock2D".into()), "`up_block_types`"),
            (with(|c| c.temporal_compression_ratio = 3.), "a power of two up to 8"),
            (with(|c| c.temporal_compression_ratio = 16.), "`temporal_compression_ratio`"),
            (with(|c| c.temporal_compression_ratio = f64::NAN), "found NaN"),
            (with(|c| c.scaling_factor = f64::INFINITY), "`scaling_factor`"),
            (with(|c| c.use_post_quant_conv = true), "`use_post_quant_conv`"),
        ] {
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn an_odd_frame_joins_the_first_batch() {
        let of = |frames| batches(frames).map(|r| (r.start, r.end)).collect::<Vec<_>>();
        assert_eq!(of(1), [(0, 1)]);
        assert_eq!(of(2), [(0, 2)]);
        assert_eq!(of(3), [(0, 3)]);
        assert_eq!(of(6), [(0, 2), (2, 4), (4, 6)]);
        assert_eq!(of(7), [(0, 3), (3, 5), (5, 7)]);
        let config = CogVideoXVaeConfig::default();
        assert_eq!([1, 2, 3, 13].map(|n| config.frames(n)), [1, 8, 9, 49]);
    }
}
