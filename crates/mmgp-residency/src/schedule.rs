//! The schedule: how long a pass takes when some of its blocks stream, and which should.
//!
//! Copies are one queue and computing is another. With `t` the time that a block computes and its
//! bytes over the rate of the link as the time that it travels,
//!
//! ```text
//! copied(j)   = max(copied(j − 1), its slot is free) + bytes(j) / link
//! computed(i) = max(computed(i − 1), copied(i)) + t(i)
//! ```
//!
//! where a slot is free once the block that was in it before has computed, and what stays was copied
//! long ago. Passes follow one another, so copies of the next begin while the last blocks of this one
//! compute. Far from the point where link and computing take equally long, blocks that are spread evenly
//! do well; near it only a search over this recurrence does.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Passes that are played before one is measured, so that the first copies do not count.
const WARM: usize = 2;
/// Passes that are measured.
const MEASURED: usize = 2;
/// Slots that blocks may take turns in, at most.
const TURNS: usize = 3;
/// Moves that a search tries for each block.
const MOVES: usize = 1500;
/// Searches from the same beginning, side by side, of which the best counts.
const SEARCHES: u32 = 4;
/// A longer search has so many times as many of them, and makes each longer beyond that.
const MORE: u32 = 8;
/// How much worse, as a share, a pass may become by a move at first.
const WARMTH: f64 = 0.005;

/// The longest that a block, or what is outside of all, can be believed to take: a day.
const LONGEST: f64 = 86_400.;
/// Rates of a link that can be believed: from 1 kB/s to 1 PB/s.
const LINKS: std::ops::RangeInclusive<f64> = 1e3..=1e15;

/// What a pass of a model costs, as measured ([`Pager::measured_costs`](crate::Pager::measured_costs)). It
/// depends on the machine and on the shapes that the model computes on, and decides which plan is made, never a
/// number of the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PassCosts {
    /// Seconds that each block computes, in order; the stem is not among them.
    pub blocks: Vec<f64>,
    /// Seconds of a pass outside its blocks.
    pub outside: f64,
    /// Bytes a second that reach the device.
    pub link: f64,
}

impl PassCosts {
    /// Whether a pass' blocks together, or the link, cost more or less than in `other` by a share of more than
    /// `share` (0.1 is 10 %).
    pub fn differ(&self, other: &Self, share: f64) -> bool {
        let far = |a: f64, b: f64| (a - b).abs() > share * a.max(b);
        let sum = |costs: &Self| costs.blocks.iter().sum::<f64>();
        far(sum(self), sum(other)) || far(self.link, other.link)
    }

    /// Why they cannot be those of a model of so many blocks, if they cannot.
    pub(crate) fn doubt(&self, blocks: usize) -> Option<String> {
        if self.blocks.len() != blocks {
            return Some(format!("{} blocks, expected {blocks}", self.blocks.len()));
        }
        // NaN is in no range.
        if let Some(at) =
            self.blocks.iter().position(|s| !(f64::MIN_POSITIVE..=LONGEST).contains(s))
        {
            return Some(format!("{} s for block {at}", self.blocks[at]));
        }
        if !(0. ..=LONGEST).contains(&self.outside) {
            return Some(format!("{} s outside the blocks", self.outside));
        }
        (!LINKS.contains(&self.link)).then(|| format!("{} bytes a second", self.link))
    }
}

/// Which blocks stream, and through how many slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Whether the block streams.
    pub(crate) streams: Vec<bool>,
    /// Slots that those take turns in; 0 if none streams.
    pub(crate) turns: usize,
}

impl Choice {
    /// All blocks stay.
    pub(crate) fn resident(blocks: usize) -> Self {
        Self { streams: vec![false; blocks], turns: 0 }
    }

    /// As many blocks stay as fit into `room` bytes, spread evenly over the pass, so that computing and
    /// copying alternate; the others take turns in two slots if there is room for two.
    pub(crate) fn spread(blocks: &[u64], room: u64) -> Self {
        if blocks.iter().sum::<u64>() <= room {
            return Self::resident(blocks.len());
        }
        let two = Self::spread_beside(blocks, room, 2);
        if two.turns == 2 && two.fits(blocks, room) {
            return two;
        }
        Self::spread_beside(blocks, room, 1)
    }

