//! The plan: which blocks stay, which stream, through how many slots, within which budget.
//!
//! Made from block sizes before anything is read, later from what blocks and copies were seen to cost
//! ([`crate::schedule`]), and changes no number of the result. Each
//! model is planned as if it had the whole budget while it runs: what other models still hold is
//! given back when the room is needed.

use std::{fmt, str::FromStr};

use crate::{
    Bytes, Error, Result,
    schedule::{Choice, PassCosts},
};

/// A limit on weights that are on the device at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// The smallest that works: the largest stem and block of one model.
    Min,
    /// No limit: every block stays once it was read.
    Unlimited,
    /// Unlimited if that fits what the device has for weights (half of the free RAM, or the VRAM that is
    /// free but for a margin and activations), else the most that does.
    Auto,
    /// So many bytes.
    Bytes(Bytes),
    /// So many bytes, or the smallest that works if that is more; the plan says where it was raised.
    /// For presets, which know no model; what a user asks for is refused instead.
    AtLeastMin(Bytes),
    /// A share, in percent, of all weights as they lie in slots.
    Percent(f64),
}

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::BudgetSyntax(text.to_string());
        match text.trim().to_ascii_lowercase().as_str() {
            "min" => Ok(Budget::Min),
            "unlimited" => Ok(Budget::Unlimited),
            "auto" => Ok(Budget::Auto),
            other => match other.strip_suffix('%') {
                Some(share) => match share.trim().parse::<f64>() {
                    Ok(share) if share > 0. && share.is_finite() => Ok(Budget::Percent(share)),
                    _ => Err(bad()),
                },
                None => Bytes::parse(other).map(Budget::Bytes).ok_or_else(bad),
            },
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Min => f.pad("min"),
            Budget::Unlimited => f.pad("unlimited"),
            Budget::Auto => f.pad("auto"),
            Budget::Bytes(bytes) => bytes.fmt(f),
            Budget::AtLeastMin(bytes) => f.pad(&format!("{bytes} or min")),
            Budget::Percent(share) => f.pad(&format!("{share}%")),
        }
    }
}

/// The limits of a pager: one over all models, and caps of single models beside it.
#[derive(Clone, Debug)]
pub struct Budgets {
    /// Over all models together.
    pub total: Budget,
    /// For the named models alone.
    pub models: Vec<(String, Budget)>,
}

impl From<Budget> for Budgets {
    fn from(total: Budget) -> Self {
        Self { total, models: Vec::new() }
    }
}

/// What the planner knows of a model: sizes in a slot, the stem first.
#[derive(Clone, Debug)]
pub(crate) struct ModelSizes {
    pub(crate) name: String,
    /// `(name, bytes)`; index 0 is the stem, which is leased throughout a pass.
    pub(crate) blocks: Vec<(String, u64)>,
    /// What the largest of its weights takes beside itself while it is expanded.
    pub(crate) expansion: u64,
}

impl ModelSizes {
    /// The sizes of its blocks, the stem not among them.
    pub(crate) fn bytes(&self) -> Vec<u64> {
        self.blocks[1..].iter().map(|b| b.1).collect()
    }

    /// What a limit leaves for blocks.
    pub(crate) fn room(&self, limit: u64) -> u64 {
        limit.saturating_sub(self.stem()).saturating_sub(self.expansion)
    }

    fn stem(&self) -> u64 {
        self.blocks[0].1
    }

    fn total(&self) -> u64 {
        self.blocks.iter().map(|b| b.1).sum()
    }

    fn largest(&self) -> (&str, u64) {
        let largest = self.blocks[1..].iter().max_by_key(|b| b.1);
        largest.map_or(("none", 0), |b| (&b.0, b.1))
    }

    pub(crate) fn minimum(&self) -> u64 {
        self.stem() + self.expansion + self.largest().1
    }
}

/// What is known of the device when a model is planned.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings {
    /// What it has for weights while the model runs.
    pub(crate) ceiling: u64,
    /// What the model's passes cost, if that was measured.
    pub(crate) costs: Option<PassCosts>,
}

/// A region for one block at a time, or for one block for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotPlan {
    /// Its size.
    pub capacity: Bytes,
    /// How many blocks live in it.
    pub blocks: usize,
    /// Whether blocks take turns in it; else it is one block's for good.
    pub turns: bool,
}

