//! The parts of an `AutoencoderKL`: residual blocks, attention at the lowest level, and the walks
//! down and up.
//!
//! A decode of a large picture is all temporaries, so each step drops what it no longer needs, norms
//! carry their SiLU, and the doubling of a level is part of its convolution.

use candle_core::{DType, Result, Tensor};
use mmgp_quant::{Bias, Linear, Weights};

use crate::{
    nn::{Conv2d, GroupNorm, Heads, Window, add, attention, contiguous},
    vae::kl::KlConfig,
};

const EPS: f64 = 1e-6;

type Built<T> = mmgp_quant::Result<T>;

/// From latents to pictures.
#[derive(Debug)]
pub struct Decoder {
    post_quant: Option<Conv2d>,
    conv_in: Conv2d,
    mid: Mid,
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    compute: DType,
}

impl Decoder {
    /// Asks for `decoder.` and, where the config has it, `post_quant_conv.`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &KlConfig, root: &Weights) -> Built<Self> {
        let (latent, groups) = (config.latent_channels, config.norm_num_groups);
        let weights = root.pp("decoder");
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let post_quant = match config.use_post_quant_conv {
            true => Some(Conv2d::new(&root.pp("post_quant_conv"), latent, latent, Window::POINT)?),
            false => None,
        };
        let conv_in = Conv2d::new(&weights.pp("conv_in"), latent, first, Window::SAME)?;
        let mid = Mid::new(config, &weights.pp("mid_block"), first)?;
        let mut levels = Vec::new();
        let mut from = first;
        for (i, &to) in channels.iter().enumerate() {
            let weights = weights.pp(format_args!("up_blocks.{i}"));
            let change = match i + 1 < channels.len() {
                true => Some(("upsamplers", Window::DOUBLE)),
                false => None,
            };
            levels.push(Level::new(
                &weights,
                from,
                to,
                config.layers_per_block + 1,
                groups,
                change,
            )?);
            from = to;
        }
        let norm_out = GroupNorm::new(&weights.pp("conv_norm_out"), groups, last, EPS)?;
        let conv_out =
            Conv2d::new(&weights.pp("conv_out"), last, config.out_channels, Window::SAME)?;
        let compute = root.compute_dtype();
        Ok(Self { post_quant, conv_in, mid, levels, norm_out, conv_out, compute })
    }

    /// `[batch, latent_channels, h, w]` to `[batch, out_channels, h · scale, w · scale]`.
    ///
    /// # Errors
    /// Another number of channels; weights that are not leased.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let latents = latents.to_dtype(self.compute)?;
        let mut x = match &self.post_quant {
            Some(conv) => self.conv_in.forward(&conv.forward(&latents)?)?,
            None => self.conv_in.forward(&latents)?,
        };
        x = self.mid.forward(x)?;
        for level in &self.levels {
            x = level.forward(x)?;
        }
        self.conv_out.forward(&self.norm_out.silu_in_place(x)?)?.to_dtype(DType::F32)
    }
}

/// From pictures to the moments of their latents.
#[derive(Debug)]
pub struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    mid: Mid,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    quant: Option<Conv2d>,
    compute: DType,
}

impl Encoder {
    /// Asks for `encoder.` and, where the config has it, `quant_conv.`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &KlConfig, root: &Weights) -> Built<Self> {
        let (moments, groups) = (2 * config.latent_channels, config.norm_num_groups);
        let weights = root.pp("encoder");
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let conv_in = Conv2d::new(&weights.pp("conv_in"), config.in_channels, first, Window::SAME)?;
        let mut levels = Vec::new();
        let mut from = first;
        for (i, &to) in channels.iter().enumerate() {
            let weights = weights.pp(format_args!("down_blocks.{i}"));
            let change = match i + 1 < channels.len() {
                true => Some(("downsamplers", Window::HALVE)),
                false => None,
            };
            levels.push(Level::new(&weights, from, to, config.layers_per_block, groups, change)?);
            from = to;
        }
        let mid = Mid::new(config, &weights.pp("mid_block"), last)?;
        let norm_out = GroupNorm::new(&weights.pp("conv_norm_out"), groups, last, EPS)?;
        let conv_out = Conv2d::new(&weights.pp("conv_out"), last, moments, Window::SAME)?;
        let quant = match config.use_quant_conv {
            true => Some(Conv2d::new(&root.pp("quant_conv"), moments, moments, Window::POINT)?),
            false => None,
        };
        let compute = root.compute_dtype();
        Ok(Self { conv_in, levels, mid, norm_out, conv_out, quant, compute })
    }

    /// `[batch, in_channels, height, width]` to `[batch, 2 · latent_channels, h, w]`: means, then
    /// logarithms of variances.
    ///
    /// # Errors
    /// Another number of channels, a picture that is too small; weights that are not leased.
    pub fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&pictures.to_dtype(self.compute)?)?;
        for level in &self.levels {
            x = level.forward(x)?;
        }
        x = self.mid.forward(x)?;
        let y = self.conv_out.forward(&self.norm_out.silu_in_place(x)?)?;
        match &self.quant {
            Some(conv) => conv.forward(&y)?.to_dtype(DType::F32),
            None => y.to_dtype(DType::F32),
        }
    }
}

