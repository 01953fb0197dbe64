//! Any number of adapters beside the models of a pipeline.
//!
//! For each linear layer that adapters change, the ranks of all of them stand one below another in
//! one `A`, `[ΣR, inputs]`, so that one product reads the input. Their order is by the rows that they
//! change: to_q, to_k and to_v of a joined layer have a `B` each, `[rows, R]`, in which the adapters
//! stand side by side, and no product meets the zeros of a block-diagonal matrix.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::Tensor;
use mmgp_quant::{Form, SideSlot};
use mmgp_residency::{Attachment, Attachments, Pager, Segment};

use crate::{
    Adapter, Error, Result, Skipped, StepWeights, Steps, Unfit,
    fit::{Layers, Placement, fit},
    side::{Live, Share, Stacked},
};

/// The adapters that act on a pipeline's models. One set at a time is beside a model; dropping it
/// takes its adapters away.
pub struct AdapterSet {
    pager: Pager,
    models: Vec<String>,
    loaded: Vec<(PathBuf, StepWeights)>,
    live: Arc<Live>,
}

/// What is about to be put beside the models.
struct Draft {
    changes: Vec<Attachments>,
    /// The side slots of all linear layers of all models.
    slots: Vec<SideSlot>,
    stacks: Vec<Stack>,
    skipped: Vec<Skipped>,
}

/// One layer's adapters; tensors are numbered as they are attached to the layer's model.
struct Stack {
    slot: SideSlot,
    model: usize,
    a: usize,
    /// `(first output, tensor)`.
    bands: Vec<(usize, usize)>,
    shares: Vec<Share>,
}

impl AdapterSet {
    /// An empty set for the models of these names; the first is meant where a file names no model.
    pub fn new(pager: &Pager, models: &[&str]) -> Self {
        let models = models.iter().map(|model| model.to_string()).collect();
        Self { pager: pager.clone(), models, loaded: Vec::new(), live: Arc::default() }
    }

    /// Puts `adapters` beside the models in place of those that were there, and makes the plan anew.
    /// The files' values are looked at once; from here on they are read with their blocks. The
    /// weights are those of the first step until [`set_step`](Self::set_step) is called.
    ///
    /// # Errors
    /// A key that fits no layer, or fits it in another shape, unless `unfit` says to skip it; a value
    /// that is no number; a budget that is too small with the adapters; blocks that are leased. The
    /// set that was there stays then.
    pub fn load(
        &mut self,
        adapters: &[(Adapter, StepWeights)],
        unfit: Unfit,
    ) -> Result<Vec<Skipped>> {
        let draft = self.draft(adapters, unfit)?;
        let first = Steps::new(1);
        let live = Arc::new(Live::new(adapters.iter().map(|(_, w)| w.at(0, &first))));
        self.pager.attach(&draft.changes, |tensors| {
            draft.slots.iter().for_each(SideSlot::clear);
            for stack in draft.stacks {
                let tensor = |at: usize| tensors[stack.model][at].clone();
                let bands = stack.bands.iter().map(|&(row, b)| (row, tensor(b)));
                let bands: Vec<(usize, Tensor)> = bands.collect();
                let (a, shares, live) = (tensor(stack.a), stack.shares, live.clone());
                stack.slot.set(Arc::new(Stacked { a, bands, shares, live }));
            }
        })?;
        let named = adapters.iter().map(|(a, weights)| (a.file().to_path_buf(), weights.clone()));
        (self.loaded, self.live) = (named.collect(), live);
        Ok(draft.skipped)
    }

    /// What [`load`](Self::load) would skip, or its error; the set stays as it is. Budgets are not
    /// looked at.
    ///
    /// # Errors
    /// Those of the files and of what they fit.
    pub fn check(&self, adapters: &[(Adapter, StepWeights)], unfit: Unfit) -> Result<Vec<Skipped>> {
        Ok(self.draft(adapters, unfit)?.skipped)
    }

    /// Takes all adapters away.
    ///
    /// # Errors
    /// Blocks that are leased; the set stays then.
    pub fn clear(&mut self) -> Result<()> {
        if self.loaded.is_empty() {
            return Ok(());
        }
        let nothing = |model: &String| Attachments { model: model.clone(), tensors: Vec::new() };
        let changes: Vec<Attachments> = self.models.iter().map(nothing).collect();
        let slots = self.slots();
        self.pager.attach(&changes, |_| slots.iter().for_each(SideSlot::clear))?;
        self.loaded.clear();
        Ok(())
    }

    /// Gives the adapters other weights over the steps, in their order; those of the first step act
    /// until [`set_step`](Self::set_step) is called. Nothing is read.
    ///
    /// # Errors
    /// Another number of weights than of adapters.
    pub fn set_weights(&mut self, weights: &[StepWeights]) -> Result<()> {
        if weights.len() != self.loaded.len() {
            let (expected, found) = (self.loaded.len(), weights.len());
            return Err(Error::WeightCount { expected, found });
        }
        for ((_, old), new) in self.loaded.iter_mut().zip(weights) {
            old.clone_from(new);
        }
        self.set_step(0, &Steps::new(1));
        Ok(())
    }

