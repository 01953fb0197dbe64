//! What a model's passes cost, as its blocks' clocks and slots tell: what the schedule is made of.

use std::{collections::VecDeque, time::Duration};

use crate::{
    Device,
    device::{Clock, Moved, VisitTimes},
    schedule::PassCosts,
};

/// Copies of fewer bytes say nothing about the rate of the link.
const TELLING: u64 = 1 << 20;

/// A block that takes so many times as long as it does is slow.
const SLOW: f64 = 2.;

/// Copies that are remembered.
const COPIES: usize = 256;

/// The times of one model's blocks, the stem first.
#[derive(Default)]
pub(super) struct Timing {
    blocks: Vec<Block>,
    /// Seconds of the last whole pass outside its blocks.
    outside: f64,
    link: Meter,
    /// That computing waited for blocks, over all visits that were read.
    pub(super) stalled: Duration,
    /// Whether a block took far longer since this was asked than it does.
    slow: bool,
}

#[derive(Default)]
struct Block {
    clock: Option<Box<dyn Clock>>,
    /// Seconds of the last visits, the latest first and the very first not among them: it pays for whatever is
    /// made once.
    seconds: [Option<f64>; 3],
    visits: u64,
    /// Whether it was copied before: the first time, files are read and memory is locked meanwhile.
    copied: bool,
}

impl Block {
    /// What a visit takes: the middle of the last three, the shorter of two. One that something held up says
    /// nothing, and the shortest of many would be less than passes take.
    fn usual(&self) -> Option<f64> {
        let mut seconds: Vec<f64> = self.seconds.into_iter().flatten().collect();
        seconds.sort_unstable_by(f64::total_cmp);
        seconds.get(seconds.len().saturating_sub(1) / 2).copied()
    }
}

/// The rates of recent copies.
#[derive(Default)]
struct Meter {
    /// Bytes a second, and bytes.
    copies: VecDeque<(f64, u64)>,
}

impl Meter {
    fn add(&mut self, bytes: u64, seconds: f64) {
        if self.copies.len() == COPIES {
            self.copies.pop_front();
        }
        self.copies.push_back((bytes as f64 / seconds, bytes));
    }

    /// The rate in the middle, by bytes: that of a link that others use for a moment stays what it is.
    fn rate(&self) -> Option<f64> {
        let mut copies: Vec<(f64, u64)> = self.copies.iter().copied().collect();
        copies.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let half = copies.iter().map(|copy| copy.1).sum::<u64>() / 2;
        let mut passed = 0;
        let middle = copies.into_iter().find(|copy| {
            passed += copy.1;
            passed > half
        });
        middle.map(|copy| copy.0).filter(|rate| rate.is_finite())
    }
}

impl Timing {
    /// A pass begins: whatever is over by now is read.
    pub(super) fn begin_pass(&mut self) {
        let mut inside = Some(0.);
        for block in 1..self.blocks.len() {
            let read = self.read(block).map(|v| (v.stalled + v.computed).as_secs_f64());
            inside = inside.zip(read).map(|(sum, seconds)| sum + seconds);
        }
        if !self.blocks.is_empty()
            && let Some(pass) = self.read(0)
            && let Some(inside) = inside
        {
            self.outside = (pass.computed.as_secs_f64() - inside).max(0.);
        }
    }

    /// Computing needs the block now, and may have to wait for it.
    pub(super) fn asked(&mut self, block: usize, may_wait: bool, device: &dyn Device) {
        if self.blocks.len() <= block {
            self.blocks.resize_with(block + 1, Block::default);
        }
        self.read(block);
        let clock = &mut self.blocks[block].clock;
        if clock.is_none() {
            match device.clock() {
                Ok(new) => *clock = Some(new),
                Err(error) => tracing::debug!("blocks are not timed: {error}"),
            }
        }
        if let Some(clock) = clock
            && may_wait
        {
            clock.asked();
        }
    }

    /// It is there.
    pub(super) fn began(&mut self, block: usize) {
        if let Some(clock) = self.clock(block) {
            clock.began();
        }
    }

