//! The two kinds of block of a FLUX transformer.
//!
//! A block is a pure function of what it is given, so that it can run again when memory had to be
//! given back. Projections of one input are one product; what stands between products is in `nn`.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Linear, Weights};

use crate::{
    flux::FluxConfig,
    nn::{
        Activation, FeedForward, HeadRows, Heads, Modulation, RmsNorm, Rope, attention, gated_add,
        join_gelu, layer_norm_modulated,
    },
};

const EPS: f64 = 1e-6;

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

    /// What becomes of the queries, keys and values in `rows`, the product of the stream.
    fn parts<'a>(&'a self, rows: &'a Tensor, rope: &'a Rope) -> [HeadRows<'a>; 3] {
        let width = self.heads.width();
        let turned = |first, norm| HeadRows { rows, first, norm: Some(norm), rope: Some(rope) };
        let v = HeadRows { rows, first: 2 * width, norm: None, rope: None };
        [turned(0, &self.norm_q), turned(width, &self.norm_k), v]
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
    /// What is added after the attention.
    fn finish(&self, x: &Tensor, mixed: &Tensor, m: &[Tensor; 6]) -> Result<Tensor> {
        let [_, _, gate, shift_mlp, scale_mlp, gate_mlp] = m;
        let x = gated_add(x, &self.out.forward(mixed)?, gate)?;
        let y = self.feed_forward.forward(&layer_norm_modulated(&x, scale_mlp, shift_mlp, EPS)?)?;
        gated_add(&x, &y, gate_mlp)
    }
}

/// A block in which picture and text tokens attend to each other through weights of their own.
#[derive(Debug)]
pub struct DoubleBlock {
    image: Stream,
    text: Stream,
    scale: f64,
}

impl DoubleBlock {
    /// Asks for the block's tensors below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &FluxConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        let attn = weights.pp("attn");
        let image = Stream {
            modulation: Modulation::new(&weights.pp("norm1"), hidden, hidden)?,
            projection: Projection::new(
                &attn,
                ["to_q", "to_k", "to_v"],
                ["norm_q", "norm_k"],
                heads,
            )?,
            out: attn.pp("to_out.0").linear(hidden, hidden, Bias::Yes)?,
            feed_forward: FeedForward::new(&weights.pp("ff"), hidden, Activation::GeluTanh)?,
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
            feed_forward: FeedForward::new(
                &weights.pp("ff_context"),
                hidden,
                Activation::GeluTanh,
            )?,
        };
        Ok(Self { image, text, scale: 1. / (heads.dim as f64).sqrt() })
    }

    /// The next `(image, text)`: `[batch, image tokens, hidden]` and `[batch, text tokens, hidden]`
    /// as given. `activated` is SiLU of the timestep's vector, `[batch, hidden]`; `rope` has the
    /// text's tokens first.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        activated: &Tensor,
        rope: &Rope,
    ) -> Result<(Tensor, Tensor)> {
        let (n, m) = (image.dim(1)?, text.dim(1)?);
        let project = |stream: &Stream, x: &Tensor, first: usize| {
            let modulation = stream.modulation.forward(activated)?;
            let y = layer_norm_modulated(x, &modulation[1], &modulation[0], EPS)?;
            let rows = stream.projection.qkv.forward(&y)?;
            Ok::<_, candle_core::Error>((modulation, rows, rope.narrow(first, x.dim(1)?)?))
        };
        let (text_mod, text_rows, text_rope) = project(&self.text, text, 0)?;
        let (image_mod, image_rows, image_rope) = project(&self.image, image, m)?;
        let heads = self.image.projection.heads;
        let [tq, tk, tv] = self.text.projection.parts(&text_rows, &text_rope);
        let [iq, ik, iv] = self.image.projection.parts(&image_rows, &image_rope);
        let (q, k, v) = (heads.join(&[tq, iq])?, heads.join(&[tk, ik])?, heads.join(&[tv, iv])?);
        drop((text_rows, image_rows));
        let mixed = attention(&q, &k, &v, self.scale, &[])?;
        drop((q, k, v));
        let next_text = self.text.finish(text, &mixed.narrow(1, 0, m)?, &text_mod)?;
        let next_image = self.image.finish(image, &mixed.narrow(1, m, n)?, &image_mod)?;
        Ok((next_image, next_text))
    }
}

/// A block over text and picture tokens together, whose attention and feed-forward run side by side.
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
    pub fn new(config: &FluxConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
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

    /// The next tokens: `x` is `[batch, text tokens + image tokens, hidden]`, `activated` and `rope`
    /// as for [`DoubleBlock::forward`].
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(&self, x: &Tensor, activated: &Tensor, rope: &Rope) -> Result<Tensor> {
        let [shift, scale, gate] = self.modulation.forward(activated)?;
        let rows = self.input.forward(&layer_norm_modulated(x, &scale, &shift, EPS)?)?;
        let (heads, width) = (self.heads, self.heads.width());
        let q = heads.split(&rows, 0, Some(&self.norm_q), Some(rope))?;
        let k = heads.split(&rows, width, Some(&self.norm_k), Some(rope))?;
        let v = heads.split(&rows, 2 * width, None, None)?;
        let mixed = attention(&q, &k, &v, self.scale, &[])?;
        drop((q, k, v));
        let joined = join_gelu(&mixed, &rows, 3 * width)?;
        drop(rows);
        gated_add(x, &self.output.forward(&joined)?, &gate)
    }
}
