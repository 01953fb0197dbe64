//! What stands between the text encoder and the transformer: the text's states attend to each other in
//! a few blocks, whose gates come from the timestep and the mean of the text.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Linear, SharedInput, Weights};

use crate::{
    hunyuanvideo::{EPS, HunyuanVideoConfig},
    nn::{Activation, FeedForward, Heads, LayerNorm, Modulation, attention_up_to, gated_add},
};

/// A block over text tokens alone.
#[derive(Debug)]
pub struct RefinerBlock {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    feed_forward: FeedForward,
    gates: Modulation<2>,
    heads: Heads,
    scale: f64,
}

impl RefinerBlock {
    /// Asks for the block's tensors below `weights`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &HunyuanVideoConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        let attn = weights.pp("attn");
        let layers = ["to_q", "to_k", "to_v"].map(|name| (name, hidden));
        Ok(Self {
            norm1: LayerNorm::new(&weights.pp("norm1"), hidden, EPS)?,
            qkv: attn.linear_joined(&layers, hidden, Bias::Yes)?,
            out: attn.pp("to_out.0").linear(hidden, hidden, Bias::Yes)?,
            norm2: LayerNorm::new(&weights.pp("norm2"), hidden, EPS)?,
            feed_forward: FeedForward::new(&weights.pp("ff"), hidden, Activation::Silu)?,
            gates: Modulation::new(&weights.pp("norm_out"), hidden, hidden)?,
            heads,
            scale: 1. / (heads.dim as f64).sqrt(),
        })
    }

    /// The next text tokens: `text` is `[batch, tokens, hidden]`, of which item `i` has `lengths[i]`
    /// before its padding; `activated` is SiLU of the text's conditioning vector, `[batch, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub fn forward(
        &self,
        text: &Tensor,
        activated: &SharedInput,
        lengths: &[usize],
    ) -> Result<Tensor> {
        let [gate, gate_mlp] = self.gates.forward(activated)?;
        let rows = self.qkv.forward(&self.norm1.forward(text)?)?;
        let width = self.heads.width();
        let part = |i: usize| self.heads.split(&rows, i * width, None, None);
        let mixed = attention_up_to(&part(0)?, &part(1)?, &part(2)?, self.scale, lengths)?;
        drop(rows);
        let text = gated_add(text, &self.out.forward(&mixed)?, &gate)?;
        let y = self.feed_forward.forward(&self.norm2.forward(&text)?)?;
        gated_add(&text, &y, &gate_mlp)
    }
}

/// The mean over the first `lengths[i]` tokens of each text: `[batch, tokens, width]` to
/// `[batch, width]`.
///
/// # Errors
/// Lengths that do not fit.
pub(super) fn mean(text: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let items = lengths.iter().enumerate().map(|(item, &length)| {
        let own = text.narrow(0, item, 1)?.narrow(1, 0, length)?;
        own.mean(1)
    });
    Tensor::cat(&items.collect::<Result<Vec<_>>>()?, 0)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn padding_is_not_in_the_mean() -> Result<()> {
        let text = Tensor::arange(0f32, 12., &Device::Cpu)?.reshape((2, 3, 2))?;
        assert_eq!(mean(&text, &[3, 1])?.to_vec2::<f32>()?, [[2., 3.], [6., 7.]]);
        assert!(mean(&text, &[4, 1]).is_err());
        Ok(())
    }
}
