//! The config of a HunyuanVideo autoencoder, as diffusers' `AutoencoderKLHunyuanVideo` saves it.
//!
//! Every key has that class's default; every value is bounded before anything is computed from it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{
    Result,
    config::{Check, WIDTH},
};

/// `AutoencoderKLHunyuanVideo`; a key that is missing takes that class's default. What only the
/// encoder reads is not here.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct HunyuanVideoVaeConfig {
    /// Channels of the frames that are decoded.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// One per level, `HunyuanVideoUpBlock3D`.
    pub up_block_types: Vec<String>,
    /// Channels of each level, from the frames down.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of an encoder level; a decoder level has one more.
    pub layers_per_block: usize,
    /// The activation, `silu`.
    pub act_fn: String,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// What the denoiser's latents are multiplied by.
    pub scaling_factor: f64,
    /// Pixels along each side of a latent pixel, a power of two.
    pub spatial_compression_ratio: usize,
    /// Frames of a latent frame, but for the first: 4.
    pub temporal_compression_ratio: usize,
    /// Whether the lowest level has attention.
    pub mid_block_add_attention: bool,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for HunyuanVideoVaeConfig {
    fn default() -> Self {
        Self {
            out_channels: 3,
            latent_channels: 16,
            up_block_types: vec![UP.into(); 4],
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            act_fn: "silu".into(),
            norm_num_groups: 32,
            scaling_factor: 0.476986,
            spatial_compression_ratio: 8,
            temporal_compression_ratio: 4,
            mid_block_add_attention: true,
            file: PathBuf::from("config"),
        }
    }
}

const UP: &str = "HunyuanVideoUpBlock3D";

/// How often frames are doubled.
const TIME_DOUBLINGS: usize = 2;

impl HunyuanVideoVaeConfig {
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
        check.range("out_channels", self.out_channels, 1..=1024)?;
        check.range("latent_channels", self.latent_channels, 1..=1024)?;
        check.range("layers_per_block", self.layers_per_block, 1..=64)?;
        let levels = self.block_out_channels.len();
        // Fewer could not double the frames often enough.
        let fits = (TIME_DOUBLINGS + 1..=16).contains(&levels);
        check.that(fits, "block_out_channels", "3 to 16 levels", levels)?;
        let types = &self.up_block_types;
        check.that(
            types.len() == levels && types.iter().all(|t| t == UP),
            "up_block_types",
            format_args!("{levels} × {UP}, one per entry of block_out_channels"),
            types,
        )?;
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
        check.positive("scaling_factor", self.scaling_factor)?;
        let (space, most) = (self.spatial_compression_ratio, 1usize << levels);
        check.that(
            space.is_power_of_two() && space <= most,
            "spatial_compression_ratio",
            format_args!("a power of two up to {most}, for {levels} levels"),
            space,
        )?;
        let time = self.temporal_compression_ratio;
        check.that(time == 1 << TIME_DOUBLINGS, "temporal_compression_ratio", 4, time)
    }

    /// How many pixels a latent pixel stands for along each side.
    pub fn scale(&self) -> usize {
        self.spatial_compression_ratio
    }

    /// How many frames `latent` latent frames decode to: 4 · (latent − 1) + 1.
    pub fn frames(&self, latent: usize) -> usize {
        match latent {
            0 => 0,
            n => (n - 1) * self.temporal_compression_ratio + 1,
        }
    }

    /// Whether level `level` of the decoder, from the latents on, doubles frames, and height and width.
    pub(super) fn doubles(&self, level: usize) -> (bool, bool) {
        let last = self.block_out_channels.len() - 1;
        let space = level < self.spatial_compression_ratio.ilog2() as usize;
        ((last - TIME_DOUBLINGS..last).contains(&level), space)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_values_are_named() {
        let base = HunyuanVideoVaeConfig::default();
        let with = |change: fn(&mut HunyuanVideoVaeConfig)| {
            let mut config = base.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(base.validate().is_ok());
        for (error, key) in [
            (with(|c| c.norm_num_groups = 0), "`norm_num_groups`"),
            (with(|c| c.norm_num_groups = 48), "multiples of norm_num_groups 48"),
            (with(|c| c.block_out_channels.truncate(2)), "expected 3 to 16 levels, found 2"),
            (with(|c| c.up_block_types[3] = "UpDecoderBlock2D".into()), "`up_block_types`"),
            (with(|c| c.temporal_compression_ratio = 8), "expected 4, found 8"),
            (with(|c| c.spatial_compression_ratio = 0), "`spatial_compression_ratio`"),
            (with(|c| c.spatial_compression_ratio = 12), "a power of two up to 16"),
            (with(|c| c.spatial_compression_ratio = 32), "a power of two up to 16"),
            (with(|c| c.scaling_factor = f64::INFINITY), "`scaling_factor`"),
            (with(|c| c.act_fn = "relu".into()), "`act_fn`"),
        ] {
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn levels_double_as_the_published_model_does() {
        let config = HunyuanVideoVaeConfig::default();
        let levels = [0, 1, 2, 3].map(|level| config.doubles(level));
        assert_eq!(levels, [(false, true), (true, true), (true, true), (false, false)]);
        assert_eq!([0, 1, 2, 33].map(|n| config.frames(n)), [0, 1, 5, 129]);
    }
}
