//! The two kinds of block of a HunyuanVideo transformer: with weights of their own for video and text,
//! and with shared ones.
//!
//! A block is a pure function of what it is given, so that it can run again when memory had to be
//! given back. Video comes before text, so that padding of the text is what stands behind the last key
//! of an item. Text is not turned: its position is 0 on every axis.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Linear, Weights};

use crate::{
    hunyuanvideo::HunyuanVideoConfig,
    nn::{
        Activation, FeedForward, Heads, Modulation, RmsNorm, Rope, attention_up_to, gated_add,
        join_gelu, layer_norm_modulated,
    },
};

/// ε of all norms.
pub(super) const EPS: f64 = 1e-6;

/// What all blocks of a pass share.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// SiLU of the conditioning vector, `[batch, hidden]`.
    pub activated: &'a Tensor,
    /// The positions of video tokens, then of text tokens.
    pub rope: &'a Rope,
    /// Of each item, video tokens and those text tokens that are no padding.
    pub keys: &'a [usize],
}

/// Queries, keys and values of one stream, heads normalised and turned.
#[derive(Debug)]
struct Projection {
    qkv: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    heads: Heads,
}

impl Projection {
    fn new(
        weights: &Weights,
        names: [&str; 3],
        norms: [&str; 2],
        heads: Heads,
    ) -> mmgp_quant::Result<Self> {
        let width = heads.width();
        Ok(Self {
            qkv: weights.linear_joined(&names.map(|name| (name, width)), width, Bias::Yes)?,
            norm_q: RmsNorm::new(&weights.pp(norms[0]), heads.dim, EPS)?,
            norm_k: RmsNorm::new(&weights.pp(norms[1]), heads.dim, EPS)?,
            heads,
        })
    }

    fn forward(&self, x: &Tensor, rope: Option<&Rope>) -> Result<[Tensor; 3]> {
        let rows = self.qkv.forward(x)?;
        let (heads, width) = (self.heads, self.heads.width());
        Ok([
            heads.split(&rows, 0, Some(&self.norm_q), rope)?,
            heads.split(&rows, width, Some(&self.norm_k), rope)?,
            heads.split(&rows, 2 * width, None, None)?,
        ])
    }
}

/// One stream of a double block: its conditioning, projections and feed-forward.
#[derive(Debug)]
struct Stream {
    modulation: Modulation<6>,
    projection: Projection,
    out: Linear,
    feed_forward: FeedForward,
}

impl Stream {
    /// The stream's conditioning, queries, keys and values.
    fn begin(
        &self,
        x: &Tensor,
        activated: &Tensor,
        rope: Option<&Rope>,
    ) -> Result<([Tensor; 6], [Tensor; 3])> {
        let modulation = self.modulation.forward(activated)?;
        let y = layer_norm_modulated(x, &modulation[1], &modulation[0], EPS)?;
        let qkv = self.projection.forward(&y, rope)?;
        Ok((modulation, qkv))
    }

    /// What is added after the attention.
    fn finish(&self, x: &Tensor, mixed: &Tensor, m: &[Tensor; 6]) -> Result<Tensor> {
        let [_, _, gate, shift_mlp, scale_mlp, gate_mlp] = m;
        let x = gated_add(x, &self.out.forward(mixed)?, gate)?;
        let y = self.feed_forward.forward(&layer_norm_modulated(&x, scale_mlp, shift_mlp, EPS)?)?;
        gated_add(&x, &y, gate_mlp)
    }
}

/// A block in which video and text tokens attend to each other through weights of their own.
#[derive(Debug)]
pub struct DoubleBlock {
    video: Stream,
    text: Stream,
    scale: f64,
}

