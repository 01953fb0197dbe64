//! The config of a HunyuanVideo transformer, as diffusers' `HunyuanVideoTransformer3DModel` saves it.
//!
//! Every key has that class's default; every value is bounded before anything is computed from it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{
    Result,
    config::{Check, HEADS, LAYERS, WIDTH},
    nn::Patch,
};

/// `HunyuanVideoTransformer3DModel`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct HunyuanVideoConfig {
    /// Channels of the latents, with those of the picture where an image-to-video model reads one.
    pub in_channels: usize,
    /// Channels of the output; `None` means those of the input.
    pub out_channels: Option<usize>,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Double blocks.
    pub num_layers: usize,
    /// Single blocks.
    pub num_single_layers: usize,
    /// Blocks that refine the text.
    pub num_refiner_layers: usize,
    /// How much wider than the stream feed-forward layers are; only 4 is built.
    pub mlp_ratio: f64,
    /// Side of a patch.
    pub patch_size: usize,
    /// Frames of a patch.
    pub patch_size_t: usize,
    /// The norm of queries and keys; only `rms_norm` is built.
    pub qk_norm: String,
    /// Whether the guidance scale is an input.
    pub guidance_embeds: bool,
    /// Width of the text states.
    pub text_embed_dim: usize,
    /// Width of the pooled text.
    pub pooled_projection_dim: usize,
    /// θ of the rotary embedding.
    pub rope_theta: f64,
    /// How many values of a head frames, rows and columns turn.
    pub rope_axes_dim: Vec<usize>,
    /// How a picture conditions the video: not (`None`), or among the channels (`latent_concat`);
    /// `token_replace` is not built.
    pub image_condition_type: Option<String>,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for HunyuanVideoConfig {
    fn default() -> Self {
        Self {
            in_channels: 16,
            out_channels: Some(16),
            num_attention_heads: 24,
            attention_head_dim: 128,
            num_layers: 20,
            num_single_layers: 40,
            num_refiner_layers: 2,
            mlp_ratio: 4.,
            patch_size: 2,
            patch_size_t: 1,
            qk_norm: "rms_norm".into(),
            guidance_embeds: true,
            text_embed_dim: 4096,
            pooled_projection_dim: 768,
            rope_theta: 256.,
            rope_axes_dim: vec![16, 56, 56],
            image_condition_type: None,
            file: PathBuf::from("config"),
        }
    }
}

impl HunyuanVideoConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// A file that is no such config; values that no such model can have, or that are not built.
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
        check.range("num_layers", self.num_layers, layers.clone())?;
        check.range("num_single_layers", self.num_single_layers, layers.clone())?;
        check.range("num_refiner_layers", self.num_refiner_layers, layers)?;
        let all = self.num_layers + self.num_single_layers;
        check.that(all > 0, "num_layers", "at least one block of either kind", all)?;
        check.range("num_attention_heads", self.num_attention_heads, HEADS)?;
        check.range("attention_head_dim", self.attention_head_dim, 2..=4096)?;
        check.range("in_channels", self.in_channels, WIDTH)?;
        check.range("out_channels", self.out_channels(), WIDTH)?;
        check.range("patch_size", self.patch_size, 1..=64)?;
        check.range("patch_size_t", self.patch_size_t, 1..=16)?;
        check.range("text_embed_dim", self.text_embed_dim, WIDTH)?;
        check.range("pooled_projection_dim", self.pooled_projection_dim, WIDTH)?;
        check.positive("rope_theta", self.rope_theta)?;
        let ratio = self.mlp_ratio;
        check.that(ratio == 4., "mlp_ratio", "4 (no other is built)", ratio)?;
        let norm = "rms_norm (no other is built)";
        check.that(self.qk_norm == "rms_norm", "qk_norm", norm, &self.qk_norm)?;
        let kind = self.image_condition_type.as_deref();
        let built = matches!(kind, None | Some("latent_concat"));
        let expected = "null or latent_concat (token_replace is not built)";
        check.that(built, "image_condition_type", expected, kind.unwrap_or_default())?;

        let axes = &self.rope_axes_dim;
        let three = axes.len() == 3;
        check.that(three, "rope_axes_dim", "3 axes (frame, row, column)", axes)?;
        let even = axes.iter().all(|d| *d > 0 && d % 2 == 0);
        check.that(even, "rope_axes_dim", "even numbers above 0", axes)?;
        let sum = axes.iter().try_fold(0usize, |sum, d| sum.checked_add(*d));
        let dim = self.attention_head_dim;
        check.that(
            sum == Some(dim),
            "rope_axes_dim",
            format_args!("numbers that add up to attention_head_dim {dim}"),
            axes,
        )
    }

    /// The width of the token stream.
    pub fn hidden(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// The channels of the output.
    pub fn out_channels(&self) -> usize {
        self.out_channels.filter(|&n| n > 0).unwrap_or(self.in_channels)
    }

    /// How latents are cut.
    pub fn patch(&self) -> Patch {
        Patch { frames: self.patch_size_t, side: self.patch_size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<HunyuanVideoConfig> {
        let dir = tempfile::tempdir().map_err(candle_core::Error::wrap)?;
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).map_err(candle_core::Error::wrap)?;
        HunyuanVideoConfig::from_file(&path)
    }

    #[test]
    fn missing_keys_take_the_class_defaults() -> Result<()> {
        let config = read(r#"{"_class_name": "HunyuanVideoTransformer3DModel"}"#)?;
        assert_eq!((config.hidden(), config.out_channels()), (3072, 16));
        assert!(config.guidance_embeds);
        let picture = read(
            r#"{"in_channels": 33, "out_channels": null, "image_condition_type": "latent_concat"}"#,
        )?;
        assert_eq!(picture.out_channels(), 33);
        Ok(())
    }

    #[test]
    fn impossible_values_are_named() {
        for (json, key) in [
            (r#"{"num_attention_heads": 0}"#, "`num_attention_heads`: expected 1 to 1024, found 0"),
            (r#"{"num_layers": 1000000000}"#, "`num_layers`: expected 0 to 1024, found 1000000000"),
            (r#"{"num_layers": 0, "num_single_layers": 0}"#, "`num_layers`"),
            (r#"{"num_refiner_layers": 1025}"#, "`num_refiner_layers`"),
            (r#"{"rope_axes_dim": [16, 56, 58]}"#, "add up to attention_head_dim 128"),
            (r#"{"rope_axes_dim": [15, 57, 56]}"#, "even numbers above 0, found [15, 57, 56]"),
            (r#"{"rope_axes_dim": [64, 64]}"#, "`rope_axes_dim`: expected 3 axes"),
            (r#"{"rope_theta": 0}"#, "`rope_theta`"),
            (r#"{"patch_size": 0}"#, "`patch_size`: expected 1 to 64, found 0"),
            (r#"{"patch_size_t": 99}"#, "`patch_size_t`"),
            (r#"{"mlp_ratio": 2.5}"#, "`mlp_ratio`: expected 4 (no other is built), found 2.5"),
            (r#"{"qk_norm": "layer_norm"}"#, "`qk_norm`"),
            (r#"{"image_condition_type": "token_replace"}"#, "token_replace is not built"),
            (r#"{"guidance_embeds": 3.5}"#, "config.json:1:"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("config.json"), "{json}: {error}");
        }
    }
}
