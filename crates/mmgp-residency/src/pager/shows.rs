//! What a pager shows of itself: what happened, what is to be expected, and what its slots would hold; and
//! what it is told to expect.

use std::{sync::Arc, time::Duration};

use super::{NewBlock, Pager};
use crate::{
    BlockImage, Bytes, Digest, Error, ModelReport, Occupancy, Report, Result,
    report::{BlockForecast, Forecast, form},
    schedule::{Choice, PassCosts},
};

impl Pager {
    /// What happened so far.
    pub fn report(&self) -> Report {
        let mut state = self.0.state.lock();
        let state = &mut *state;
        for model in &mut state.models {
            model.timing.read_all();
            for slot in 0..model.slots.len() {
                model.look_at(slot);
            }
        }
        let models = state.models.iter().enumerate().map(|(at, m)| ModelReport {
            name: m.name.clone(),
            disk: Bytes(m.disk),
            weights: Bytes(m.blocks.iter().map(|b| b.image.bytes).sum()),
            attached: Bytes(m.attached()),
            form: form(&m.blocks),
            limit: Bytes(
                state.plan.as_ref().and_then(|p| p.models.get(at)).map_or(u64::MAX, |p| p.limit.0),
            ),
            peak: Bytes(m.stats.peak),
            read: Bytes(m.stats.read),
            streamed: Bytes(m.stats.streamed),
            copies: m.stats.copies,
            visits: m.stats.visits,
            hits: m.stats.hits,
            stalled: m.timing.stalled,
            own: m.host.iter().map(|visits| visits.least().unwrap_or_default()).sum(),
        });
        let models: Vec<ModelReport> = models.collect();
        Report {
            budget: Bytes(state.plan.as_ref().map_or(u64::MAX, |p| p.budget.0)),
            peak: Bytes(state.peak),
            deviations: state.order.deviations,
            locked: self.0.device.locked(),
            copies: models.iter().map(|m| m.copies).sum(),
            streamed: Bytes(models.iter().map(|m| m.streamed.0).sum()),
            host: state.counters.host,
            waits: state.counters.waits,
            taken: state.counters.taken,
            replans: state.counters.replans,
            reruns: state.counters.reruns,
            models,
        }
    }

    /// What a steady pass of `model` takes by the schedule, as its blocks and copies were measured;
    /// `None` before they were. `effort` is how many times as long as the pager's own search one for
    /// [`Forecast::best`] looks.
    pub fn forecast(&self, model: &str, effort: u32) -> Option<Forecast> {
        let mut state = self.0.state.lock();
        let at = state.live(model)?;
        let m = &mut state.models[at];
        m.timing.read_all();
        let sizes = m.sizes(&*self.0.device);
        let blocks = sizes.bytes();
        let costs = m.timing.costs(blocks.len())?;
        let plan = state.plan.as_ref()?.models.get(at)?;
        let choice = plan.choice();
        let room = sizes.room(plan.limit.0);
        drop(state);
        let best = Choice::search(&blocks, room, &costs, effort);
        let named = sizes.blocks[1..].iter().zip(&costs.blocks).zip(&choice.streams);
        let named = named.map(|(((name, bytes), &seconds), &streams)| BlockForecast {
            name: name.clone(),
            bytes: Bytes(*bytes),
            seconds,
            streams,
        });
        let named: Vec<BlockForecast> = named.collect();
        Some(Forecast {
            link: costs.link,
            streamed: Bytes(named.iter().filter(|b| b.streams).map(|b| b.bytes.0).sum()),
            schedule: choice.seconds(&blocks, &costs),
            best: best.seconds(&blocks, &costs),
            outside: costs.outside,
            slots: choice.turns,
            blocks: named,
        })
    }

    /// What a pass of `model` costs, as this pager measured it: `None` for a model that is not there, and
    /// before each block was timed (its first visit does not count) and something was copied into slots that
    /// blocks take turns in. What a later run may [expect](Self::expect_costs).
    pub fn measured_costs(&self, model: &str) -> Option<PassCosts> {
        let mut state = self.0.state.lock();
        let at = state.live(model)?;
        let m = &mut state.models[at];
        m.timing.read_all();
        for slot in 0..m.slots.len() {
            m.look_at(slot);
        }
        m.timing.costs(m.blocks.len() - 1)
    }

    /// What passes of `model` are expected to cost until they were measured, if that was told.
    pub fn expected_costs(&self, model: &str) -> Option<PassCosts> {
        let state = self.0.state.lock();
        state.models[state.live(model)?].expected.clone()
    }

