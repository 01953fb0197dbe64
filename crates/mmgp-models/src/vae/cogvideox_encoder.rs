//! The encoder of CogVideoX's video autoencoder, for one frame: the picture that a video begins with.
//!
//! Of one frame every convolution over time sees copies, and nothing is joined in time.

use candle_core::{DType, Result as CandleResult, Tensor};
use mmgp_quant::Weights;
use mmgp_residency::{ModelBuilder, Paged};

use crate::{
    Error, Result,
    nn::{Conv2d, Conv3d, GroupNorm, Window, add},
    vae::{
        cogvideox::{CogVideoXVaeConfig, Tiling},
        kl::Moments,
    },
};

/// Of the norms, whatever the config says: that is how diffusers builds them.
const EPS: f64 = 1e-6;

type Built<T> = mmgp_quant::Result<T>;

/// The encoder of an `AutoencoderKLCogVideoX` whose weights are paged.
pub struct CogVideoXEncoder {
    model: Paged<Encoder, ()>,
    config: CogVideoXVaeConfig,
    compute: DType,
}

impl CogVideoXEncoder {
    /// Asks `builder` for the encoder's tensors. Nothing is read; the decoder's are left aside.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &CogVideoXVaeConfig, mut builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let root = builder.stem();
        let encoder = Encoder::new(config, &root)?;
        builder.ignore("decoder.");
        builder.ignore("post_quant_conv.");
        let compute = root.compute_dtype();
        let model = builder.finish(encoder, Vec::new())?;
        Ok(Self { model, config: config.clone(), compute })
    }

    /// Pictures `[batch, 3, height, width]`, about −1 to 1, to what is known of their latents, each
    /// `[batch, latent_channels, height / scale, width / scale]`, f32; in tiles, if `tiling` is given and
    /// they are larger than one.
    ///
    /// # Errors
    /// Sides that are no multiples of the scale; tiles that do not fit the model, see [`Tiling`];
    /// weights that cannot be read.
    pub fn encode(&self, pictures: &Tensor, tiling: Option<&Tiling>) -> Result<Moments> {
        let (_, _, height, width) = pictures.dims4()?;
        let scale = self.config.scale();
        if height == 0 || width == 0 || height % scale + width % scale > 0 {
            return Err(Error::Input(format!(
                "a picture of {width}x{height}: expected multiples of {scale}"
            )));
        }
        let x = pictures.to_dtype(self.compute)?.unsqueeze(2)?;
        let encode = |x: &Tensor| -> Result<Tensor> {
            let moments = self.model.pass()?.stem(|encoder| encoder.forward(x))?;
            Ok(moments.to_dtype(DType::F32)?)
        };
        let moments = match tiling {
            Some(tiling) => tiling.encode(&x, scale, encode)?,
            None => encode(&x)?,
        };
        let moments = moments.squeeze(2)?;
        let channels = self.config.latent_channels;
        let mean = moments.narrow(1, 0, channels)?.contiguous()?;
        let logvar = moments.narrow(1, channels, channels)?.clamp(-30f32, 20f32)?;
        let latents = (&mean * self.config.picture_factor())?;
        Ok(Moments { mean, logvar, latents })
    }

    /// Stored tensors that neither decoder nor encoder use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }
}

struct Encoder {
    conv_in: Conv3d,
    steps: Vec<Step>,
    norm_out: GroupNorm,
    conv_out: Conv3d,
}

enum Step {
    Residual(Box<Residual>),
    Halve(Conv2d),
}

impl Encoder {
    fn new(config: &CogVideoXVaeConfig, root: &Weights) -> Built<Self> {
        let weights = root.pp("encoder");
        let channels = &config.block_out_channels;
        let groups = config.norm_num_groups;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let residual = |path: String, from: usize, to: usize| -> Built<Step> {
            Ok(Step::Residual(Box::new(Residual::new(&weights.pp(path), from, to, groups)?)))
        };
        let mut steps = Vec::new();
        let mut from = first;
        for (level, &to) in channels.iter().enumerate() {
            for i in 0..config.layers_per_block {
                steps.push(residual(format!("down_blocks.{level}.resnets.{i}"), from, to)?);
                from = to;
            }
            if level + 1 < channels.len() {
                let weights = weights.pp(format_args!("down_blocks.{level}.downsamplers.0.conv"));
                steps.push(Step::Halve(Conv2d::new(&weights, to, to, Window::HALVE)?));
            }
        }
        for i in 0..2 {
            steps.push(residual(format!("mid_block.resnets.{i}"), last, last)?);
        }
        Ok(Self {
            conv_in: same(&weights.pp("conv_in"), config.in_channels, first)?,
            steps,
            norm_out: GroupNorm::new(&weights.pp("norm_out"), groups, last, EPS)?,
            conv_out: same(&weights.pp("conv_out"), last, 2 * config.latent_channels)?,
        })
    }

    /// `[batch, 3, 1, height, width]` to `[batch, 2 · latent_channels, 1, h, w]`.
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let mut x = self.conv_in.forward(x, None)?;
        for step in &self.steps {
            x = match step {
                Step::Residual(block) => block.forward(x)?,
                Step::Halve(conv) => conv.forward(&x.squeeze(2)?)?.unsqueeze(2)?,
            };
        }
        self.conv_out.forward(&self.norm_out.silu_in_place(x)?, None)
    }
}

/// A 3 × 3 × 3 convolution that keeps the size.
fn same(weights: &Weights, from: usize, to: usize) -> Built<Conv3d> {
    Conv3d::new(&weights.pp("conv"), from, to, 3, Window::SAME)
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
        let shortcut = weights.pp("conv_shortcut");
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

    fn forward(&self, x: Tensor) -> CandleResult<Tensor> {
        let y = self.conv1.forward(&self.norm1.forward_silu(&x)?, None)?;
        let y = self.conv2.forward(&self.norm2.silu_in_place(y)?, None)?;
        match &self.shortcut {
            Some(conv) => add(&y, &conv.forward(&x, None)?),
            None => add(&y, &x),
        }
    }
}
