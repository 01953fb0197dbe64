//! The FLUX transformer as a stem and a list of blocks.
//!
//! The stem embeds tokens, timestep, guidance and pooled text and projects the result; everything
//! between is blocks, leased one after another.

use candle_core::{DType, Result as CandleResult, Tensor, TensorId};
use mmgp_quant::{Bias, Linear, SharedInput, Weights};
use mmgp_residency::{ModelBuilder, Paged, Pager};
use parking_lot::Mutex;

use crate::{
    Error, Result,
    flux::FluxConfig,
    nn::{
        Activation, DoubleBlock, Heads, Joint, Mlp, Rope, SingleBlock, TextPlace, add,
        layer_norm_modulated, timestep_embedding,
    },
};

const EPS: f64 = 1e-6;
const SINUSOIDS: usize = 256;
const THETA: f64 = 10000.;

/// What one call of a FLUX transformer reads; all tensors f32.
#[derive(Clone, Copy, Debug)]
pub struct FluxInputs<'a> {
    /// Packed latents `[batch, image tokens, in_channels]`.
    pub hidden_states: &'a Tensor,
    /// Text states `[batch, text tokens, joint_attention_dim]`.
    pub encoder_hidden_states: &'a Tensor,
    /// Pooled text `[batch, pooled_projection_dim]`.
    pub pooled_projections: &'a Tensor,
    /// Sigma in 0..1 (a scheduler's timestep / 1000), `[batch]`.
    pub timestep: &'a Tensor,
    /// Positions of the picture's tokens `[image tokens, 3]`.
    pub img_ids: &'a Tensor,
    /// Positions of the text's tokens `[text tokens, 3]`.
    pub txt_ids: &'a Tensor,
    /// Guidance scale `[batch]`: given exactly if the config has `guidance_embeds`.
    pub guidance: Option<&'a Tensor>,
}

/// A FLUX.1 transformer whose weights are paged.
pub struct FluxTransformer {
    model: Paged<Stem, Block>,
    guidance: bool,
    axes: Vec<usize>,
    rope: Mutex<Option<Turned>>,
}

/// The tables of the last positions. Steps share theirs: making them anew would read positions back from
/// the device and send tables there, behind whatever else travels.
struct Turned {
    text: TensorId,
    image: TensorId,
    rope: Rope,
}

enum Block {
    Double(Box<DoubleBlock>),
    Single(Box<SingleBlock>),
}

impl FluxTransformer {
    /// Asks `builder` for all tensors of the model. Nothing is read.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the config.
    pub fn new(config: &FluxConfig, builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let stem = Stem::new(config, &builder.stem())?;
        let heads = Heads { count: config.num_attention_heads, dim: config.attention_head_dim };
        let mut blocks = Vec::new();
        for i in 0..config.num_layers {
            let weights = builder.block(&format!("transformer_blocks.{i}"));
            blocks.push(Block::Double(Box::new(DoubleBlock::new(heads, &weights)?)));
        }
        for i in 0..config.num_single_layers {
            let weights = builder.block(&format!("single_transformer_blocks.{i}"));
            blocks.push(Block::Single(Box::new(SingleBlock::new(heads, &weights)?)));
        }
        let model = builder.finish(stem, blocks)?;
        let axes = config.axes_dims_rope.clone();
        Ok(Self { model, guidance: config.guidance_embeds, axes, rope: Mutex::default() })
    }

    /// The velocity `[batch, image tokens, out_channels]`, f32.
    ///
    /// # Errors
    /// Inputs that do not fit the model or each other; weights that cannot be read; cancellation.
    pub fn forward(&self, inputs: &FluxInputs<'_>) -> Result<Tensor> {
        self.check(inputs)?;
        let text_tokens = inputs.txt_ids.dim(0)?;

        let pass = self.model.pass()?;
        let rope = pass.stem(|_| self.rope(inputs))?;
        let (mut image, mut text, activated) = pass.stem(|stem| stem.embed(inputs))?;
        let joint = Joint { activated: &activated, rope: &rope, text: TextPlace::First };
        let mut joined = None;
        for visit in pass.blocks() {
            let visit = visit?;
            // Both streams go on as one from the first single block.
            let next = visit.run(|block| match (block, &joined) {
                (Block::Double(block), _) => {
                    let (image, text) = block.forward(&image, &text, &joint)?;
                    Ok(State::Two(image, text))
                }
                (Block::Single(block), Some(x)) => Ok(State::One(block.forward(x, &joint)?)),
                (Block::Single(block), None) => {
                    let x = Tensor::cat(&[&text, &image], 1)?;
                    Ok(State::One(block.forward(&x, &joint)?))
                }
            })?;
            match next {
                State::Two(i, t) => (image, text) = (i, t),
                State::One(x) => joined = Some(x),
            }
        }
        if let Some(x) = joined {
            image = x.narrow(1, text_tokens, x.dim(1)? - text_tokens)?;
        }
        Ok(pass.stem(|stem| stem.project(&image, &activated))?)
    }

    fn rope(&self, inputs: &FluxInputs<'_>) -> CandleResult<Rope> {
        let (text, image) = (inputs.txt_ids.id(), inputs.img_ids.id());
        let mut last = self.rope.lock();
        if let Some(turned) = last.as_ref().filter(|t| (t.text, t.image) == (text, image)) {
            return Ok(turned.rope.clone());
        }
        let ids = Tensor::cat(&[inputs.txt_ids, inputs.img_ids], 0)?;
        let rope = Rope::new(&ids, &self.axes, THETA, inputs.hidden_states.device())?;
        *last = Some(Turned { text, image, rope: rope.clone() });
        Ok(rope)
    }

