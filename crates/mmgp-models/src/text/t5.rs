//! The T5 encoder ([T5](https://arxiv.org/abs/1910.10683), and v1.1 with its gated feed-forward).
//!
//! The table of relative positions serves all layers, so it belongs to the stem although its name is
//! in the first block. Scores are not divided by √d.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use mmgp_quant::{Bias, Linear, Weights};
use mmgp_residency::{ModelBuilder, Paged};
use serde::Deserialize;

use crate::{
    Error, Result,
    config::{Check, HEADS, LAYERS, WIDTH},
    nn::{Activation, Heads, RmsNorm, add, attention, contiguous, look_up},
    text::{embed, ids},
};

/// What a masked score is lowered by: as good as the most negative f32, which transformers takes, and a
/// number in bf16 too.
const MASKED: f64 = -3e38;

/// `T5EncoderModel`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Token ids there are.
    pub vocab_size: usize,
    /// Width of the stream.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width of the feed-forward.
    pub d_ff: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Heads.
    pub num_heads: usize,
    /// Rows of the table of relative positions.
    pub relative_attention_num_buckets: usize,
    /// From this distance on all positions count the same.
    pub relative_attention_max_distance: usize,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// `relu`, `gated-gelu`, …: the activation, gated or not.
    pub feed_forward_proj: String,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".into(),
            file: PathBuf::from("config"),
        }
    }
}

impl T5Config {
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
        check.range("d_model", self.d_model, WIDTH)?;
        check.range("d_kv", self.d_kv, 1..=4096)?;
        check.range("d_ff", self.d_ff, WIDTH)?;
        check.range("num_layers", self.num_layers, LAYERS)?;
        check.range("num_heads", self.num_heads, HEADS)?;
        let buckets = self.relative_attention_num_buckets;
        let key = "relative_attention_num_buckets";
        check.range(key, buckets, 4..=4096)?;
        check.that(buckets.is_multiple_of(2), key, "an even number", buckets)?;
        // Below, the logarithm that spreads far positions over buckets has no range.
        let distance = self.relative_attention_max_distance;
        check.range("relative_attention_max_distance", distance, buckets / 4 + 1..=(1 << 20))?;
        check.positive("layer_norm_epsilon", self.layer_norm_epsilon)?;
        self.activation().map(drop)
    }

    /// The feed-forward's function, and whether a second product gates it.
    fn activation(&self) -> Result<(Activation, bool)> {
        let name = self.feed_forward_proj.as_str();
        let (gated, name) = match name.strip_prefix("gated-") {
            Some("gelu") => (true, "gelu_new"), // what transformers means by it
            Some(name) => (true, name),
            None => (false, name),
        };
        Activation::parse(name).map(|a| (a, gated)).ok_or_else(|| Error::Config {
            file: self.file.clone(),
            key: "feed_forward_proj".into(),
            expected: "relu, gelu, silu or gelu_new, with `gated-` before it or not".into(),
            found: format!("{:?}", self.feed_forward_proj),
        })
    }
}

/// A T5 encoder whose weights are paged.
pub struct T5Encoder {
    model: Paged<Stem, Block>,
    config: T5Config,
}

impl T5Encoder {
    /// Asks `builder` for all tensors of the encoder. Nothing is read; a decoder is left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &T5Config, mut builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let weights = builder.stem();
        let shared = ["shared.weight", "encoder.embed_tokens.weight"];
        let name = if weights.contains(shared[0]) { shared[0] } else { shared[1] };
        let stem = Stem {
            table: weights.tensor_as_stored(&[config.vocab_size, config.d_model], name)?,
            positions: weights.tensor(
                &[config.relative_attention_num_buckets, config.num_heads],
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            )?,
            norm: RmsNorm::new(
                &weights.pp("encoder.final_layer_norm"),
                config.d_model,
                config.layer_norm_epsilon,
            )?,
            compute: weights.compute_dtype(),
        };
        // Both names hold the same table; a whole T5 has more that an encoder does not need.
        for other in ["shared.", "encoder.embed_tokens.", "decoder.", "lm_head."] {
            builder.ignore(other);
        }
        let mut blocks = Vec::new();
        for i in 0..config.num_layers {
            blocks.push(Block::new(config, &builder.block(&format!("encoder.block.{i}")))?);
        }
        Ok(Self { model: builder.finish(stem, blocks)?, config: config.clone() })
    }

    /// The last hidden state `[batch, tokens, d_model]`, f32, of token ids `[batch, tokens]`.
    /// `mask` `[batch, tokens]` is 1 for a token and 0 for padding, which is then not attended to.
    ///
    /// # Errors
    /// Ids outside the vocabulary; a mask of another shape; weights that cannot be read.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let ids = self::ids(ids)?;
        let (batch, tokens) = ids.dims2()?;
        let mask = match mask {
            Some(mask) if mask.dims() == [batch, tokens] => {
                let keep = mask.to_dtype(DType::F32)?;
                Some(keep.affine(-MASKED, MASKED)?.reshape((batch, 1, 1, tokens))?)
            }
            Some(mask) => {
                let (mask, ids) = (mask.dims(), ids.dims());
                return Err(Error::Input(format!("t5: a mask of {mask:?} for ids of {ids:?}")));
            }
            None => None,
        };
        let buckets = self.buckets(tokens, ids.device())?;
        let pass = self.model.pass()?;
        let (mut x, bias) = pass.stem(|stem| {
            Ok((embed(&stem.table, &ids, stem.compute)?, stem.bias(&buckets, tokens)?))
        })?;
        let biases: Vec<&Tensor> = std::iter::once(&bias).chain(mask.as_ref()).collect();
        for visit in pass.blocks() {
            x = visit?.run(|block| block.forward(&x, &biases))?;
        }
        Ok(pass.stem(|stem| stem.norm.forward(&x)?.to_dtype(DType::F32))?)
    }

    /// Stored tensors that the encoder does not use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }

    /// The width of the output.
    pub fn width(&self) -> usize {
        self.config.d_model
    }

    /// The bucket of every (query, key) pair, row by row.
    fn buckets(&self, tokens: usize, device: &Device) -> CandleResult<Tensor> {
        let half = self.config.relative_attention_num_buckets / 2;
        let far = self.config.relative_attention_max_distance;
        let buckets: Vec<u32> = (0..tokens * tokens)
            .map(|at| bucket(at / tokens, at % tokens, half, far) as u32)
            .collect();
        Tensor::from_vec(buckets, tokens * tokens, device)
    }
}

