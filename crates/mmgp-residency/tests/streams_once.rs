//! A block that streams is fetched once a pass: what was fetched ahead stays until it is used, however
//! many resident blocks come before it.
#![allow(clippy::unwrap_used)]

use std::{thread::sleep, time::Duration};

use candle_core::Device;
use mmgp_residency::{Budget, ModelPlan, Pager};

mod common;
use common::{Tower, WIDTH, build, write};

const DEPTH: usize = 12;
const PASSES: usize = 10;

/// A pass whose blocks take longer than it takes to fetch one.
fn pass(tower: &Tower) {
    for block in tower.pass().unwrap().blocks() {
        let compute = |_: &_| {
            sleep(Duration::from_millis(1));
            Ok(())
        };
        block.unwrap().run(compute).unwrap();
    }
}

/// What the file has of a block of the tower.
fn stored(block: usize) -> u64 {
    let values = WIDTH * WIDTH;
    (2 * values + if block % 2 == 1 { 4 * values + 2 * WIDTH } else { 0 }) as u64
}

fn streamed(plan: &ModelPlan) -> u64 {
    (0..DEPTH).filter(|&b| plan.slots[plan.slot_of[b + 1]].turns).map(stored).sum()
}

#[test]
fn what_was_fetched_ahead_stays_until_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, DEPTH, 5);
    let weights: u64 = (0..DEPTH).map(stored).sum();
    for percent in [50., 60., 70., 80., 90.] {
        let pager = Pager::new(&Device::Cpu).unwrap();
        let tower = build(&pager, "a", &path, DEPTH);
        pager.plan(Budget::Percent(percent)).unwrap();
        for _ in 0..3 {
            pass(&tower);
        }
        let (before, mut planned) = (pager.report(), 0);
        for _ in 0..PASSES {
            pass(&tower);
            planned += streamed(&pager.plan_in_force().unwrap().models[0]);
        }
        let after = pager.report();
        let read = after.models[0].read.0 - before.models[0].read.0;
        assert!(planned > 0);
        // A new plan may fetch whatever it keeps; the first blocks of a pass may come at the end of the last.
        let plans = 1 + after.replans - before.replans;
        assert!(
            read <= planned + plans * weights,
            "{percent} %: {read} of {planned}, {plans} plans"
        );
    }
}
