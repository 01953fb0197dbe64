//! The two kinds of block of transformers in which text and pixels attend to each other together
//! ([MM-DiT](https://arxiv.org/abs/2403.03206)), as FLUX and HunyuanVideo have them: with weights of their own
//! for both, and with shared ones.
//!
//! A block is a pure function of what it is given, so that it can run again when memory had to be
//! given back. Projections of one input are one product.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Input, Linear, SharedInput, Weights};

use crate::nn::{
    Activation, FeedForward, Heads, Modulation, Projected, RmsNorm, Rope, attention,
    attention_up_to, gated_add, gated_add_norm, join_gelu, layer_norm_modulated_for,
};

/// ε of all norms.
const EPS: f64 = 1e-6;

/// What all blocks of a pass share.
#[derive(Clone, Copy, Debug)]
pub struct Joint<'a> {
    /// SiLU of the conditioning vector, `[batch, width]`.
    pub activated: &'a SharedInput,
    /// Where tokens are, in their order.
    pub rope: &'a Rope,
    /// Where the text is.
    pub text: TextPlace<'a>,
}

/// Where the text's tokens are among all.
#[derive(Clone, Copy, Debug)]
pub enum TextPlace<'a> {
    /// Before the pixels' tokens; all tokens are seen.
    First,
    /// Behind them, padding at its end: of each item, so many tokens are seen.
    Last(&'a [usize]),
}

impl Joint<'_> {
    /// Attention of heads `[batch, heads, tokens, dim]`, to `[batch, tokens, heads · dim]`.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
        let scale = 1. / (heads.dim as f64).sqrt();
        match self.text {
            TextPlace::First => attention(q, k, v, scale, &[]),
            TextPlace::Last(keys) => attention_up_to(q, k, v, scale, keys),
        }
    }

    /// Attention of one stream's heads, and beside it along the last dimension GELU of what `up` makes of the stream.
    fn attention_beside_gelu(
        &self,
        stream: &Projected<'_>,
        heads: Heads,
        up: &Linear,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        {
            stream.held_to(heads)?;
            let keys = match self.text {
                TextPlace::First => stream.x.dims().get(1).copied(),
                // Items that see as many keys as others are computed together.
                TextPlace::Last(keys) => {
                    keys.first().copied().filter(|n| keys.iter().all(|m| m == n))
                }
            };
            let scale = 1. / (heads.dim as f64).sqrt();
            if let Some(keys) = keys
                && let Some(rows) =
                    crate::nn::cuda::attention_beside_gelu(heads, stream, keys, scale, up)?
            {
                return Ok(rows);
            }
        }
        let [q, k, v] = heads.project(&[*stream])?;
        let mixed = self.attention(&q, &k, &v, heads)?;
        drop((q, k, v));
        join_gelu(&mixed, up, stream.x)
    }
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

    /// The projection of a stream whose tokens are where `rope` has them.
    fn of<'a>(&'a self, x: &'a Input, rope: &'a Rope) -> Projected<'a> {
        Projected { linear: &self.qkv, x, norms: [&self.norm_q, &self.norm_k], rope }
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
    /// The next tokens of the stream `x`: adds what attention gave, projected, and the feed-forward. What was read is let go
    /// at once.
    fn finish(&self, x: &Tensor, mixed: Tensor, m: &[Tensor; 6]) -> Result<Tensor> {
        let [_, _, gate, shift_mlp, scale_mlp, gate_mlp] = m;
        let (modulation, up) = ([scale_mlp, shift_mlp], self.feed_forward.up());
        let (x, y) = gated_add_norm(x, &mixed, gate, modulation, EPS, up)?;
        drop(mixed);
        gated_add(&x, &self.feed_forward.forward_input(y)?, gate_mlp)
    }
}

/// A block in which the tokens of pixels and of text attend to each other through weights of their own.
#[derive(Debug)]
pub struct DoubleBlock {
    image: Stream,
    text: Stream,
}

impl DoubleBlock {
    /// Asks for the block's tensors below `weights`, by diffusers' names; the stream is as wide as its heads.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(heads: Heads, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = heads.width();
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
        Ok(Self { image, text })
    }

    /// The next `(image, text)`: `[batch, image tokens, width]` and `[batch, text tokens, width]` as given.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        joint: &Joint<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let (n, m) = (image.dim(1)?, text.dim(1)?);
        let (image_at, text_at) = match joint.text {
            TextPlace::First => (m, 0),
            TextPlace::Last(_) => (0, n),
        };
        let normed = |stream: &Stream, x: &Tensor, first: usize| {
            let modulation = stream.modulation.forward(joint.activated)?;
            let (modulated, reader) = ([&modulation[1], &modulation[0]], &stream.projection.qkv);
            let y = layer_norm_modulated_for(x, modulated, EPS, &[reader])?;
            Ok::<_, candle_core::Error>((modulation, y, joint.rope.narrow(first, x.dim(1)?)?))
        };
        let (image_mod, image_y, image_rope) = normed(&self.image, image, image_at)?;
        let (text_mod, text_y, text_rope) = normed(&self.text, text, text_at)?;
        let heads = self.image.projection.heads;
        let images = self.image.projection.of(&image_y, &image_rope);
        let texts = self.text.projection.of(&text_y, &text_rope);
        let [q, k, v] = match joint.text {
            TextPlace::First => heads.project(&[texts, images])?,
            TextPlace::Last(_) => heads.project(&[images, texts])?,
        };
        drop((image_y, text_y));
        let mixed = joint.attention(&q, &k, &v, heads)?;
        drop((q, k, v));
        let image_mixed = self.image.out.forward(&mixed.narrow(1, image_at, n)?)?;
        let text_mixed = self.text.out.forward(&mixed.narrow(1, text_at, m)?)?;
        drop(mixed);
        let next_text = self.text.finish(text, text_mixed, &text_mod)?;
        let next_image = self.image.finish(image, image_mixed, &image_mod)?;
        Ok((next_image, next_text))
    }
}

/// A block over the tokens of text and of pixels together, whose attention and feed-forward run side by side.
#[derive(Debug)]
pub struct SingleBlock {
    modulation: Modulation<3>,
    projection: Projection,
    up: Linear,
    output: Linear,
}

impl SingleBlock {
    /// Asks for the block's tensors below `weights`, by diffusers' names; the stream is as wide as its heads.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(heads: Heads, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = heads.width();
        let attn = weights.pp("attn");
        Ok(Self {
            modulation: Modulation::new(&weights.pp("norm"), hidden, hidden)?,
            projection: Projection::new(
                &attn,
                ["to_q", "to_k", "to_v"],
                ["norm_q", "norm_k"],
                heads,
            )?,
            // It reads the same input, but its outputs go where the next product reads them.
            up: weights.pp("proj_mlp").linear(hidden, 4 * hidden, Bias::Yes)?,
            output: weights.pp("proj_out").linear(5 * hidden, hidden, Bias::Yes)?,
        })
    }

    /// The next tokens: `x` is `[batch, tokens of all, width]`.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(&self, x: &Tensor, joint: &Joint<'_>) -> Result<Tensor> {
        let [shift, scale, gate] = self.modulation.forward(joint.activated)?;
        let readers = [&self.projection.qkv, &self.up];
        let y = layer_norm_modulated_for(x, [&scale, &shift], EPS, &readers)?;
        let heads = self.projection.heads;
        let stream = self.projection.of(&y, joint.rope);
        let joined = joint.attention_beside_gelu(&stream, heads, &self.up)?;
        drop(y);
        gated_add(x, &self.output.forward(&joined)?, &gate)
    }
}
