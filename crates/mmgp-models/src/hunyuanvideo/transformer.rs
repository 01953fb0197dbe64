//! The HunyuanVideo transformer as a stem and a list of blocks.
//!
//! The stem cuts latents into patches, embeds them, the text, the timestep and the guidance scale, and
//! puts the result together again; everything between is blocks, leased one after another: first those
//! that refine the text, then the double ones, then the single ones. Padding of the text changes
//! nothing, so that as much of it as all items have is not computed at all.

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use mmgp_quant::{Bias, Linear, SharedInput, Weights};
use mmgp_residency::{ModelBuilder, Paged, Pager};
use parking_lot::Mutex;

use crate::{
    Error, Result,
    hunyuanvideo::{EPS, HunyuanVideoConfig, RefinerBlock, refiner},
    nn::{
        Activation, DoubleBlock, Heads, Joint, Mlp, Patch, PatchConv, Rope, SingleBlock, TextPlace,
        add, contiguous, layer_norm_modulated, timestep_embedding,
    },
};

const SINUSOIDS: usize = 256;

/// What one call of a HunyuanVideo transformer reads; all tensors f32.
#[derive(Clone, Copy, Debug)]
pub struct HunyuanVideoInputs<'a> {
    /// Latents `[batch, in_channels, frames, height, width]`, with the picture's latents among the
    /// channels where an image-to-video model reads them.
    pub hidden_states: &'a Tensor,
    /// A scheduler's timestep, 0 to 1000, `[batch]`.
    pub timestep: &'a Tensor,
    /// States of the text `[batch, text tokens, text_embed_dim]`, padding behind each text.
    pub encoder_hidden_states: &'a Tensor,
    /// Of each text, its tokens before the padding: at least one.
    pub text_lengths: &'a [usize],
    /// Pooled text `[batch, pooled_projection_dim]`.
    pub pooled_projections: &'a Tensor,
    /// Guidance scale times 1000, `[batch]`: given exactly if the config has `guidance_embeds`.
    pub guidance: Option<&'a Tensor>,
}

/// A HunyuanVideo transformer whose weights are paged.
pub struct HunyuanVideoTransformer {
    model: Paged<Stem, Block>,
    config: HunyuanVideoConfig,
    rope: Mutex<Option<Turned>>,
}

/// The tables of the last call, which the steps of a run share: making them anew would send tables to
/// the device behind whatever else travels there.
struct Turned {
    grid: [usize; 3],
    text: usize,
    rope: Rope,
}

enum Block {
    Refiner(Box<RefinerBlock>),
    Double(Box<DoubleBlock>),
    Single(Box<SingleBlock>),
}

/// The streams between two blocks; they go on as one from the first single block.
enum State {
    Two(Tensor, Tensor),
    One(Tensor),
}

impl HunyuanVideoTransformer {
    /// Asks `builder` for all tensors of the model. Nothing is read.
    ///
    /// # Errors
    /// A config that will not do; a tensor that is missing or does not fit it.
    pub fn new(config: &HunyuanVideoConfig, builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let stem = Stem::new(config, &builder.stem())?;
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        let mut blocks = Vec::new();
        for i in 0..config.num_refiner_layers {
            let path = format!("context_embedder.token_refiner.refiner_blocks.{i}");
            let block = RefinerBlock::new(config, &builder.block(&path))?;
            blocks.push(Block::Refiner(Box::new(block)));
        }
        for i in 0..config.num_layers {
            let weights = builder.block(&format!("transformer_blocks.{i}"));
            blocks.push(Block::Double(Box::new(DoubleBlock::new(heads, &weights)?)));
        }
        for i in 0..config.num_single_layers {
            let weights = builder.block(&format!("single_transformer_blocks.{i}"));
            blocks.push(Block::Single(Box::new(SingleBlock::new(heads, &weights)?)));
        }
        let model = builder.finish(stem, blocks)?;
        Ok(Self { model, config: config.clone(), rope: Mutex::default() })
    }

    /// The velocity `[batch, out_channels, frames, height, width]`, f32.
    ///
    /// # Errors
    /// Inputs that do not fit the model or each other; weights that cannot be read; cancellation.
    pub fn forward(&self, inputs: &HunyuanVideoInputs<'_>) -> Result<Tensor> {
        let grid = self.check(inputs)?;
        let lengths = inputs.text_lengths;
        let most = lengths.iter().copied().max().unwrap_or(0);
        let patches = grid.iter().product::<usize>();
        let keys: Vec<usize> = lengths.iter().map(|length| patches + length).collect();

        let pass = self.model.pass()?;
        let rope = pass.stem(|_| self.rope(grid, most, inputs.hidden_states.device()))?;
        let Embedded { video, text, activated, refining } =
            pass.stem(|stem| stem.embed(inputs, most))?;
        let joint = Joint { activated: &activated, rope: &rope, text: TextPlace::Last(&keys) };
        let mut state = State::Two(video, text);
        for visit in pass.blocks() {
            state = visit?.run(|block| match (block, &state) {
                (Block::Refiner(block), State::Two(video, text)) => {
                    Ok(State::Two(video.clone(), block.forward(text, &refining, lengths)?))
                }
                (Block::Double(block), State::Two(video, text)) => {
                    let (video, text) = block.forward(video, text, &joint)?;
                    Ok(State::Two(video, text))
                }
                (Block::Single(block), State::Two(video, text)) => {
                    let x = Tensor::cat(&[video, text], 1)?;
                    Ok(State::One(block.forward(&x, &joint)?))
                }
                (Block::Single(block), State::One(x)) => Ok(State::One(block.forward(x, &joint)?)),
                (_, State::One(_)) => candle_core::bail!("hunyuanvideo: blocks out of order"),
            })?;
        }
        let video = match state {
            State::Two(video, _) => video,
            State::One(x) => x.narrow(1, 0, patches)?,
        };
        Ok(pass.stem(|stem| stem.project(&video, &activated, grid))?)
    }

