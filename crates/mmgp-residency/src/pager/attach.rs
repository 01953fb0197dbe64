//! Attaching tensors of other files to a model's blocks: how an adapter rides with its block.
//!
//! What is attached lies in the block's image behind its own tensors: it is fetched, leased and given
//! back with the block and counted in the budget. Attaching replaces all that was attached to a model
//! before, at once or not at all. The pager does not know what the tensors are for.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use mmgp_io::Dtype;
use mmgp_quant::{Form, Target};

use super::{NewBlock, Pager, State};
use crate::{
    BlockImage, Error, ImageTensor, Making, Plan, Result, Segment, placeholder::placeholder,
};

/// A linear layer of a paged model and the block that it belongs to.
#[derive(Clone, Debug)]
pub struct BlockTarget {
    /// The block's place in the model, 0 for the stem.
    pub block: usize,
    /// The layer, under the names its weights are stored by.
    pub target: Target,
}

/// A tensor that is to ride with a block.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The block's place in the model, 0 for the stem.
    pub block: usize,
    /// A name, for messages.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// [`Form::AsStored`]: in the dtype of its segments if they agree; [`Form::F32`]; else in the compute dtype.
    pub form: Form,
    /// Where its elements come from; together they fill it.
    pub segments: Vec<Segment>,
}

/// All that is to be attached to one model.
#[derive(Clone, Debug, Default)]
pub struct Attachments {
    /// The model's name.
    pub model: String,
    /// Nothing detaches what was there.
    pub tensors: Vec<Attachment>,
}

impl Pager {
    /// The linear layers of the model of this name in the order in which they were built, or `None`
    /// if there is no such model.
    pub fn targets(&self, model: &str) -> Option<Vec<BlockTarget>> {
        let state = self.0.state.lock();
        let model = state.live(model)?;
        Some(state.models[model].targets.clone())
    }

    /// The names of the models that are there, in the order in which they were added.
    pub fn models(&self) -> Vec<String> {
        let state = self.0.state.lock();
        let live = state.models.iter().filter(|m| !m.blocks.is_empty());
        live.map(|m| m.name.clone()).collect()
    }

    /// Replaces what is attached to the models named in `changes`, makes the plan anew within the
    /// budgets there are and gives back everything held. Nothing is read.
    ///
    /// `install` gets the placeholders, model by model in the order of `changes`, once nothing can
    /// fail any more and before any block can be leased again; it must not call the pager. What it
    /// leaves of an earlier attachment is poison. A model that was dropped keeps nothing attached:
    /// detaching from it does nothing.
    ///
    /// # Errors
    /// A model or block that is not there, segments that do not fill their tensor or cannot take its
    /// dtype, leases that are out, a budget that is too small with what is attached. All stays as it
    /// was then, and `install` is not called.
    pub fn attach(
        &self,
        changes: &[Attachments],
        install: impl FnOnce(&[Vec<Tensor>]),
    ) -> Result<Arc<Plan>> {
        let mut drafts = Vec::with_capacity(changes.len());
        for change in changes {
            let draft = |tensor| self.draft(&change.model, tensor);
            drafts.push(change.tensors.iter().map(draft).collect::<Result<Vec<_>>>()?);
        }
        let mut state = self.0.state.lock();
        self.settle(&mut state)?;

        let mut replaced: Vec<(usize, Vec<NewBlock>)> = Vec::new();
        let plan = (changes.iter().zip(&drafts))
            .try_for_each(|(change, drafts)| {
                if let Some((model, blocks)) = state.with_attached(change, drafts)? {
                    let old = std::mem::replace(&mut state.models[model].blocks, blocks);
                    replaced.push((model, old));
                }
                Ok(())
            })
            .and_then(|()| {
                let budgets = state.budgets.clone();
                state.make_plan(&budgets, &*self.0.device)
            });
        let plan = match plan {
            Ok(plan) => plan,
            Err(error) => {
                for (model, blocks) in replaced.into_iter().rev() {
                    state.models[model].blocks = blocks;
                }
                return Err(error);
            }
        };
        for (model, _) in &replaced {
            state.release_all(*model); // its blocks' bytes are others now
        }
        let plan = state.adopt(plan);
        let placeholders: Vec<Vec<Tensor>> = drafts
            .into_iter()
            .map(|drafts| drafts.into_iter().map(|(_, tensor)| tensor).collect())
            .collect();
        install(&placeholders);
        Ok(plan)
    }

