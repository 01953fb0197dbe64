//! What happens between passes: the plan follows what was measured and the memory that is there, and a new
//! one takes over what the old one left in its slots.

use std::sync::Arc;

use super::{
    At, Pager,
    state::{Phase, SlotState, State},
};
use crate::{Bytes, Error, Plan, Result, plan::ModelPlan, sync::MutexGuard};

/// A plan is remade when costs have changed by more than this share, ...
const DRIFT: f64 = 0.1;
/// ... and adopted when it saves more than this one.
const WORTH: f64 = 0.01;
/// Passes between two searches, at most, where they find nothing.
const PATIENCE: u32 = 64;

impl Pager {
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
        state.ease(model, device);
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
        let costs = if streams { state.models[at].costs() } else { None };
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
        // Another thread may have planned anew meanwhile, or leased a block.
        let same = state.plan.as_ref().is_some_and(|now| Arc::ptr_eq(now, &plan));
        if !same || state.models[at].slots.iter().any(leased) {
            return Ok(());
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

    /// Waits until nothing is being fetched. Others may have the lock meanwhile, so what a plan is made of is
    /// looked at only afterwards.
    ///
    /// # Errors
    /// Leases that are out.
    pub(super) fn settle(&self, state: &mut MutexGuard<'_, State>) -> Result<()> {
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
}

impl State {
    /// Follows a plan that was made since the pager settled: the lock was held all the time, so it has every
    /// model, and the slots that it takes over are neither leased nor being filled.
    pub(super) fn adopt(&mut self, plan: Plan) -> Arc<Plan> {
        for (at, plan) in plan.models.iter().enumerate() {
            let m = &mut self.models[at];
            let freed = m.adopt(plan);
            m.allowed = plan.total.0;
            m.planned = m.costs();
            self.held -= freed;
        }
        // What fits one model need not fit beside another.
        let allowed = self.models.iter().map(|m| m.allowed).max().unwrap_or(0);
        if let Some(model) = self.running.or(Some(0)).filter(|&m| m < self.models.len()) {
            self.shrink(model, allowed);
        }
        let plan = Arc::new(plan);
        self.plan = Some(plan.clone());
        plan
    }
}
