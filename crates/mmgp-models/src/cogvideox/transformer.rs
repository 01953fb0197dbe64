//! The CogVideoX transformer as a stem and a list of blocks.
//!
//! The stem cuts latents into patches, embeds them, the text and the timestep, and puts the result
//! together again; everything between is blocks, leased one after another.

use candle_core::{DType, Device, Result as CandleResult, Tensor, TensorId};
use mmgp_quant::{Bias, Linear, SharedInput, Weights};
use mmgp_residency::{ModelBuilder, Paged, Pager};
use parking_lot::Mutex;

use crate::{
    Error, Result,
    cogvideox::{CogVideoXBlock, CogVideoXConfig, positions::Sinusoids},
    nn::{
        Activation, LayerNorm, Mlp, Modulation, Patch, PatchConv, Rope, Samples, add,
        timestep_embedding,
    },
};

const THETA: f64 = 10000.;

/// What one call of a CogVideoX transformer reads; tensors are f32 where nothing else is said.
#[derive(Clone, Copy, Debug)]
pub struct CogVideoXInputs<'a> {
    /// Latents `[batch, frames, in_channels, height, width]`, with the picture's latents among the
    /// channels where an image-to-video model reads them.
    pub hidden_states: &'a Tensor,
    /// Text states `[batch, text tokens, text_embed_dim]`.
    pub encoder_hidden_states: &'a Tensor,
    /// A scheduler's timestep, 0 to below 1000, `[batch]`, of any dtype.
    pub timestep: &'a Tensor,
    /// Positions of the patches `[patches, 3]`
    /// ([`positions::rotary`](crate::cogvideox::positions::rotary)): given exactly if the config has
    /// `use_rotary_positional_embeddings`.
    pub image_positions: Option<&'a Tensor>,
    /// `[batch]`: given exactly if the config has `ofs_embed_dim`.
    pub ofs: Option<&'a Tensor>,
}

/// A CogVideoX transformer whose weights are paged.
pub struct CogVideoXTransformer {
    model: Paged<Stem, CogVideoXBlock>,
    config: CogVideoXConfig,
    tables: Mutex<Option<Kept>>,
}

/// The tables of the last call, which the steps of a run share: making them anew would read
/// positions back from the device and send tables there, behind whatever else travels.
struct Kept {
    key: Key,
    tables: Tables,
}

/// What tables were made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    Positions(TensorId, usize),
    Grid([usize; 3]),
}

/// How positions enter the model.
#[derive(Clone)]
enum Tables {
    Turned(Rope),
    Added(Sinusoids),
}

impl CogVideoXTransformer {
    /// Asks `builder` for all tensors of the model. Nothing is read.
    ///
    /// # Errors
    /// A config that will not do; a tensor that is missing or does not fit it.
    pub fn new(config: &CogVideoXConfig, builder: ModelBuilder) -> Result<Self> {
        config.validate()?;
        let stem = Stem::new(config, &builder.stem())?;
        let mut blocks = Vec::new();
        for i in 0..config.num_layers {
            let weights = builder.block(&format!("transformer_blocks.{i}"));
            blocks.push(CogVideoXBlock::new(config, &weights)?);
        }
        let model = builder.finish(stem, blocks)?;
        Ok(Self { model, config: config.clone(), tables: Mutex::default() })
    }

    /// What the model predicts (of the published ones, velocity):
    /// `[batch, frames, out_channels, height, width]`, f32.
    ///
    /// # Errors
    /// Inputs that do not fit the model or each other; weights that cannot be read; cancellation.
    pub fn forward(&self, inputs: &CogVideoXInputs<'_>) -> Result<Tensor> {
        self.forward_samples(inputs, Samples::Together)
    }