    fn spread_beside(blocks: &[u64], room: u64, turns: usize) -> Self {
        let total: u64 = blocks.iter().sum();
        let largest = blocks.iter().copied().max().unwrap_or(0);
        let share = room.saturating_sub(turns as u64 * largest);
        let mut streams = vec![true; blocks.len()];
        let (mut kept, mut owed) = (0, 0f64);
        for (at, &bytes) in blocks.iter().enumerate() {
            owed += bytes as f64 * share as f64 / total as f64;
            if owed >= bytes as f64 && kept + bytes <= share {
                streams[at] = false;
                kept += bytes;
                owed -= bytes as f64;
            }
        }
        let mut choice = Self { streams, turns };
        choice.fill(blocks, room);
        choice
    }

    /// Lets whatever still fits stay, the largest first.
    fn fill(&mut self, blocks: &[u64], room: u64) {
        let mut rest: Vec<usize> = (0..blocks.len()).filter(|&b| self.streams[b]).collect();
        rest.sort_by_key(|&b| std::cmp::Reverse(blocks[b]));
        for b in rest {
            self.streams[b] = false;
            if self.taken(blocks) > room {
                self.streams[b] = true;
            }
        }
        self.turns = self.turns.min(self.streamed());
    }

    /// How many blocks stream.
    pub(crate) fn streamed(&self) -> usize {
        self.streams.iter().filter(|&&s| s).count()
    }

    /// The sizes of the slots that blocks take turns in.
    pub(crate) fn slots(&self, blocks: &[u64]) -> Vec<u64> {
        let mut sizes = vec![0; self.turns];
        let streamed = blocks.iter().zip(&self.streams).filter(|(_, streams)| **streams);
        for (turn, (&bytes, _)) in streamed.enumerate() {
            let slot = &mut sizes[turn % self.turns];
            *slot = bytes.max(*slot);
        }
        sizes
    }

    /// What slots and what stays take.
    fn taken(&self, blocks: &[u64]) -> u64 {
        let mut sizes = [0; TURNS];
        let (mut turn, mut kept) = (0, 0);
        for (&bytes, &streams) in blocks.iter().zip(&self.streams) {
            if streams {
                let slot = &mut sizes[turn % self.turns.max(1)];
                *slot = bytes.max(*slot);
                turn += 1;
            } else {
                kept += bytes;
            }
        }
        kept + sizes.iter().sum::<u64>()
    }

    /// Whether slots and what stays fit, and no more streams than must: what does not fit beside two slots
    /// of the largest block, and one more block of the smallest.
    fn fits(&self, blocks: &[u64], room: u64) -> bool {
        let (mut all, mut streamed) = (0, 0);
        let (mut largest, mut smallest) = (0, u64::MAX);
        for (&bytes, &streams) in blocks.iter().zip(&self.streams) {
            streamed += if streams { bytes } else { 0 };
            all += bytes;
            (largest, smallest) = (largest.max(bytes), smallest.min(bytes));
        }
        // What streams is looked at first: it is the cheaper question.
        streamed <= (all + 2 * largest + smallest).saturating_sub(room)
            && self.taken(blocks) <= room
    }

    /// Seconds of a steady pass: what one takes when many follow each other.
    pub(crate) fn seconds(&self, blocks: &[u64], costs: &PassCosts) -> f64 {
        let (mut copied, mut computed) = (0f64, 0f64);
        let mut free = [0f64; TURNS];
        let mut warm = 0.;
        for pass in 0..WARM + MEASURED {
            if pass == WARM {
                warm = computed;
            }
            let mut turn = 0;
            for ((&bytes, &streams), seconds) in blocks.iter().zip(&self.streams).zip(&costs.blocks)
            {
                if streams {
                    let slot = &mut free[turn % self.turns.max(1)];
                    turn += 1;
                    copied = copied.max(*slot) + bytes as f64 / costs.link;
                    computed = computed.max(copied) + seconds;
                    *slot = computed;
                } else {
                    computed += seconds;
                }
            }
            computed += costs.outside;
        }
        (computed - warm) / MEASURED as f64
    }

