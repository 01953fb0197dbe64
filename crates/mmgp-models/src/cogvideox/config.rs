//! The config of a CogVideoX transformer, as diffusers' `CogVideoXTransformer3DModel` saves it.
//!
//! One class covers the family: 2B (sinusoids added to the patches), 5B (rotary), its image-to-video
//! form (also a learned table), and 1.5 (patches over frames too, `ofs`). Every key has that class's
//! default; every value is bounded before anything is computed from it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{
    Result,
    config::{Check, HEADS, LAYERS, WIDTH},
    nn::Activation,
};

/// `CogVideoXTransformer3DModel`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct CogVideoXConfig {
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Channels of the latents, with those of the picture where an image-to-video model reads one.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Whether the cosines of a timestep come before its sines; only `true` is built.
    pub flip_sin_to_cos: bool,
    /// What the sinusoids' exponent is shifted by; only 0 is built.
    pub freq_shift: f64,
    /// Width of the timestep's vector.
    pub time_embed_dim: usize,
    /// Width of the sinusoids of `ofs`, an input that the image-to-video model of 1.5 reads.
    pub ofs_embed_dim: Option<usize>,
    /// Width of the text states.
    pub text_embed_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Whether queries, keys and values have a bias.
    pub attention_bias: bool,
    /// Width of the latents that learned positions are for, and that rotary positions are scaled to.
    pub sample_width: usize,
    /// Their height.
    pub sample_height: usize,
    /// Their frames before compression.
    pub sample_frames: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Frames of a patch; `None` (before 1.5) means one, and a convolution in place of a linear layer.
    pub patch_size_t: Option<usize>,
    /// Frames that the VAE joins in one, beside the first.
    pub temporal_compression_ratio: usize,
    /// Text tokens of the learned table of positions.
    pub max_text_seq_length: usize,
    /// Activation of the feed-forward layers: `gelu-approximate` or `gelu`.
    pub activation_fn: String,
    /// Activation of the timestep's perceptron.
    pub timestep_activation_fn: String,
    /// Whether norms have weights; only `true` is built.
    pub norm_elementwise_affine: bool,
    /// ε of the norms over the width of the stream.
    pub norm_eps: f64,
    /// What rows and columns are divided by before their sinusoids.
    pub spatial_interpolation_scale: f64,
    /// What frames are divided by before their sinusoids.
    pub temporal_interpolation_scale: f64,
    /// Whether positions turn queries and keys, in place of sinusoids added to patches.
    pub use_rotary_positional_embeddings: bool,
    /// Whether a stored table is added to text and patches.
    pub use_learned_positional_embeddings: bool,
    /// Whether the patches' convolution has a bias.
    pub patch_bias: bool,
    #[serde(skip)]
    pub(super) file: PathBuf,
}

impl Default for CogVideoXConfig {
    fn default() -> Self {
        Self {
            num_attention_heads: 30,
            attention_head_dim: 64,
            in_channels: 16,
            out_channels: 16,
            flip_sin_to_cos: true,
            freq_shift: 0.,
            time_embed_dim: 512,
            ofs_embed_dim: None,
            text_embed_dim: 4096,
            num_layers: 30,
            attention_bias: true,
            sample_width: 90,
            sample_height: 60,
            sample_frames: 49,
            patch_size: 2,
            patch_size_t: None,
            temporal_compression_ratio: 4,
            max_text_seq_length: 226,
            activation_fn: "gelu-approximate".into(),
            timestep_activation_fn: "silu".into(),
            norm_elementwise_affine: true,
            norm_eps: 1e-5,
            spatial_interpolation_scale: 1.875,
            temporal_interpolation_scale: 1.,
            use_rotary_positional_embeddings: false,
            use_learned_positional_embeddings: false,
            patch_bias: true,
            file: PathBuf::from("config"),
        }
    }
}

