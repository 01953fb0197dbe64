//! What a pager knows: models, the slots that they hold, and what may be given back for what.
//!
//! Everything here runs under the pager's lock, reads nothing and computes nothing.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use crate::{
    BlockTarget, Budgets, Device, Error, Occupancy, Plan, Result, Slot, SlotPlan,
    image::ALIGN,
    order::Order,
    pager::{At, NewBlock, timing::Timing},
    plan::{ModelPlan, ModelSizes, Surroundings},
    schedule::PassCosts,
};

/// Of what there is for weights and activations, the share that activations get until they were measured.
const GUESS: u64 = 4;
/// What is kept free beside measured activations.
const SPARE: u64 = 64 << 20;
/// What is given up at least when there is too little for activations.
const STEP: u64 = 256 << 20;

pub(super) struct State {
    pub(super) models: Vec<Model>,
    pub(super) budgets: Budgets,
    pub(super) plan: Option<Arc<Plan>>,
    pub(super) held: u64,
    pub(super) peak: u64,
    pub(super) order: Order,
    /// What the device has for weights and activations, as last seen.
    pub(super) ceiling: u64,
    /// The model whose pass began last.
    pub(super) running: Option<usize>,
    pub(super) counters: Counters,
}

/// What the pager itself did, on the thread that computes.
#[derive(Default)]
pub(super) struct Counters {
    /// Its time, without waiting for fetches.
    pub(super) host: Duration,
    /// Times that it waited for a block to be fetched.
    pub(super) waits: u64,
    /// Slots that were taken from the device.
    pub(super) taken: u64,
    /// Times that the plan changed between passes.
    pub(super) replans: u64,
    /// Times that a block ran again after memory was given back.
    pub(super) reruns: u64,
}

/// The time that the pager itself took for the visits of a block.
#[derive(Clone, Copy, Default)]
pub(super) struct HostTime {
    /// Of the visit that is under way.
    visit: Duration,
    least: Option<Duration>,
}

impl HostTime {
    /// What the visit's beginning took.
    pub(super) fn began(&mut self, took: Duration) {
        self.visit = took;
    }

    /// What its end took.
    pub(super) fn ended(&mut self, took: Duration) {
        let visit = self.visit + took;
        self.least = Some(self.least.map_or(visit, |least| least.min(visit)));
    }

    /// What a visit took at least, once there was one.
    pub(super) fn least(self) -> Option<Duration> {
        self.least
    }
}

pub(super) struct Model {
    pub(super) name: String,
    pub(super) disk: u64,
    /// Empty once the model was dropped.
    pub(super) blocks: Vec<NewBlock>,
    /// How many tensors of each block are its own; what follows them is attached.
    pub(super) own: Vec<usize>,
    pub(super) targets: Vec<BlockTarget>,
    /// As the plan has them; empty before.
    pub(super) slots: Vec<SlotState>,
    pub(super) slot_of: Vec<usize>,
    pub(super) held: u64,
    /// What all models may hold while this one runs.
    pub(super) allowed: u64,
    /// The most that activations took in each of its last two passes.
    peaks: [u64; 2],
    /// What its activations needed beyond that when memory ran out.
    extra: u64,
    pub(super) timing: Timing,
    /// What the pager took for each block's visits under this plan.
    pub(super) host: Vec<HostTime>,
    /// What passes are expected to cost until they were measured, as the caller says.
    pub(super) expected: Option<PassCosts>,
    /// The costs that its plan was made with.
    pub(super) planned: Option<PassCosts>,
    /// Passes in which costs may drift without a search, and how many there are after one in vain.
    pub(super) rest: u32,
    pub(super) patience: u32,
    pub(super) stats: Stats,
}

#[derive(Default)]
pub(super) struct Stats {
    pub(super) peak: u64,
    pub(super) read: u64,
    pub(super) visits: u64,
    pub(super) hits: u64,
    pub(super) streamed: u64,
    pub(super) copies: u64,
}

pub(super) struct SlotState {
    pub(super) capacity: u64,
    pub(super) occupancy: Occupancy,
    pub(super) memory: Option<Box<dyn Slot>>,
    pub(super) phase: Phase,
}

pub(super) enum Phase {
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

impl Model {
    pub(super) fn new(
        name: String,
        disk: u64,
        blocks: Vec<NewBlock>,
        targets: Vec<BlockTarget>,
    ) -> Self {
        Self {
            name,
            disk,
            own: blocks.iter().map(|b| b.tensors.len()).collect(),
            blocks,
            targets,
            slots: Vec::new(),
            slot_of: Vec::new(),
            held: 0,
            allowed: u64::MAX,
            peaks: [0; 2],
            extra: 0,
            timing: Timing::default(),
            host: Vec::new(),
            expected: None,
            planned: None,
            rest: 0,
            patience: 1,
            stats: Stats::default(),
        }
    }

