//! The convolutional autoencoder of latent diffusion ([LDM](https://arxiv.org/abs/2112.10752)), as
//! diffusers' `AutoencoderKL` saves it.
//!
//! Decoder and encoder are two models over one checkpoint, each all stem: decoding needs no encoder
//! weights. Their parts are in `kl_parts`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use mmgp_residency::{ModelBuilder, Paged};
use serde::Deserialize;

pub use super::kl_parts::{Decoder, Encoder};
use crate::{
    Result,
    config::{Check, WIDTH},
};

/// `AutoencoderKL`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct KlConfig {
    /// Channels of the picture that is encoded.
    pub in_channels: usize,
    /// Channels of the picture that is decoded.
    pub out_channels: usize,
    /// One per level, `DownEncoderBlock2D`.
    pub down_block_types: Vec<String>,
    /// One per level, `UpDecoderBlock2D`.
    pub up_block_types: Vec<String>,
    /// Channels of each level, from the picture down.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of an encoder level; a decoder level has one more.
    pub layers_per_block: usize,
    /// The activation, `silu`.
    pub act_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Height and width of pictures it was trained on.
    pub sample_size: usize,
    /// What the denoiser's latents are multiplied by.
    pub scaling_factor: f64,
    /// What is subtracted before that; `None` counts as 0.
    pub shift_factor: Option<f64>,
    /// Whether a 1 × 1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1 × 1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether there is attention at the lowest level.
    pub mid_block_add_attention: bool,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DOWN.into()],
            up_block_types: vec![UP.into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            file: PathBuf::from("config"),
        }
    }
}

const DOWN: &str = "DownEncoderBlock2D";
const UP: &str = "UpDecoderBlock2D";

impl KlConfig {
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
        for (key, types, known) in [
            ("down_block_types", &self.down_block_types, DOWN),
            ("up_block_types", &self.up_block_types, UP),
        ] {
            let expected = format!("{levels} × {known}, one per entry of block_out_channels");
            check.that(types.len() == levels, key, &expected, types)?;
            check.that(types.iter().all(|t| t == known), key, &expected, types)?;
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
        check.range("sample_size", self.sample_size, 1..=(1 << 20))?;
        check.positive("scaling_factor", self.scaling_factor)?;
        let shift = self.shift_factor;
        check.that(self.shift().is_finite(), "shift_factor", "a number or null", shift)
    }

    /// How many picture pixels a latent pixel stands for along each side.
    pub fn scale(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    fn shift(&self) -> f64 {
        self.shift_factor.unwrap_or(0.)
    }
}

/// The decoder of an `AutoencoderKL` whose weights are paged.
pub struct KlDecoder {
    model: Paged<Decoder, ()>,
    config: KlConfig,
}

impl KlDecoder {
    /// Asks `builder` for the decoder's tensors. Nothing is read; the encoder's are left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &KlConfig, mut builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let decoder = Decoder::new(config, &builder.stem())?;
        builder.ignore("encoder.");
        builder.ignore("quant_conv.");
        Ok(Self { model: builder.finish(decoder, Vec::new())?, config: config.clone() })
    }

    /// Latents as a denoiser leaves them, `[batch, latent_channels, h, w]`, to pictures
    /// `[batch, out_channels, h · scale, w · scale]`, about −1 to 1, not clamped; f32.
    ///
    /// # Errors
    /// Another number of channels; weights that cannot be read.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let latents =
            ((latents.to_dtype(DType::F32)? / self.config.scaling_factor)? + self.config.shift())?;
        Ok(self.model.pass()?.stem(|decoder| decoder.forward(&latents))?)
    }

    /// Stored tensors that neither decoder nor encoder use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }
}

/// What an encoder says about pictures: a normal distribution of latents, `[batch, latent_channels,
/// h, w]`, f32, of the mean μ and the variance σ².
#[derive(Clone, Debug)]
pub struct Moments {
    /// The mean, not scaled.
    pub mean: Tensor,
    /// The logarithm of the variance, clamped to −30..20.
    pub logvar: Tensor,
    /// The mean as a denoiser takes it: (mean − shift) · scaling.
    pub latents: Tensor,
}

/// The encoder of an `AutoencoderKL` whose weights are paged.
pub struct KlEncoder {
    model: Paged<Encoder, ()>,
    config: KlConfig,
}

impl KlEncoder {
    /// Asks `builder` for the encoder's tensors. Nothing is read; the decoder's are left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &KlConfig, mut builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let encoder = Encoder::new(config, &builder.stem())?;
        builder.ignore("decoder.");
        builder.ignore("post_quant_conv.");
        Ok(Self { model: builder.finish(encoder, Vec::new())?, config: config.clone() })
    }

    /// Pictures `[batch, in_channels, height, width]`, about −1 to 1, f32.
    ///
    /// # Errors
    /// Another number of channels; a picture smaller than a latent pixel; weights that cannot be
    /// read.
    pub fn encode(&self, pictures: &Tensor) -> Result<Moments> {
        let moments = self.model.pass()?.stem(|encoder| encoder.forward(pictures))?;
        let channels = self.config.latent_channels;
        let mean = moments.narrow(1, 0, channels)?.contiguous()?;
        let logvar = moments.narrow(1, channels, channels)?.clamp(-30f32, 20f32)?;
        let latents = ((&mean - self.config.shift())? * self.config.scaling_factor)?;
        Ok(Moments { mean, logvar, latents })
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
        let base = KlConfig::default();
        let with = |change: fn(&mut KlConfig)| {
            let mut config = base.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(base.validate().is_ok());
        for (error, key) in [
            (with(|c| c.norm_num_groups = 0), "`norm_num_groups`"),
            (with(|c| c.norm_num_groups = 48), "multiples of norm_num_groups 48, found [64]"),
            (with(|c| c.block_out_channels.clear()), "`block_out_channels`"),
            (with(|c| c.block_out_channels = vec![64; 99]), "1 to 16 levels, found 99"),
            (with(|c| c.up_block_types = vec!["AttnUpDecoderBlock2D".into()]), "`up_block_types`"),
            (with(|c| c.layers_per_block = 1_000_000_000), "`layers_per_block`"),
            (with(|c| c.scaling_factor = 0.), "`scaling_factor`"),
        ] {
            assert!(error.contains(key), "{error}");
        }
    }
}