    /// [`forward`](Self::forward), with the samples of the batch as `samples` says.
    ///
    /// # Errors
    /// Those of `forward`.
    pub fn forward_samples(
        &self,
        inputs: &CogVideoXInputs<'_>,
        samples: Samples,
    ) -> Result<Tensor> {
        let grid = self.check(inputs)?;
        let pass = self.model.pass()?;
        let (rope, sinusoids) = match pass.stem(|_| self.tables(inputs, grid))? {
            Tables::Turned(rope) => (Some(rope), None),
            Tables::Added(sinusoids) => (None, Some(sinusoids)),
        };
        let parts = Part::split(inputs, samples)?;
        let (mut streams, vectors): (Vec<_>, Vec<_>) = pass
            .stem(|stem| {
                let parts = parts.iter().map(|part| stem.embed(part, sinusoids.as_ref()));
                parts.collect::<CandleResult<Vec<_>>>()
            })?
            .into_iter()
            .map(|(image, text, vector)| ((image, text), vector))
            .unzip();
        drop(parts);
        for visit in pass.blocks() {
            streams = visit?.run(|block| {
                let forward = |((image, text), vector): (&(Tensor, Tensor), &SharedInput)| {
                    block.forward(image, text, vector, rope.as_ref())
                };
                streams.iter().zip(&vectors).map(forward).collect()
            })?;
        }
        let project = |stem: &Stem| {
            let ends = streams.iter().zip(&vectors);
            let ends = ends.map(|((image, _), vector)| stem.project(image, vector, grid));
            Tensor::cat(&ends.collect::<CandleResult<Vec<_>>>()?, 0)
        };
        Ok(pass.stem(project)?)
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

    fn tables(&self, inputs: &CogVideoXInputs<'_>, grid: [usize; 3]) -> CandleResult<Tables> {
        let text = inputs.encoder_hidden_states.dim(1)?;
        let key = match inputs.image_positions {
            Some(positions) => Key::Positions(positions.id(), text),
            None => Key::Grid(grid),
        };
        let mut kept = self.tables.lock();
        if let Some(kept) = kept.as_ref().filter(|kept| kept.key == key) {
            return Ok(kept.tables.clone());
        }
        let device = inputs.hidden_states.device();
        let tables = match inputs.image_positions {
            Some(positions) => {
                // The text is not turned: the angle of position 0 is 0.
                let zeros = Tensor::zeros((text, 3), DType::F32, &Device::Cpu)?;
                let image = positions.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
                let all = Tensor::cat(&[zeros, image], 0)?;
                Tables::Turned(Rope::new(&all, &self.config.axes(), THETA, device)?)
            }
            None => {
                let (spatial, temporal) = (
                    self.config.spatial_interpolation_scale,
                    self.config.temporal_interpolation_scale,
                );
                let hidden = self.config.hidden();
                Tables::Added(Sinusoids::new(grid, hidden, spatial, temporal, device)?)
            }
        };
        *kept = Some(Kept { key, tables: tables.clone() });
        Ok(tables)
    }

    /// The patches in frames, rows and columns.
    fn check(&self, inputs: &CogVideoXInputs<'_>) -> Result<[usize; 3]> {
        let dims = |t: &Tensor| t.dims().to_vec();
        let wrong = |what: &str| {
            Err(Error::Input(format!(
                "cogvideox: {what} (hidden_states {:?}, encoder_hidden_states {:?}, timestep {:?}, \
                 image_positions {:?}, ofs {:?})",
                dims(inputs.hidden_states),
                dims(inputs.encoder_hidden_states),
                dims(inputs.timestep),
                inputs.image_positions.map(dims),
                inputs.ofs.map(dims),
            )))
        };
        let config = &self.config;
        let &[batch, frames, channels, height, width] = inputs.hidden_states.dims() else {
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
        let (patch, joined) = (config.patch_size, config.patch_size_t.unwrap_or(1));
        let whole = |n: usize, by: usize| n > 0 && n.is_multiple_of(by);
        if !whole(frames, joined) || !whole(height, patch) || !whole(width, patch) {
            return wrong(&format!(
                "latents are not whole patches of {joined} x {patch} x {patch}"
            ));
        }
        let grid = [frames / joined, height / patch, width / patch];
        let one = |t: &Tensor| t.dims() == [batch];
        if texts != batch || !one(inputs.timestep) {
            return wrong("one text and one timestep per video");
        }
        match (config.ofs_embed_dim, inputs.ofs) {
            (Some(_), None) => return wrong("this model reads an ofs and none was given"),
            (None, Some(_)) => return wrong("this model reads no ofs, one was given"),
            (Some(_), Some(ofs)) if !one(ofs) => return wrong("one ofs per video"),
            _ => {}
        }
        match (config.use_rotary_positional_embeddings, inputs.image_positions) {
            (true, None) => return wrong("this model reads positions and none were given"),
            (false, Some(_)) => return wrong("this model reads no positions, some were given"),
            (true, Some(at)) if at.dims() != [grid.iter().product(), 3] => {
                return wrong(&format!("latents of {grid:?} patches need a position for each"));
            }
            _ => {}
        }
        let table = config.use_learned_positional_embeddings;
        let learned = (config.max_text_seq_length, config.sample());
        if table && (tokens, [frames, height, width]) != learned {
            return wrong(&format!(
                "the learned positions are for {} text tokens and latents of {:?}",
                learned.0, learned.1
            ));
        }
        Ok(grid)
    }
}

/// What changes from sample to sample, of those that go together.
struct Part {
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    ofs: Option<Tensor>,
}

impl Part {
    fn split(inputs: &CogVideoXInputs<'_>, samples: Samples) -> CandleResult<Vec<Self>> {
        let hidden_states = samples.split(inputs.hidden_states)?;
        let encoder_hidden_states = samples.split(inputs.encoder_hidden_states)?;
        let timesteps = samples.split(inputs.timestep)?;
        let mut ofs = inputs.ofs.map(|ofs| samples.split(ofs)).transpose()?.map(Vec::into_iter);
        let parts = hidden_states.into_iter().zip(encoder_hidden_states).zip(timesteps);
        Ok(parts
            .map(|((hidden_states, encoder_hidden_states), timestep)| Self {
                hidden_states,
                encoder_hidden_states,
                timestep,
                ofs: ofs.as_mut().and_then(Iterator::next),
            })
            .collect())
    }
}

struct Stem {
    patches: Patches,
    text: Linear,
    learned: Option<Tensor>,
    timestep: Mlp,
    ofs: Option<(Mlp, usize)>,
    norm_final: LayerNorm,
    modulation: Modulation<2>,
    norm_out: LayerNorm,
    proj_out: Linear,
    hidden: usize,
    patch: Patch,
    compute: DType,
}

impl Stem {
    fn new(config: &CogVideoXConfig, weights: &Weights) -> mmgp_quant::Result<Self> {
        let (hidden, time) = (config.hidden(), config.time_embed_dim);
        let patch = Patch { frames: config.patch_size_t.unwrap_or(1), side: config.patch_size };
        let embed = weights.pp("patch_embed");
        let activation = config.timestep_activation().unwrap_or(Activation::Silu);
        let norm = |name: &str| LayerNorm::new(&weights.pp(name), hidden, config.norm_eps);
        let outputs = patch.values(config.out_channels);
        Ok(Self {
            patches: Patches::new(config, patch, &embed.pp("proj"))?,
            text: embed.pp("text_proj").linear(config.text_embed_dim, hidden, Bias::Yes)?,
            learned: match config.use_learned_positional_embeddings {
                true => {
                    let [frames, height, width] = config.sample();
                    let patches = frames * (height / patch.side) * (width / patch.side);
                    let shape = [1, config.max_text_seq_length + patches, hidden];
                    Some(embed.tensor(&shape, "pos_embedding")?)
                }
                false => None,
            },
            timestep: Mlp::new(&weights.pp("time_embedding"), hidden, time, activation)?,
            ofs: match config.ofs_embed_dim {
                Some(width) => {
                    let mlp = Mlp::new(&weights.pp("ofs_embedding"), width, width, activation)?;
                    Some((mlp, width))
                }
                None => None,
            },
            norm_final: norm("norm_final")?,
            modulation: Modulation::new(&weights.pp("norm_out"), time, hidden)?,
            norm_out: norm("norm_out.norm")?,
            proj_out: weights.pp("proj_out").linear(hidden, outputs, Bias::Yes)?,
            hidden,
            patch,
            compute: weights.compute_dtype(),
        })
    }

    /// Patches, text tokens, and SiLU of the vector that conditions all blocks.
    fn embed(
        &self,
        inputs: &Part,
        sinusoids: Option<&Sinusoids>,
    ) -> CandleResult<(Tensor, Tensor, SharedInput)> {
        let embedded = |mlp: &Mlp, t: &Tensor, width: usize| {
            mlp.forward(&timestep_embedding(t, width)?.to_dtype(self.compute)?)
        };
        let mut vector = embedded(&self.timestep, &inputs.timestep, self.hidden)?;
        if let (Some((mlp, width)), Some(ofs)) = (&self.ofs, &inputs.ofs) {
            vector = add(&vector, &embedded(mlp, ofs, *width)?)?;
        }
        let rows = self.patch.cut(&inputs.hidden_states.to_dtype(self.compute)?)?;
        let mut image = self.patches.forward(&rows)?;
        drop(rows);
        let mut text = self.text.forward(&inputs.encoder_hidden_states.to_dtype(self.compute)?)?;
        if let Some(sinusoids) = sinusoids {
            image = add(&image, &sinusoids.table()?.to_dtype(self.compute)?)?;
        }
        if let Some(table) = &self.learned {
            let (m, n) = (text.dim(1)?, image.dim(1)?);
            text = add(&text, &table.narrow(1, 0, m)?)?;
            image = add(&image, &table.narrow(1, m, n)?)?;
        }
        Ok((image, text, SharedInput::new(Activation::Silu.apply(&vector)?)))
    }

    fn project(
        &self,
        image: &Tensor,
        activated: &SharedInput,
        grid: [usize; 3],
    ) -> CandleResult<Tensor> {
        let [shift, scale] = self.modulation.forward(activated)?;
        let y = self.norm_final.forward(image)?;
        let y = self.norm_out.forward_modulated(&y, &scale, &shift)?;
        self.patch.join(&self.proj_out.forward(&y)?, grid)?.to_dtype(DType::F32)
    }
}

/// The embedding of patches, stored as a convolution before 1.5 and as a linear layer since.
enum Patches {
    Convolution(PatchConv),
    Linear(Linear),
}

impl Patches {
    fn new(config: &CogVideoXConfig, patch: Patch, weights: &Weights) -> mmgp_quant::Result<Self> {
        let (hidden, channels) = (config.hidden(), config.in_channels);
        if config.patch_size_t.is_some() {
            // `patch_bias` is about the convolution only.
            return Ok(Self::Linear(weights.linear(patch.values(channels), hidden, Bias::Yes)?));
        }
        let (shape, bias) =
            ([hidden, channels, patch.side, patch.side], Bias::from(config.patch_bias));
        Ok(Self::Convolution(PatchConv::new(weights, &shape, bias)?))
    }

    /// `[batch, patches, values]` to `[batch, patches, hidden]`.
    fn forward(&self, rows: &Tensor) -> CandleResult<Tensor> {
        match self {
            Self::Linear(linear) => linear.forward(rows),
            Self::Convolution(conv) => conv.forward(rows),
        }
    }
}
