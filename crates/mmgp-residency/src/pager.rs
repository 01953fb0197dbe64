//! The pager: which block is where, and the hand-offs between the thread that computes and those
//! that fetch.
//!
//! Every block has one slot (the plan's choice), a slot holds one block at a time, and a slot is in
//! one [`Phase`]. A lease waits until its block is ready, binds it, and while it computes the block
//! that comes next is fetched into a slot that is free. All bookkeeping is under one lock that is
//! never held while anything is read or computed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::{Device as Candle, Tensor};
use crossbeam_channel::{Receiver, Sender};
use parking_lot::{Condvar, Mutex, MutexGuard};

use self::state::{Model, Phase, SlotState, State};
use crate::{
    BlockImage, Budget, Budgets, Bytes, Device, Digest, Error, Host, ModelReport, Occupancy, Plan,
    Report, Result, Slot,
    plan::ModelPlan,
    report::{Forecast, form},
    schedule::Choice,
};

mod attach;
mod state;
mod timing;

pub use attach::{Attachment, Attachments, BlockTarget};

/// A plan is remade when costs have changed by more than this share, ...
const DRIFT: f64 = 0.1;
/// ... and adopted when it saves more than this one.
const WORTH: f64 = 0.01;
/// Passes between two searches, at most, where they find nothing.
const PATIENCE: u32 = 64;

/// Threads that fetch blocks: one fetches ahead, one is there when that was the wrong one.
const FETCHERS: usize = 2;

/// Pages the blocks of some models through one device. Clones share it.
#[derive(Clone)]
pub struct Pager(Arc<Inner>);

struct Inner {
    device: Arc<dyn Device>,
    state: Mutex<State>,
    /// Signalled when a fetch ends.
    changed: Condvar,
    jobs: Sender<Job>,
    cancelled: Arc<AtomicBool>,
}

/// A fetch, done by a worker thread: the slot travels with it and comes back.
struct Job {
    pager: Arc<Inner>,
    at: At,
    memory: Box<dyn Slot>,
    image: Arc<BlockImage>,
}

/// A block of a model; block 0 is the stem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) model: usize,
    pub(crate) block: usize,
}

/// A block as the builder hands it over.
pub(crate) struct NewBlock {
    pub(crate) image: Arc<BlockImage>,
    /// The placeholders, in image order.
    pub(crate) tensors: Vec<Tensor>,
}

impl Pager {
    /// A pager over the memory behind a candle device.
    ///
    /// # Errors
    /// A device that this build cannot page on.
    pub fn new(device: &Candle) -> Result<Self> {
        if device.is_cpu() {
            return Self::over(Host::new()?);
        }
        Err(Error::NotPageable {
            model: "pager".into(),
            reason: format!(
                "{:?} is not paged by mmgp: a GPU is opened by `Cuda::new` (feature `cuda`), which \
                 makes the candle device and its streams, and given to `Pager::over`",
                device.location()
            ),
        })
    }

    /// A pager over any [`Device`].
    ///
    /// # Errors
    /// No worker threads to be had.
    pub fn over(device: impl Device + 'static) -> Result<Self> {
        Self::share(Arc::new(device))
    }

    /// Another pager over the same device, with models and budgets of its own.
    ///
    /// # Errors
    /// No worker threads to be had.
    pub fn beside(&self) -> Result<Self> {
        Self::share(self.0.device.clone())
    }

    fn share(device: Arc<dyn Device>) -> Result<Self> {
        let (jobs, inbox) = crossbeam_channel::unbounded::<Job>();
        for worker in 0..FETCHERS {
            let inbox = inbox.clone();
            std::thread::Builder::new()
                .name(format!("mmgp-fetch-{worker}"))
                .spawn(move || fetch(&inbox))
                .map_err(|e| Error::NotPageable {
                    model: "pager".into(),
                    reason: format!("no worker threads: {e}"),
                })?;
        }
        Ok(Self(Arc::new(Inner {
            device,
            state: Mutex::new(State::new(Budget::Auto.into())),
            changed: Condvar::new(),
            jobs,
            cancelled: Arc::default(),
        })))
    }

    /// The device that is paged into.
    pub fn device(&self) -> &dyn Device {
        &*self.0.device
    }

