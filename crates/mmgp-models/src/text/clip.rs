//! CLIP's text encoder ([CLIP](https://arxiv.org/abs/2103.00020)), with or without its projection.
//!
//! Checkpoints name its tensors with the prefix `text_model.` or without; both are read.

use std::path::{Path, PathBuf};

use candle_core::{DType, Result as CandleResult, Tensor};
use mmgp_quant::{Bias, Linear, Weights};
use mmgp_residency::{ModelBuilder, Paged};
use serde::Deserialize;

use crate::{
    Error, Result,
    config::{Check, HEADS, LAYERS, WIDTH},
    nn::{Activation, Heads, LayerNorm, add, attention, causal_mask, look_up},
    text::{embed, ids},
};

/// Configs written before 2023 all say that the end token is 2, whatever it is.
const LEGACY_EOS: u32 = 2;

/// `CLIPTextModel` and `CLIPTextModelWithProjection`; a key that is missing takes the class's
/// default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Token ids there are.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Width of the feed-forward.
    pub intermediate_size: usize,
    /// Width of the projected text.
    pub projection_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// The most tokens.
    pub max_position_embeddings: usize,
    /// The feed-forward's activation.
    pub hidden_act: String,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// The end token, at which the text is pooled; 2 means the highest id in the text.
    pub eos_token_id: u32,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
            file: PathBuf::from("config"),
        }
    }
}

impl ClipConfig {
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
        check.range("vocab_size", self.vocab_size, 1..=(1 << 24))?;
        check.range("hidden_size", self.hidden_size, WIDTH)?;
        check.range("intermediate_size", self.intermediate_size, WIDTH)?;
        check.range("projection_dim", self.projection_dim, WIDTH)?;
        check.range("num_hidden_layers", self.num_hidden_layers, LAYERS)?;
        let heads = self.num_attention_heads;
        check.range("num_attention_heads", heads, HEADS)?;
        check.that(
            self.hidden_size.is_multiple_of(heads),
            "num_attention_heads",
            format_args!("a divisor of hidden_size {}", self.hidden_size),
            heads,
        )?;
        check.range("max_position_embeddings", self.max_position_embeddings, 1..=(1 << 16))?;
        check.positive("layer_norm_eps", self.layer_norm_eps)?;
        self.activation().map(drop)
    }

    fn activation(&self) -> Result<Activation> {
        Activation::parse(&self.hidden_act).ok_or_else(|| Error::Config {
            file: self.file.clone(),
            key: "hidden_act".into(),
            expected: "quick_gelu, gelu, gelu_new, silu or relu".into(),
            found: format!("{:?}", self.hidden_act),
        })
    }
}

/// Whether pooled text goes through the projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    /// `CLIPTextModelWithProjection`: `text_projection.weight` must be stored.
    Yes,
    /// `CLIPTextModel`: one that is stored is not used.
    No,
}

/// What a CLIP text encoder says about token ids; all f32.
#[derive(Clone, Debug)]
pub struct ClipOutput {
    /// After the final norm, `[batch, tokens, hidden]`.
    pub last_hidden_state: Tensor,
    /// Before the last block, without the final norm, `[batch, tokens, hidden]`.
    pub penultimate_hidden_state: Tensor,
    /// The last hidden state at the end token, `[batch, hidden]`; projected `[batch, projection_dim]`
    /// where there is a projection.
    pub pooled: Tensor,
}

/// A CLIP text encoder whose weights are paged.
pub struct ClipText {
    model: Paged<Stem, Block>,
    config: ClipConfig,
}

