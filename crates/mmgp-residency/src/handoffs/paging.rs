//! Models that run on a pager: whatever the schedule, every lease sees its own block's values, within the
//! budget, and nothing waits for ever.

use std::sync::atomic::Ordering::Relaxed;

use candle_core::Tensor;
use mmgp_io::Dtype;
use shuttle::thread::{self, yield_now};

use super::{
    any, explore,
    memory::{Memory, value},
};
use crate::{
    ALIGN, Budget, Budgets, Bytes, Error, ModelBuilder, Paged, Pager, Result, sync::join_all,
};

/// A block's tensors and their names.
type Tensors = Vec<(String, Tensor)>;
type Model = Paged<Tensors, Tensors>;

/// Elements of a tensor: it takes `ALIGN` bytes.
const ELEMENTS: usize = ALIGN as usize / 4;
/// What one takes of a stem and of the largest block.
const STEM: u64 = ALIGN;
const LARGEST: u64 = 2 * ALIGN;

/// A model of a stem and `depth` blocks, every other one twice as large.
fn build(pager: &Pager, name: &str, depth: usize) -> Model {
    let (builder, _) = ModelBuilder::sketch(pager, name, Dtype::F32);
    let tensors = |weights: mmgp_quant::Weights, path: &str, count: usize| -> Tensors {
        let tensor = |i| {
            let tensor = weights.tensor(&[ELEMENTS], &format!("{i}")).unwrap();
            (format!("{path}.{i}"), tensor)
        };
        (0..count).map(tensor).collect()
    };
    let stem = tensors(builder.stem().pp(name), name, 1);
    let blocks = (0..depth).map(|block| {
        let path = format!("{name}.{block}");
        tensors(builder.block(&path), &path, 1 + block % 2)
    });
    let blocks = blocks.collect();
    builder.finish(stem, blocks).unwrap()
}

/// The ceiling that leaves a stem and so much to weights, and a quarter to activations.
fn room(bytes: u64) -> u64 {
    (STEM + bytes) * 4 / 3
}

fn pager(memory: &Memory, budget: Budget) -> Pager {
    let pager = Pager::over(memory.clone()).unwrap();
    pager.plan(budget).unwrap();
    pager
}

/// Reads the tensors now and again, as a forward would.
fn compute(tensors: &Tensors) -> candle_core::Result<()> {
    for _ in 0..2 {
        for (name, tensor) in tensors {
            let values = tensor.to_vec1::<f32>()?;
            assert!(values.iter().all(|&v| v == value(name)), "{name} holds {}", values[0]);
        }
        yield_now();
    }
    Ok(())
}

/// One pass over the first `blocks` blocks.
fn run_some(model: &Model, blocks: usize) -> Result<()> {
    let pass = model.pass()?;
    pass.stem(compute)?;
    for visit in pass.blocks().take(blocks) {
        visit?.run(compute)?;
    }
    pass.stem(compute)
}

fn run(model: &Model) -> Result<()> {
    run_some(model, model.len())
}

/// All is given back and all workers end.
fn finish(memory: &Memory, pagers: impl IntoIterator<Item = Pager>, models: Vec<Model>) {
    drop(models);
    assert_eq!(memory.taken(), 0, "models that were dropped hold memory");
    drop(pagers.into_iter().collect::<Vec<_>>());
    join_all();
}

#[test]
fn a_model_streams_within_its_budget() {
    explore(|| {
        let budget = STEM + any(&[LARGEST, 2 * LARGEST, 3 * LARGEST]);
        let memory = Memory::new(budget);
        let pager = pager(&memory, Budget::Bytes(Bytes(budget)));
        let model = build(&pager, "tower", 4);
        for _ in 0..3 {
            run(&model).unwrap();
        }
        assert!(pager.report().peak.0 <= budget);
        finish(&memory, [pager], vec![model]);
    });
}

#[test]
fn a_failed_fetch_ahead_is_tried_again_and_one_that_was_demanded_is_told() {
    explore(|| {
        let memory = Memory::new(u64::MAX);
        let pager = pager(&memory, Budget::Bytes(Bytes(STEM + any(&[1, 2]) * LARGEST)));
        let model = build(&pager, "tower", 4);
        let told = |failing: &str| match run(&model) {
            Ok(()) => false,
            Err(Error::Device(error)) if error.contains(failing) => true,
            Err(error) => panic!("{error}"),
        };
        match any(&[0, 1, 2]) {
            // Nothing is fetched ahead of the first stem.
            0 => {
                memory.fail(&["stem"]);
                assert!(told("stem"));
            }
            // Block 2 is fetched ahead first.
            1 => {
                memory.fail(&["tower.2"]);
                assert!(!told(""));
                assert_eq!(memory.fills(), 1 + 4 + 1);
            }
            _ => {
                memory.fail(&["tower.2", "tower.2"]);
                assert!(told("tower.2"));
            }
        }
        assert!(!told(""));
        finish(&memory, [pager], vec![model]);
    });
}