    /// What computes on it was queued.
    pub(super) fn ended(&mut self, block: usize) {
        if let Some(clock) = self.clock(block) {
            clock.ended();
        }
    }

    /// A block that streams was copied.
    pub(super) fn moved(&mut self, block: usize, moved: Moved) {
        let seconds = moved.took.as_secs_f64();
        let first = match self.blocks.get_mut(block) {
            Some(block) => !std::mem::replace(&mut block.copied, true),
            None => true,
        };
        if !first && moved.bytes.0 >= TELLING && seconds > 0. {
            self.link.add(moved.bytes.0, seconds);
        }
    }

    /// Reads all visits that are over.
    pub(super) fn read_all(&mut self) {
        for block in 0..self.blocks.len() {
            self.read(block);
        }
    }

    /// Passes are others from now on: what was seen of blocks says nothing about them. The link stays.
    pub(super) fn forget_blocks(&mut self) {
        self.read_all();
        for block in &mut self.blocks {
            (block.seconds, block.visits) = ([None; 3], 0);
        }
        self.outside = 0.;
    }

    /// Whether a block took more than twice its time since the last call.
    pub(super) fn take_slow(&mut self) -> bool {
        std::mem::take(&mut self.slow)
    }

    /// What a pass over `blocks` blocks costs, once each was measured and something was copied.
    pub(super) fn costs(&self, blocks: usize) -> Option<PassCosts> {
        let measured = self.blocks.get(1..=blocks)?;
        let blocks = measured.iter().map(Block::usual).collect::<Option<Vec<f64>>>()?;
        Some(PassCosts { blocks, outside: self.outside, link: self.link.rate()? })
    }

    fn clock(&mut self, block: usize) -> Option<&mut Box<dyn Clock>> {
        self.blocks.get_mut(block)?.clock.as_mut()
    }

    fn read(&mut self, block: usize) -> Option<VisitTimes> {
        let b = self.blocks.get_mut(block)?;
        let times = b.clock.as_mut()?.read().ok()??;
        b.visits += 1;
        if b.visits > 1 {
            let seconds = times.computed.as_secs_f64();
            self.slow |= b.usual().is_some_and(|usual| seconds > SLOW * usual);
            b.seconds = [Some(seconds), b.seconds[0], b.seconds[1]];
        }
        if block > 0 {
            self.stalled += times.stalled;
        }
        Some(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_visit_that_was_held_up_changes_nothing() {
        let of = |seconds| Block { seconds, ..Block::default() }.usual();
        assert_eq!(of([None; 3]), None);
        assert_eq!(of([Some(2.), None, None]), Some(2.));
        assert_eq!(of([Some(9.), Some(2.), None]), Some(2.));
        assert_eq!(of([Some(2.), Some(9.), Some(3.)]), Some(3.));
        assert_eq!(of([Some(2.), Some(1.), Some(3.)]), Some(2.));
    }

    #[test]
    fn a_link_that_is_slow_for_a_moment_keeps_its_rate() {
        let mut meter = Meter::default();
        assert_eq!(meter.rate(), None);
        let copies = |meter: &mut Meter, count: usize, rate: f64| {
            for _ in 0..count {
                meter.add(1 << 30, (1u64 << 30) as f64 / rate);
            }
        };
        copies(&mut meter, 100, 50e9);
        copies(&mut meter, 60, 10e9);
        assert!((meter.rate().unwrap() / 50e9 - 1.).abs() < 1e-9);
        // What lasts is believed.
        copies(&mut meter, 120, 10e9);
        assert!((meter.rate().unwrap() / 10e9 - 1.).abs() < 1e-9);
        // Many small copies say less than a few large ones.
        let mut meter = Meter::default();
        (0..50).for_each(|_| meter.add(1 << 20, 1e-3));
        copies(&mut meter, 2, 50e9);
        assert!((meter.rate().unwrap() / 50e9 - 1.).abs() < 1e-9);
    }
}