    /// The choice of the shortest steady pass that a search finds within `room` bytes. It begins with blocks
    /// spread evenly and lets some stay in the place of others; `effort` is how long it looks. The same
    /// question always gets the same answer.
    pub(crate) fn search(blocks: &[u64], room: u64, costs: &PassCosts, effort: u32) -> Self {
        let spread = Self::spread(blocks, room);
        if spread.turns == 0 || costs.blocks.len() != blocks.len() {
            return spread;
        }
        let more = effort.clamp(1, MORE);
        let moves = MOVES * blocks.len() * effort.div_ceil(more) as usize;
        // One slot is for those who have no room for two.
        let beginnings: Vec<(u32, Self)> = (spread.turns..=TURNS.min(blocks.len()))
            .map(|turns| (turns, Self::spread_beside(blocks, room, turns)))
            .filter(|(turns, begin)| begin.turns == *turns && begin.fits(blocks, room))
            .flat_map(|(_, begin)| (1..=SEARCHES * more).map(move |seed| (seed, begin.clone())))
            .collect();
        let found: Vec<(f64, Self)> = beginnings
            .into_par_iter()
            .map(|(seed, begin)| begin.improve(blocks, room, costs, moves, seed))
            .collect();
        // Of choices as good as each other, the first.
        let best = found.into_iter().reduce(|a, b| if b.0 < a.0 * 0.9999 { b } else { a });
        best.map_or(spread, |(_, choice)| choice)
    }

