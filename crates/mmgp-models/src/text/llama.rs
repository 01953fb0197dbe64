//! Llama ([Llama](https://arxiv.org/abs/2302.13971), and 3 with shared keys and values) as a text
//! encoder: hidden states, no logits.
//!
//! A pipeline reads one hidden state, often not the last. An encoder is built up to that one: the
//! blocks behind it are neither planned, nor read, nor run. Checkpoints name tensors with the prefix
//! `model.` (a whole `LlamaForCausalLM`) or without (`LlamaModel`, as diffusers' folders hold it); both
//! are read.

use std::{
    f64::consts::TAU,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use mmgp_quant::{Bias, Linear, Weights};
use mmgp_residency::{ModelBuilder, Paged};
use serde::Deserialize;

use crate::{
    Error, Result,
    config::{Check, HEADS, LAYERS, WIDTH},
    nn::{Activation, Heads, RmsNorm, Rope, add, attention, causal_mask},
    text::{embed, ids},
};

/// θ where no key says one.
const THETA: f64 = 10000.;

/// `LlamaModel`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct LlamaConfig {
    /// Token ids there are.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Width of the feed-forward.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values; `None` means as many as of queries.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `None` means `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// The feed-forward's activation.
    pub hidden_act: String,
    /// The tokens it was made for.
    pub max_position_embeddings: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Whether the projections of the attention have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward has biases.
    pub mlp_bias: bool,
    /// θ of the rotary embedding, as files from before transformers 5 have it.
    pub rope_theta: Option<f64>,
    /// How positions are scaled, as files from before transformers 5 have it; it goes before
    /// `rope_parameters`.
    pub rope_scaling: Option<RopeParameters>,
    /// θ and scaling, as transformers 5 saves them.
    pub rope_parameters: Option<RopeParameters>,
    #[serde(skip)]
    file: PathBuf,
}

/// θ of a rotary embedding, and how it is scaled for longer texts.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct RopeParameters {
    /// θ; `None` means the config's `rope_theta`.
    pub rope_theta: Option<f64>,
    /// `default`, `linear` or `llama3`.
    pub rope_type: Option<String>,
    /// An older name of `rope_type`, used where that is missing.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    /// What frequencies are divided by.
    pub factor: Option<f64>,
    /// `llama3`: waves longer than the trained length over this are divided.
    pub low_freq_factor: Option<f64>,
    /// `llama3`: waves shorter than the trained length over this are kept.
    pub high_freq_factor: Option<f64>,
    /// `llama3`: the trained length; `None` means `max_position_embeddings`.
    pub original_max_position_embeddings: Option<usize>,
    /// The part of a head that is turned; only the whole is built.
    pub partial_rotary_factor: Option<f64>,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            attention_bias: false,
            mlp_bias: false,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            file: PathBuf::from("config"),
        }
    }
}