/// Half of the buckets for keys before the query, half for those behind; in each half the first ones
/// are single distances, the others grow with the logarithm up to `far` (T5, section 2.1).
fn bucket(query: usize, key: usize, half: usize, far: usize) -> usize {
    let (base, distance) = if key > query { (half, key - query) } else { (0, query - key) };
    let exact = half / 2;
    if distance < exact {
        return base + distance;
    }
    // In f32 as torch does it, so that borders fall alike.
    let growth = (distance as f32 / exact as f32).ln();
    let range = ((far as f64 / exact as f64).ln()) as f32;
    let step = (growth / range * (half - exact) as f32) as usize;
    base + (exact + step).min(half - 1)
}

struct Stem {
    table: Tensor,
    positions: Tensor,
    norm: RmsNorm,
    compute: DType,
}

impl Stem {
    /// `[1, heads, tokens, tokens]`
    fn bias(&self, buckets: &Tensor, tokens: usize) -> CandleResult<Tensor> {
        let bias = look_up(&self.positions, buckets)?;
        contiguous(&bias.reshape((tokens, tokens, ()))?.permute((2, 0, 1))?.unsqueeze(0)?)
    }
}

struct Block {
    norm: RmsNorm,
    qkv: Linear,
    out: Linear,
    heads: Heads,
    feed_norm: RmsNorm,
    up: Linear,
    gate: Option<Linear>,
    activation: Activation,
    down: Linear,
}

impl Block {
    fn new(config: &T5Config, weights: &Weights) -> Result<Self> {
        let heads = Heads { count: config.num_heads, dim: config.d_kv };
        let (width, inner, eps) = (config.d_model, heads.width(), config.layer_norm_epsilon);
        let attention = weights.pp("layer.0.SelfAttention");
        let feed = weights.pp("layer.1.DenseReluDense");
        let (activation, gated) = config.activation()?;
        let up = |name: &str| feed.pp(name).linear(width, config.d_ff, Bias::No);
        Ok(Self {
            norm: RmsNorm::new(&weights.pp("layer.0.layer_norm"), width, eps)?,
            qkv: attention.linear_joined(
                &[("q", inner), ("k", inner), ("v", inner)],
                width,
                Bias::No,
            )?,
            out: attention.pp("o").linear(inner, width, Bias::No)?,
            heads,
            feed_norm: RmsNorm::new(&weights.pp("layer.1.layer_norm"), width, eps)?,
            up: up(if gated { "wi_0" } else { "wi" })?,
            gate: if gated { Some(up("wi_1")?) } else { None },
            activation,
            down: feed.pp("wo").linear(config.d_ff, width, Bias::No)?,
        })
    }

    fn forward(&self, x: &Tensor, biases: &[&Tensor]) -> CandleResult<Tensor> {
        let rows = self.qkv.forward(&self.norm.forward(x)?)?;
        let width = self.heads.width();
        let part = |i: usize| self.heads.split(&rows, i * width, None, None);
        let mixed = attention(&part(0)?, &part(1)?, &part(2)?, 1., biases)?;
        let x = add(x, &self.out.forward(&mixed)?)?;
        let y = self.feed_norm.forward(&x)?;
        let up = self.up.forward(&y)?;
        let inner = match &self.gate {
            Some(gate) => self.activation.apply_times(&up, &gate.forward(&y)?)?,
            None => self.activation.apply(&up)?,
        };
        add(&x, &self.down.forward(&inner)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_grow_with_the_logarithm() {
        let at = |query, key| bucket(query, key, 16, 128);
        assert_eq!((at(5, 5), at(5, 3), at(3, 5)), (0, 2, 18));
        assert_eq!((at(7, 0), at(8, 0), at(9, 0)), (7, 8, 8));
        assert_eq!((at(127, 0), at(128, 0), at(9999, 0)), (15, 15, 15));
        assert_eq!(at(0, 9999), 31);
    }

    #[test]
    fn impossible_values_are_named() {
        let base = T5Config::default();
        let with = |change: fn(&mut T5Config)| {
            let mut config = base.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(base.validate().is_ok());
        for (error, key) in [
            (with(|c| c.num_heads = 0), "`num_heads`: expected 1 to 1024, found 0"),
            (with(|c| c.num_layers = 1_000_000_000), "`num_layers`"),
            (with(|c| c.relative_attention_num_buckets = 1), "`relative_attention_num_buckets`"),
            (with(|c| c.relative_attention_max_distance = 8), "`relative_attention_max_distance`"),
            (with(|c| c.feed_forward_proj = "gated-tanh".into()), "`feed_forward_proj`"),
            (with(|c| c.layer_norm_epsilon = -1.), "`layer_norm_epsilon`"),
        ] {
            assert!(error.contains(key), "{error}");
        }
    }
}
