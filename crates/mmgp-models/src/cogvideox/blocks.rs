//! The block of a CogVideoX transformer: text and video go through the same weights, normalised and
//! gated by vectors of their own.
//!
//! A block is a pure function of what it is given, so that it can run again when memory had to be
//! given back.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Linear, SharedInput, Weights};

use crate::{
    cogvideox::CogVideoXConfig,
    nn::{
        Activation, FeedForward, Heads, LayerNorm, Modulation, Rope, attention, contiguous,
        gated_add,
    },
};

/// ε of the norms over a head.
const HEAD_EPS: f64 = 1e-6;

/// A norm whose result text and video modulate differently.
#[derive(Debug)]
struct JointNorm {
    modulation: Modulation<6>,
    norm: LayerNorm,
}

/// What is added to each stream after a layer: gates of video and text, `[batch, hidden]`.
struct Gates {
    image: Tensor,
    text: Tensor,
}

impl JointNorm {
    fn new(config: &CogVideoXConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        Ok(Self {
            modulation: Modulation::new(weights, config.time_embed_dim, hidden)?,
            norm: LayerNorm::new(&weights.pp("norm"), hidden, config.norm_eps)?,
        })
    }

    /// Both streams as one, the text first, and their gates.
    fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        activated: &SharedInput,
    ) -> Result<(Tensor, Gates)> {
        let [shift, scale, gate, text_shift, text_scale, text_gate] =
            self.modulation.forward(activated)?;
        let text = self.norm.forward_modulated(text, &text_scale, &text_shift)?;
        let image = self.norm.forward_modulated(image, &scale, &shift)?;
        Ok((Tensor::cat(&[text, image], 1)?, Gates { image: gate, text: text_gate }))
    }
}

/// A block in which text and video tokens attend to each other.
#[derive(Debug)]
pub struct CogVideoXBlock {
    norm1: JointNorm,
    qkv: Linear,
    norm_q: LayerNorm,
    norm_k: LayerNorm,
    out: Linear,
    norm2: JointNorm,
    feed_forward: FeedForward,
    heads: Heads,
    scale: f64,
}

impl CogVideoXBlock {
    /// Asks for the block's tensors below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &CogVideoXConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        let attn = weights.pp("attn1");
        let layers = ["to_q", "to_k", "to_v"].map(|name| (name, hidden));
        let activation = config.feed_forward_activation().unwrap_or(Activation::GeluTanh);
        Ok(Self {
            norm1: JointNorm::new(config, &weights.pp("norm1"))?,
            qkv: attn.linear_joined(&layers, hidden, Bias::from(config.attention_bias))?,
            norm_q: LayerNorm::new(&attn.pp("norm_q"), heads.dim, HEAD_EPS)?,
            norm_k: LayerNorm::new(&attn.pp("norm_k"), heads.dim, HEAD_EPS)?,
            out: attn.pp("to_out.0").linear(hidden, hidden, Bias::Yes)?,
            norm2: JointNorm::new(config, &weights.pp("norm2"))?,
            feed_forward: FeedForward::new(&weights.pp("ff"), hidden, activation)?,
            heads,
            scale: 1. / (heads.dim as f64).sqrt(),
        })
    }

    /// The next `(image, text)`: `[batch, patches, hidden]` and `[batch, text tokens, hidden]` as
    /// given. `activated` is SiLU of the timestep's vector, `[batch, time_embed_dim]`; `rope`, of a
    /// rotary model, has the text's tokens first.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        activated: &SharedInput,
        rope: Option<&Rope>,
    ) -> Result<(Tensor, Tensor)> {
        let (x, gates) = self.norm1.forward(image, text, activated)?;
        let (image, text) = add(image, text, &self.attend(&x, rope)?, &gates)?;
        let (x, gates) = self.norm2.forward(&image, &text, activated)?;
        add(&image, &text, &self.feed_forward.forward(&x)?, &gates)
    }

    fn attend(&self, x: &Tensor, rope: Option<&Rope>) -> Result<Tensor> {
        let rows = self.qkv.forward(x)?;
        let (heads, width) = (self.heads, self.heads.width());
        let (batch, tokens, _) = rows.dims3()?;
        let normed = |first: usize, norm: &LayerNorm| {
            let own = contiguous(&rows.narrow(2, first, width)?)?;
            let own = norm.forward(&own.reshape((batch, tokens, heads.count, heads.dim))?)?;
            heads.split(&own.reshape((batch, tokens, width))?, 0, None, rope)
        };
        let q = normed(0, &self.norm_q)?;
        let k = normed(width, &self.norm_k)?;
        let v = heads.split(&rows, 2 * width, None, None)?;
        drop(rows);
        let mixed = attention(&q, &k, &v, self.scale, &[])?;
        drop((q, k, v));
        self.out.forward(&mixed)
    }
}

/// Adds what a layer made of both streams, the text first, to each behind its gate.
fn add(image: &Tensor, text: &Tensor, y: &Tensor, gates: &Gates) -> Result<(Tensor, Tensor)> {
    let (n, m) = (image.dim(1)?, text.dim(1)?);
    let text = gated_add(text, &y.narrow(1, 0, m)?, &gates.text)?;
    Ok((gated_add(image, &y.narrow(1, m, n)?, &gates.image)?, text))
}