impl LlamaConfig {
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
        check.range("vocab_size", self.vocab_size, 1..=(1 << 24))?;
        check.range("hidden_size", self.hidden_size, WIDTH)?;
        check.range("intermediate_size", self.intermediate_size, WIDTH)?;
        check.range("num_hidden_layers", self.num_hidden_layers, LAYERS)?;
        let (heads, hidden) = (self.num_attention_heads, self.hidden_size);
        check.range("num_attention_heads", heads, HEADS)?;
        check.that(
            self.head_dim.is_some() || hidden.is_multiple_of(heads),
            "num_attention_heads",
            format_args!("a divisor of hidden_size {hidden}"),
            heads,
        )?;
        let shared = self.shared_heads();
        check.that(
            shared > 0 && heads.is_multiple_of(shared),
            "num_key_value_heads",
            format_args!("a divisor of num_attention_heads {heads}"),
            shared,
        )?;
        check.range("head_dim", self.head_dim(), 2..=4096)?;
        let even = self.head_dim().is_multiple_of(2);
        check.that(even, "head_dim", "an even number", self.head_dim())?;
        check.range("max_position_embeddings", self.max_position_embeddings, 1..=(1 << 24))?;
        check.positive("rms_norm_eps", self.rms_norm_eps)?;
        self.activation()?;
        self.rates().map(drop)
    }

    fn activation(&self) -> Result<Activation> {
        Activation::parse(&self.hidden_act).ok_or_else(|| Error::Config {
            file: self.file.clone(),
            key: "hidden_act".into(),
            expected: "silu, gelu, gelu_new, quick_gelu or relu".into(),
            found: format!("{:?}", self.hidden_act),
        })
    }

    fn shared_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// By how much each pair of a head turns from one token to the next.
    fn rates(&self) -> Result<Vec<f32>> {
        let check = Check::new(&self.file);
        let none = RopeParameters::default();
        let old = self.rope_scaling.as_ref().filter(|scaling| **scaling != none);
        let (key, rope) = match (old, &self.rope_parameters) {
            (Some(scaling), _) => ("rope_scaling", scaling),
            (None, parameters) => ("rope_parameters", parameters.as_ref().unwrap_or(&none)),
        };
        let of = |name: &str| format!("{key}.{name}");
        let number = |name: &str, value: Option<f64>| -> Result<f64> {
            let fits = value.is_some_and(|v| v.is_finite() && v > 0.);
            check.that(fits, &of(name), "a number above 0", value)?;
            Ok(value.unwrap_or(1.))
        };
        let theta = rope.rope_theta.or(self.rope_theta).unwrap_or(THETA);
        check.positive("rope_theta", theta)?;
        let part = rope.partial_rotary_factor.unwrap_or(1.);
        check.that(part == 1., &of("partial_rotary_factor"), "1 (no other is built)", part)?;
        let dim = self.head_dim();
        let plain = (0..dim / 2).map(|j| theta.powf(-((2 * j) as f64 / dim as f64)));
        let kind = rope.rope_type.as_deref().or(rope.old_type.as_deref()).unwrap_or("default");
        let rates: Vec<f64> = match kind {
            "default" => plain.collect(),
            "linear" => {
                let factor = number("factor", rope.factor)?;
                plain.map(|rate| rate / factor).collect()
            }
            "llama3" => {
                let factor = number("factor", rope.factor)?;
                let low = number("low_freq_factor", rope.low_freq_factor)?;
                let high = number("high_freq_factor", rope.high_freq_factor)?;
                let expected = format!("more than low_freq_factor {low}");
                check.that(low < high, &of("high_freq_factor"), expected, high)?;
                let trained = rope.original_max_position_embeddings;
                let trained = trained.unwrap_or(self.max_position_embeddings);
                check.range(&of("original_max_position_embeddings"), trained, 1..=(1 << 24))?;
                // Waves in the trained length: few are stretched, many are kept, and between is a ramp.
                let scaled = |rate: f64| {
                    let waves = trained as f64 * rate / TAU;
                    let kept = ((waves - low) / (high - low)).clamp(0., 1.);
                    rate * ((1. - kept) / factor + kept)
                };
                plain.map(scaled).collect()
            }
            other => {
                let names = "default, linear or llama3";
                check.that(false, &of("rope_type"), names, other)?;
                Vec::new()
            }
        };
        Ok(rates.into_iter().map(|rate| rate as f32).collect())
    }
}

/// A Llama text encoder whose weights are paged.
pub struct LlamaEncoder {
    model: Paged<Stem, Block>,
    config: LlamaConfig,
    end: usize,
    rates: Vec<f32>,
}

impl LlamaEncoder {
    /// Asks `builder` for the tensors that hidden state `end`, counted from the last, depends on: 1 is
    /// the last one, behind the final norm; 3 the one that two blocks follow. Nothing is read; what is
    /// behind it, and a head that makes logits, are left aside.
    ///
    /// # Errors
    /// A hidden state that there is not; a tensor that is missing or does not fit the config.
    pub fn new(config: &LlamaConfig, end: usize, mut builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let (hidden, layers) = (config.hidden_size, config.num_hidden_layers);
        let kept = blocks_before(end, layers)?;
        let root = builder.stem();
        let prefixed = root.contains("model.embed_tokens.weight");
        let prefix = if prefixed { "model." } else { "" };
        let table = format!("{prefix}embed_tokens.weight");
        let stem = Stem {
            table: root.tensor_as_stored(&[config.vocab_size, hidden], &table)?,
            norm: match end {
                1 => {
                    let weights = root.pp(format_args!("{prefix}norm"));
                    Some(RmsNorm::new(&weights, hidden, config.rms_norm_eps)?)
                }
                _ => None,
            },
            compute: root.compute_dtype(),
        };
        builder.ignore("lm_head.");
        if end > 1 {
            builder.ignore(&format!("{prefix}norm."));
        }
        let mut blocks = Vec::new();
        for i in 0..layers {
            let path = format!("{prefix}layers.{i}");
            if i < kept {
                blocks.push(Block::new(config, &builder.block(&path))?);
                // Old checkpoints store the frequencies, which the config gives.
                builder.ignore(&format!("{path}.self_attn.rotary_emb."));
            } else {
                builder.ignore(&format!("{path}."));
            }
        }
        let model = builder.finish(stem, blocks)?;
        Ok(Self { model, config: config.clone(), end, rates: config.rates()? })
    }

