//! The parts of CogVideoX's decoder: a chain of steps, each a pure function of its frames and of what
//! it saw before.
//!
//! What a convolution must see again of the frames before is handed from one batch of frames to the
//! next by the caller, who holds a step's old and new at once, but never two of all steps. Norms take
//! their scale and shift from the latents
//! ([spatially conditional normalization](https://arxiv.org/abs/2209.09002)); both are computed on the
//! latents' grid, since a 1 × 1 × 1 convolution and a nearest-neighbour enlargement commute.

use candle_core::{Result, Tensor};
use mmgp_quant::Weights;

use crate::{
    nn::{Conv2d, Conv3d, GroupNorm, Window, add, contiguous, spread_affine_silu},
    vae::cogvideox::CogVideoXVaeConfig,
};

/// Of the norms in spatial norms, whatever the config says.
const EPS: f64 = 1e-6;

type Built<T> = mmgp_quant::Result<T>;

/// What a step needs of the frames before: one tensor per convolution over time, or none at the
/// first batch.
pub(super) type Past = Vec<Tensor>;

/// The decoder as a chain of steps.
pub(super) struct Decoder {
    steps: Vec<Step>,
}

enum Step {
    Conv(Conv3d),
    Residual(Box<Residual>),
    Double(Double),
    Out(SpatialNorm, Conv3d),
}

impl Decoder {
    /// Asks for `decoder.`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub(super) fn new(config: &CogVideoXVaeConfig, root: &Weights) -> Built<Self> {
        let (latent, groups) = (config.latent_channels, config.norm_num_groups);
        let weights = root.pp("decoder");
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let conv = |name: &str, from: usize, to: usize| same(&weights.pp(name), from, to);
        let residual = |path: String, from: usize, to: usize| -> Built<Step> {
            Ok(Step::Residual(Box::new(Residual::new(
                &weights.pp(path),
                from,
                to,
                latent,
                groups,
            )?)))
        };
        let mut steps = vec![Step::Conv(conv("conv_in", latent, first)?)];
        for i in 0..2 {
            steps.push(residual(format!("mid_block.resnets.{i}"), first, first)?);
        }
        let mut from = first;
        for (level, &to) in channels.iter().enumerate() {
            for i in 0..config.layers_per_block + 1 {
                steps.push(residual(format!("up_blocks.{level}.resnets.{i}"), from, to)?);
                from = to;
            }
            if level + 1 < channels.len() {
                let weights = weights.pp(format_args!("up_blocks.{level}.upsamplers.0.conv"));
                let time = match level < config.time_doublings() {
                    true => Time::Double,
                    false => Time::Keep,
                };
                let conv = Conv2d::new(&weights, to, to, Window::DOUBLE)?;
                steps.push(Step::Double(Double { conv, time }));
            }
        }
        let norm = SpatialNorm::new(&weights.pp("norm_out"), last, latent, groups)?;
        steps.push(Step::Out(norm, conv("conv_out", last, config.out_channels)?));
        Ok(Self { steps })
    }

    pub(super) fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Step `index` of the chain over `x` `[batch, channels, frames, height, width]`, which is left as
    /// it is; `latents` `[batch, latent_channels, t, h, w]` are those that these frames come from.
    ///
    /// # Errors
    /// Shapes that do not fit; weights that are not leased.
    pub(super) fn step(
        &self,
        index: usize,
        x: &Tensor,
        latents: &Tensor,
        past: &Past,
    ) -> Result<(Tensor, Past)> {
        let mut next = Past::new();
        let y = match &self.steps[index] {
            Step::Conv(conv) => causal(conv, x, past.first(), &mut next)?,
            Step::Residual(block) => block.forward(x, latents, past, &mut next)?,
            Step::Double(double) => double.forward(x)?,
            Step::Out(norm, conv) => {
                let y = norm.silu_in_place(x.copy()?, latents)?;
                causal(conv, &y, past.first(), &mut next)?
            }
        };
        Ok((y, next))
    }
}

/// A 3 × 3 × 3 convolution that keeps the size.
fn same(weights: &Weights, from: usize, to: usize) -> Built<Conv3d> {
    Conv3d::new(&weights.pp("conv"), from, to, 3, Window::SAME)
}

/// A convolution, and into `next` what it must see again.
fn causal(conv: &Conv3d, x: &Tensor, past: Option<&Tensor>, next: &mut Past) -> Result<Tensor> {
    next.extend(conv.past(x, past)?);
    conv.forward(x, past)
}

/// Norm, SiLU, convolution, twice, beside a shortcut.
struct Residual {
    norm1: SpatialNorm,
    conv1: Conv3d,
    norm2: SpatialNorm,
    conv2: Conv3d,
    shortcut: Option<Conv3d>,
}