    /// An attachment as its image will have it, and its placeholder.
    fn draft(&self, model: &str, new: &Attachment) -> Result<(ImageTensor, Tensor)> {
        let Attachment { name, shape, segments, .. } = new;
        let wrong = |what: String| Error::NotPageable {
            model: model.to_string(),
            reason: format!("cannot attach `{name}` {shape:?}: {what}"),
        };
        let device = self.device();
        let Some(elements) = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) else {
            return Err(wrong("it is larger than any memory".into()));
        };
        let mut dtypes = Vec::with_capacity(segments.len());
        let mut filled = 0usize;
        for segment in segments {
            let view = &segment.source;
            let place = || format!("{}: tensor `{}`", view.file().path().display(), view.name());
            dtypes.push(match (new.form, device.travels_as(view.dtype()), view.dtype()) {
                (Form::AsStored, Some(dtype), _) => dtype,
                (form, _, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) => match form {
                    Form::F32 => DType::F32,
                    _ => device.compute_dtype(),
                },
                (_, _, found) => {
                    return Err(wrong(format!("{} is stored as {found}", place())));
                }
            });
            filled = filled.saturating_add(view.elements() as usize);
            if segment.end().is_none_or(|end| end > elements) {
                return Err(wrong(format!("{} {:?} does not fit into it", place(), view.shape())));
            }
        }
        if filled != elements {
            return Err(wrong(format!("its {} segments hold {filled} elements", segments.len())));
        }
        let agreed = dtypes.first().copied().filter(|first| dtypes.iter().all(|d| d == first));
        let dtype: DType = agreed.unwrap_or(device.compute_dtype());
        let tensor = placeholder(shape, dtype, device.candle())?;
        let (name, shape, segments) = (name.clone(), shape.clone(), segments.clone());
        Ok((
            ImageTensor { name, dtype, shape, offset: 0, segments, making: Making::Values },
            tensor,
        ))
    }
}

impl State {
    /// The model of this name that was added last, if it was not dropped.
    pub(super) fn live(&self, name: &str) -> Option<usize> {
        self.models.iter().rposition(|m| m.name == name && !m.blocks.is_empty())
    }

    /// The blocks of a model with other attachments; `None` if there is nothing to do.
    fn with_attached(
        &self,
        change: &Attachments,
        drafts: &[(ImageTensor, Tensor)],
    ) -> Result<Option<(usize, Vec<NewBlock>)>> {
        let missing =
            |what: String| Error::NotPageable { model: change.model.clone(), reason: what };
        let Some(at) = self.live(&change.model) else {
            return match drafts.is_empty() {
                true => Ok(None),
                false => Err(missing("is not loaded, so nothing can be attached to it".into())),
            };
        };
        let model = &self.models[at];
        let own = model.blocks.iter().zip(&model.own);
        let mut tensors: Vec<(Vec<ImageTensor>, Vec<Tensor>)> = own
            .map(|(block, &own)| {
                (block.image.tensors[..own].to_vec(), block.tensors[..own].to_vec())
            })
            .collect();
        for (new, (image, tensor)) in change.tensors.iter().zip(drafts) {
            let blocks = tensors.len();
            let Some(block) = tensors.get_mut(new.block) else {
                return Err(missing(format!("has {blocks} blocks, not a block {}", new.block)));
            };
            block.0.push(image.clone());
            block.1.push(tensor.clone());
        }
        let blocks = tensors.into_iter().zip(&model.blocks).map(|((images, tensors), old)| {
            let mut image = BlockImage::new(old.image.name.clone(), images);
            image.expected = old.image.expected.clone();
            NewBlock { image: Arc::new(image), tensors }
        });
        Ok(Some((at, blocks.collect())))
    }
}
