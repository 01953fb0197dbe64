//! The plan: which blocks stay, which stream, through how many slots, within which budget.
//!
//! Made from block sizes alone, before anything is read, and changes no number of the result. Each
//! model is planned as if it had the whole budget while it runs: what other models still hold is
//! given back when the room is needed.

use std::{fmt, str::FromStr};

use crate::{Bytes, Error, Result};

/// A limit on weights that are on the device at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// The smallest that works: the largest stem and block of one model.
    Min,
    /// No limit: every block stays once it was read.
    Unlimited,
    /// Unlimited if that fits half of the memory that is available now, else the most that does.
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
}

impl ModelSizes {
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

    fn minimum(&self) -> u64 {
        self.stem() + self.largest().1
    }
}

/// A region for one block at a time, or for one block for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotPlan {
    /// Its size.
    pub capacity: Bytes,
    /// How many blocks take turns in it.
    pub blocks: usize,
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
    /// The budget that was too small for this model and was raised ([`Budget::AtLeastMin`]).
    pub raised: Option<Bytes>,
    /// Slot 0 is the stem's.
    pub slots: Vec<SlotPlan>,
    /// The slot of each block, the stem first. A block always comes to the same slot.
    pub slot_of: Vec<usize>,
}

impl ModelPlan {
    /// What the model holds when all its slots are taken.
    pub fn held(&self) -> Bytes {
        Bytes(self.slots.iter().map(|s| s.capacity.0).sum())
    }

    /// Blocks with a slot of their own, the stem not counted.
    pub fn residents(&self) -> usize {
        self.slot_of[1..].iter().filter(|&&slot| self.slots[slot].blocks == 1).count()
    }

    /// Slots in which blocks take turns.
    pub fn streaming_slots(&self) -> usize {
        self.slots.iter().filter(|s| s.blocks > 1).count()
    }

    fn make(sizes: &ModelSizes, limit: u64) -> Self {
        let blocks: Vec<u64> = sizes.blocks[1..].iter().map(|b| b.1).collect();
        let room = limit.saturating_sub(sizes.stem());
        let streamed = choose_streamed(&blocks, room);
        // Two slots let a block arrive while the one before it computes.
        let two: u64 = slot_sizes(&blocks, &streamed, 2).iter().sum();
        let kept: u64 =
            (0..blocks.len()).filter(|b| !streamed.contains(b)).map(|b| blocks[b]).sum();
        let turns = if streamed.len() > 1 && two + kept <= room { 2 } else { 1 };

        let own = |bytes: u64| SlotPlan { capacity: Bytes(bytes), blocks: 1 };
        let mut slots = vec![own(sizes.stem())];
        let mut slot_of = vec![0; blocks.len() + 1];
        let ring = slots.len();
        if !streamed.is_empty() {
            for (slot, capacity) in slot_sizes(&blocks, &streamed, turns).into_iter().enumerate() {
                let blocks = streamed.iter().skip(slot).step_by(turns).count();
                slots.push(SlotPlan { capacity: Bytes(capacity), blocks });
            }
        }
        let mut turn = 0;
        for (block, &bytes) in blocks.iter().enumerate() {
            slot_of[block + 1] = if streamed.contains(&block) {
                turn += 1;
                ring + (turn - 1) % turns
            } else {
                slots.push(own(bytes));
                slots.len() - 1
            };
        }
        let (name, bytes) = (sizes.name.clone(), Bytes(sizes.total()));
        Self { name, bytes, limit: Bytes(limit), raised: None, slots, slot_of }
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
    /// Plans `models` within `budgets`; `available` is asked only if the budget depends on it.
    pub(crate) fn make(
        models: &[ModelSizes],
        budgets: &Budgets,
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
                let half = available()?.0 / 2;
                if weights <= half { u64::MAX } else { half.max(minimum) }
            }
        };
        let mut plans = Vec::with_capacity(models.len());
        for model in models {
            let mut limit = budget;
            for (_, cap) in budgets.models.iter().filter(|(name, _)| *name == model.name) {
                limit = limit.min(match cap {
                    Budget::Min => model.minimum(),
                    Budget::Unlimited | Budget::Auto => u64::MAX,
                    Budget::Bytes(bytes) => bytes.0,
                    Budget::AtLeastMin(bytes) => bytes.0.max(model.minimum()),
                    Budget::Percent(percent) => share(model.total(), *percent),
                });
            }
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
            let asked = own.map(|(_, cap)| cap).chain([&budgets.total]);
            let raised = asked.filter_map(|budget| match budget {
                Budget::AtLeastMin(bytes) if bytes.0 < model.minimum() => Some(*bytes),
                _ => None,
            });
            let raised = raised.min();
            plans.push(ModelPlan { raised, ..ModelPlan::make(model, limit) });
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

/// The blocks that stream when `room` bytes are there for all of them: none if all fit; else as many
/// as must, spread evenly over the pass, so that compute and copies alternate.
fn choose_streamed(blocks: &[u64], room: u64) -> Vec<usize> {
    let total: u64 = blocks.iter().sum();
    if total <= room {
        return Vec::new();
    }
    let largest = blocks.iter().copied().max().unwrap_or(0);
    let ring = if room >= 2 * largest { 2 * largest } else { largest };
    let share = room.saturating_sub(ring);
    let mut resident = vec![false; blocks.len()];
    let (mut kept, mut owed) = (0, 0f64);
    for (at, &bytes) in blocks.iter().enumerate() {
        owed += bytes as f64 * share as f64 / total as f64;
        if owed >= bytes as f64 && kept + bytes <= share {
            resident[at] = true;
            kept += bytes;
            owed -= bytes as f64;
        }
    }
    // What is left over takes whatever still fits, the largest first.
    let mut rest: Vec<usize> = (0..blocks.len()).filter(|&b| !resident[b]).collect();
    rest.sort_by_key(|&b| std::cmp::Reverse(blocks[b]));
    for b in rest {
        if kept + blocks[b] <= share {
            resident[b] = true;
            kept += blocks[b];
        }
    }
    (0..blocks.len()).filter(|&b| !resident[b]).collect()
}

/// The sizes of `turns` slots through which `streamed` pass in turn.
fn slot_sizes(blocks: &[u64], streamed: &[usize], turns: usize) -> Vec<u64> {
    let mut sizes = vec![0; turns];
    for (turn, &block) in streamed.iter().enumerate() {
        sizes[turn % turns] = sizes[turn % turns].max(blocks[block]);
    }
    sizes
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
        }
    }