    /// Makes the plan within `budgets` for the models added so far and gives back what it does not keep.
    /// Models added later are planned within the same budgets. Nothing is read.
    ///
    /// The pager changes the plan between passes when that pays: once blocks were measured, and when the
    /// memory that is there for weights changes.
    ///
    /// # Errors
    /// A budget that is too small, with the smallest that works; leases that are still out.
    pub fn plan(&self, budgets: impl Into<Budgets>) -> Result<Arc<Plan>> {
        let mut state = self.0.state.lock();
        let budgets = budgets.into();
        let plan = state.make_plan(&budgets, &*self.0.device)?;
        state.budgets = budgets;
        self.adopt(&mut state, plan)
    }

    /// The plan that passes follow now, which the pager may have changed since; `None` before the first.
    pub fn plan_in_force(&self) -> Option<Arc<Plan>> {
        self.0.state.lock().plan.clone()
    }

    /// A new run begins (a picture, say): passes are expected in the order of the run before.
    pub fn begin_run(&self) {
        self.0.state.lock().order.begin();
    }

    /// Set it to make the next lease of this pager fail with [`Error::Cancelled`].
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.0.cancelled.clone()
    }

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
        let streams = blocks.iter().zip(&choice.streams).filter(|(_, streams)| **streams);
        let names = sizes.blocks[1..].iter().map(|(name, bytes)| (name.clone(), Bytes(*bytes)));
        Some(Forecast {
            link: costs.link,
            streamed: Bytes(streams.map(|(bytes, _)| bytes).sum()),
            schedule: choice.seconds(&blocks, &costs),
            best: best.seconds(&blocks, &costs),
            outside: costs.outside,
            blocks: names.zip(&costs.blocks).map(|((n, b), &seconds)| (n, b, seconds)).collect(),
        })
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

    pub(crate) fn add(
        &self,
        name: String,
        disk: u64,
        blocks: Vec<NewBlock>,
        targets: Vec<BlockTarget>,
    ) -> usize {
        let mut state = self.0.state.lock();
        state.plan = None; // made anew at the next lease
        state.models.push(Model::new(name, disk, blocks, targets));
        state.models.len() - 1
    }

    /// Gives back what a dropped model holds.
    pub(crate) fn remove(&self, model: usize) {
        let mut state = self.0.state.lock();
        while state.models[model].slots.iter().any(|s| matches!(s.phase, Phase::Filling)) {
            self.0.changed.wait(&mut state);
        }
        state.release_all(model);
        state.order.forget(model);
        let m = &mut state.models[model];
        (m.slots, m.slot_of, m.blocks) = (Vec::new(), Vec::new(), Vec::new());
        (m.own, m.targets) = (Vec::new(), Vec::new());
        if let Some(plan) = &mut state.plan {
            let plan = Arc::make_mut(plan);
            plan.weights.0 -= std::mem::take(&mut plan.models[model].bytes.0);
        }
    }

    /// A pass of `model` begins: what the last one showed is read, and the plan changed if that pays or
    /// the memory that is there demands it.
    pub(crate) fn begin_pass(&self, model: usize) -> Result<()> {
        let device = &*self.0.device;
        let mut state = self.0.state.lock();
        state.order.pass(model);
        if let Some(before) = state.running.replace(model) {
            let peak = device.take_peak().0;
            state.models[before].calibrate(peak);
            if before != model {
                device.trim();
            }
        }
        state.models[model].timing.begin_pass();
        if state.plan.is_none() {
            return Ok(());
        }
        state.ceiling = device.ceiling()?.0;
        self.replan(&mut state, model)?;
        let allowed = state.models[model].allowed;
        state.shrink(model, allowed);
        device.share(Bytes(allowed))
    }

    /// Changes the plan of one model if that pays or memory demands it; not while a block of it is leased.
    fn replan(&self, state: &mut MutexGuard<'_, State>, at: usize) -> Result<()> {
        let device = &*self.0.device;
        let Some(plan) = state.plan.clone() else { return Ok(()) };
        let now = &plan.models[at];
        let minimum = now.minimum().0;
        let (limit, total) = state.limits(at, minimum);
        state.models[at].allowed = total;
        let shrinks = limit < now.held().0;
        let streams = now.streaming_slots() > 0;
        let grows = streams && limit / 50 > now.limit.0 / 49; // by more than 2 %
        let costs =
            if streams { state.models[at].timing.costs(now.slot_of.len() - 1) } else { None };
        let drifted = match (&costs, &state.models[at].planned) {
            (Some(new), Some(old)) => new.differ(old, DRIFT),
            (new, _) => new.is_some(),
        };
        if !shrinks && !grows {
            let m = &mut state.models[at];
            if !drifted || m.rest > 0 {
                m.rest = m.rest.saturating_sub(1);
                return Ok(());
            }
        }
        let leased = |s: &SlotState| matches!(s.phase, Phase::Leased { .. });
        if state.models[at].slots.iter().any(leased) {
            return Ok(());
        }
        let sizes = state.models[at].sizes(device);
        let limit = limit.max(minimum);
        let next = ModelPlan::make(&sizes, limit, costs.as_ref());
        state.models[at].planned = costs.clone();
        if let (false, false, Some(costs)) = (shrinks, grows, &costs) {
            let blocks = sizes.bytes();
            let seconds = |plan: &ModelPlan| plan.choice().seconds(&blocks, costs);
            let m = &mut state.models[at];
            if seconds(&next) > (1. - WORTH) * seconds(now) {
                // Costs that never settle are not searched in every pass.
                m.patience = (2 * m.patience).min(PATIENCE);
                m.rest = m.patience;
                return Ok(());
            }
            m.patience = 1;
        }
        let next = ModelPlan { total: Bytes(total), asked: now.asked, raised: now.raised, ..next };
        while state.models[at].slots.iter().any(|s| matches!(s.phase, Phase::Filling)) {
            self.0.changed.wait(state);
        }
        tracing::debug!(
            "{}: {} resident, {} slots",
            now.name,
            next.residents(),
            next.streaming_slots()
        );
        let freed = state.models[at].adopt(&next);
        state.held -= freed;
        state.counters.replans += 1;
        let mut plan = plan;
        Arc::make_mut(&mut plan).models[at] = next;
        state.plan = Some(plan);
        Ok(())
    }

    /// Waits until the block is there and binds it.
    pub(crate) fn lease(&self, at: At) -> Result<Lease> {
        let inner = &*self.0;
        let device = &*inner.device;
        let mut state = inner.state.lock();
        if state.plan.is_none() {
            let budgets = state.budgets.clone();
            let plan = state.make_plan(&budgets, device)?;
            self.adopt(&mut state, plan)?;
            device.share(Bytes(state.models[at.model].allowed))?;
        }
        let begun = Instant::now();
        if let Phase::Leased { block, leases } = &mut state.slot_mut(at).phase
            && *block == at.block
        {
            *leases += 1;
            return Ok(Lease { pager: self.clone(), at });
        }
        let short = device.shortage().0;
        if short > 0 {
            state.relent(at.model, short, device);
        }
        state.models[at.model].timing.asked(at.block, device);
        let mut waited = Duration::ZERO;
        let mut demanded = false;
        let used = loop {
            if inner.cancelled.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let slot = state.slot_mut(at);
            match &mut slot.phase {
                Phase::Leased { block, .. } => {
                    let holder = *block;
                    return Err(Error::StillLeased {
                        model: state.models[at.model].name.clone(),
                        block: state.name(at),
                        holder: state.name(At { block: holder, ..at }),
                    });
                }
                Phase::Ready { block, used } if *block == at.block => break *used,
                // A fetch ahead that failed is tried again; one that was asked for here is told.
                Phase::Failed(block, error) if *block == at.block && demanded => {
                    let error = error.clone();
                    slot.phase = Phase::Empty;
                    return Err(error);
                }
                Phase::Filling => {}
                Phase::Empty | Phase::Ready { .. } | Phase::Failed(..) => {
                    demanded = self.demand(&mut state, at)?;
                    if demanded && !matches!(state.slot_mut(at).phase, Phase::Filling) {
                        continue; // it was there at once
                    }
                }
            }
            let since = Instant::now();
            inner.changed.wait(&mut state);
            waited += since.elapsed();
        };
        let model = &mut state.models[at.model];
        let slot = &mut model.slots[model.slot_of[at.block]];
        if let Some(memory) = &mut slot.memory {
            memory.bind(&model.blocks[at.block].tensors)?;
        }
        slot.phase = Phase::Leased { block: at.block, leases: 1 };
        model.timing.began(at.block);
        model.stats.visits += 1;
        model.stats.hits += u64::from(used);
        self.fetch_ahead(&mut state, at);
        state.counters.waits += u64::from(waited > Duration::ZERO);
        state.counters.host += begun.elapsed().saturating_sub(waited);
        Ok(Lease { pager: self.clone(), at })
    }

    fn release(&self, at: At) {
        let mut state = self.0.state.lock();
        let begun = Instant::now();
        let model = &mut state.models[at.model];
        let slot = &mut model.slots[model.slot_of[at.block]];
        let Phase::Leased { leases, .. } = &mut slot.phase else { return };
        *leases -= 1;
        if *leases > 0 {
            return;
        }
        model.timing.ended(at.block);
        slot.phase = Phase::Ready { block: at.block, used: true };
        if let Some(memory) = &mut slot.memory
            && let Err(error) = memory.unbind(&model.blocks[at.block].tensors)
        {
            tracing::error!("{}: unbinding failed: {error}", model.name);
            slot.phase = Phase::Empty;
        }
        // The stem is given back when the pass is over: what comes next is another pass.
        let last = model.blocks.len() - 1;
        let now = if at.block == 0 { At { block: last, ..at } } else { at };
        self.fetch_ahead(&mut state, now);
        state.counters.host += begun.elapsed();
    }

    /// Whether what failed with `error` inside a block of `model` may run again: memory ran out, and some
    /// was given back.
    pub(crate) fn may_run_again(&self, model: usize, error: &candle_core::Error) -> Result<bool> {
        let device = &*self.0.device;
        if !device.is_out_of_memory(error) {
            return Ok(false);
        }
        let mut state = self.0.state.lock();
        let again = state.leave_more(model, device)?;
        state.counters.reruns += u64::from(again);
        tracing::debug!("memory ran out: {}", if again { "once more" } else { "nothing to give" });
        Ok(again)
    }

    /// Starts the fetch of a block that is needed now, giving back what other models hold. Says
    /// whether it did: what is still being fetched elsewhere may have to be given back first.
    fn demand(&self, state: &mut MutexGuard<'_, State>, at: At) -> Result<bool> {
        let wanted = state.missing(at);
        let others = |_: &State, m: usize, _: usize| m != at.model;
        let mine = state.models[at.model].slot_of[at.block];
        let all = |_: &State, m: usize, slot: usize| m != at.model || slot != mine;
        if state.make_room(at.model, wanted, others) || state.make_room(at.model, wanted, all) {
            return self.start(state, at).map(|()| true);
        }
        if state.models.iter().flat_map(|m| &m.slots).any(|s| matches!(s.phase, Phase::Filling)) {
            return Ok(false); // what is being fetched can be given back once it is there
        }
        Err(Error::InUse {
            model: state.models[at.model].name.clone(),
            block: state.name(at),
            wanted: Bytes(wanted),
            held: Bytes(state.held),
            budget: Bytes(state.models[at.model].allowed),
        })
    }

    /// Fetches the next block that is not there yet, if its slot is free and there is room.
    /// At most one block ahead, and never at the cost of anything that is needed before it.
    fn fetch_ahead(&self, state: &mut MutexGuard<'_, State>, now: At) {
        if !self.0.device.overlaps() {
            return;
        }
        let mut ahead = 0;
        while let Some(next) = state.upcoming(now, ahead) {
            ahead += 1;
            let slot = state.slot_mut(next);
            match slot.phase {
                Phase::Ready { block, .. } | Phase::Leased { block, .. } if block == next.block => {
                }
                // What was fetched ahead stays until it is used.
                Phase::Empty | Phase::Ready { used: true, .. } => {
                    let room = state.missing(next);
                    let done = |state: &State, m: usize, slot: usize| {
                        m != next.model && (m != now.model || state.is_past(now, slot))
                    };
                    if state.make_room(now.model, room, done)
                        && let Err(error) = self.start(state, next)
                    {
                        tracing::warn!("no memory to fetch ahead: {error}");
                    }
                    return;
                }
                _ => return,
            }
        }
    }

    fn start(&self, state: &mut MutexGuard<'_, State>, at: At) -> Result<()> {
        let device = &*self.0.device;
        let model = &mut state.models[at.model];
        let image = model.blocks[at.block].image.clone();
        let slot = model.slot_of[at.block];
        model.look_at(slot);
        let slot = &mut model.slots[slot];
        let mut memory = match slot.memory.take() {
            Some(memory) => memory,
            None => {
                let (capacity, occupancy) = (slot.capacity, slot.occupancy);
                let memory = match device.slot(Bytes(capacity), occupancy) {
                    Ok(memory) => memory,
                    // The card has less than was thought: what is idle makes room.
                    Err(error) => match state.relent(at.model, capacity, device) {
                        true => device.slot(Bytes(capacity), occupancy)?,
                        false => return Err(error),
                    },
                };
                state.held += capacity;
                state.peak = state.peak.max(state.held);
                state.counters.taken += 1;
                let model = &mut state.models[at.model];
                model.held += capacity;
                model.stats.peak = model.stats.peak.max(model.held);
                memory
            }
        };
        let turns = state.slot_mut(at).occupancy == Occupancy::Turns;
        if memory.fills_at_once(&image) {
            let phase = match memory.fill(&image) {
                Ok(copies) => {
                    state.models[at.model].filled(at.block, copies);
                    Phase::Ready { block: at.block, used: false }
                }
                Err(error) => Phase::Failed(at.block, error),
            };
            let slot = state.slot_mut(at);
            (slot.phase, slot.memory) = (phase, Some(memory));
            return Ok(());
        }
        if turns && !image.kept.is_some() && device.lockable().0 < image.bytes {
            state.make_lockable(at.model, image.bytes, device);
        }
        state.models[at.model].stats.read += image.stored;
        state.slot_mut(at).phase = Phase::Filling;
        // Cannot fail: workers live as long as the sender does.
        let _ = self.0.jobs.send(Job { pager: self.0.clone(), at, memory, image });
        Ok(())
    }

    /// Waits until nothing is being fetched.
    ///
    /// # Errors
    /// Leases that are out.
    fn settle(&self, state: &mut MutexGuard<'_, State>) -> Result<()> {
        let filling = |s: &SlotState| matches!(s.phase, Phase::Filling);
        while state.models.iter().flat_map(|m| &m.slots).any(filling) {
            self.0.changed.wait(state);
        }
        for (model, m) in state.models.iter().enumerate() {
            if let Some(block) = m.slots.iter().find_map(|s| match s.phase {
                Phase::Leased { block, .. } => Some(block),
                _ => None,
            }) {
                let block = state.name(At { model, block });
                return Err(Error::Busy { model: m.name.clone(), block });
            }
        }
        Ok(())
    }

    fn adopt(&self, state: &mut MutexGuard<'_, State>, plan: Plan) -> Result<Arc<Plan>> {
        self.settle(state)?;
        for (at, plan) in plan.models.iter().enumerate() {
            let m = &mut state.models[at];
            let freed = m.adopt(plan);
            m.allowed = plan.total.0;
            m.planned = m.timing.costs(plan.slot_of.len() - 1);
            state.held -= freed;
        }
        // What fits one model need not fit beside another.
        let allowed = state.models.iter().map(|m| m.allowed).max().unwrap_or(0);
        if let Some(model) = state.running.or(Some(0)).filter(|&m| m < state.models.len()) {
            state.shrink(model, allowed);
        }
        let plan = Arc::new(plan);
        state.plan = Some(plan.clone());
        Ok(plan)
    }
}

/// The guard that says "this block's weights are on the device until I drop".
pub(crate) struct Lease {
    pager: Pager,
    at: At,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pager.release(self.at);
    }
}

/// A worker: fills slots until the pager is gone.
fn fetch(inbox: &Receiver<Job>) {
    for Job { pager, at, mut memory, image } in inbox {
        let result = memory.fill(&image);
        let mut state = pager.state.lock();
        if let Ok(copies) = &result {
            state.models[at.model].filled(at.block, *copies);
        }
        let slot = state.slot_mut(at);
        slot.memory = Some(memory);
        slot.phase = match result {
            Ok(_) => Phase::Ready { block: at.block, used: false },
            Err(error) => Phase::Failed(at.block, error),
        };
        drop(state);
        pager.changed.notify_all();
    }
}