impl ClipText {
    /// Asks `builder` for all tensors of the encoder. Nothing is read; a vision tower is left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(
        config: &ClipConfig,
        projection: Projection,
        mut builder: ModelBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let root = builder.stem();
        let prefixed = root.contains("text_model.embeddings.token_embedding.weight");
        let prefix = if prefixed { "text_model." } else { "" };
        let (hidden, eps) = (config.hidden_size, config.layer_norm_eps);
        let table = |rows: usize, name: &str| {
            let name = format!("{prefix}embeddings.{name}.weight");
            root.tensor_as_stored(&[rows, hidden], &name)
        };
        let stem = Stem {
            tokens: table(config.vocab_size, "token_embedding")?,
            positions: table(config.max_position_embeddings, "position_embedding")?,
            norm: LayerNorm::new(&root.pp(format!("{prefix}final_layer_norm")), hidden, eps)?,
            projection: match projection {
                Projection::Yes => Some(root.pp("text_projection").linear(
                    hidden,
                    config.projection_dim,
                    Bias::No,
                )?),
                Projection::No => None,
            },
            compute: root.compute_dtype(),
        };
        builder.ignore(&format!("{prefix}embeddings.position_ids"));
        for other in ["vision_model.", "visual_projection.", "text_projection.", "logit_scale"] {
            builder.ignore(other);
        }
        let mut blocks = Vec::new();
        for i in 0..config.num_hidden_layers {
            let weights = builder.block(&format!("{prefix}encoder.layers.{i}"));
            blocks.push(Block::new(config, &weights)?);
        }
        Ok(Self { model: builder.finish(stem, blocks)?, config: config.clone() })
    }

    /// Encodes token ids `[batch, tokens]`.
    ///
    /// # Errors
    /// More tokens than there are positions; ids outside the vocabulary; weights that cannot be read.
    pub fn forward(&self, ids: &Tensor) -> Result<ClipOutput> {
        let ids = self::ids(ids)?;
        let (batch, tokens) = ids.dims2()?;
        if tokens == 0 || tokens > self.config.max_position_embeddings {
            return Err(Error::Input(format!(
                "clip: {tokens} tokens for a context of {}",
                self.config.max_position_embeddings
            )));
        }
        let ends = self.ends(&ids)?;
        let mask = causal_mask(tokens, ids.device())?;
        let pass = self.model.pass()?;
        let mut x = pass.stem(|stem| stem.embed(&ids))?;
        let mut penultimate = x.clone();
        for visit in pass.blocks() {
            penultimate = x;
            x = visit?.run(|block| block.forward(&penultimate, &mask))?;
        }
        let (last, pooled) = pass.stem(|stem| {
            let last = stem.norm.forward(&x)?;
            let rows = last.reshape((batch * tokens, ()))?;
            let pooled = look_up(&rows, &ends)?;
            let pooled = match &stem.projection {
                Some(projection) => projection.forward(&pooled)?,
                None => pooled,
            };
            Ok((last, pooled))
        })?;
        Ok(ClipOutput {
            last_hidden_state: last.to_dtype(DType::F32)?,
            penultimate_hidden_state: penultimate.to_dtype(DType::F32)?,
            pooled: pooled.to_dtype(DType::F32)?,
        })
    }

    /// Stored tensors that the encoder does not use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }

    /// The most tokens it takes.
    pub fn context(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// For each text the row, in all rows of the batch, at which it is pooled: that of the first end
    /// token; the first of all if there is none.
    fn ends(&self, ids: &Tensor) -> Result<Tensor> {
        let eos = self.config.eos_token_id;
        let mut ends = Vec::new();
        for (item, text) in ids.to_vec2::<u32>()?.iter().enumerate() {
            let end = match eos {
                LEGACY_EOS => text.iter().max().copied().unwrap_or(eos),
                eos => eos,
            };
            let at = text.iter().position(|&id| id == end).unwrap_or(0);
            ends.push((item * text.len() + at) as u32);
        }
        Ok(Tensor::new(ends, ids.device())?)
    }
}

struct Stem {
    tokens: Tensor,
    positions: Tensor,
    norm: LayerNorm,
    projection: Option<Linear>,
    compute: DType,
}

impl Stem {
    fn embed(&self, ids: &Tensor) -> CandleResult<Tensor> {
        let positions = Tensor::arange(0, ids.dim(1)? as u32, ids.device())?.unsqueeze(0)?;
        let tokens = embed(&self.tokens, ids, self.compute)?;
        add(&tokens, &embed(&self.positions, &positions, self.compute)?)
    }
}

struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    heads: Heads,
    norm2: LayerNorm,
    up: Linear,
    activation: Activation,
    down: Linear,
}

impl Block {
    fn new(config: &ClipConfig, weights: &Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.layer_norm_eps);
        let (inner, count) = (config.intermediate_size, config.num_attention_heads);
        let attention = weights.pp("self_attn");
        Ok(Self {
            norm1: LayerNorm::new(&weights.pp("layer_norm1"), hidden, eps)?,
            qkv: attention.linear_joined(
                &[("q_proj", hidden), ("k_proj", hidden), ("v_proj", hidden)],
                hidden,
                Bias::Yes,
            )?,
            out: attention.pp("out_proj").linear(hidden, hidden, Bias::Yes)?,
            heads: Heads { count, dim: hidden / count },
            norm2: LayerNorm::new(&weights.pp("layer_norm2"), hidden, eps)?,
            up: weights.pp("mlp.fc1").linear(hidden, inner, Bias::Yes)?,
            activation: config.activation()?,
            down: weights.pp("mlp.fc2").linear(inner, hidden, Bias::Yes)?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> CandleResult<Tensor> {
        let rows = self.qkv.forward(&self.norm1.forward(x)?)?;
        let width = self.heads.width();
        let part = |i: usize| self.heads.split(&rows, i * width, None, None);
        let scale = 1. / (self.heads.dim as f64).sqrt();
        let mixed = attention(&part(0)?, &part(1)?, &part(2)?, scale, &[mask])?;
        let x = add(x, &self.out.forward(&mixed)?)?;
        let inner = self.activation.apply(&self.up.forward(&self.norm2.forward(&x)?)?)?;
        add(&x, &self.down.forward(&inner)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_values_are_named() {
        let base = ClipConfig::default();
        let with = |change: fn(&mut ClipConfig)| {
            let mut config = base.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(base.validate().is_ok());
        for (error, key) in [
            (
                with(|c| c.num_attention_heads = 0),
                "`num_attention_heads`: expected 1 to 1024, found 0",
            ),
            (with(|c| c.num_attention_heads = 7), "a divisor of hidden_size 512, found 7"),
            (with(|c| c.num_hidden_layers = 1_000_000_000), "`num_hidden_layers`"),
            (with(|c| c.hidden_act = "tanh".into()), "`hidden_act`"),
        ] {
            assert!(error.contains(key), "{error}");
        }
    }
}
