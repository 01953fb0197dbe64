//! What passes cost, measured by one pager and expected by another: the first plan is then the searched one, the
//! bits stay the same, and what cannot be is ignored.
#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use candle_core::{DType, Device as Candle, Tensor};
use mmgp_residency::{
    BlockImage, Budget, Bytes, Clock, Device, Digest, Host, ImageTensor, ModelPlan, Moved,
    Occupancy, Pager, PassCosts, Result, Slot, VisitTimes,
};

mod common;
use common::{Tower, build, run, write};

const DEPTH: usize = 12;
const LINK: f64 = 1e6;
const OUTSIDE: f64 = 1e-3;

/// The host, on which blocks and copies take what it is told.
struct Told {
    host: Host,
    /// Seconds of the stem's visits and of each block's, in the order in which clocks are asked for.
    seconds: Vec<f64>,
    clocks: AtomicUsize,
}

struct ToldClock(Duration, bool);

struct ToldSlot(Box<dyn Slot>);

/// Blocks that take long behind blocks that take little.
fn costs() -> PassCosts {
    let blocks = (0..DEPTH).map(|i| if i < DEPTH / 2 { 1e-3 } else { 5e-3 });
    PassCosts { blocks: blocks.collect(), outside: OUTSIDE, link: LINK }
}

fn pager_on(costs: &PassCosts) -> Pager {
    let pass = costs.blocks.iter().sum::<f64>() + costs.outside;
    let seconds = std::iter::once(pass).chain(costs.blocks.iter().copied()).collect();
    let host = Host::new().unwrap();
    Pager::over(Told { host, seconds, clocks: AtomicUsize::new(0) }).unwrap()
}

impl Device for Told {
    fn candle(&self) -> &Candle {
        self.host.candle()
    }

    fn compute_dtype(&self) -> DType {
        self.host.compute_dtype()
    }

    fn available(&self) -> Result<Bytes> {
        self.host.available()
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        let at = self.clocks.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(ToldClock(Duration::from_secs_f64(self.seconds[at]), false)))
    }

    fn slot(&self, capacity: Bytes, occupancy: Occupancy) -> Result<Box<dyn Slot>> {
        Ok(Box::new(ToldSlot(self.host.slot(capacity, occupancy)?)))
    }
}

impl Clock for ToldClock {
    fn asked(&mut self) {}

    fn began(&mut self) {}

    fn ended(&mut self) {
        self.1 = true;
    }

    fn read(&mut self) -> Result<Option<VisitTimes>> {
        let over = std::mem::take(&mut self.1);
        Ok(over.then_some(VisitTimes { stalled: Duration::ZERO, computed: self.0 }))
    }
}

impl Slot for ToldSlot {
    fn fill(&mut self, image: &BlockImage) -> Result<u64> {
        self.0.fill(image)
    }

    fn moved(&mut self) -> Option<Moved> {
        let bytes = Bytes(1 << 20);
        let took = Duration::from_secs_f64(bytes.0 as f64 / LINK);
        self.0.moved().map(|_| Moved { bytes, took })
    }

    fn digest(&self, tensors: &[ImageTensor]) -> Result<Digest> {
        self.0.digest(tensors)
    }

    fn bind(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.0.bind(tensors)
    }

    fn unbind(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.0.unbind(tensors)
    }
}

/// A tower on a pager of its own, planned within half of its weights after `prepare`.
fn planned(
    file: &Path,
    measures: &PassCosts,
    prepare: impl FnOnce(&Pager),
) -> (Pager, Tower, ModelPlan) {
    let pager = pager_on(measures);
    let tower = build(&pager, "tower", file, DEPTH);
    prepare(&pager);
    let plan = pager.plan(Budget::Percent(50.)).unwrap();
    (pager, tower, plan.models[0].clone())
}

fn near(a: &PassCosts, b: &PassCosts) -> bool {
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
    a.blocks.iter().zip(&b.blocks).all(|(&a, &b)| close(a, b))
        && a.blocks.len() == b.blocks.len()
        && close(a.outside, b.outside)
        && close(a.link, b.link)
}

