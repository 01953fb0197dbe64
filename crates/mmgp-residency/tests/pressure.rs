//! On a device that takes memory from elsewhere where it has none, slow blocks make a model hold less; once they
//! are quick again, it holds what it did. Where memory runs out, what is held or may be is given up.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use candle_core::DType;
use mmgp_residency::{
    Budget, Bytes, Clock, Device, Host, Occupancy, Pager, Result, Slot, VisitTimes,
};

mod common;
use common::{build, run, write};

const DEPTH: usize = 6;

/// The host, as a card with a little memory whose blocks take as long as the test says.
struct Card {
    host: Host,
    spills: bool,
    slow: Arc<AtomicBool>,
}

struct Scripted(Arc<AtomicBool>, Option<VisitTimes>);

impl Clock for Scripted {
    fn asked(&mut self) {}

    fn began(&mut self) {}

    fn ended(&mut self) {
        let computed = Duration::from_millis(if self.0.load(Relaxed) { 5 } else { 2 });
        self.1 = Some(VisitTimes { stalled: Duration::ZERO, computed });
    }

    fn read(&mut self) -> Result<Option<VisitTimes>> {
        Ok(self.1.take())
    }
}

impl Device for Card {
    fn candle(&self) -> &candle_core::Device {
        self.host.candle()
    }

    fn compute_dtype(&self) -> DType {
        self.host.compute_dtype()
    }

    fn available(&self) -> Result<Bytes> {
        self.ceiling()
    }

    fn ceiling(&self) -> Result<Bytes> {
        Ok(Bytes(1 << 20))
    }

    fn spills(&self) -> bool {
        self.spills
    }

    fn is_out_of_memory(&self, error: &candle_core::Error) -> bool {
        error.to_string().contains("out of memory")
    }

    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>> {
        self.host.slot(capacity, occupancy)
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        Ok(Box::new(Scripted(self.slow.clone(), None)))
    }
}

#[test]
fn slow_blocks_make_a_model_hold_less_where_memory_spills() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, DEPTH, 5);
    for spills in [true, false] {
        let slow = Arc::new(AtomicBool::new(false));
        let card = Card { host: Host::new().unwrap(), spills, slow: slow.clone() };
        let pager = Pager::over(card).unwrap();
        let tower = build(&pager, "tower", &path, DEPTH);
        pager.plan(Budget::Unlimited).unwrap();
        let expected = run(&tower).unwrap();
        let mut held = Vec::new();
        for pass in 0..8 {
            slow.store(pass == 2, Relaxed);
            assert_eq!(run(&tower).unwrap(), expected);
            held.push(pager.plan_in_force().unwrap().models[0].residents());
        }
        // What a pass shows acts on the next one, and counts as its need in the two after it.
        let eased = if spills { 0 } else { DEPTH };
        let expected = [DEPTH, DEPTH, DEPTH, eased, eased, eased, DEPTH, DEPTH];
        assert_eq!(held, expected, "spills: {spills}");
    }
}

#[test]
fn memory_that_runs_out_before_much_is_held_is_given_back_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, DEPTH, 5);
    let card = Card { host: Host::new().unwrap(), spills: false, slow: Arc::default() };
    let pager = Pager::over(card).unwrap();
    let tower = build(&pager, "tower", &path, DEPTH);
    pager.plan(Budget::Unlimited).unwrap();
    // Of a first pass, when only the stem is there: the rest is not taken then.
    let pass = tower.pass().unwrap();
    let mut ran = 0;
    pass.stem(|_| {
        ran += 1;
        if ran == 1 { candle_core::bail!("out of memory") } else { Ok(()) }
    })
    .unwrap();
    assert_eq!((ran, pager.report().reruns), (2, 1));
    // With nothing left to give, the error is told.
    let mut ran = 0;
    let error = pass.stem(|_| -> candle_core::Result<()> {
        ran += 1;
        candle_core::bail!("out of memory")
    });
    assert!(error.is_err() && ran == 1, "{ran}");
}