#[test]
fn cancelling_ends_a_pass_wherever_it_waits() {
    explore(|| {
        let memory = Memory::new(STEM + 2 * LARGEST);
        let pager = pager(&memory, Budget::Bytes(Bytes(STEM + 2 * LARGEST)));
        let model = build(&pager, "tower", 3);
        let cancel = pager.cancel_flag();
        let canceller = thread::spawn({
            let cancel = cancel.clone();
            move || cancel.store(true, Relaxed)
        });
        while match run(&model) {
            Ok(()) => true,
            Err(error) => !matches!(error, Error::Cancelled),
        } {}
        canceller.join().unwrap();
        assert!(matches!(run(&model), Err(Error::Cancelled)));
        cancel.store(false, Relaxed);
        run(&model).unwrap();
        finish(&memory, [pager], vec![model]);
    });
}

#[test]
fn a_model_is_dropped_while_a_block_of_it_is_fetched() {
    explore(|| {
        let budget = STEM + 2 * LARGEST;
        let memory = Memory::new(budget);
        let pager = pager(&memory, Budget::Bytes(Bytes(budget)));
        let encoder = build(&pager, "encoder", 4);
        let transformer = build(&pager, "transformer", 2);
        if any(&[false, true]) {
            run_some(&encoder, any(&[1, 2, 3])).unwrap();
        } else {
            // A visit that was begun and not run.
            let pass = encoder.pass().unwrap();
            drop(pass.blocks().next().unwrap().unwrap());
        }
        drop(encoder);
        assert_eq!(memory.taken(), 0);
        run(&transformer).unwrap();
        finish(&memory, [pager], vec![transformer]);
    });
}

#[test]
fn models_run_in_turn_and_the_next_is_fetched_ahead() {
    explore(|| {
        let budget = STEM + any(&[LARGEST, 2 * LARGEST, 4 * LARGEST]);
        let memory = Memory::new(budget);
        let pager = pager(&memory, Budget::Bytes(Bytes(budget)));
        let names = ["encoder", "transformer", "vae"];
        let models: Vec<Model> = names.iter().map(|name| build(&pager, name, 2)).collect();
        for picture in 0..3 {
            pager.begin_run();
            if picture == 1 {
                memory.fail(&[any(&["stem", "transformer.1"])]);
            }
            for model in [0, 1, 1, 2] {
                // Not every picture needs every model.
                if picture < 2 || model == 1 || any(&[false, true]) {
                    // A stem may be demanded where it could not be fetched ahead.
                    match run(&models[model]) {
                        Err(Error::Device(_)) if picture == 1 => run(&models[model]).unwrap(),
                        result => result.unwrap(),
                    }
                }
            }
        }
        finish(&memory, [pager], models);
    });
}

#[test]
fn plans_change_between_passes() {
    explore(|| {
        let memory = Memory::new(u64::MAX);
        let pager = pager(&memory, Budget::Unlimited);
        let model = build(&pager, "transformer", 4);
        let vae = build(&pager, "vae", 1);
        for ceiling in [8, 3, 2, 3].map(|blocks| room(blocks * LARGEST)) {
            memory.set_ceiling(ceiling);
            for _ in 0..2 {
                run(&model).unwrap();
                assert!(memory.taken() <= ceiling - ceiling / 4, "more is held than there is now");
                match any(&[0, 1, 2, 3]) {
                    0 => drop(pager.plan(Budget::Unlimited).unwrap()),
                    1 => memory.want(LARGEST),
                    2 => run(&vae).unwrap(),
                    _ => {}
                }
            }
        }
        let mut left = 1;
        let pass = model.pass().unwrap();
        for visit in pass.blocks() {
            let full = visit.unwrap().run(|tensors| {
                compute(tensors)?;
                if left > 0 && any(&[false, true]) {
                    left -= 1;
                    candle_core::bail!("out of memory");
                }
                compute(tensors)
            });
            match full {
                Err(Error::Candle(_)) => {} // nothing was left to give back
                result => result.unwrap(),
            }
        }
        drop(pass);
        assert!(pager.report().replans > 0);
        finish(&memory, [pager], vec![model, vae]);
    });
}

