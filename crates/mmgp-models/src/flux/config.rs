//! The config of a FLUX transformer, as diffusers' `FluxTransformer2DModel` saves it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{
    Result,
    config::{Check, HEADS, LAYERS, WIDTH},
};

/// `FluxTransformer2DModel`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct FluxConfig {
    /// Latent pixels joined along each side by the model itself; always 1, the pipeline packs.
    pub patch_size: usize,
    /// Width of a packed latent token.
    pub in_channels: usize,
    /// Width of an output token; `None` means that of the input.
    pub out_channels: Option<usize>,
    /// Double blocks.
    pub num_layers: usize,
    /// Single blocks.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of the text states.
    pub joint_attention_dim: usize,
    /// Width of the pooled text.
    pub pooled_projection_dim: usize,
    /// Whether the guidance scale is an input (FLUX.1-dev) or not (FLUX.1-schnell).
    pub guidance_embeds: bool,
    /// How many values of a head each position axis turns.
    pub axes_dims_rope: Vec<usize>,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            file: PathBuf::from("config"),
        }
    }
}

impl FluxConfig {
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
        let layers = 0..=*LAYERS.end();
        check.that(self.patch_size == 1, "patch_size", 1, self.patch_size)?;
        check.range("num_layers", self.num_layers, layers.clone())?;
        check.range("num_single_layers", self.num_single_layers, layers)?;
        let all = self.num_layers + self.num_single_layers;
        check.that(all > 0, "num_layers", "at least one block of either kind", all)?;
        check.range("num_attention_heads", self.num_attention_heads, HEADS)?;
        check.range("attention_head_dim", self.attention_head_dim, 2..=4096)?;
        check.range("in_channels", self.in_channels, WIDTH)?;
        check.range("out_channels", self.out_channels(), WIDTH)?;
        check.range("joint_attention_dim", self.joint_attention_dim, WIDTH)?;
        check.range("pooled_projection_dim", self.pooled_projection_dim, WIDTH)?;
        let axes = &self.axes_dims_rope;
        let three = axes.len() == 3;
        check.that(three, "axes_dims_rope", "3 axes (picture, row, column)", axes)?;
        let even = axes.iter().all(|d| *d > 0 && d % 2 == 0);
        check.that(even, "axes_dims_rope", "even numbers above 0", axes)?;
        let sum = axes.iter().try_fold(0usize, |sum, d| sum.checked_add(*d));
        let dim = self.attention_head_dim;
        check.that(
            sum == Some(dim),
            "axes_dims_rope",
            format_args!("numbers that add up to attention_head_dim {dim}"),
            axes,
        )
    }

    /// The width of the token stream.
    pub fn hidden(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// The width of an output token.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<FluxConfig> {
        let dir = tempfile::tempdir().map_err(candle_core::Error::wrap)?;
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).map_err(candle_core::Error::wrap)?;
        FluxConfig::from_file(&path)
    }

    #[test]
    fn missing_keys_take_the_class_defaults() -> Result<()> {
        let config = read(r#"{"_class_name": "FluxTransformer2DModel", "guidance_embeds": true}"#)?;
        assert_eq!((config.hidden(), config.out_channels()), (3072, 64));
        assert_eq!(config.axes_dims_rope, [16, 56, 56]);
        assert!(config.guidance_embeds);
        Ok(())
    }

    #[test]
    fn impossible_values_are_named() {
        for (json, key) in [
            (r#"{"num_attention_heads": 0}"#, "`num_attention_heads`: expected 1 to 1024, found 0"),
            (r#"{"num_layers": 1000000000}"#, "`num_layers`: expected 0 to 1024, found 1000000000"),
            (r#"{"num_layers": 0, "num_single_layers": 0}"#, "`num_layers`"),
            (
                r#"{"axes_dims_rope": [16, 56, 58]}"#,
                "add up to attention_head_dim 128, found [16, 56, 58]",
            ),
            (r#"{"axes_dims_rope": [15, 57, 56]}"#, "even numbers above 0, found [15, 57, 56]"),
            (r#"{"axes_dims_rope": [64, 64]}"#, "`axes_dims_rope`: expected 3 axes"),
            (r#"{"axes_dims_rope": [2, 18446744073709551614, 2]}"#, "add up to"),
            (r#"{"patch_size": 2}"#, "`patch_size`: expected 1, found 2"),
            (r#"{"out_channels": 0}"#, "`out_channels`"),
            (r#"{"guidance_embeds": 3.5}"#, "config.json:1:"),
            (r#"{"num_layers": -1}"#, "config.json:1:"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("config.json"), "{json}: {error}");
        }
    }
}
