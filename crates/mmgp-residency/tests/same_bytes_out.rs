//! Contracts 1 and 2: any budget gives the bits of the resident run, and no budget is exceeded.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
use mmgp_residency::{Budget, Budgets, Bytes, Pager};

mod common;
use common::{build, run, write};

#[test]
fn every_budget_gives_the_same_bits_and_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"));
    write(&a, 7, 1);
    write(&b, 4, 2);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let (tower, other) = (build(&pager, "a", &a, 7), build(&pager, "b", &b, 4));
    let plan = pager.plan(Budget::Unlimited).unwrap();
    let (minimum, weights) = (plan.minimum.0, plan.weights.0);
    let expected = (run(&tower).unwrap(), run(&other).unwrap());
    let read = pager.report().models[0].read;
    assert_eq!(run(&tower).unwrap(), expected.0);
    assert_eq!(pager.report().models[0].read, read, "nothing is read twice without a budget");

    let step = (weights - minimum) / 9;
    for budget in (0..=10).map(|i| minimum + i * step) {
        pager.plan(Budget::Bytes(Bytes(budget))).unwrap();
        for _ in 0..3 {
            pager.begin_run();
            assert_eq!(run(&other).unwrap(), expected.1, "budget {budget}");
            for _ in 0..4 {
                assert_eq!(run(&tower).unwrap(), expected.0, "budget {budget}");
            }
        }
    }
    let report = pager.report();
    assert!(report.models.iter().all(|m| m.visits > 0 && m.hits > 0));
}

#[test]
fn what_is_held_stays_below_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 9, 3);
    for extra in [0, 1, 3000, 9000] {
        // A pager each: peaks are those of its whole life.
        let pager = Pager::new(&Device::Cpu).unwrap();
        let (tower, other) = (build(&pager, "a", &path, 9), build(&pager, "b", &path, 9));
        let minimum = pager.plan(Budget::Min).unwrap().minimum;
        let budget = Bytes(minimum.0 + extra);
        pager.plan(budget_of(budget)).unwrap();
        for _ in 0..3 {
            run(&tower).unwrap();
            run(&other).unwrap();
        }
        let report = pager.report();
        assert!(report.peak <= budget, "{} > {budget}", report.peak);
        assert!(report.peak > Bytes(0) && report.budget == budget);
    }
}

fn budget_of(bytes: Bytes) -> Budgets {
    Budget::Bytes(bytes).into()
}

#[test]
fn nothing_is_fetched_in_vain_by_a_first_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 6, 3);
    for budget in [Budget::Min, Budget::Percent(60.), Budget::Unlimited] {
        let pager = Pager::new(&Device::Cpu).unwrap();
        let (first, second) = (build(&pager, "first", &path, 6), build(&pager, "second", &path, 6));
        pager.plan(budget).unwrap();
        run(&first).unwrap();
        run(&second).unwrap();
        for model in pager.report().models {
            assert_eq!(model.read, model.disk, "{} at {budget}", model.name);
        }
    }
}

#[test]
fn fetching_ahead_is_learned_across_passes_and_models() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 6, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let (first, second) = (build(&pager, "first", &path, 6), build(&pager, "second", &path, 6));
    pager.plan(Budget::Percent(30.)).unwrap();
    for _ in 0..3 {
        pager.begin_run();
        run(&first).unwrap();
        run(&second).unwrap();
        run(&second).unwrap();
    }
    assert_eq!(pager.report().deviations, 0);
    pager.begin_run();
    run(&second).unwrap();
    assert_eq!(pager.report().deviations, 1);
}

#[test]
fn models_used_inside_each_other_share_the_budget_or_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 4, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let (outer, inner) = (build(&pager, "outer", &path, 4), build(&pager, "inner", &path, 4));
    pager.plan(Budget::Unlimited).unwrap();
    let expected = run(&inner).unwrap();
    pager.plan(Budget::Min).unwrap();
    let pass = outer.pass().unwrap();
    let error = run(&inner).unwrap_err().to_string();
    assert!(error.contains("`inner`") && error.contains("in use"), "{error}");
    drop(pass);
    assert_eq!(run(&inner).unwrap(), expected);
}

#[test]
fn a_dropped_model_gives_its_memory_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 4, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let keep = build(&pager, "keep", &path, 4);
    let gone = build(&pager, "gone", &path, 4);
    pager.plan(Budget::Percent(50.)).unwrap();
    let expected = run(&keep).unwrap();
    run(&gone).unwrap();
    drop(gone);
    assert_eq!(run(&keep).unwrap(), expected);
    let late = build(&pager, "late", &path, 4); // planned anew, within the same budget
    assert_eq!(run(&late).unwrap(), expected);
    assert_eq!(run(&keep).unwrap(), expected);
}

#[test]
fn int8_made_on_the_fly_gives_the_same_bits_under_every_budget() {
    use mmgp_quant::QuantPolicy;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 7, 1);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let dense = build(&pager, "dense", &path, 7);
    let tower = |exclude: &[&str]| {
        let exclude: Vec<String> = exclude.iter().map(|s| s.to_string()).collect();
        common::build_with(&pager, "int8", &path, 7, |b| {
            b.quantize(QuantPolicy::int8(&exclude).unwrap());
        })
    };
    let int8 = tower(&[]);
    let plan = pager.plan(Budget::Unlimited).unwrap();
    assert!(plan.models[1].bytes < plan.models[0].bytes);
    let (exact, expected) = (run(&dense).unwrap(), run(&int8).unwrap());
    let values = |bits: &[u32]| bits.iter().map(|&b| f32::from_bits(b)).collect::<Vec<_>>();
    let (a, b) = (values(&exact), values(&expected));
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied());
    assert!(error > 0. && error < 0.02, "{error}");
    for budget in [Budget::Min, Budget::Percent(40.), Budget::Percent(70.)] {
        pager.plan(budget).unwrap();
        for _ in 0..2 {
            assert_eq!(run(&int8).unwrap(), expected, "{budget}");
        }
    }
    drop(int8);
    assert_eq!(run(&tower(&["layers.*"])).unwrap(), exact, "all excluded by name");
    assert_ne!(run(&tower(&["layers.1.*"])).unwrap(), expected);
}