    /// Hidden state `end` of token ids `[batch, tokens]`, counted as for [`new`](Self::new) and not
    /// behind that one: `[batch, tokens, hidden_size]`, f32. `mask` `[batch, tokens]` is 1 for a token and
    /// 0 for padding, which no token attends to; what stands in rows of padding means nothing.
    ///
    /// # Errors
    /// No tokens, ids outside the vocabulary; a mask of another shape; a hidden state that there is not,
    /// or behind the one that it was built for; weights that cannot be read.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>, end: usize) -> Result<Tensor> {
        let ids = self::ids(ids)?;
        let (_, tokens) = ids.dims2()?;
        if tokens == 0 {
            return Err(Error::Input("llama: no tokens".into()));
        }
        if end < self.end {
            return Err(Error::Input(format!(
                "llama: hidden state {end} from the end was asked for, it was built up to {}",
                self.end
            )));
        }
        let blocks = blocks_before(end, self.config.num_hidden_layers)?;
        let mask = match mask {
            Some(mask) if mask.dims() == ids.dims() => seen(mask, ids.device())?,
            Some(mask) => {
                let (mask, ids) = (mask.dims(), ids.dims());
                return Err(Error::Input(format!("llama: a mask of {mask:?} for ids of {ids:?}")));
            }
            None => causal_mask(tokens, ids.device())?,
        };
        let rope = Rope::of_text(tokens, &self.rates, ids.device())?;
        let pass = self.model.pass()?;
        let mut x = pass.stem(|stem| embed(&stem.table, &ids, stem.compute))?;
        for visit in pass.blocks().take(blocks) {
            x = visit?.run(|block| block.forward(&x, &rope, &mask))?;
        }
        Ok(pass.stem(|stem| match &stem.norm {
            Some(norm) if end == 1 => norm.forward(&x)?.to_dtype(DType::F32),
            _ => x.to_dtype(DType::F32),
        })?)
    }

    /// Stored tensors that the encoder does not use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }

    /// The width of the output.
    pub fn width(&self) -> usize {
        self.config.hidden_size
    }

    /// The number of blocks that it was built with.
    pub fn blocks(&self) -> usize {
        self.model.len()
    }
}

/// How many of `layers` blocks run before hidden state `end`, counted from the last.
fn blocks_before(end: usize, layers: usize) -> Result<usize> {
    let count = (layers + 1).checked_sub(end).filter(|_| end > 0);
    count.ok_or_else(|| {
        Error::Input(format!("llama: hidden state {end} from the end of {layers} blocks"))
    })
}

/// The bias `[batch, 1, tokens, tokens]` of 0 and −∞ that lets a token see itself and, of what is before
/// it, all that is no padding. A row always sees something, padding too: no row may become NaN, which
/// would spread through the values.
fn seen(mask: &Tensor, device: &Device) -> CandleResult<Tensor> {
    let (batch, tokens) = mask.dims2()?;
    let keep = mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let mut all = Vec::with_capacity(batch * tokens * tokens);
    for keep in &keep {
        for query in 0..tokens {
            all.extend(keep.iter().enumerate().map(|(key, &keep)| {
                match key == query || (key < query && keep != 0.) {
                    true => 0.,
                    false => f32::NEG_INFINITY,
                }
            }));
        }
    }
    Tensor::from_vec(all, (batch, 1, tokens, tokens), device)
}

struct Stem {
    table: Tensor,
    norm: Option<RmsNorm>,
    compute: DType,
}

struct Block {
    norm: RmsNorm,
    qkv: Linear,
    out: Linear,
    heads: Heads,
    shared: Heads,
    feed_norm: RmsNorm,
    gate_up: Linear,
    activation: Activation,
    down: Linear,
}