    /// Stored tensors that the model does not use.
    pub fn unused(&self) -> &[String] {
        self.model.unused()
    }

    /// The pager that the model belongs to.
    pub fn pager(&self) -> &Pager {
        self.model.pager()
    }

    /// The number of blocks.
    pub fn blocks(&self) -> usize {
        self.model.len()
    }

    fn check(&self, inputs: &FluxInputs<'_>) -> Result<()> {
        let dims = |t: &Tensor| t.dims().to_vec();
        let batch = inputs.hidden_states.dim(0)?;
        let one = |t: &Tensor| t.dims() == [batch];
        let wrong = |what: &str| {
            Err(Error::Input(format!(
                "flux: {what} (hidden_states {:?}, encoder_hidden_states {:?}, pooled_projections \
                 {:?}, timestep {:?}, img_ids {:?}, txt_ids {:?}, guidance {:?})",
                dims(inputs.hidden_states),
                dims(inputs.encoder_hidden_states),
                dims(inputs.pooled_projections),
                dims(inputs.timestep),
                dims(inputs.img_ids),
                dims(inputs.txt_ids),
                inputs.guidance.map(dims),
            )))
        };
        match (self.guidance, inputs.guidance) {
            (true, None) => return wrong("this model reads a guidance scale and none was given"),
            (false, Some(_)) => return wrong("this model reads no guidance scale, one was given"),
            (true, Some(guidance)) if !one(guidance) => return wrong("one guidance per picture"),
            _ => {}
        }
        if !one(inputs.timestep) {
            return wrong("one timestep per picture");
        }
        let tokens = |t: &Tensor| t.dims().get(1).copied();
        if inputs.img_ids.dims() != [tokens(inputs.hidden_states).unwrap_or(0), 3]
            || inputs.txt_ids.dims() != [tokens(inputs.encoder_hidden_states).unwrap_or(0), 3]
            || inputs.encoder_hidden_states.dim(0)? != batch
            || inputs.pooled_projections.dim(0)? != batch
        {
            return wrong("batch sizes or numbers of tokens and positions differ");
        }
        Ok(())
    }
}

enum State {
    Two(Tensor, Tensor),
    One(Tensor),
}

struct Stem {
    x_embedder: Linear,
    context_embedder: Linear,
    timestep: Mlp,
    guidance: Option<Mlp>,
    text: Mlp,
    norm_out: Linear,
    proj_out: Linear,
    hidden: usize,
    compute: DType,
}

impl Stem {
    fn new(config: &FluxConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let hidden = config.hidden();
        let embed = weights.pp("time_text_embed");
        let mlp =
            |name: &str, inputs: usize| Mlp::new(&embed.pp(name), inputs, hidden, Activation::Silu);
        let linear = |name: &str, inputs: usize, outputs: usize| {
            weights.pp(name).linear(inputs, outputs, Bias::Yes)
        };
        Ok(Self {
            x_embedder: linear("x_embedder", config.in_channels, hidden)?,
            context_embedder: linear("context_embedder", config.joint_attention_dim, hidden)?,
            timestep: mlp("timestep_embedder", SINUSOIDS)?,
            guidance: match config.guidance_embeds {
                true => Some(mlp("guidance_embedder", SINUSOIDS)?),
                false => None,
            },
            text: mlp("text_embedder", config.pooled_projection_dim)?,
            norm_out: linear("norm_out.linear", hidden, 2 * hidden)?,
            proj_out: linear("proj_out", hidden, config.out_channels())?,
            hidden,
            compute: weights.compute_dtype(),
        })
    }

    /// Picture tokens, text tokens, and SiLU of the vector that conditions all blocks.
    fn embed(&self, inputs: &FluxInputs<'_>) -> CandleResult<(Tensor, Tensor, SharedInput)> {
        let sinusoids = |t: &Tensor| {
            let t = (t.to_dtype(DType::F32)? * 1000.)?;
            timestep_embedding(&t, SINUSOIDS)?.to_dtype(self.compute)
        };
        let mut vector = self.timestep.forward(&sinusoids(inputs.timestep)?)?;
        if let (Some(mlp), Some(guidance)) = (&self.guidance, inputs.guidance) {
            vector = add(&vector, &mlp.forward(&sinusoids(guidance)?)?)?;
        }
        let vector =
            add(&vector, &self.text.forward(&inputs.pooled_projections.to_dtype(self.compute)?)?)?;
        Ok((
            self.x_embedder.forward(&inputs.hidden_states.to_dtype(self.compute)?)?,
            self.context_embedder.forward(&inputs.encoder_hidden_states.to_dtype(self.compute)?)?,
            SharedInput::new(Activation::Silu.apply(&vector)?),
        ))
    }

    fn project(&self, image: &Tensor, activated: &SharedInput) -> CandleResult<Tensor> {
        let modulation = activated.through(&self.norm_out)?;
        // Here the scale comes first, unlike in the blocks.
        let scale = modulation.narrow(1, 0, self.hidden)?;
        let shift = modulation.narrow(1, self.hidden, self.hidden)?;
        let y = layer_norm_modulated(image, &scale, &shift, EPS)?;
        self.proj_out.forward(&y)?.to_dtype(DType::F32)
    }
}
