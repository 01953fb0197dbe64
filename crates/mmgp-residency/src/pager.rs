//! The pager: which block is where, and the hand-offs between the thread that computes and those
//! that fetch.
//!
//! Every block has one slot (the plan's choice), a slot holds one block at a time, and a slot is in
//! one [`Phase`]. A lease waits until its block is ready, binds it, and while it computes the block
//! that comes next is fetched into a slot that is free. All bookkeeping is under one lock that is
//! never held while anything is read or computed.

use std::{
    cmp::Reverse,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::{Device as Candle, Tensor};
use crossbeam_channel::{Receiver, Sender};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    BlockImage, Budget, Budgets, Bytes, Device, Digest, Error, Host, ModelReport, Occupancy, Plan,
    Report, Result, Slot, SlotPlan, image::ALIGN, order::Order, plan::ModelSizes,
};

mod attach;

pub use attach::{Attachment, Attachments, BlockTarget};

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

struct State {
    models: Vec<Model>,
    budgets: Budgets,
    plan: Option<Arc<Plan>>,
    held: u64,
    peak: u64,
    order: Order,
}

struct Model {
    name: String,
    disk: u64,
    /// Empty once the model was dropped.
    blocks: Vec<NewBlock>,
    /// How many tensors of each block are its own; what follows them is attached.
    own: Vec<usize>,
    targets: Vec<BlockTarget>,
    /// As the plan has them; empty before.
    slots: Vec<SlotState>,
    slot_of: Vec<usize>,
    held: u64,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    peak: u64,
    read: u64,
    visits: u64,
    hits: u64,
    stalled: Duration,
}

struct SlotState {
    capacity: u64,
    occupancy: Occupancy,
    memory: Option<Box<dyn Slot>>,
    phase: Phase,
}