/// The plan of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPlan {
    /// The model's name.
    pub name: String,
    /// All its weights as they lie in slots.
    pub bytes: Bytes,
    /// What it may hold.
    pub limit: Bytes,
    /// What the budgets alone would let it hold.
    pub asked: Bytes,
    /// What all models together may hold while it runs; `u64::MAX` if there is no limit.
    pub total: Bytes,
    /// The budget that was too small for this model and was raised ([`Budget::AtLeastMin`]).
    pub raised: Option<Bytes>,
    /// The least that it can run in.
    pub(crate) least: Bytes,
    /// Of its limit, what is left for expanding one weight at a time.
    pub expansion: Bytes,
    /// Slot 0 is the stem's.
    pub slots: Vec<SlotPlan>,
    /// The slot of each block, the stem first. A block always comes to the same slot.
    pub slot_of: Vec<usize>,
}

impl ModelPlan {
    /// What the model holds when all its slots are taken and a weight is expanded.
    pub fn held(&self) -> Bytes {
        Bytes(self.slots.iter().map(|s| s.capacity.0).sum::<u64>() + self.expansion.0)
    }

    /// The least that it can run in.
    pub(crate) fn minimum(&self) -> Bytes {
        self.least
    }

    /// Blocks with a slot of their own, the stem not counted.
    pub fn residents(&self) -> usize {
        self.slot_of[1..].iter().filter(|&&slot| !self.slots[slot].turns).count()
    }

    /// Slots in which blocks take turns.
    pub fn streaming_slots(&self) -> usize {
        self.slots.iter().filter(|s| s.turns).count()
    }

    /// Blocks that stream, as [`Choice`] has them.
    pub(crate) fn choice(&self) -> Choice {
        let streams = self.slot_of[1..].iter().map(|&slot| self.slots[slot].turns).collect();
        Choice { streams, turns: self.slots.iter().filter(|s| s.turns).count() }
    }

    /// The plan of a model within `limit` bytes: by the schedule if its costs are known, else with what
    /// stays spread evenly.
    pub(crate) fn make(sizes: &ModelSizes, limit: u64, costs: Option<&PassCosts>) -> Self {
        let blocks = sizes.bytes();
        let room = sizes.room(limit);
        let choice = match costs {
            Some(costs) => Choice::search(&blocks, room, costs, 1),
            None => Choice::spread(&blocks, room),
        };
        let own = |bytes: u64| SlotPlan { capacity: Bytes(bytes), blocks: 1, turns: false };
        let mut slots = vec![own(sizes.stem())];
        let mut slot_of = vec![0; blocks.len() + 1];
        let ring = slots.len();
        for (slot, capacity) in choice.slots(&blocks).into_iter().enumerate() {
            let blocks = choice.streamed().saturating_sub(slot).div_ceil(choice.turns);
            slots.push(SlotPlan { capacity: Bytes(capacity), blocks, turns: true });
        }
        let mut turn = 0;
        for (block, &bytes) in blocks.iter().enumerate() {
            slot_of[block + 1] = if choice.streams[block] {
                turn += 1;
                ring + (turn - 1) % choice.turns
            } else {
                slots.push(own(bytes));
                slots.len() - 1
            };
        }
        Self {
            name: sizes.name.clone(),
            bytes: Bytes(sizes.total()),
            limit: Bytes(limit),
            asked: Bytes(limit),
            total: Bytes(limit),
            raised: None,
            least: Bytes(sizes.minimum()),
            expansion: Bytes(sizes.expansion),
            slots,
            slot_of,
        }
    }
}

/// What is kept and what streams, for all models of a pager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The limit over all models, in bytes; `u64::MAX` if there is none.
    pub budget: Bytes,
    /// All weights of all models as they lie in slots.
    pub weights: Bytes,
    /// The smallest budget that would work.
    pub minimum: Bytes,
    /// In the order in which models were added.
    pub models: Vec<ModelPlan>,
}

