//! The pager: which block is where, and the hand-offs between the thread that computes and those
//! that fetch.
//!
//! Every block has one slot (the plan's choice), a slot holds one block at a time, and a slot is in
//! one [`Phase`]. A lease waits until its block is ready, binds it, and while it computes the block
//! that comes next is fetched into a slot that is free. All bookkeeping is under one lock that is
//! never held while anything is read or computed.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use candle_core::{Device as Candle, Tensor};

use self::state::{Model, Phase, State};
use crate::{
    BlockImage, Budget, Budgets, Bytes, Device, Error, Host, Occupancy, Plan, Result, Slot,
    sync::{self, AtomicBool, Condvar, Mutex, MutexGuard, Receiver, Sender},
};

mod attach;
mod passes;
mod shows;
mod state;
mod timing;

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
        let (jobs, inbox) = sync::unbounded::<Job>();
        for worker in 0..FETCHERS {
            let inbox = inbox.clone();
            sync::spawn(format!("mmgp-fetch-{worker}"), move || fetch(&inbox)).map_err(|e| {
                let reason = format!("no worker threads: {e}");
                Error::NotPageable { model: "pager".into(), reason }
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
        self.settle(&mut state)?;
        let plan = state.make_plan(&budgets, &*self.0.device)?;
        state.budgets = budgets;
        Ok(state.adopt(plan))
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

    /// Waits until the block is there and binds it.
    pub(crate) fn lease(&self, at: At) -> Result<Lease> {
        let inner = &*self.0;
        let device = &*inner.device;
        let mut state = inner.state.lock();
        if state.plan.is_none() {
            self.settle(&mut state)?;
            let budgets = state.budgets.clone();
            let plan = state.make_plan(&budgets, device)?;
            state.adopt(plan);
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
        let there = state.stays(at);
        state.models[at.model].timing.asked(at.block, !there, device);
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
        let took = begun.elapsed().saturating_sub(waited);
        state.counters.host += took;
        state.models[at.model].host(at.block).began(took);
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
        let took = begun.elapsed();
        state.counters.host += took;
        state.models[at.model].host(at.block).ended(took);
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
    for Job { pager, at, mut memory, image } in inbox.iter() {
        // A lease that waits for the block must hear of it, whatever happens.
        let filled = catch_unwind(AssertUnwindSafe(|| memory.fill(&image)));
        let result = filled.unwrap_or_else(|_| {
            Err(Error::Device(format!("the thread that fetched `{}` panicked", image.name)))
        });
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