impl CogVideoXConfig {
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
        const SIDE: std::ops::RangeInclusive<usize> = 1..=(1 << 14);
        let check = Check::new(&self.file);
        check.range("num_layers", self.num_layers, LAYERS)?;
        check.range("num_attention_heads", self.num_attention_heads, HEADS)?;
        check.range("attention_head_dim", self.attention_head_dim, 2..=4096)?;
        check.range("in_channels", self.in_channels, WIDTH)?;
        check.range("out_channels", self.out_channels, WIDTH)?;
        check.range("time_embed_dim", self.time_embed_dim, WIDTH)?;
        check.range("text_embed_dim", self.text_embed_dim, WIDTH)?;
        check.range("patch_size", self.patch_size, 1..=64)?;
        check.range("sample_width", self.sample_width, SIDE)?;
        check.range("sample_height", self.sample_height, SIDE)?;
        check.range("sample_frames", self.sample_frames, SIDE)?;
        check.range("temporal_compression_ratio", self.temporal_compression_ratio, 1..=64)?;
        check.range("max_text_seq_length", self.max_text_seq_length, 1..=(1 << 16))?;
        check.positive("norm_eps", self.norm_eps)?;
        check.positive("spatial_interpolation_scale", self.spatial_interpolation_scale)?;
        check.positive("temporal_interpolation_scale", self.temporal_interpolation_scale)?;

        let built = "true (false is not built)";
        check.that(self.flip_sin_to_cos, "flip_sin_to_cos", built, false)?;
        check.that(self.norm_elementwise_affine, "norm_elementwise_affine", built, false)?;
        check.that(
            self.freq_shift == 0.,
            "freq_shift",
            "0 (no other is built)",
            self.freq_shift,
        )?;
        let names = "gelu-approximate or gelu";
        let ours = self.feed_forward_activation().is_some();
        check.that(ours, "activation_fn", names, &self.activation_fn)?;
        let ours = self.timestep_activation().is_some();
        let names = "silu, gelu or relu";
        check.that(ours, "timestep_activation_fn", names, &self.timestep_activation_fn)?;