impl Block {
    fn new(config: &LlamaConfig, weights: &Weights) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let dim = config.head_dim();
        let heads = Heads { count: config.num_attention_heads, dim };
        let shared = Heads { count: config.shared_heads(), dim };
        let (attention, feed) = (weights.pp("self_attn"), weights.pp("mlp"));
        let qkv =
            [("q_proj", heads.width()), ("k_proj", shared.width()), ("v_proj", shared.width())];
        let (bias, feed_bias) = (Bias::from(config.attention_bias), Bias::from(config.mlp_bias));
        let norm = |name: &str| RmsNorm::new(&weights.pp(name), hidden, config.rms_norm_eps);
        Ok(Self {
            norm: norm("input_layernorm")?,
            qkv: attention.linear_joined(&qkv, hidden, bias)?,
            out: attention.pp("o_proj").linear(heads.width(), hidden, bias)?,
            heads,
            shared,
            feed_norm: norm("post_attention_layernorm")?,
            gate_up: feed.linear_joined(
                &[("gate_proj", inner), ("up_proj", inner)],
                hidden,
                feed_bias,
            )?,
            activation: config.activation()?,
            down: feed.pp("down_proj").linear(inner, hidden, feed_bias)?,
        })
    }

    fn forward(&self, x: &Tensor, rope: &Rope, mask: &Tensor) -> CandleResult<Tensor> {
        let rows = self.qkv.forward(&self.norm.forward(x)?)?;
        let (width, shared) = (self.heads.width(), self.shared.width());
        let q = self.heads.split(&rows, 0, None, Some(rope))?;
        let k = self.shared.split(&rows, width, None, Some(rope))?;
        let v = self.shared.split(&rows, width + shared, None, None)?;
        let scale = 1. / (self.heads.dim as f64).sqrt();
        let x = add(x, &self.out.forward(&attention(&q, &k, &v, scale, &[mask])?)?)?;
        let inner = self.gate_up.forward(&self.feed_norm.forward(&x)?)?;
        add(&x, &self.down.forward(&self.activation.gate(&inner)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<LlamaConfig> {
        let dir = tempfile::tempdir().map_err(candle_core::Error::wrap)?;
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).map_err(candle_core::Error::wrap)?;
        LlamaConfig::from_file(&path)
    }

    #[test]
    fn theta_is_where_any_version_writes_it() -> Result<()> {
        let second = |json: &str| -> Result<f32> { Ok(read(json)?.rates()?[1]) };
        // The second of 64 pairs: θ^(−1/64).
        let near = |got: f32, theta: f64| (f64::from(got) - theta.powf(-1. / 64.)).abs() < 1e-7;
        assert!(near(second("{}")?, 10000.));
        assert!(near(second(r#"{"rope_theta": 500000, "rope_scaling": null}"#)?, 500000.));
        let new = r#"{"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}"#;
        assert!(near(second(new)?, 500000.));
        // The inner one goes first, and so does the old key.
        let both = r#"{"rope_theta": 7.0, "rope_parameters": {"rope_theta": 500000.0}}"#;
        assert!(near(second(both)?, 500000.));
        let old = r#"{"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 1.0},
                      "rope_parameters": {"rope_theta": 7.0}}"#;
        assert!(near(second(old)?, 500000.));
        Ok(())
    }

    #[test]
    fn long_waves_are_stretched() -> Result<()> {
        let plain = read("{}")?.rates()?;
        let linear = read(r#"{"rope_scaling": {"type": "linear", "factor": 4.0}}"#)?.rates()?;
        assert!(plain.iter().zip(&linear).all(|(a, b)| (a / 4. - b).abs() < 1e-9));
        let three = read(
            r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128}}"#,
        )?;
        let mut between = 0;
        for (plain, got) in plain.iter().zip(three.rates()?) {
            let wave = TAU / f64::from(*plain);
            match wave {
                wave if wave < 32. => assert_eq!(got, *plain),
                wave if wave > 128. => assert!((got - plain / 8.).abs() < 1e-9),
                _ => {
                    between += 1;
                    assert!(got < *plain && got > plain / 8.);
                }
            }
        }
        assert!(between > 5);
        Ok(())
    }

    #[test]
    fn impossible_values_are_named() {
        for (json, key) in [
            (r#"{"num_attention_heads": 0}"#, "`num_attention_heads`: expected 1 to 1024, found 0"),
            (r#"{"num_attention_heads": 24}"#, "a divisor of hidden_size 4096, found 24"),
            (r#"{"num_key_value_heads": 5}"#, "a divisor of num_attention_heads 32, found 5"),
            (r#"{"num_key_value_heads": 0}"#, "`num_key_value_heads`"),
            (r#"{"head_dim": 7}"#, "`head_dim`: expected an even number, found 7"),
            (r#"{"head_dim": 0}"#, "`head_dim`"),
            (r#"{"num_hidden_layers": 1000000000}"#, "`num_hidden_layers`"),
            (r#"{"hidden_act": "tanh"}"#, "`hidden_act`"),
            (r#"{"rms_norm_eps": 0}"#, "`rms_norm_eps`"),
            (r#"{"rope_theta": -1}"#, "`rope_theta`"),
            (r#"{"rope_parameters": {"rope_type": "yarn"}}"#, "`rope_parameters.rope_type`"),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "`rope_scaling.factor`"),
            (r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8}}"#, "low_freq_factor`"),
            (
                r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                    "high_freq_factor": 4}}"#,
                "expected more than low_freq_factor 4, found 4.0",
            ),
            (
                r#"{"rope_parameters": {"partial_rotary_factor": 0.5}}"#,
                "`rope_parameters.partial_rotary_factor`",
            ),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("config.json"), "{json}: {error}");
        }
    }

    #[test]
    fn states_are_counted_from_the_last() {
        let count = |end| blocks_before(end, 5).ok();
        assert_eq!([1, 3, 6].map(count), [Some(5), Some(3), Some(0)]);
        assert_eq!([0, 7, usize::MAX].map(count), [None; 3]);
    }
}