    fn improve(
        self,
        blocks: &[u64],
        room: u64,
        costs: &PassCosts,
        moves: usize,
        seed: u32,
    ) -> (f64, Self) {
        let count = blocks.len() as u64;
        let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(seed));
        let mut draw = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            ((u128::from(random) * u128::from(below)) >> 64) as usize
        };
        let mut seconds = self.seconds(blocks, costs);
        let mut at = self;
        let mut best = (seconds, at.clone());
        // Nothing is quicker than computing alone.
        let floor = (costs.blocks.iter().sum::<f64>() + costs.outside) * 1.0001;
        for tried in 0..moves {
            if best.0 <= floor {
                break;
            }
            let mut next = at.clone();
            for _ in 0..=draw(3) {
                match draw(2) {
                    0 => {
                        let block = draw(count);
                        next.streams[block] ^= true;
                    }
                    _ => next.streams.swap(draw(count), draw(count)),
                }
            }
            if !next.fits(blocks, room) {
                continue;
            }
            let then = next.seconds(blocks, costs);
            // Annealing: what is worse by about the warmth is taken too, so that the search does not
            // end in the first hollow.
            let warmth = WARMTH * (1. - tried as f64 / moves as f64);
            let worse = (then - seconds) / seconds;
            if worse <= 0. || (draw(1 << 20) as f64) < (-worse / warmth).exp() * f64::from(1 << 20)
            {
                (at, seconds) = (next, then);
                if seconds < best.0 {
                    best = (seconds, at.clone());
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// FLUX.1-dev in bf16: 19 double and 38 single blocks.
    fn flux(step: f64, link: f64) -> (Vec<u64>, PassCosts) {
        let kinds = [(680_000_000u64, 2.12), (283_000_000, 2.05)];
        let blocks: Vec<(u64, f64)> = [vec![kinds[0]; 19], vec![kinds[1]; 38]].concat();
        let sum: f64 = blocks.iter().map(|b| b.1).sum();
        let costs = PassCosts {
            blocks: blocks.iter().map(|b| b.1 * step / sum).collect(),
            outside: 0.,
            link,
        };
        (blocks.into_iter().map(|b| b.0).collect(), costs)
    }

    fn bound(blocks: &[u64], choice: &Choice, costs: &PassCosts) -> f64 {
        let streamed = blocks.iter().zip(&choice.streams).filter(|(_, s)| **s);
        let bytes: u64 = streamed.map(|(b, _)| b).sum();
        (bytes as f64 / costs.link).max(costs.blocks.iter().sum::<f64>() + costs.outside)
    }

    #[test]
    fn a_pass_is_as_long_as_the_recurrence_says() {
        let costs = PassCosts { blocks: vec![1., 1.], outside: 0., link: 1. };
        // One slot: copies and computing take turns.
        let one = Choice { streams: vec![true, true], turns: 1 };
        assert_eq!(one.seconds(&[2, 2], &costs), 6.);
        // Two slots: the link never rests.
        let two = Choice { streams: vec![true, true], turns: 2 };
        assert_eq!(two.seconds(&[2, 2], &costs), 4.);
        // What stays costs nothing but its computing.
        assert_eq!(Choice::resident(2).seconds(&[2, 2], &costs), 2.);
        let mixed = Choice { streams: vec![false, true], turns: 1 };
        assert_eq!(mixed.seconds(&[2, 2], &costs), 3.);
    }

    #[test]
    fn the_search_comes_near_the_bound_where_even_spreading_does_not() {
        // What a search was seen to reach, over the bound. The room holds two slots beside what stays.
        for (kept, allowed) in
            [(4e9, 1.001), (8e9, 1.001), (12e9, 1.002), (14e9, 1.01), (16e9, 1.001)]
        {
            let room = kept + 1.36e9;
            let (blocks, costs) = flux(0.183, 54.5e9);
            let choice = Choice::search(&blocks, room as u64, &costs, 1);
            assert!(choice.fits(&blocks, room as u64));
            let ratio = choice.seconds(&blocks, &costs) / bound(&blocks, &choice, &costs);
            let spread = Choice::spread(&blocks, room as u64);
            let even = spread.seconds(&blocks, &costs) / bound(&blocks, &spread, &costs);
            println!("{kept:e}: {ratio:.4} with {} slots, evenly {even:.4}", choice.turns);
            assert!(ratio <= allowed, "{kept:e}: {ratio}");
        }
    }

    #[test]
    fn a_longer_search_finds_hardly_more() {
        for room in [2e9, 6e9, 12e9, 14e9] {
            let (blocks, costs) = flux(0.183, 54.5e9);
            let seconds = |effort| {
                Choice::search(&blocks, room as u64, &costs, effort).seconds(&blocks, &costs)
            };
            let (short, long) = (seconds(1), seconds(20));
            assert!(short <= 1.01 * long, "{room:e}: {short} {long}");
        }
    }

    /// A pass that a GPU made, as the bench records it.
    #[derive(serde::Deserialize)]
    struct Recorded {
        row: String,
        step_s: f64,
        outside_s: f64,
        link: f64,
        slots: usize,
        blocks: Vec<(u64, f64, bool)>,
    }

    #[test]
    fn passes_took_as_long_as_the_recurrence_says() {
        // Over blocks of the tensor library's operations, and over fused ones.
        let recorded = concat!(
            include_str!("../tests/recorded/h100.jsonl"),
            include_str!("../tests/recorded/h100-fast.jsonl")
        );
        let mut errors = Vec::new();
        for line in recorded.lines() {
            let pass: Recorded = serde_json::from_str(line).unwrap();
            let costs = PassCosts {
                blocks: pass.blocks.iter().map(|b| b.1).collect(),
                outside: pass.outside_s,
                link: pass.link,
            };
            let streams = pass.blocks.iter().map(|b| b.2).collect();
            let choice = Choice { streams, turns: pass.slots };
            let blocks: Vec<u64> = pass.blocks.iter().map(|b| b.0).collect();
            let error = (choice.seconds(&blocks, &costs) / pass.step_s - 1.).abs();
            println!("{}: off by {:.1} %", pass.row, error * 100.);
            assert!(error <= 0.05, "{}: off by {error}", pass.row);
            errors.push(error);
        }
        errors.sort_by(f64::total_cmp);
        assert!(errors.len() >= 6 && errors[errors.len() / 2] <= 0.02, "{errors:?}");
    }

    proptest! {
        #[test]
        fn whatever_is_chosen_fits_and_is_no_worse_than_even_spreading(
            sizes in prop::collection::vec((1u64..100, 1u32..50), 1..12),
            share in 0.0f64..1.2,
        ) {
            let blocks: Vec<u64> = sizes.iter().map(|s| s.0).collect();
            let costs = PassCosts {
                blocks: sizes.iter().map(|s| f64::from(s.1)).collect(),
                outside: 0.5,
                link: 3.,
            };
            let largest = blocks.iter().copied().max().unwrap_or(0);
            let room = largest.max((blocks.iter().sum::<u64>() as f64 * share) as u64);
            let spread = Choice::spread(&blocks, room);
            prop_assert!(spread.fits(&blocks, room));
            let choice = Choice::search(&blocks, room, &costs, 1);
            prop_assert!(choice.fits(&blocks, room));
            prop_assert_eq!(choice.slots(&blocks).len(), choice.turns);
            let (even, found) = (spread.seconds(&blocks, &costs), choice.seconds(&blocks, &costs));
            prop_assert!(found <= even * 1.0001, "{} {}", found, even);
            prop_assert!(found >= bound(&blocks, &choice, &costs) * 0.9999);
        }
    }
}