        let hidden = self.hidden();
        let (rotary, learned) =
            (self.use_rotary_positional_embeddings, self.use_learned_positional_embeddings);
        if rotary {
            // A quarter of a head is for frames, three eighths for rows and columns, all in pairs.
            let dim = self.attention_head_dim;
            let fits = dim.is_multiple_of(16);
            check.that(fits, "attention_head_dim", "a multiple of 16 (rotary positions)", dim)?;
        } else {
            let fits = hidden.is_multiple_of(16);
            let expected = "a number that makes the width of all heads a multiple of 16";
            check.that(fits, "attention_head_dim", expected, self.attention_head_dim)?;
        }
        let key = "use_learned_positional_embeddings";
        let expected = "false without use_rotary_positional_embeddings";
        check.that(rotary || !learned, key, expected, learned)?;
        if let Some(frames) = self.patch_size_t {
            check.range("patch_size_t", frames, 1..=16)?;
            let expected = "null without use_rotary_positional_embeddings";
            check.that(rotary, "patch_size_t", expected, frames)?;
            check.that(!learned, key, "false beside patch_size_t", learned)?;
        }
        if let Some(width) = self.ofs_embed_dim {
            let (time, key) = (self.time_embed_dim, "ofs_embed_dim");
            check.that(width == time, key, format_args!("time_embed_dim {time}"), width)?;
            check.that(width.is_multiple_of(2), key, "an even number", width)?;
        }
        Ok(())
    }

    /// The width of the token stream.
    pub fn hidden(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Frames, rows and columns of the latents that a learned table is for.
    pub fn sample(&self) -> [usize; 3] {
        let frames = (self.sample_frames - 1) / self.temporal_compression_ratio + 1;
        [frames, self.sample_height, self.sample_width]
    }

    /// How many values of a head frames, rows and columns turn.
    pub fn axes(&self) -> [usize; 3] {
        let dim = self.attention_head_dim;
        [dim / 4, dim / 8 * 3, dim / 8 * 3]
    }

    pub(crate) fn feed_forward_activation(&self) -> Option<Activation> {
        match self.activation_fn.as_str() {
            "gelu-approximate" => Some(Activation::GeluTanh),
            "gelu" => Some(Activation::Gelu),
            _ => None,
        }
    }

    pub(crate) fn timestep_activation(&self) -> Option<Activation> {
        let known = ["silu", "swish", "gelu", "relu"];
        known.contains(&&*self.timestep_activation_fn).then_some(())?;
        Activation::parse(&self.timestep_activation_fn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<CogVideoXConfig> {
        let dir = tempfile::tempdir().map_err(candle_core::Error::wrap)?;
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).map_err(candle_core::Error::wrap)?;
        CogVideoXConfig::from_file(&path)
    }

    #[test]
    fn missing_keys_take_the_class_defaults() -> Result<()> {
        let config = read(r#"{"_class_name": "CogVideoXTransformer3DModel", "dropout": 0.0}"#)?;
        assert_eq!((config.hidden(), config.num_layers), (1920, 30));
        assert_eq!(config.sample(), [13, 60, 90]);
        assert_eq!(config.axes(), [16, 24, 24]);
        assert_eq!((config.patch_size, config.patch_size_t), (2, None));
        assert!(config.patch_bias && config.attention_bias);
        Ok(())
    }

    #[test]
    fn the_published_variants_are_read() -> Result<()> {
        let json = r#"{"num_attention_heads": 48, "num_layers": 42, "in_channels": 32,
            "use_rotary_positional_embeddings": true, "use_learned_positional_embeddings": true}"#;
        assert_eq!(read(json)?.hidden(), 3072);
        let json = r#"{"num_attention_heads": 48, "num_layers": 42, "in_channels": 32,
            "use_rotary_positional_embeddings": true, "patch_size_t": 2, "patch_bias": false,
            "ofs_embed_dim": 512, "sample_width": 300, "sample_height": 300, "sample_frames": 81,
            "max_text_seq_length": 224}"#;
        assert_eq!(read(json)?.sample(), [21, 300, 300]);
        Ok(())
    }

    #[test]
    fn impossible_values_are_named() {
        let rotary = r#""use_rotary_positional_embeddings": true"#;
        for (json, key) in [
            (r#""num_layers": 0"#, "`num_layers`: expected 1 to 1024, found 0"),
            (r#""num_attention_heads": 100000"#, "`num_attention_heads`: expected 1 to 1024"),
            (r#""attention_head_dim": 3"#, "`attention_head_dim`: expected a number that makes"),
            (
                &format!(r#"{rotary}, "attention_head_dim": 40"#),
                "`attention_head_dim`: expected a multiple of 16 (rotary positions), found 40",
            ),
            (r#""patch_size": 0"#, "`patch_size`: expected 1 to 64, found 0"),
            (r#""patch_size_t": 2"#, "`patch_size_t`: expected null without use_rotary"),
            (&format!(r#"{rotary}, "patch_size_t": 0"#), "`patch_size_t`: expected 1 to 16"),
            (
                &format!(
                    r#"{rotary}, "patch_size_t": 2, "use_learned_positional_embeddings": true"#
                ),
                "`use_learned_positional_embeddings`: expected false beside patch_size_t",
            ),
            (
                r#""use_learned_positional_embeddings": true"#,
                "`use_learned_positional_embeddings`: expected false without use_rotary",
            ),
            (r#""ofs_embed_dim": 256"#, "`ofs_embed_dim`: expected time_embed_dim 512, found 256"),
            (
                r#""ofs_embed_dim": 7, "time_embed_dim": 7"#,
                "`ofs_embed_dim`: expected an even number, found 7",
            ),
            (r#""activation_fn": "geglu""#, r#"gelu-approximate or gelu, found "geglu""#),
            (r#""timestep_activation_fn": "mish""#, "`timestep_activation_fn`"),
            (r#""flip_sin_to_cos": false"#, "`flip_sin_to_cos`"),
            (r#""freq_shift": 1"#, "`freq_shift`"),
            (r#""norm_elementwise_affine": false"#, "`norm_elementwise_affine`"),
            (r#""norm_eps": 0"#, "`norm_eps`: expected a number above 0"),
            (r#""spatial_interpolation_scale": -1"#, "`spatial_interpolation_scale`"),
            (r#""temporal_interpolation_scale": 0"#, "`temporal_interpolation_scale`"),
            (r#""sample_frames": 0"#, "`sample_frames`"),
            (r#""sample_width": 99999999"#, "`sample_width`"),
            (r#""sample_height": 0"#, "`sample_height`"),
            (r#""temporal_compression_ratio": 0"#, "`temporal_compression_ratio`"),
            (r#""max_text_seq_length": 0"#, "`max_text_seq_length`"),
            (r#""in_channels": 0"#, "`in_channels`"),
            (r#""out_channels": null"#, "config.json:1:"),
            (r#""num_layers": -1"#, "config.json:1:"),
        ] {
            let error = read(&format!("{{{json}}}")).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("config.json"), "{json}: {error}");
        }
    }
}