    /// Stored tensors that the model does not use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }

    /// The pager that the model belongs to.
    pub fn pager(&self) -> &Pager {
        self.model.pager()
    }

    /// The number of blocks, those that refine the text included.
    pub fn blocks(&self) -> usize {
        self.model.len()
    }

    fn rope(&self, grid: [usize; 3], text: usize, device: &Device) -> CandleResult<Rope> {
        let mut last = self.rope.lock();
        if let Some(turned) = last.as_ref().filter(|t| (t.grid, t.text) == (grid, text)) {
            return Ok(turned.rope.clone());
        }
        let axes = &self.config.rope_axes_dim;
        let rope = Rope::new(&positions(grid, text)?, axes, self.config.rope_theta, device)?;
        *last = Some(Turned { grid, text, rope: rope.clone() });
        Ok(rope)
    }

    /// The patches in frames, rows and columns.
    fn check(&self, inputs: &HunyuanVideoInputs<'_>) -> Result<[usize; 3]> {
        let dims = |t: &Tensor| t.dims().to_vec();
        let wrong = |what: &str| {
            Err(Error::Input(format!(
                "hunyuanvideo: {what} (hidden_states {:?}, timestep {:?}, encoder_hidden_states {:?}, \
                 text_lengths {:?}, pooled_projections {:?}, guidance {:?})",
                dims(inputs.hidden_states),
                dims(inputs.timestep),
                dims(inputs.encoder_hidden_states),
                inputs.text_lengths,
                dims(inputs.pooled_projections),
                inputs.guidance.map(dims),
            )))
        };
        let config = &self.config;
        let &[batch, channels, frames, height, width] = inputs.hidden_states.dims() else {
            return wrong("latents have five dimensions");
        };
        let &[texts, tokens, text_width] = inputs.encoder_hidden_states.dims() else {
            return wrong("text states have three dimensions");
        };
        if channels != config.in_channels {
            return wrong(&format!("the model reads {} channels", config.in_channels));
        }
        if text_width != config.text_embed_dim {
            return wrong(&format!("the model reads text of width {}", config.text_embed_dim));
        }
        if inputs.pooled_projections.dims() != [batch, config.pooled_projection_dim] {
            let width = config.pooled_projection_dim;
            return wrong(&format!("the model reads one pooled text of width {width} per video"));
        }
        let Patch { frames: joined, side } = config.patch();
        let whole = |n: usize, by: usize| n > 0 && n.is_multiple_of(by);
        if batch == 0 || !whole(frames, joined) || !whole(height, side) || !whole(width, side) {
            return wrong(&format!("latents are not whole patches of {joined} x {side} x {side}"));
        }
        let lengths = inputs.text_lengths;
        if texts != batch || lengths.len() != batch || inputs.timestep.dims() != [batch] {
            return wrong("one text, one length of it and one timestep per video");
        }
        if lengths.iter().any(|length| !(1..=tokens).contains(length)) {
            return wrong("a text has at least one token, and not more than there are states");
        }
        match (config.guidance_embeds, inputs.guidance) {
            (true, None) => return wrong("this model reads a guidance scale and none was given"),
            (false, Some(_)) => return wrong("this model reads no guidance scale, one was given"),
            (true, Some(guidance)) if guidance.dims() != [batch] => {
                return wrong("one guidance scale per video");
            }
            _ => {}
        }
        Ok([frames / joined, height / side, width / side])
    }
}

/// Frame, row and column of each patch of `grid`, then as many zeros as the text has tokens:
/// `[patches + text, 3]`, f32.
fn positions([frames, rows, columns]: [usize; 3], text: usize) -> CandleResult<Tensor> {
    let tokens = frames * rows * columns + text;
    let mut all = Vec::with_capacity(tokens * 3);
    for frame in 0..frames {
        for row in 0..rows {
            (0..columns).for_each(|c| all.extend([frame as f32, row as f32, c as f32]));
        }
    }
    all.resize(tokens * 3, 0.);
    Tensor::from_vec(all, (tokens, 3), &Device::Cpu)
}