    /// The bytes in slots of what is attached to its blocks.
    pub(super) fn attached(&self) -> u64 {
        let own = self.blocks.iter().zip(&self.own);
        own.flat_map(|(block, &own)| &block.image.tensors[own..])
            .map(|t| t.bytes().next_multiple_of(ALIGN))
            .sum()
    }

    pub(super) fn sizes(&self, device: &dyn Device) -> ModelSizes {
        let blocks = self.blocks.iter().map(|b| (b.image.name.clone(), b.image.bytes));
        let mut blocks: Vec<_> = blocks.collect();
        if blocks.is_empty() {
            blocks.push((String::new(), 0)); // a model that was dropped
        }
        let tensors = self.blocks.iter().flat_map(|b| &b.image.tensors);
        let expansion = tensors.map(|t| device.expansion(t).0).max().unwrap_or(0);
        ModelSizes { name: self.name.clone(), blocks, expansion }
    }

    /// What a pass costs: as measured, or else as expected.
    pub(super) fn costs(&self) -> Option<PassCosts> {
        let blocks = self.blocks.len().saturating_sub(1);
        self.timing.costs(blocks).or_else(|| self.expected.clone())
    }

    /// What the pager took for visits of a block.
    pub(super) fn host(&mut self, block: usize) -> &mut HostTime {
        if self.host.len() <= block {
            self.host.resize(self.blocks.len().max(block + 1), HostTime::default());
        }
        &mut self.host[block]
    }

    /// The slot in which a block lives.
    pub(super) fn slot_of(&mut self, block: usize) -> &mut SlotState {
        &mut self.slots[self.slot_of[block]]
    }

    /// Notes how long it took to bring what is in a slot.
    pub(super) fn look_at(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        let (Phase::Ready { block, .. } | Phase::Leased { block, .. }) = slot.phase else { return };
        if let Some(moved) = slot.memory.as_mut().and_then(|memory| memory.moved())
            && slot.occupancy == Occupancy::Turns
        {
            self.timing.moved(block, moved);
        }
    }

    /// A block was brought into a slot, in so many copies.
    pub(super) fn filled(&mut self, block: usize, copies: u64) {
        self.stats.copies += copies;
        if self.slots[self.slot_of[block]].occupancy == Occupancy::Turns {
            self.stats.streamed += self.blocks[block].image.bytes;
        }
    }

    /// A pass of it is over, in which activations took so much at most.
    pub(super) fn calibrate(&mut self, peak: u64) {
        // Where memory ran out, the peak is what there was, not what was needed.
        self.peaks = [peak.saturating_add(self.extra), self.peaks[0]];
        self.extra = 0;
    }

    /// What is kept for its activations, of `ceiling` for everything.
    fn reserve(&self, ceiling: u64) -> u64 {
        match self.peaks {
            [0, 0] => ceiling / GUESS,
            [a, b] => a.max(b) + a.max(b) / 50 + SPARE,
        }
        .saturating_add(self.extra)
    }

    /// Slots of a new plan, with what of the old ones can stay in them; gives back the rest and says how
    /// much that is.
    pub(super) fn adopt(&mut self, plan: &ModelPlan) -> u64 {
        let before = self.held;
        self.host.clear();
        for slot in 0..self.slots.len() {
            self.look_at(slot);
            if let Some(memory) = &mut self.slots[slot].memory {
                memory.unbind_all();
            }
        }
        let mut old = std::mem::take(&mut self.slots);
        let old_slot_of = std::mem::replace(&mut self.slot_of, plan.slot_of.clone());
        let empty = |slot: &SlotPlan| SlotState {
            capacity: slot.capacity.0,
            occupancy: if slot.turns { Occupancy::Turns } else { Occupancy::Alone },
            memory: None,
            phase: Phase::Empty,
        };
        self.slots = plan.slots.iter().map(empty).collect();
        // A slot goes on as one of the same kind and size: a resident block's as that block's own, another
        // as any.
        for (block, &from) in old_slot_of.iter().enumerate() {
            let to = self.slots.get_mut(self.slot_of.get(block).copied().unwrap_or(usize::MAX));
            if let (Some(to), Some(from)) = (to, old.get_mut(from))
                && (to.occupancy, to.capacity) == (from.occupancy, from.capacity)
                && to.occupancy == Occupancy::Alone
            {
                (to.memory, to.phase) =
                    (from.memory.take(), std::mem::replace(&mut from.phase, Phase::Empty));
            }
        }
        let turns = |s: &SlotState| s.occupancy == Occupancy::Turns;
        for (at, to) in self.slots.iter_mut().enumerate().filter(|(_, s)| turns(s)) {
            let same =
                |s: &&mut SlotState| turns(s) && s.memory.is_some() && s.capacity == to.capacity;
            if let Some(from) = old.iter_mut().find(same) {
                to.memory = from.memory.take();
                match from.phase {
                    Phase::Ready { block, used } if self.slot_of.get(block) == Some(&at) => {
                        to.phase = Phase::Ready { block, used };
                    }
                    _ => {}
                }
            }
        }
        drop(old);
        let held = self.slots.iter().filter(|s| s.memory.is_some()).map(|s| s.capacity);
        self.held = held.sum();
        // What stays on the device needs no locked memory.
        for (block, &slot) in self.blocks.iter().zip(&self.slot_of) {
            if self.slots[slot].occupancy == Occupancy::Alone {
                block.image.kept.clear();
            }
        }
        before - self.held
    }
}

impl State {
    pub(super) fn new(budgets: Budgets) -> Self {
        Self {
            models: Vec::new(),
            budgets,
            plan: None,
            held: 0,
            peak: 0,
            order: Order::default(),
            ceiling: u64::MAX,
            running: None,
            counters: Counters::default(),
        }
    }