enum Phase {
    /// Nothing in it that is worth keeping.
    Empty,
    /// A fetch is under way; the memory is with the worker.
    Filling,
    /// Holds this block, unbound. `used` tells whether it was leased since it was fetched.
    Ready { block: usize, used: bool },
    /// Holds this block, bound, for so many leases.
    Leased { block: usize, leases: usize },
    /// The fetch of this block failed.
    Failed(usize, Error),
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
            state: Mutex::new(State {
                models: Vec::new(),
                budgets: Budget::Auto.into(),
                plan: None,
                held: 0,
                peak: 0,
                order: Order::default(),
            }),
            changed: Condvar::new(),
            jobs,
            cancelled: Arc::default(),
        })))
    }

    /// The device that is paged into.
    pub fn device(&self) -> &dyn Device {
        &*self.0.device
    }

    /// Makes the plan within `budgets` for the models added so far and gives back everything held.
    /// Models added later are planned within the same budgets. Nothing is read.
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
        let state = self.0.state.lock();
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
            visits: m.stats.visits,
            hits: m.stats.hits,
            stalled: m.stats.stalled,
        });
        Report {
            budget: Bytes(state.plan.as_ref().map_or(u64::MAX, |p| p.budget.0)),
            peak: Bytes(state.peak),
            deviations: state.order.deviations,
            models: models.collect(),
        }
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
        state.models.push(Model {
            name,
            disk,
            own: blocks.iter().map(|b| b.tensors.len()).collect(),
            blocks,
            targets,
            slots: Vec::new(),
            slot_of: Vec::new(),
            held: 0,
            stats: Stats::default(),
        });
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

    /// A pass of `model` begins.
    pub(crate) fn begin_pass(&self, model: usize) {
        self.0.state.lock().order.pass(model);
    }

    /// Waits until the block is there and binds it.
    pub(crate) fn lease(&self, at: At) -> Result<Lease> {
        let inner = &*self.0;
        let mut state = inner.state.lock();
        if state.plan.is_none() {
            let plan = state.make_plan(&state.budgets, &*inner.device)?;
            self.adopt(&mut state, plan)?;
        }
        let mut waiting: Option<Instant> = None;
        let mut demanded = false;
        let used = loop {
            if inner.cancelled.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let slot = state.slot_mut(at);
            match &mut slot.phase {
                Phase::Leased { block, leases } if *block == at.block => {
                    *leases += 1;
                    return Ok(Lease { pager: self.clone(), at });
                }
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
            waiting.get_or_insert_with(Instant::now);
            inner.changed.wait(&mut state);
        };
        let model = &mut state.models[at.model];
        let slot = &mut model.slots[model.slot_of[at.block]];
        if let Some(memory) = &mut slot.memory {
            memory.bind(&model.blocks[at.block].tensors)?;
        }
        slot.phase = Phase::Leased { block: at.block, leases: 1 };
        model.stats.visits += 1;
        model.stats.hits += u64::from(used);
        model.stats.stalled += waiting.map_or(Duration::ZERO, |since| since.elapsed());
        self.fetch_ahead(&mut state, at);
        Ok(Lease { pager: self.clone(), at })
    }

    fn release(&self, at: At) {
        let mut state = self.0.state.lock();
        let model = &mut state.models[at.model];
        let slot = &mut model.slots[model.slot_of[at.block]];
        let Phase::Leased { leases, .. } = &mut slot.phase else { return };
        *leases -= 1;
        if *leases > 0 {
            return;
        }
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
    }

    /// Starts the fetch of a block that is needed now, giving back what other models hold. Says
    /// whether it did: what is still being fetched elsewhere may have to be given back first.
    fn demand(&self, state: &mut MutexGuard<'_, State>, at: At) -> Result<bool> {
        let wanted = state.missing(at);
        let others = |_: &State, m: usize, _: usize| m != at.model;
        let mine = state.models[at.model].slot_of[at.block];
        let all = |_: &State, m: usize, slot: usize| m != at.model || slot != mine;
        if state.make_room(wanted, others) || state.make_room(wanted, all) {
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
            budget: Bytes(state.budget()),
        })
    }

    /// Fetches the next block that is not there yet, if its slot is free and there is room.
    /// At most one block ahead, and never at the cost of anything that is needed before it.
    fn fetch_ahead(&self, state: &mut MutexGuard<'_, State>, now: At) {
        for next in state.upcoming(now) {
            let slot = state.slot_mut(next);
            match slot.phase {
                Phase::Ready { block, .. } | Phase::Leased { block, .. } if block == next.block => {
                }
                Phase::Empty | Phase::Ready { .. } => {
                    let room = state.missing(next);
                    let done = |state: &State, m: usize, slot: usize| {
                        m != next.model && (m != now.model || state.is_past(now, slot))
                    };
                    if state.make_room(room, done)
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
        let model = &mut state.models[at.model];
        let image = model.blocks[at.block].image.clone();
        let slot = &mut model.slots[model.slot_of[at.block]];
        let memory = match slot.memory.take() {
            Some(memory) => memory,
            None => {
                let memory = self.0.device.slot(Bytes(slot.capacity), slot.occupancy)?;
                model.held += slot.capacity;
                model.stats.peak = model.stats.peak.max(model.held);
                let capacity = slot.capacity;
                state.held += capacity;
                state.peak = state.peak.max(state.held);
                memory
            }
        };
        let model = &mut state.models[at.model];
        let slot = &mut model.slots[model.slot_of[at.block]];
        if memory.fills_at_once(&image) {
            let mut memory = memory;
            slot.phase = match memory.fill(&image) {
                Ok(()) => Phase::Ready { block: at.block, used: false },
                Err(error) => Phase::Failed(at.block, error),
            };
            slot.memory = Some(memory);
            return Ok(());
        }
        model.stats.read += image.stored;
        slot.phase = Phase::Filling;
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
        for model in 0..state.models.len() {
            state.release_all(model);
            let (m, plan) = (&mut state.models[model], &plan.models[model]);
            m.slot_of = plan.slot_of.clone();
            let empty = |slot: &SlotPlan| SlotState {
                capacity: slot.capacity.0,
                occupancy: if slot.blocks > 1 { Occupancy::Turns } else { Occupancy::Alone },
                memory: None,
                phase: Phase::Empty,
            };
            m.slots = plan.slots.iter().map(empty).collect();
        }
        let plan = Arc::new(plan);
        state.plan = Some(plan.clone());
        Ok(plan)
    }
}

impl Model {
    /// The bytes in slots of what is attached to its blocks.
    fn attached(&self) -> u64 {
        let own = self.blocks.iter().zip(&self.own);
        own.flat_map(|(block, &own)| &block.image.tensors[own..])
            .map(|t| t.bytes().next_multiple_of(ALIGN))
            .sum()
    }
}

impl State {
    fn make_plan(&self, budgets: &Budgets, device: &dyn Device) -> Result<Plan> {
        let sizes: Vec<ModelSizes> = self
            .models
            .iter()
            .map(|m| {
                let blocks = m.blocks.iter().map(|b| (b.image.name.clone(), b.image.bytes));
                let mut blocks: Vec<_> = blocks.collect();
                if blocks.is_empty() {
                    blocks.push((String::new(), 0)); // a model that was dropped
                }
                ModelSizes { name: m.name.clone(), blocks }
            })
            .collect();
        Plan::make(&sizes, budgets, || device.available())
    }

    fn budget(&self) -> u64 {
        self.plan.as_ref().map_or(0, |plan| plan.budget.0)
    }

    fn name(&self, at: At) -> String {
        self.models[at.model].blocks[at.block].image.name.clone()
    }

    fn slot_mut(&mut self, at: At) -> &mut SlotState {
        let model = &mut self.models[at.model];
        &mut model.slots[model.slot_of[at.block]]
    }

    /// What must be taken before the block can be fetched.
    fn missing(&mut self, at: At) -> u64 {
        let slot = self.slot_mut(at);
        if slot.memory.is_some() { 0 } else { slot.capacity }
    }

    /// Whether what lies in a slot of the running model was visited in this pass already.
    fn is_past(&self, now: At, slot: usize) -> bool {
        match self.models[now.model].slots[slot].phase {
            Phase::Ready { block, .. } => block != 0 && block <= now.block,
            _ => true,
        }
    }

    /// The blocks that come after `now`, as far as that is known.
    fn upcoming(&self, now: At) -> Vec<At> {
        let rest = now.block + 1..self.models[now.model].blocks.len();
        let mut list: Vec<At> = rest.map(|block| At { model: now.model, block }).collect();
        if let Some(model) = self.order.next() {
            let blocks = self.models[model].slot_of.len();
            let until = if model == now.model { now.block } else { blocks };
            list.extend((0..until).map(|block| At { model, block }));
        }
        list
    }

    /// Gives back idle slots that `may` allows until `wanted` more bytes fit; nothing if they never
    /// will. First what costs least to bring back: models that run seldom, late blocks.
    fn make_room(&mut self, wanted: u64, may: impl Fn(&State, usize, usize) -> bool) -> bool {
        let free = self.budget().saturating_sub(self.held);
        if wanted <= free {
            return true;
        }
        let mut idle = Vec::new();
        for (m, model) in self.models.iter().enumerate() {
            for (s, slot) in model.slots.iter().enumerate() {
                if slot.memory.is_some()
                    && !matches!(slot.phase, Phase::Leased { .. })
                    && may(self, m, s)
                {
                    idle.push((self.order.passes(m), Reverse(s), m, slot.capacity));
                }
            }
        }
        if free + idle.iter().map(|i| i.3).sum::<u64>() < wanted {
            return false;
        }
        idle.sort_unstable();
        for (_, Reverse(slot), model, _) in idle {
            if wanted <= self.budget().saturating_sub(self.held) {
                break;
            }
            self.give_back(model, slot);
        }
        true
    }

    fn give_back(&mut self, model: usize, slot: usize) {
        let m = &mut self.models[model];
        let s = &mut m.slots[slot];
        if s.memory.take().is_some() {
            m.held -= s.capacity;
            self.held -= s.capacity;
        }
        s.phase = Phase::Empty;
    }

    fn release_all(&mut self, model: usize) {
        for slot in 0..self.models[model].slots.len() {
            self.give_back(model, slot);
        }
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
        let slot = state.slot_mut(at);
        slot.memory = Some(memory);
        slot.phase = match result {
            Ok(()) => Phase::Ready { block: at.block, used: false },
            Err(error) => Phase::Failed(at.block, error),
        };
        drop(state);
        pager.changed.notify_all();
    }
}

/// The dtypes of a model's slots, the larger share first.
fn form(blocks: &[NewBlock]) -> String {
    let mut sizes: Vec<(u64, &'static str)> = Vec::new();
    for tensor in blocks.iter().flat_map(|b| &b.image.tensors) {
        let dtype = tensor.dtype.as_str();
        match sizes.iter_mut().find(|(_, name)| *name == dtype) {
            Some((bytes, _)) => *bytes += tensor.bytes(),
            None => sizes.push((tensor.bytes(), dtype)),
        }
    }
    sizes.sort_unstable_by_key(|(bytes, _)| Reverse(*bytes));
    sizes.iter().map(|(_, name)| *name).collect::<Vec<_>>().join("+")
}