/// The residual blocks of one resolution, and the change to the next.
#[derive(Debug)]
struct Level {
    blocks: Vec<Residual>,
    change: Option<Conv2d>,
}

impl Level {
    fn new(
        weights: &Weights,
        from: usize,
        to: usize,
        count: usize,
        groups: usize,
        change: Option<(&str, Window)>,
    ) -> Built<Self> {
        let mut blocks = Vec::new();
        for i in 0..count {
            let from = if i == 0 { from } else { to };
            blocks.push(Residual::new(&weights.pp(format_args!("resnets.{i}")), from, to, groups)?);
        }
        let change = match change {
            Some((name, window)) => {
                let weights = weights.pp(format_args!("{name}.0.conv"));
                Some(Conv2d::new(&weights, to, to, window)?)
            }
            None => None,
        };
        Ok(Self { blocks, change })
    }

    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for block in &self.blocks {
            x = block.forward(x)?;
        }
        match &self.change {
            Some(conv) => conv.forward(&x),
            None => Ok(x),
        }
    }
}

/// Norm, SiLU, convolution, twice, beside a shortcut.
#[derive(Debug)]
struct Residual {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl Residual {
    fn new(weights: &Weights, from: usize, to: usize, groups: usize) -> Built<Self> {
        Ok(Self {
            norm1: GroupNorm::new(&weights.pp("norm1"), groups, from, EPS)?,
            conv1: Conv2d::new(&weights.pp("conv1"), from, to, Window::SAME)?,
            norm2: GroupNorm::new(&weights.pp("norm2"), groups, to, EPS)?,
            conv2: Conv2d::new(&weights.pp("conv2"), to, to, Window::SAME)?,
            shortcut: match from == to {
                true => None,
                false => Some(Conv2d::new(&weights.pp("conv_shortcut"), from, to, Window::POINT)?),
            },
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        // A decode at 1024 × 1024 peaks in here, at a gigabyte a tensor: where there is a shortcut,
        // it is taken first, and the input's memory becomes the branch's.
        let (mut y, x) = match &self.shortcut {
            Some(conv) => {
                let shortcut = conv.forward(&x)?;
                (self.norm1.silu_in_place(x)?, shortcut)
            }
            None => (self.norm1.forward_silu(&x)?, x),
        };
        y = self.conv1.forward(&y)?; // assigned, not shadowed: what was there is dropped
        y = self.norm2.silu_in_place(y)?;
        y = self.conv2.forward(&y)?;
        add(&y, &x)
    }
}

/// The lowest level: a residual block, attention over all positions, a residual block.
#[derive(Debug)]
struct Mid {
    before: Residual,
    attention: Option<Attention>,
    after: Residual,
}

impl Mid {
    fn new(config: &KlConfig, weights: &Weights, channels: usize) -> Built<Self> {
        let groups = config.norm_num_groups;
        let residual = |i: usize| {
            Residual::new(&weights.pp(format_args!("resnets.{i}")), channels, channels, groups)
        };
        Ok(Self {
            before: residual(0)?,
            attention: match config.mid_block_add_attention {
                true => Some(Attention::new(&weights.pp("attentions.0"), channels, groups)?),
                false => None,
            },
            after: residual(1)?,
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = self.before.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.after.forward(x)
    }
}

/// One head over all positions.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    qkv: Linear,
    out: Linear,
    channels: usize,
}

impl Attention {
    fn new(weights: &Weights, channels: usize, groups: usize) -> Built<Self> {
        // Checkpoints from before diffusers 0.13 have the second set of names.
        let old = weights.contains("query.weight") && !weights.contains("to_q.weight");
        let ([q, k, v], out) = match old {
            false => (["to_q", "to_k", "to_v"], "to_out.0"),
            true => (["query", "key", "value"], "proj_attn"),
        };
        Ok(Self {
            norm: GroupNorm::new(&weights.pp("group_norm"), groups, channels, EPS)?,
            qkv: weights.linear_joined(
                &[(q, channels), (k, channels), (v, channels)],
                channels,
                Bias::Yes,
            )?,
            out: weights.pp(out).linear(channels, channels, Bias::Yes)?,
            channels,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = x.dims4()?;
        let tokens = self.norm.forward(x)?.reshape((batch, channels, height * width))?;
        // Contiguous before the product: candle multiplies transposed batches wrongly on the CPU.
        let rows = self.qkv.forward(&contiguous(&tokens.transpose(1, 2)?)?)?;
        let heads = Heads { count: 1, dim: self.channels };
        let part = |i: usize| heads.split(&rows, i * self.channels, None, None);
        let scale = 1. / (self.channels as f64).sqrt();
        let mixed = attention(&part(0)?, &part(1)?, &part(2)?, scale, &[])?;
        let y = contiguous(&self.out.forward(&mixed)?.transpose(1, 2)?)?;
        add(&y.reshape((batch, channels, height, width))?, x)
    }
}