    pub(super) fn make_plan(&mut self, budgets: &Budgets, device: &dyn Device) -> Result<Plan> {
        self.ceiling = device.ceiling()?.0;
        let sizes: Vec<ModelSizes> = self.models.iter().map(|m| m.sizes(device)).collect();
        let around = |(model, sizes): (&Model, &ModelSizes)| Surroundings {
            ceiling: ceiling_for(model, self.ceiling, sizes.minimum()),
            costs: model.costs(),
        };
        let surroundings: Vec<_> = self.models.iter().zip(&sizes).map(around).collect();
        Plan::make(&sizes, budgets, &surroundings, || device.available())
    }

    /// What `model` may hold, and all together while it runs, now that the ceiling is what it is.
    pub(super) fn limits(&self, model: usize, minimum: u64) -> (u64, u64) {
        let Some(plan) = &self.plan else { return (u64::MAX, u64::MAX) };
        let total = plan.budget.0.min(ceiling_for(&self.models[model], self.ceiling, minimum));
        (plan.models[model].asked.0.min(total), total)
    }

    pub(super) fn name(&self, at: At) -> String {
        self.models[at.model].blocks[at.block].image.name.clone()
    }

    pub(super) fn slot_mut(&mut self, at: At) -> &mut SlotState {
        self.models[at.model].slot_of(at.block)
    }

    /// Whether the block has been there since an earlier visit.
    pub(super) fn stays(&mut self, at: At) -> bool {
        let slot = self.slot_mut(at);
        let used = matches!(slot.phase, Phase::Ready { block, used: true } if block == at.block);
        used && slot.occupancy == Occupancy::Alone
    }

    /// What must be taken before the block can be fetched.
    pub(super) fn missing(&mut self, at: At) -> u64 {
        let slot = self.slot_mut(at);
        if slot.memory.is_some() { 0 } else { slot.capacity }
    }

    /// Whether what lies in a slot of the running model was visited in this pass already.
    pub(super) fn is_past(&self, now: At, slot: usize) -> bool {
        match self.models[now.model].slots[slot].phase {
            Phase::Ready { block, .. } => block != 0 && block <= now.block,
            _ => true,
        }
    }

    /// The block that comes `ahead` blocks after the one behind `now`, as far as that is known.
    pub(super) fn upcoming(&self, now: At, ahead: usize) -> Option<At> {
        let rest = self.models[now.model].blocks.len() - now.block - 1;
        if ahead < rest {
            return Some(At { block: now.block + 1 + ahead, ..now });
        }
        let model = self.order.next()?;
        let blocks = self.models[model].slot_of.len();
        let until = if model == now.model { now.block } else { blocks };
        let block = ahead - rest;
        (block < until).then_some(At { model, block })
    }

    /// Gives back idle slots that `may` allows until `wanted` more bytes fit beside what `model` may hold;
    /// nothing if they never will. First what costs least to bring back: models that run seldom, late
    /// blocks.
    pub(super) fn make_room(
        &mut self,
        model: usize,
        wanted: u64,
        may: impl Fn(&State, usize, usize) -> bool,
    ) -> bool {
        let allowed = self.models[model].allowed;
        let free = allowed.saturating_sub(self.held);
        if wanted <= free {
            return true;
        }
        let idle = self.idle(may);
        if free + idle.iter().map(|i| i.bytes).sum::<u64>() < wanted {
            return false;
        }
        for Idle { model, slot, .. } in idle {
            if wanted <= allowed.saturating_sub(self.held) {
                break;
            }
            self.give_back(model, slot);
        }
        true
    }