    fn none() -> Result<Bytes> {
        Ok(Bytes(0))
    }

    #[test]
    fn a_budget_below_the_minimum_names_the_smallest_that_works() {
        let models = [model("a", 10, &[5, 7]), model("b", 40, &[])];
        let plan = |total| Plan::make(&models, &Budget::Bytes(Bytes(total)).into(), none);
        let error = plan(39).unwrap_err().to_string();
        assert!(error.contains("`b`") && error.contains("works for all models is 40 B"), "{error}");
        assert!(plan(40).is_ok());
        assert_eq!(Plan::make(&models, &Budget::Min.into(), none).unwrap().budget, Bytes(40));
    }

    #[test]
    fn a_cap_of_one_model_stands_beside_the_budget() {
        let models = [model("a", 10, &[5, 7, 5]), model("b", 1, &[3, 3])];
        let budgets = Budgets { total: Budget::Unlimited, models: vec![("a".into(), Budget::Min)] };
        let plan = Plan::make(&models, &budgets, none).unwrap();
        assert_eq!(plan.models[0].held(), Bytes(17));
        assert_eq!(plan.models[1].residents(), 2);
        let budgets = Budgets {
            total: Budget::Unlimited,
            models: vec![("b".into(), Budget::Bytes(Bytes(3)))],
        };
        assert!(Plan::make(&models, &budgets, none).is_err());
    }

    #[test]
    fn a_budget_of_at_least_the_minimum_is_raised_and_says_so() {
        let models = [model("a", 10, &[5, 7, 5]), model("b", 1, &[3, 3])];
        let cap = |total, bytes| {
            let caps = vec![("a".to_string(), Budget::AtLeastMin(Bytes(bytes)))];
            Plan::make(&models, &Budgets { total, models: caps }, none)
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

        let plan = Plan::make(&models, &Budget::AtLeastMin(Bytes(12)).into(), none).unwrap();
        assert_eq!((plan.budget, plan.models[0].raised), (Bytes(17), Some(Bytes(12))));
        assert_eq!(plan.models[1].raised, None, "12 B are enough for it");
    }

    #[test]
    fn auto_takes_half_of_what_is_available() {
        let models = [model("a", 0, &[50, 50])];
        let plan = |available| Plan::make(&models, &Budget::Auto.into(), || Ok(Bytes(available)));
        assert_eq!(plan(200).unwrap().budget, Bytes(u64::MAX));
        assert_eq!(plan(150).unwrap().budget, Bytes(75));
        assert_eq!(plan(20).unwrap().budget, Bytes(50)); // the least that works at all
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
            let plan = Plan::make(std::slice::from_ref(&sizes), &Budget::Bytes(Bytes(budget)).into(), none).unwrap();
            let m = &plan.models[0];
            prop_assert!(m.held().0 <= budget);
            for (block, &slot) in m.slot_of.iter().enumerate() {
                prop_assert!(m.slots[slot].capacity.0 >= sizes.blocks[block].1);
            }
            let streamed: Vec<u64> = (m.slot_of.iter().zip(&sizes.blocks))
                .filter(|(slot, _)| m.slots[**slot].blocks > 1)
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