impl Residual {
    fn new(weights: &Weights, from: usize, to: usize, latent: usize, groups: usize) -> Built<Self> {
        let shortcut = weights.pp("conv_shortcut");
        Ok(Self {
            norm1: SpatialNorm::new(&weights.pp("norm1"), from, latent, groups)?,
            conv1: same(&weights.pp("conv1"), from, to)?,
            norm2: SpatialNorm::new(&weights.pp("norm2"), to, latent, groups)?,
            conv2: same(&weights.pp("conv2"), to, to)?,
            shortcut: match from == to {
                true => None,
                false => Some(Conv3d::new(&shortcut, from, to, 1, Window::POINT)?),
            },
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        latents: &Tensor,
        past: &Past,
        next: &mut Past,
    ) -> Result<Tensor> {
        let mut y = self.norm1.silu_in_place(x.copy()?, latents)?;
        y = causal(&self.conv1, &y, past.first(), next)?; // what was there is dropped
        y = self.norm2.silu_in_place(y, latents)?;
        y = causal(&self.conv2, &y, past.get(1), next)?;
        match &self.shortcut {
            Some(conv) => add(&y, &conv.forward(x, None)?),
            None => add(&y, x),
        }
    }
}

/// GroupNorm over all frames of a batch, then scale and shift from the latents, then SiLU.
struct SpatialNorm {
    norm: GroupNorm,
    scale: Conv3d,
    shift: Conv3d,
}

impl SpatialNorm {
    fn new(weights: &Weights, channels: usize, latent: usize, groups: usize) -> Built<Self> {
        let point = |name: &str| {
            Conv3d::new(&weights.pp(name).pp("conv"), latent, channels, 1, Window::POINT)
        };
        Ok(Self {
            norm: GroupNorm::new(&weights.pp("norm_layer"), groups, channels, EPS)?,
            scale: point("conv_y")?,
            shift: point("conv_b")?,
        })
    }

    /// In the memory of `x`, which must be the caller's own.
    fn silu_in_place(&self, x: Tensor, latents: &Tensor) -> Result<Tensor> {
        let frames = latent_frames(x.dim(2)?, latents.dim(2)?);
        let scale = self.scale.forward(latents, None)?;
        let shift = self.shift.forward(latents, None)?;
        spread_affine_silu(self.norm.in_place(x)?, &scale, &shift, &frames)
    }
}

/// Which of `latent` frames each of `frames` takes its scale and shift from: the nearest before it. Of
/// an odd number above one the first stands alone on both sides.
fn latent_frames(frames: usize, latent: usize) -> Vec<usize> {
    match frames > 1 && frames % 2 == 1 {
        true => (0..frames)
            .map(|i| match i {
                0 => 0,
                _ => 1 + (i - 1) * latent.saturating_sub(1) / (frames - 1),
            })
            .collect(),
        false => (0..frames).map(|i| i * latent / frames).collect(),
    }
}

/// Twice the height and width, then a 3 × 3 convolution of each frame; perhaps twice the frames.
struct Double {
    conv: Conv2d,
    time: Time,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Time {
    Keep,
    /// Every frame twice; of an odd number the first stays single.
    Double,
}

impl Double {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let frames = x.dim(2)?;
        let times = |frame: usize| match self.time {
            Time::Double if frame > 0 || frames % 2 == 0 => 2,
            _ => 1,
        };
        let count: usize = (0..frames).map(times).sum();
        let mut at = 0;
        let mut out: Option<Tensor> = None;
        for frame in 0..frames {
            // A frame that comes twice is convolved once.
            let y = self.conv.forward(&contiguous(&x.narrow(2, frame, 1)?.squeeze(2)?)?)?;
            let y = contiguous(&y.unsqueeze(2)?)?;
            let out = match &out {
                Some(out) => out,
                None => {
                    let (batch, channels, _, height, width) = y.dims5()?;
                    let shape = (batch, channels, count, height, width);
                    out.insert(Tensor::zeros(shape, y.dtype(), y.device())?)
                }
            };
            for _ in 0..times(frame) {
                out.slice_set(&y, 2, at)?;
                at += 1;
            }
        }
        out.ok_or_else(|| candle_core::Error::Msg("no frames to double".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_an_odd_number_of_frames_stands_alone() {
        assert_eq!(latent_frames(1, 1), [0]);
        assert_eq!(latent_frames(3, 3), [0, 1, 2]);
        assert_eq!(latent_frames(5, 3), [0, 1, 1, 2, 2]);
        assert_eq!(latent_frames(9, 3), [0, 1, 1, 1, 1, 2, 2, 2, 2]);
        assert_eq!(latent_frames(8, 2), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(latent_frames(2, 2), [0, 1]);
    }
}