    /// Lets every adapter act as its weights say for `step`, counted from 0. Nothing is read.
    pub fn set_step(&self, step: usize, steps: &Steps) {
        self.live.set(self.loaded.iter().map(|(_, weights)| weights.at(step, steps)));
    }

    /// The files and weights of the adapters, in their order.
    pub fn adapters(&self) -> impl Iterator<Item = (&Path, &StepWeights)> {
        self.loaded.iter().map(|(file, weights)| (&**file, weights))
    }

    /// Whether there are no adapters.
    pub fn is_empty(&self) -> bool {
        self.loaded.is_empty()
    }

    fn draft(&self, adapters: &[(Adapter, StepWeights)], unfit: Unfit) -> Result<Draft> {
        let mut models = Vec::with_capacity(self.models.len());
        for model in &self.models {
            let Some(targets) = self.pager.targets(model) else {
                let (model, present) = (model.clone(), self.pager.models());
                return Err(Error::NoModel { model, present });
            };
            models.push(Layers::new(model.clone(), targets));
        }
        let taken = |l: &&Layers| l.targets.iter().any(|t| t.target.side.is_taken());
        if let Some(layers) = models.iter().find(taken).filter(|_| self.is_empty()) {
            return Err(Error::Taken { model: layers.model.clone() });
        }

        let mut skipped = Vec::new();
        // By model, layer and rows; within one of these in the order of the adapters.
        let mut rows: BTreeMap<(usize, usize, usize, usize), Vec<Placement<'_>>> = BTreeMap::new();
        for (number, (adapter, _)) in adapters.iter().enumerate() {
            for place in fit(number, adapter, &models, unfit, &mut skipped)? {
                let Placement { model, target, row, rows: count, .. } = place;
                rows.entry((model, target, row, count)).or_default().push(place);
            }
            adapter.check_values()?;
        }

        let nothing = |l: &Layers| Attachments { model: l.model.clone(), tensors: Vec::new() };
        let mut draft = Draft {
            changes: models.iter().map(nothing).collect(),
            slots: models.iter().flat_map(|l| &l.targets).map(|t| t.target.side.clone()).collect(),
            stacks: Vec::new(),
            skipped,
        };
        let mut rows = rows.into_iter().peekable();
        while let Some(((model, target, ..), band)) = rows.next() {
            let mut bands = vec![band];
            while let Some((_, band)) = rows.next_if(|((m, t, ..), _)| (*m, *t) == (model, target))
            {
                bands.push(band);
            }
            let tensors = &mut draft.changes[model].tensors;
            let layer = &models[model].targets[target];
            let form = match self.pager.device().candle().is_cpu() {
                true => Form::AsStored,
                false => Form::Compute,
            };
            let mut stack = Stack {
                slot: layer.target.side.clone(),
                model,
                a: tensors.len(),
                bands: Vec::new(),
                shares: Vec::new(),
            };
            let name = &layer.target.parts[0].name;
            let places = || bands.iter().flatten();
            tensors.push(Attachment {
                block: layer.block,
                name: format!("{name}.lora_A"),
                shape: vec![places().map(|p| p.module.rank()).sum(), layer.target.inputs],
                form,
                segments: below(places().copied()),
            });
            for place in places() {
                let (adapter, module) = (place.adapter, place.module);
                stack.shares.push(Share { adapter, ranks: module.rank(), scale: module.scale });
            }
            for band in &bands {
                stack.bands.push((band[0].row, tensors.len()));
                let ranks = band.iter().map(|p| p.module.rank()).sum();
                tensors.push(Attachment {
                    block: layer.block,
                    name: format!("{name}.lora_B"),
                    shape: vec![band[0].rows, ranks],
                    form,
                    segments: beside(band, ranks),
                });
            }
            draft.stacks.push(stack);
        }
        Ok(draft)
    }

    fn slots(&self) -> Vec<SideSlot> {
        let targets = self.models.iter().filter_map(|model| self.pager.targets(model));
        targets.flatten().map(|t| t.target.side).collect()
    }
}

/// The `A` of several modules, one below another.
fn below<'a>(places: impl Iterator<Item = Placement<'a>>) -> Vec<Segment> {
    let mut element = 0;
    let segment = |place: Placement<'a>| {
        let source = place.module.down.clone();
        let from = element;
        element += source.elements() as usize;
        Segment { source, element: from, stride: None }
    };
    places.map(segment).collect()
}

/// The `B` of several modules, side by side in rows of `ranks`.
fn beside(places: &[Placement<'_>], ranks: usize) -> Vec<Segment> {
    let mut element = 0;
    let segment = |place: &Placement<'_>| {
        let source = place.module.up.clone();
        let from = element;
        element += place.module.rank();
        let stride = (places.len() > 1).then_some(ranks);
        Segment { source, element: from, stride }
    };
    places.iter().map(segment).collect()
}

impl Drop for AdapterSet {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            tracing::warn!("adapters stay attached to their blocks, without effect: {error}");
            self.slots().iter().for_each(SideSlot::clear);
        }
    }
}