/// What the first block reads.
struct Embedded {
    video: Tensor,
    text: Tensor,
    /// SiLU of the vector that conditions all blocks but those that refine the text, ...
    activated: SharedInput,
    /// ... and of theirs.
    refining: SharedInput,
}

struct Stem {
    patches: PatchConv,
    timestep: Mlp,
    guidance: Option<Mlp>,
    pooled: Mlp,
    text: Linear,
    text_timestep: Mlp,
    text_mean: Mlp,
    norm_out: Linear,
    proj_out: Linear,
    patch: Patch,
    hidden: usize,
    compute: DType,
}

impl Stem {
    fn new(config: &HunyuanVideoConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let (hidden, patch) = (config.hidden(), config.patch());
        let (embed, context) = (weights.pp("time_text_embed"), weights.pp("context_embedder"));
        let mlp = |weights: &Weights, name: &str, inputs: usize| {
            Mlp::new(&weights.pp(name), inputs, hidden, Activation::Silu)
        };
        let of_text = context.pp("time_text_embed");
        let shape = [hidden, config.in_channels, patch.frames, patch.side, patch.side];
        let outputs = patch.values(config.out_channels());
        Ok(Self {
            patches: PatchConv::new(&weights.pp("x_embedder.proj"), &shape, Bias::Yes)?,
            timestep: mlp(&embed, "timestep_embedder", SINUSOIDS)?,
            guidance: match config.guidance_embeds {
                true => Some(mlp(&embed, "guidance_embedder", SINUSOIDS)?),
                false => None,
            },
            pooled: mlp(&embed, "text_embedder", config.pooled_projection_dim)?,
            text: context.pp("proj_in").linear(config.text_embed_dim, hidden, Bias::Yes)?,
            text_timestep: mlp(&of_text, "timestep_embedder", SINUSOIDS)?,
            text_mean: mlp(&of_text, "text_embedder", config.text_embed_dim)?,
            norm_out: weights.pp("norm_out.linear").linear(hidden, 2 * hidden, Bias::Yes)?,
            proj_out: weights.pp("proj_out").linear(hidden, outputs, Bias::Yes)?,
            patch,
            hidden,
            compute: weights.compute_dtype(),
        })
    }

    /// Of the text, the first `most` tokens are embedded.
    fn embed(&self, inputs: &HunyuanVideoInputs<'_>, most: usize) -> CandleResult<Embedded> {
        let sinusoids = |t: &Tensor| timestep_embedding(t, SINUSOIDS)?.to_dtype(self.compute);
        let timestep = sinusoids(inputs.timestep)?;
        let mut vector = self.timestep.forward(&timestep)?;
        if let (Some(mlp), Some(guidance)) = (&self.guidance, inputs.guidance) {
            vector = add(&vector, &mlp.forward(&sinusoids(guidance)?)?)?;
        }
        let pooled = inputs.pooled_projections.to_dtype(self.compute)?;
        let vector = add(&vector, &self.pooled.forward(&pooled)?)?;

        let text = inputs.encoder_hidden_states.narrow(1, 0, most)?;
        let mean = refiner::mean(&text.to_dtype(DType::F32)?, inputs.text_lengths)?;
        let of_text = self.text_mean.forward(&mean.to_dtype(self.compute)?)?;
        let refining = add(&self.text_timestep.forward(&timestep)?, &of_text)?;

        let latents = inputs.hidden_states.to_dtype(self.compute)?.transpose(1, 2)?;
        Ok(Embedded {
            video: self.patches.forward(&self.patch.cut(&latents)?)?,
            text: self.text.forward(&contiguous(&text.to_dtype(self.compute)?)?)?,
            activated: SharedInput::new(Activation::Silu.apply(&vector)?),
            refining: SharedInput::new(Activation::Silu.apply(&refining)?),
        })
    }

    fn project(
        &self,
        video: &Tensor,
        activated: &SharedInput,
        grid: [usize; 3],
    ) -> CandleResult<Tensor> {
        let modulation = activated.through(&self.norm_out)?;
        // Here the scale comes first, unlike in the blocks.
        let scale = modulation.narrow(1, 0, self.hidden)?;
        let shift = modulation.narrow(1, self.hidden, self.hidden)?;
        let y = layer_norm_modulated(video, &scale, &shift, EPS)?;
        let y = self.patch.join(&self.proj_out.forward(&y)?, grid)?;
        contiguous(&y.transpose(1, 2)?)?.to_dtype(DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn video_is_counted_and_text_stands_at_the_origin() -> CandleResult<()> {
        let at = positions([2, 2, 3], 2)?.to_vec2::<f32>()?;
        assert_eq!(at.len(), 14);
        assert_eq!((at[5].as_slice(), at[6].as_slice()), (&[0., 1., 2.][..], &[1., 0., 0.][..]));
        assert_eq!(at[11..], [[1., 1., 2.], [0.; 3], [0.; 3]]);
        Ok(())
    }
}