#[test]
fn pagers_beside_each_other_run_in_two_threads() {
    explore(|| {
        let budget = STEM + 2 * LARGEST;
        let memory = Memory::new(2 * budget);
        let first = pager(&memory, Budget::Bytes(Bytes(budget)));
        let second = first.beside().unwrap();
        second.plan(Budget::Bytes(Bytes(budget))).unwrap();
        let threads = [(first, "image"), (second, "video")].map(|(pager, name)| {
            thread::spawn(move || {
                let model = build(&pager, name, 3);
                run(&model).unwrap();
                run(&model).unwrap();
                assert!(pager.report().peak.0 <= budget);
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        join_all();
        assert_eq!(memory.taken(), 0);
    });
}

#[test]
fn models_of_one_pager_run_in_two_threads() {
    explore(|| {
        // Room for both at their smallest: either gives back what the other needs.
        let budget = 2 * (STEM + LARGEST) + any(&[0, LARGEST]);
        let memory = Memory::new(budget);
        let pager = pager(&memory, Budget::Bytes(Bytes(budget)));
        let models = ["image", "video"].map(|name| build(&pager, name, 3));
        pager.plan(Budget::Bytes(Bytes(budget))).unwrap();
        let threads = models.map(|model| {
            thread::spawn(move || {
                run(&model).unwrap();
                run(&model).unwrap();
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        finish(&memory, [pager], Vec::new());
    });
}

#[test]
fn a_model_comes_and_goes_while_another_runs() {
    explore(|| {
        let (large, small) = (STEM + 2 * LARGEST, STEM + LARGEST);
        let memory = Memory::new(large + small);
        let pager = Pager::over(memory.clone()).unwrap();
        let total = Budget::Bytes(Bytes(large + small));
        let models = vec![("transformer".into(), Budget::Bytes(Bytes(large)))];
        let budgets = Budgets { total, models };
        pager.plan(budgets.clone()).unwrap();
        let model = build(&pager, "transformer", 4);
        // The plan cannot change inside a pass of the other.
        let may_fail = |result: Result<()>| match result {
            Ok(()) | Err(Error::Busy { .. }) => {}
            Err(error) => panic!("{error}"),
        };
        let other = thread::spawn({
            let pager = pager.clone();
            move || {
                for _ in 0..any(&[0, 50, 100, 200]) {
                    yield_now();
                }
                let vae = build(&pager, "vae", 1);
                may_fail(run(&vae));
                may_fail(run(&vae));
            }
        });
        for _ in 0..4 {
            may_fail(run(&model));
            if any(&[false, true]) {
                may_fail(pager.plan(budgets.clone()).map(drop));
            }
        }
        other.join().unwrap();
        run(&model).unwrap();
        finish(&memory, [pager], vec![model]);
    });
}

#[test]
fn a_model_is_added_while_the_plan_changes() {
    explore(|| {
        let memory = Memory::new(u64::MAX);
        let pager = pager(&memory, Budget::Unlimited);
        let model = build(&pager, "transformer", 4);
        let other = thread::spawn({
            let pager = pager.clone();
            move || {
                for _ in 0..any(&[50, 100, 200, 300]) {
                    yield_now();
                }
                build(&pager, "vae", 1)
            }
        });
        for ceiling in [3, 2, 3, 2, 3].map(|blocks| room(blocks * LARGEST)) {
            memory.set_ceiling(ceiling);
            match run(&model) {
                Ok(()) | Err(Error::Busy { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        let vae = other.join().unwrap();
        run(&vae).unwrap();
        run(&model).unwrap();
        finish(&memory, [pager], vec![model, vae]);
    });
}

#[test]
fn workers_end_with_their_pager() {
    explore(|| {
        let memory = Memory::new(u64::MAX);
        let pager = pager(&memory, Budget::Bytes(Bytes(STEM + 2 * LARGEST)));
        let model = build(&pager, "tower", 3);
        run_some(&model, 1).unwrap();
        // The model waits for what is being fetched, and holds the pager.
        let last = thread::spawn(move || drop(model));
        drop(pager);
        last.join().unwrap();
        join_all();
        assert_eq!(memory.taken(), 0);
    });
}