impl Plan {
    /// Plans `models` within `budgets`, and each within what the device has for weights while it runs;
    /// `available` is asked only if the budget depends on it.
    pub(crate) fn make(
        models: &[ModelSizes],
        budgets: &Budgets,
        surroundings: &[Surroundings],
        available: impl FnOnce() -> Result<Bytes>,
    ) -> Result<Self> {
        let weights: u64 = models.iter().map(ModelSizes::total).sum();
        let minimum = models.iter().map(ModelSizes::minimum).max().unwrap_or(0);
        let share = |of: u64, percent: f64| (of as f64 * percent / 100.) as u64;
        let budget = match budgets.total {
            Budget::Min => minimum,
            Budget::Unlimited => u64::MAX,
            Budget::Bytes(bytes) => bytes.0,
            Budget::AtLeastMin(bytes) => bytes.0.max(minimum),
            Budget::Percent(percent) => share(weights, percent),
            Budget::Auto => {
                let bytes = available()?.0;
                if weights <= bytes { u64::MAX } else { bytes.max(minimum) }
            }
        };
        let mut plans = Vec::with_capacity(models.len());
        for (at, model) in models.iter().enumerate() {
            let around = surroundings.get(at);
            let total = budget.min(around.map_or(u64::MAX, |a| a.ceiling));
            let mut asked = budget;
            for (_, cap) in budgets.models.iter().filter(|(name, _)| *name == model.name) {
                asked = asked.min(match cap {
                    Budget::Min => model.minimum(),
                    Budget::Unlimited | Budget::Auto => u64::MAX,
                    Budget::Bytes(bytes) => bytes.0,
                    Budget::AtLeastMin(bytes) => bytes.0.max(model.minimum()),
                    Budget::Percent(percent) => share(model.total(), *percent),
                });
            }
            let limit = asked.min(total);
            if limit < model.minimum() {
                let (block, largest) = model.largest();
                return Err(Error::BudgetTooSmall {
                    budget: Bytes(limit),
                    model: model.name.clone(),
                    needed: Bytes(model.minimum()),
                    stem: Bytes(model.stem()),
                    block: block.to_string(),
                    largest: Bytes(largest),
                    minimum: Bytes(minimum),
                });
            }
            let own = budgets.models.iter().filter(|(name, _)| *name == model.name);
            let given = own.map(|(_, cap)| cap).chain([&budgets.total]);
            let raised = given.filter_map(|budget| match budget {
                Budget::AtLeastMin(bytes) if bytes.0 < model.minimum() => Some(*bytes),
                _ => None,
            });
            let raised = raised.min();
            let costs = around.and_then(|a| a.costs.as_ref());
            let plan = ModelPlan::make(model, limit, costs);
            plans.push(ModelPlan { raised, asked: Bytes(asked), total: Bytes(total), ..plan });
        }
        let bytes = |n| Bytes(n);
        Ok(Self {
            budget: bytes(budget),
            weights: bytes(weights),
            minimum: bytes(minimum),
            models: plans,
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.budget.0 {
            u64::MAX => write!(f, "plan: no budget, weights {}", self.weights)?,
            _ => write!(f, "plan: budget {} of {} of weights", self.budget, self.weights)?,
        }
        for m in &self.models {
            let blocks = m.slot_of.len() - 1;
            let stem = m.slots[0].capacity;
            write!(f, "\n  {:<18}{:>10}: stem {stem}", m.name, m.bytes.to_string())?;
            let streamed = blocks - m.residents();
            if blocks > 0 {
                write!(f, ", {} of {blocks} blocks resident", m.residents())?;
            }
            if streamed > 0 {
                let slots = m.streaming_slots();
                write!(
                    f,
                    ", {streamed} stream through {slots} slot{}",
                    if slots == 1 { "" } else { "s" }
                )?;
            }
            write!(f, ", holds {}", m.held())?;
            if let Some(asked) = m.raised {
                write!(f, " (its budget of {asked} is too small and was raised to {})", m.limit)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model(name: &str, stem: u64, blocks: &[u64]) -> ModelSizes {
        let named = blocks.iter().enumerate().map(|(i, &b)| (format!("{name}.{i}"), b));
        ModelSizes {
            name: name.into(),
            blocks: std::iter::once(("stem".into(), stem)).chain(named).collect(),
            expansion: 0,
        }
    }

    fn none() -> Result<Bytes> {
        Ok(Bytes(0))
    }

    #[test]
    fn a_budget_below_the_minimum_names_the_smallest_that_works() {
        let models = [model("a", 10, &[5, 7]), model("b", 40, &[])];
        let plan = |total| Plan::make(&models, &Budget::Bytes(Bytes(total)).into(), &[], none);
        let error = plan(39).unwrap_err().to_string();
        assert!(error.contains("`b`") && error.contains("works for all models is 40 B"), "{error}");
        assert!(plan(40).is_ok());
        assert_eq!(Plan::make(&models, &Budget::Min.into(), &[], none).unwrap().budget, Bytes(40));
    }

    #[test]
    fn a_cap_of_one_model_stands_beside_the_budget() {
        let models = [model("a", 10, &[5, 7, 5]), model("b", 1, &[3, 3])];
        let budgets = Budgets { total: Budget::Unlimited, models: vec![("a".into(), Budget::Min)] };
        let plan = Plan::make(&models, &budgets, &[], none).unwrap();
        assert_eq!(plan.models[0].held(), Bytes(17));
        assert_eq!(plan.models[1].residents(), 2);
        let budgets = Budgets {
            total: Budget::Unlimited,
            models: vec![("b".into(), Budget::Bytes(Bytes(3)))],
        };
        assert!(Plan::make(&models, &budgets, &[], none).is_err());
    }

    #[test]
    fn a_budget_of_at_least_the_minimum_is_raised_and_says_so() {
        let models = [model("a", 10, &[5, 7, 5]), model("b", 1, &[3, 3])];
        let cap = |total, bytes| {
            let caps = vec![("a".to_string(), Budget::AtLeastMin(Bytes(bytes)))];
            Plan::make(&models, &Budgets { total, models: caps }, &[], none)
        };
        let plan = cap(Budget::Unlimited, 12).unwrap();
        assert_eq!((plan.models[0].limit, plan.models[0].raised), (Bytes(17), Some(Bytes(12))));
        assert_eq!(plan.models[1].raised, None);
        let said = plan.to_string();
        assert!(said.contains("its budget of 12 B is too small and was raised to 17 B"), "{said}");
        let plan = cap(Budget::Unlimited, 20).unwrap();
        assert_eq!((plan.models[0].limit, plan.models[0].raised), (Bytes(20), None));
        // It lifts itself, not the budget of all.
        assert!(cap(Budget::Bytes(Bytes(16)), 12).is_err());

        let plan = Plan::make(&models, &Budget::AtLeastMin(Bytes(12)).into(), &[], none).unwrap();
        assert_eq!((plan.budget, plan.models[0].raised), (Bytes(17), Some(Bytes(12))));
        assert_eq!(plan.models[1].raised, None, "12 B are enough for it");
    }

    #[test]
    fn auto_takes_what_is_available() {
        let models = [model("a", 0, &[50, 50])];
        let plan =
            |available| Plan::make(&models, &Budget::Auto.into(), &[], || Ok(Bytes(available)));
        assert_eq!(plan(100).unwrap().budget, Bytes(u64::MAX));
        assert_eq!(plan(75).unwrap().budget, Bytes(75));
        assert_eq!(plan(20).unwrap().budget, Bytes(50)); // the least that works at all
    }

    #[test]
    fn what_the_device_has_bounds_each_model() {
        let models = [model("a", 10, &[5, 7, 5]), model("b", 1, &[3, 3])];
        let around = |ceiling| Surroundings { ceiling, costs: None };
        let plan =
            |a, b| Plan::make(&models, &Budget::Unlimited.into(), &[around(a), around(b)], none);
        let both = plan(22, 100).unwrap();
        assert_eq!((both.models[0].streaming_slots(), both.models[1].residents()), (2, 2));
        assert_eq!(both.models[0].total, Bytes(22));
        assert!(plan(16, 100).is_err());
    }

    #[test]
    fn room_for_one_expanded_weight_is_left() {
        let sizes = ModelSizes { expansion: 4, ..model("a", 10, &[5, 5, 5]) };
        let plan = |limit| {
            let models = std::slice::from_ref(&sizes);
            Plan::make(models, &Budget::Bytes(Bytes(limit)).into(), &[], none)
        };
        assert!(plan(18).is_err());
        let least = plan(19).unwrap();
        assert_eq!((least.models[0].held(), least.models[0].residents()), (Bytes(19), 0));
        assert_eq!(plan(29).unwrap().models[0].residents(), 3);
    }

    #[test]
    fn budgets_are_read_from_text() {
        for (text, budget) in [
            ("min", Budget::Min),
            ("Unlimited", Budget::Unlimited),
            ("25%", Budget::Percent(25.)),
            ("6MB", Budget::Bytes(Bytes(6_000_000))),
        ] {
            assert_eq!(text.parse::<Budget>().unwrap(), budget);
        }
        for text in ["", "%", "-3%", "nan%", "lots", "6 XB"] {
            assert!(text.parse::<Budget>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn plans_keep_their_budget_and_stream_no_more_than_they_must(
            stem in 0u64..50,
            blocks in prop::collection::vec(1u64..100, 1..40),
            extra in 0u64..4000,
        ) {
            let sizes = model("m", stem, &blocks);
            let budget = sizes.minimum() + extra;
            let plan = Plan::make(std::slice::from_ref(&sizes), &Budget::Bytes(Bytes(budget)).into(), &[], none).unwrap();
            let m = &plan.models[0];
            prop_assert!(m.held().0 <= budget);
            for (block, &slot) in m.slot_of.iter().enumerate() {
                prop_assert!(m.slots[slot].capacity.0 >= sizes.blocks[block].1);
            }
            let streamed: Vec<u64> = (m.slot_of.iter().zip(&sizes.blocks))
                .filter(|(slot, _)| m.slots[**slot].turns)
                .map(|(_, block)| block.1)
                .collect();
            let largest = *blocks.iter().max().unwrap();
            if stem + blocks.iter().sum::<u64>() <= budget {
                prop_assert!(streamed.is_empty());
            } else if let Some(smallest) = streamed.iter().min() {
                // What is left unused is too small for any block that streams.
                let bound = (sizes.total() + 2 * largest + stem + smallest).saturating_sub(budget);
                prop_assert!(streamed.iter().sum::<u64>() <= bound);
            }
        }
    }
}