impl DoubleBlock {
    /// Asks for the block's tensors below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &HunyuanVideoConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        let attn = weights.pp("attn");
        let feed = |name: &str| FeedForward::new(&weights.pp(name), hidden, Activation::GeluTanh);
        let video = Stream {
            modulation: Modulation::new(&weights.pp("norm1"), hidden, hidden)?,
            projection: Projection::new(
                &attn,
                ["to_q", "to_k", "to_v"],
                ["norm_q", "norm_k"],
                heads,
            )?,
            out: attn.pp("to_out.0").linear(hidden, hidden, Bias::Yes)?,
            feed_forward: feed("ff")?,
        };
        let text = Stream {
            modulation: Modulation::new(&weights.pp("norm1_context"), hidden, hidden)?,
            projection: Projection::new(
                &attn,
                ["add_q_proj", "add_k_proj", "add_v_proj"],
                ["norm_added_q", "norm_added_k"],
                heads,
            )?,
            out: attn.pp("to_add_out").linear(hidden, hidden, Bias::Yes)?,
            feed_forward: feed("ff_context")?,
        };
        Ok(Self { video, text, scale: 1. / (heads.dim as f64).sqrt() })
    }

    /// The next `(video, text)`: `[batch, video tokens, hidden]` and `[batch, text tokens, hidden]` as
    /// given.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(
        &self,
        video: &Tensor,
        text: &Tensor,
        context: &Context<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let (n, m) = (video.dim(1)?, text.dim(1)?);
        let rope = context.rope.narrow(0, n)?;
        let (video_mod, [q, k, v]) = self.video.begin(video, context.activated, Some(&rope))?;
        let (text_mod, [tq, tk, tv]) = self.text.begin(text, context.activated, None)?;
        let join = |a: Tensor, b: Tensor| Tensor::cat(&[a, b], 2);
        let (q, k, v) = (join(q, tq)?, join(k, tk)?, join(v, tv)?);
        let mixed = attention_up_to(&q, &k, &v, self.scale, context.keys)?;
        drop((q, k, v));
        let next_video = self.video.finish(video, &mixed.narrow(1, 0, n)?, &video_mod)?;
        let next_text = self.text.finish(text, &mixed.narrow(1, n, m)?, &text_mod)?;
        Ok((next_video, next_text))
    }
}

/// A block over video and text tokens together, whose attention and feed-forward run side by side.
#[derive(Debug)]
pub struct SingleBlock {
    modulation: Modulation<3>,
    input: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    output: Linear,
    heads: Heads,
    scale: f64,
}

impl SingleBlock {
    /// Asks for the block's tensors below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &HunyuanVideoConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        // All four read the same input, so one product computes them.
        let layers = [
            ("attn.to_q", hidden),
            ("attn.to_k", hidden),
            ("attn.to_v", hidden),
            ("proj_mlp", 4 * hidden),
        ];
        Ok(Self {
            modulation: Modulation::new(&weights.pp("norm"), hidden, hidden)?,
            input: weights.linear_joined(&layers, hidden, Bias::Yes)?,
            norm_q: RmsNorm::new(&weights.pp("attn.norm_q"), heads.dim, EPS)?,
            norm_k: RmsNorm::new(&weights.pp("attn.norm_k"), heads.dim, EPS)?,
            output: weights.pp("proj_out").linear(5 * hidden, hidden, Bias::Yes)?,
            heads,
            scale: 1. / (heads.dim as f64).sqrt(),
        })
    }

    /// The next tokens: `x` is `[batch, video tokens + text tokens, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(&self, x: &Tensor, context: &Context<'_>) -> Result<Tensor> {
        let [shift, scale, gate] = self.modulation.forward(context.activated)?;
        let rows = self.input.forward(&layer_norm_modulated(x, &scale, &shift, EPS)?)?;
        let (heads, width) = (self.heads, self.heads.width());
        let q = heads.split(&rows, 0, Some(&self.norm_q), Some(context.rope))?;
        let k = heads.split(&rows, width, Some(&self.norm_k), Some(context.rope))?;
        let v = heads.split(&rows, 2 * width, None, None)?;
        let mixed = attention_up_to(&q, &k, &v, self.scale, context.keys)?;
        drop((q, k, v));
        let joined = join_gelu(&mixed, &rows, 3 * width)?;
        drop(rows);
        gated_add(x, &self.output.forward(&joined)?, &gate)
    }
}
