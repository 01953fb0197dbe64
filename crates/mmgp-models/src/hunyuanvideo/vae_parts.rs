//! The parts of the decoder: a chain of steps, each a pure function of its frames.
//!
//! Convolutions look back in time only, and see the nearest pixel where a frame ends; the attention of
//! the lowest level lets a frame see itself and those before it. Norms see all frames of a tile.

use candle_core::{Result, Tensor};
use mmgp_quant::{Bias, Linear, Weights};

use crate::{
    hunyuanvideo::{EPS, HunyuanVideoVaeConfig},
    nn::{Conv3d, GroupNorm, Heads, Window, add, attention, contiguous},
};

type Built<T> = mmgp_quant::Result<T>;

/// The decoder as a chain of steps.
pub(super) struct Decoder {
    steps: Vec<Step>,
}

enum Step {
    Conv(Conv3d),
    Residual(Box<Residual>),
    Attention(Box<Attention>),
    Enlarge(Enlarge),
    Out(GroupNorm, Conv3d),
}

impl Decoder {
    /// Asks for `post_quant_conv` and `decoder.`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub(super) fn new(config: &HunyuanVideoVaeConfig, root: &Weights) -> Built<Self> {
        let (latent, groups) = (config.latent_channels, config.norm_num_groups);
        let weights = root.pp("decoder");
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let residual = |path: String, from: usize, to: usize| -> Built<Step> {
            let block = Residual::new(&weights.pp(path), from, to, groups)?;
            Ok(Step::Residual(Box::new(block)))
        };
        let point = Conv3d::new(&root.pp("post_quant_conv"), latent, latent, 1, Window::POINT)?;
        let mut steps = vec![Step::Conv(point)];
        steps.push(Step::Conv(same(&weights.pp("conv_in"), latent, first)?));
        steps.push(residual("mid_block.resnets.0".into(), first, first)?);
        if config.mid_block_add_attention {
            let attention = Attention::new(&weights.pp("mid_block.attentions.0"), first, groups)?;
            steps.push(Step::Attention(Box::new(attention)));
        }
        steps.push(residual("mid_block.resnets.1".into(), first, first)?);
        let mut from = first;
        for (level, &to) in channels.iter().enumerate() {
            for i in 0..config.layers_per_block + 1 {
                steps.push(residual(format!("up_blocks.{level}.resnets.{i}"), from, to)?);
                from = to;
            }
            let (time, space) = config.doubles(level);
            if time || space {
                let weights = weights.pp(format_args!("up_blocks.{level}.upsamplers.0"));
                steps.push(Step::Enlarge(Enlarge::new(&weights, to, time, space)?));
            }
        }
        let norm = GroupNorm::new(&weights.pp("conv_norm_out"), groups, last, EPS)?;
        steps.push(Step::Out(norm, same(&weights.pp("conv_out"), last, config.out_channels)?));
        Ok(Self { steps })
    }

    pub(super) fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Step `index` of the chain over `x` `[batch, channels, frames, height, width]`, which is left as
    /// it is.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub(super) fn step(&self, index: usize, x: &Tensor) -> Result<Tensor> {
        match &self.steps[index] {
            Step::Conv(conv) => conv.forward(x, None),
            Step::Residual(block) => block.forward(x),
            Step::Attention(attention) => attention.forward(x),
            Step::Enlarge(enlarge) => enlarge.forward(x),
            Step::Out(norm, conv) => conv.forward(&norm.forward_silu(x)?, None),
        }
    }
}

/// A 3 × 3 × 3 convolution that keeps the size.
fn same(weights: &Weights, from: usize, to: usize) -> Built<Conv3d> {
    Conv3d::new(&weights.pp("conv"), from, to, 3, Window::SAME.nearest())
}

/// Norm, SiLU, convolution, twice, beside a shortcut.
struct Residual {
    norm1: GroupNorm,
    conv1: Conv3d,
    norm2: GroupNorm,
    conv2: Conv3d,
    shortcut: Option<Conv3d>,
}