    /// Gives back what is idle and cheap until no more than `target` is held, if there is that much. The
    /// slots that blocks of `model` take turns in stay.
    pub(super) fn shrink(&mut self, model: usize, target: u64) {
        if self.held <= target {
            return;
        }
        let may = |state: &State, m: usize, s: usize| {
            m != model || (s != 0 && state.models[m].slots[s].occupancy == Occupancy::Alone)
        };
        for Idle { model, slot, .. } in self.idle(may) {
            if self.held <= target {
                break;
            }
            self.give_back(model, slot);
        }
    }

    /// Slots that nobody uses, cheapest first.
    fn idle(&self, may: impl Fn(&State, usize, usize) -> bool) -> Vec<Idle> {
        let mut idle = Vec::new();
        for (m, model) in self.models.iter().enumerate() {
            for (s, slot) in model.slots.iter().enumerate() {
                if slot.memory.is_some()
                    && !matches!(slot.phase, Phase::Leased { .. })
                    && may(self, m, s)
                {
                    let passes = self.order.passes(m);
                    idle.push(Idle {
                        passes,
                        late: Reverse(s),
                        model: m,
                        slot: s,
                        bytes: slot.capacity,
                    });
                }
            }
        }
        idle.sort_unstable();
        idle
    }

    /// Makes memory lockable for a block of `model` that streams: blocks of models that run less often are
    /// worth less there.
    pub(super) fn make_lockable(&self, model: usize, wanted: u64, device: &dyn Device) {
        let passes = self.order.passes(model);
        for (m, other) in self.models.iter().enumerate() {
            if self.order.passes(m) >= passes {
                continue;
            }
            for block in &other.blocks {
                if device.lockable().0 >= wanted {
                    return;
                }
                block.image.kept.clear();
            }
        }
    }

    pub(super) fn give_back(&mut self, model: usize, slot: usize) {
        let m = &mut self.models[model];
        m.look_at(slot);
        let s = &mut m.slots[slot];
        if s.memory.take().is_some() {
            m.held -= s.capacity;
            self.held -= s.capacity;
        }
        s.phase = Phase::Empty;
    }

    pub(super) fn release_all(&mut self, model: usize) {
        for slot in 0..self.models[model].slots.len() {
            self.give_back(model, slot);
        }
    }

    /// Computing got far slower than it is, and the device takes memory from elsewhere rather than fail: leaves
    /// more of it to activations in the pass that begins.
    pub(super) fn ease(&mut self, model: usize, device: &dyn Device) {
        if self.models[model].timing.take_slow() && device.spills() {
            let m = &mut self.models[model];
            m.extra = m.extra.saturating_add((m.reserve(self.ceiling) / 4).max(STEP));
        }
    }

    /// Others want `short` bytes: gives back as much, and keeps to that. `false` if nothing could be given.
    pub(super) fn relent(&mut self, model: usize, short: u64, device: &dyn Device) -> bool {
        let before = self.held;
        self.shrink(model, before.saturating_sub(short));
        // Never below what the model needs to run at all.
        let least = self.models[model].sizes(device).minimum();
        let m = &mut self.models[model];
        m.allowed = m.allowed.min(self.held.max(least));
        self.ceiling = self.ceiling.saturating_sub(short);
        self.held < before
    }

    /// Memory ran out inside a block of `model`: leaves more of it to activations. `false` if there is
    /// nothing left to give.
    pub(super) fn leave_more(&mut self, model: usize, device: &dyn Device) -> Result<bool> {
        device.trim();
        let minimum = self.models[model].sizes(device).minimum();
        let m = &mut self.models[model];
        let step = (m.reserve(self.ceiling) / 4).max(STEP);
        let before = m.allowed;
        // From what is held, which early in a pass is less than what may be.
        let least = before.min(self.held.max(minimum));
        m.extra = m.extra.saturating_add(step);
        m.allowed = before.min(least.saturating_sub(step).max(minimum));
        let (allowed, held) = (m.allowed, self.held);
        self.shrink(model, allowed);
        device.share(crate::Bytes(allowed))?;
        Ok(allowed < before || self.held < held)
    }
}

/// A slot that may be given back, ordered by what that costs.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Idle {
    passes: usize,
    late: Reverse<usize>,
    model: usize,
    slot: usize,
    bytes: u64,
}

/// What weights may take of `ceiling` while `model` runs. A guess at its activations gives way to the least
/// that the model needs.
fn ceiling_for(model: &Model, ceiling: u64, minimum: u64) -> u64 {
    match ceiling {
        u64::MAX => u64::MAX,
        _ => ceiling.saturating_sub(model.reserve(ceiling)).max(minimum.min(ceiling)),
    }
}
