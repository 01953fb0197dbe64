//! What passes cost, kept for the next start: its first plan is then the one that measuring would have led to.
//!
//! A note is on all that times depend on: the machine, the model as it lies in slots, how it is copied there, and
//! the shapes that it computes on. Whatever a note says, pictures are the same.

use std::{cell::RefCell, collections::BTreeMap};

use mmgp_models::{Activations, Pipeline, Request};
use mmgp_residency::{Bytes, Pager, PassCosts};
use serde::{Deserialize, Serialize};

use crate::{device::GpuUse, notes::Notes};

/// Costs that differ by more than this share from those that were kept take their place.
const SHARE: f64 = 0.1;

/// The times of one pager's models.
pub(crate) struct Times {
    notes: Option<Notes>,
    machine: String,
    copies: Copies,
    activations: Activations,
    /// What each model's passes are now.
    subjects: RefCell<BTreeMap<String, Subject>>,
}

/// What a model's passes cost depends on this.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Subject {
    version: String,
    machine: String,
    copies: Copies,
    pipeline: String,
    model: String,
    /// The blocks' names and bytes in slots, the stem first, with what is attached.
    blocks: Vec<(String, u64)>,
    /// The dtypes in slots, and the bytes in files.
    form: (String, u64),
    /// The dtype of activations, and what products with int8 or fp8 weights make of them.
    compute: String,
    width: usize,
    height: usize,
    frames: usize,
    max_sequence_length: usize,
}

/// How blocks are copied to a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Copies {
    synchronous: bool,
    link_limit: Option<u64>,
    locked_share: Option<f64>,
}

impl Times {
    /// Kept in `notes`, unless it is not known what the machine is.
    pub(crate) fn new(notes: Option<Notes>, machine: Option<String>, gpu: &GpuUse) -> Self {
        // A limit on VRAM changes what is copied, not how fast.
        let GpuUse {
            vram_limit: _,
            compiler: _,
            link_limit,
            locked_share,
            synchronous,
            activations,
        } = *gpu;
        Self {
            notes: notes.filter(|_| machine.is_some()),
            machine: machine.unwrap_or_default(),
            copies: Copies { synchronous, link_limit: link_limit.map(|b| b.0), locked_share },
            activations,
            subjects: RefCell::default(),
        }
    }

    /// Other models than so far may have the names that they had.
    pub(crate) fn forget_models(&self) {
        self.subjects.borrow_mut().clear();
    }

    /// The passes that follow are for `request`: the pager expects of each model what was kept of such.
    pub(crate) fn begin(&self, pager: &Pager, pipeline: &dyn Pipeline, request: &Request) {
        let mut subjects = self.subjects.borrow_mut();
        for model in pipeline.parts().iter().map(|part| part.name) {
            let subject = self.subject(pager, pipeline.class(), model, request);
            if subject.as_ref() == subjects.get(model) {
                continue;
            }
            let kept = self.notes.as_ref().zip(subject.as_ref());
            let kept = kept.and_then(|(notes, subject)| notes.read::<_, PassCosts>(subject));
            pager.expect_costs(model, kept);
            match subject {
                Some(subject) => subjects.insert(model.into(), subject),
                None => subjects.remove(model),
            };
        }
    }

    /// Keeps what was measured since, where that is news.
    pub(crate) fn keep(&self, pager: &Pager) {
        let Some(notes) = &self.notes else { return };
        for (model, subject) in &*self.subjects.borrow() {
            let Some(measured) = pager.measured_costs(model) else { continue };
            let known = pager.expected_costs(model);
            if known.is_some_and(|known| !measured.differ(&known, SHARE)) {
                continue;
            }
            if let Err(why) = notes.write(subject, &measured) {
                tracing::info!("{model}: its times will be measured again: {why}");
            }
        }
    }

    fn subject(
        &self,
        pager: &Pager,
        pipeline: &str,
        model: &str,
        request: &Request,
    ) -> Option<Subject> {
        let blocks = pager.blocks(model)?;
        let about = pager.report().models.into_iter().rfind(|m| m.name == model)?;
        // All fields, so that a new one is thought of here.
        let Request {
            prompt: _,
            negative: _,
            image: _,
            seed: _,
            steps: _,
            guidance: _,
            guidance_schedule: _,
            tiles: _,
            width,
            height,
            frames,
            max_sequence_length,
        } = request;
        Some(Subject {
            version: env!("CARGO_PKG_VERSION").into(),
            machine: self.machine.clone(),
            copies: self.copies.clone(),
            pipeline: pipeline.into(),
            model: model.into(),
            blocks: blocks.into_iter().map(|(name, Bytes(bytes))| (name, bytes)).collect(),
            form: (about.form, about.disk.0),
            compute: match (pager.device().compute_dtype(), self.activations.codes()) {
                (dtype, None) => format!("{dtype:?}"),
                (dtype, Some(codes)) => format!("{dtype:?}, {codes} in products"),
            },
            width: *width,
            height: *height,
            frames: *frames,
            max_sequence_length: *max_sequence_length,
        })
    }
}