impl Residual {
    fn new(weights: &Weights, from: usize, to: usize, groups: usize) -> Built<Self> {
        let shortcut = weights.pp("conv_shortcut.conv");
        Ok(Self {
            norm1: GroupNorm::new(&weights.pp("norm1"), groups, from, EPS)?,
            conv1: same(&weights.pp("conv1"), from, to)?,
            norm2: GroupNorm::new(&weights.pp("norm2"), groups, to, EPS)?,
            conv2: same(&weights.pp("conv2"), to, to)?,
            shortcut: match from == to {
                true => None,
                false => Some(Conv3d::new(&shortcut, from, to, 1, Window::POINT)?),
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = self.norm1.forward_silu(x)?;
        y = self.conv1.forward(&y, None)?; // assigned, not shadowed: what was there is dropped
        y = self.norm2.silu_in_place(y)?;
        y = self.conv2.forward(&y, None)?;
        match &self.shortcut {
            Some(conv) => add(&y, &conv.forward(x, None)?),
            None => add(&y, x),
        }
    }
}

/// One head over all positions of a frame and of those before it.
struct Attention {
    norm: GroupNorm,
    qkv: Linear,
    out: Linear,
    channels: usize,
}

impl Attention {
    fn new(weights: &Weights, channels: usize, groups: usize) -> Built<Self> {
        let layers = ["to_q", "to_k", "to_v"].map(|name| (name, channels));
        Ok(Self {
            norm: GroupNorm::new(&weights.pp("group_norm"), groups, channels, EPS)?,
            qkv: weights.linear_joined(&layers, channels, Bias::Yes)?,
            out: weights.pp("to_out.0").linear(channels, channels, Bias::Yes)?,
            channels,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, frames, height, width) = x.dims5()?;
        let pixels = height * width;
        let tokens = self.norm.forward(x)?.reshape((batch, channels, frames * pixels))?;
        // Contiguous before the product: candle multiplies transposed batches wrongly on the CPU.
        let rows = self.qkv.forward(&contiguous(&tokens.transpose(1, 2)?)?)?;
        drop(tokens);
        let heads = Heads { count: 1, dim: self.channels };
        let part = |i: usize| heads.split(&rows, i * self.channels, None, None);
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        drop(rows);
        let scale = 1. / (self.channels as f64).sqrt();
        let mut mixed = Vec::with_capacity(frames);
        for frame in 0..frames {
            let seen = (frame + 1) * pixels;
            let own = q.narrow(2, frame * pixels, pixels)?;
            let (k, v) = (k.narrow(2, 0, seen)?, v.narrow(2, 0, seen)?);
            mixed.push(attention(&own, &k, &v, scale, &[])?);
        }
        let y = self.out.forward(&Tensor::cat(&mixed, 1)?)?;
        let y = contiguous(&y.transpose(1, 2)?)?;
        add(&y.reshape((batch, channels, frames, height, width))?, x)
    }
}

/// Twice the frames, of which the first stays single, or twice the height and width, or both; then a
/// convolution.
struct Enlarge {
    conv: Conv3d,
    frames: bool,
}

impl Enlarge {
    fn new(weights: &Weights, channels: usize, frames: bool, space: bool) -> Built<Self> {
        let window = Window { repeat: if space { 2 } else { 1 }, ..Window::SAME.nearest() };
        let conv = Conv3d::new(&weights.pp("conv.conv"), channels, channels, 3, window)?;
        Ok(Self { conv, frames })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !self.frames {
            return self.conv.forward(x, None);
        }
        // Frames are repeated while they are small; pixels only where the kernel looks.
        let frames = x.dim(2)? as u32;
        let twice: Vec<u32> = (0..2 * frames - 1).map(|i| i.div_ceil(2)).collect();
        let twice = Tensor::new(twice, x.device())?;
        self.conv.forward(&x.index_select(&twice, 2)?, None)
    }
}