#[test]
fn what_one_pager_measured_plans_the_first_pass_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    write(&file, DEPTH, 1);
    let (pager, tower, spread) = planned(&file, &costs(), |_| ());
    let expected = run(&tower).unwrap();
    assert_eq!(pager.measured_costs("tower"), None, "first visits do not count");
    assert_eq!(pager.measured_costs("other"), None);
    for _ in 0..3 {
        assert_eq!(run(&tower).unwrap(), expected);
    }
    let measured = pager.measured_costs("tower").unwrap();
    assert!(near(&measured, &costs()), "{measured:?}");
    let searched = pager.plan_in_force().unwrap().models[0].clone();
    assert_eq!(pager.report().replans, 1);
    assert_ne!(searched.slot_of, spread.slot_of);

    let (pager, tower, first) =
        planned(&file, &costs(), |pager| pager.expect_costs("tower", Some(measured.clone())));
    assert_eq!(pager.expected_costs("tower"), Some(measured));
    assert_eq!(first.slot_of, searched.slot_of);
    for _ in 0..4 {
        assert_eq!(run(&tower).unwrap(), expected);
    }
    let report = pager.report();
    assert_eq!(report.replans, 0, "{report}");
}

#[test]
fn costs_that_come_after_the_plan_change_it_before_the_first_pass() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    write(&file, DEPTH, 1);
    let expect = |pager: &Pager| pager.expect_costs("tower", Some(costs()));
    let (_, _, searched) = planned(&file, &costs(), expect);
    let (pager, tower, spread) = planned(&file, &costs(), |_| ());
    expect(&pager);
    assert_eq!(pager.plan_in_force().unwrap().models[0], spread);
    run(&tower).unwrap();
    assert_eq!(pager.plan_in_force().unwrap().models[0].slot_of, searched.slot_of);
}

#[test]
fn own_costs_count_once_they_were_measured() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    write(&file, DEPTH, 1);
    let expect = |costs: PassCosts| move |pager: &Pager| pager.expect_costs("tower", Some(costs));
    let (_, _, right) = planned(&file, &costs(), expect(costs()));
    // Twice as slow, and the other way round.
    let blocks = costs().blocks.iter().rev().map(|s| 2. * s).collect();
    let stale = PassCosts { blocks, ..costs() };
    let (pager, tower, wrong) = planned(&file, &costs(), expect(stale));
    assert_ne!(wrong.slot_of, right.slot_of);
    let expected = run(&tower).unwrap();
    for _ in 0..3 {
        assert_eq!(run(&tower).unwrap(), expected);
    }
    assert_eq!(pager.plan_in_force().unwrap().models[0].slot_of, right.slot_of);

    // Passes on another shape: what was measured is none of theirs.
    pager.expect_costs("tower", None);
    assert_eq!((pager.measured_costs("tower"), pager.expected_costs("tower")), (None, None));
    run(&tower).unwrap();
    assert_eq!(pager.measured_costs("tower"), None);
    run(&tower).unwrap();
    run(&tower).unwrap();
    let measured = pager.measured_costs("tower").unwrap();
    assert!(near(&measured, &costs()), "{measured:?}");
}

#[test]
fn costs_that_cannot_be_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    write(&file, DEPTH, 1);
    let (_, _, spread) = planned(&file, &costs(), |_| ());
    let block = |seconds: f64| {
        let mut costs = costs();
        costs.blocks[3] = seconds;
        costs
    };
    let mut hostile: Vec<PassCosts> =
        [0., -0., -1., 1e9, f64::NAN, f64::INFINITY, -f64::INFINITY, 1e-320].map(block).into();
    for outside in [-1e-9, 1e9, f64::NAN, f64::INFINITY] {
        hostile.push(PassCosts { outside, ..costs() });
    }
    for link in [0., -1., 1e2, 1e300, f64::NAN, f64::INFINITY] {
        hostile.push(PassCosts { link, ..costs() });
    }
    let [mut more, mut fewer] = [costs(), costs()];
    more.blocks.push(1e-3);
    fewer.blocks.pop();
    hostile.extend([more, fewer, PassCosts { blocks: Vec::new(), ..costs() }]);
    for hostile in hostile {
        let said = format!("{hostile:?}");
        let (pager, tower, plan) =
            planned(&file, &costs(), |pager| pager.expect_costs("tower", Some(hostile)));
        assert_eq!((pager.expected_costs("tower"), plan), (None, spread.clone()), "{said}");
        run(&tower).unwrap();
    }
    let pager = pager_on(&costs());
    pager.expect_costs("nobody", Some(costs()));
    assert_eq!(pager.expected_costs("nobody"), None);
    // The limits themselves can be.
    let extreme =
        |seconds: f64, link: f64| PassCosts { blocks: vec![seconds; DEPTH], outside: 0., link };
    for costs in [extreme(86_400., 1e15), extreme(f64::MIN_POSITIVE, 1e3)] {
        let (pager, tower, _) =
            planned(&file, &costs, |pager| pager.expect_costs("tower", Some(costs.clone())));
        assert_eq!(pager.expected_costs("tower"), Some(costs));
        run(&tower).unwrap();
    }
}