    /// From now on, passes of `model` are others than those before (the first ones, or on inputs of another
    /// shape): what was measured of its blocks is forgotten, and `costs` counts until they were measured anew.
    /// Plans are made with it, and one that is in force may change when the next pass begins.
    ///
    /// Costs that cannot be (another number of blocks, what is no positive number, more than a day for a block,
    /// a link outside 1 kB/s to 1 PB/s) are ignored, and logged. Those that are merely wrong cost time.
    pub fn expect_costs(&self, model: &str, costs: Option<PassCosts>) {
        let mut state = self.0.state.lock();
        let Some(at) = state.live(model) else {
            tracing::info!("there is no model `{model}` to expect costs of");
            return;
        };
        let m = &mut state.models[at];
        m.timing.forget_blocks();
        (m.rest, m.patience) = (0, 1);
        let blocks = m.blocks.len() - 1;
        m.expected = costs.filter(|costs| match costs.doubt(blocks) {
            Some(doubt) => {
                tracing::info!("{model}: costs of passes are ignored: {doubt}");
                false
            }
            None => true,
        });
    }

    /// The names of a model's blocks and their sizes in slots, the stem first, with what is attached to
    /// them; `None` if there is no such model.
    pub fn blocks(&self, model: &str) -> Option<Vec<(String, Bytes)>> {
        let state = self.0.state.lock();
        let blocks = &state.models[state.live(model)?].blocks;
        Some(blocks.iter().map(|b| (b.image.name.clone(), Bytes(b.image.bytes))).collect())
    }

    /// Bytes a second at which the blocks of `model` that stream now come to the device, into a slot that
    /// is taken for this beside what the plan holds. Whatever computes meanwhile goes on.
    ///
    /// # Errors
    /// A model that is not there or of which nothing streams; a device that refuses.
    pub fn measure_link(&self, model: &str) -> Result<f64> {
        let nothing =
            |reason: &str| Error::NotPageable { model: model.into(), reason: reason.into() };
        let images: Vec<Arc<BlockImage>> = {
            let state = self.0.state.lock();
            let at = state.live(model).ok_or_else(|| nothing("there is no such model"))?;
            let m = &state.models[at];
            let blocks = m.blocks.iter().zip(&m.slot_of);
            let turns = |slot: usize| m.slots[slot].occupancy == Occupancy::Turns;
            blocks.filter(|(_, slot)| turns(**slot)).map(|(b, _)| b.image.clone()).collect()
        };
        let largest = images.iter().map(|image| image.bytes).max();
        let largest = largest.ok_or_else(|| nothing("nothing of it streams"))?;
        let mut slot = self.0.device.slot(Bytes(largest), Occupancy::Turns)?;
        let (mut bytes, mut seconds) = (0., 0.);
        for image in &images {
            slot.fill(image)?;
            let moved = loop {
                match slot.moved() {
                    Some(moved) => break moved,
                    None => std::thread::sleep(Duration::from_micros(50)),
                }
            };
            bytes += moved.bytes.0 as f64;
            seconds += moved.took.as_secs_f64();
        }
        Ok(bytes / seconds)
    }

    /// The digests of a model's blocks as they lie in slots, the stem's first: what a later run may
    /// hold them to ([`ModelBuilder::expect`](crate::ModelBuilder::expect)). Reads all of the model,
    /// one block at a time, beside what the plan holds.
    ///
    /// # Errors
    /// A model that is not there; a file that cannot be read.
    pub fn digests(&self, model: &str) -> Result<Vec<Digest>> {
        let images = self.images(model).ok_or_else(|| Error::NotPageable {
            model: model.into(),
            reason: "there is no such model".into(),
        })?;
        let digest = |image: &BlockImage| {
            let mut slot = self.0.device.slot(Bytes(image.bytes), Occupancy::Alone)?;
            slot.fill(image)?;
            slot.digest(&image.tensors)
        };
        images.iter().map(digest).collect()
    }

    /// The images of a model's blocks, the stem's first, without what is attached to them, or `None`
    /// if there is no such model.
    pub(crate) fn images(&self, model: &str) -> Option<Vec<BlockImage>> {
        let state = self.0.state.lock();
        let mut models = state.models.iter().filter(|m| !m.blocks.is_empty());
        let model = models.find(|m| m.name == model)?;
        let own = |(block, &own): (&NewBlock, &usize)| {
            let image = &*block.image;
            BlockImage::new(image.name.clone(), image.tensors[..own].to_vec())
        };
        Some(model.blocks.iter().zip(&model.own).map(own).collect())
    }
}
