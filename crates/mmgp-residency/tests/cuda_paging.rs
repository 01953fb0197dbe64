//! Contract 1 on a GPU: one recipe, one result, whatever is resident, locked or staged.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::{Bias, Linear};
use mmgp_residency::{
    Budget, Bytes, Cuda, CudaOptions, Error, Files, ModelBuilder, Paged, Pager, Transfers,
};

mod common;
use common::{build, run, values, write};

const DEPTH: usize = 9;

fn open(options: &CudaOptions) -> Pager {
    Pager::over(Cuda::new(options).unwrap()).unwrap()
}

#[test]
fn every_plan_and_every_way_of_the_bytes_gives_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, DEPTH, 7);
    for compute in [DType::BF16, DType::F32] {
        let options = CudaOptions { compute, ..CudaOptions::default() };
        let resident = open(&options);
        let tower = build(&resident, "tower", &path, DEPTH);
        resident.plan(Budget::Unlimited).unwrap();
        let expected = run(&tower).unwrap();
        for locked in [0, 8 << 10, u64::MAX] {
            for (buffer, transfers) in
                [(1 << 16, Transfers::Overlapped), (1 << 20, Transfers::Synchronous)]
            {
                let options = CudaOptions {
                    transfers,
                    poisons: locked == 0,
                    locked: Some(Bytes(locked)),
                    buffers: 2,
                    buffer: Bytes(buffer),
                    ..options.clone()
                };
                for budget in [Budget::Min, Budget::Percent(60.), Budget::Percent(85.)] {
                    let pager = open(&options);
                    let tower = build(&pager, "tower", &path, DEPTH);
                    pager.plan(budget).unwrap();
                    for pass in 0..5 {
                        assert_eq!(run(&tower).unwrap(), expected, "{options:?} {budget} {pass}");
                    }
                    let report = pager.report();
                    assert!(report.peak <= report.budget, "{report}");
                }
            }
        }
    }
}

#[test]
fn in_steady_state_nothing_is_taken_and_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, DEPTH, 7);
    let pager = open(&CudaOptions::default());
    let tower = build(&pager, "tower", &path, DEPTH);
    pager.plan(Budget::Percent(60.)).unwrap();
    // A new plan takes slots and makes blocks ready to be copied; then there are passes without one.
    let steady = (0..40).find_map(|_| {
        run(&tower).unwrap();
        let before = pager.report();
        for _ in 0..10 {
            run(&tower).unwrap();
        }
        let after = pager.report();
        (after.replans == before.replans).then_some((before, after))
    });
    let (before, after) = steady.expect("ten passes under one plan");
    assert!(after.streamed > before.streamed);
    assert_eq!((after.taken, after.waits), (before.taken, before.waits), "{after:?}");
}

#[test]
fn the_gpu_computes_what_the_cpu_computes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, DEPTH, 5);
    let cpu = Pager::new(&Device::Cpu).unwrap();
    let expected = values(&build(&cpu, "tower", &path, DEPTH)).unwrap();
    for (compute, allowed) in [(DType::F32, 1e-5), (DType::BF16, 3e-2)] {
        let pager = open(&CudaOptions { compute, ..CudaOptions::default() });
        let got = values(&build(&pager, "tower", &path, DEPTH)).unwrap();
        let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
        let off: Vec<f32> = got.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let relative = norm(&off) / norm(&expected);
        println!("{compute:?}: {relative:e}");
        assert!(relative < allowed, "{compute:?}: {relative}");
    }
}

#[test]
fn locked_memory_is_what_was_booked_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, DEPTH, 3);
    let cuda = Cuda::new(&CudaOptions::default()).unwrap();
    let locked = cuda.locked_counter();
    let pager = Pager::over(cuda).unwrap();
    for _ in 0..20 {
        let tower = build(&pager, "tower", &path, DEPTH);
        pager.plan(Budget::Min).unwrap();
        run(&tower).unwrap();
        // Blocks stream through one slot, each kept in whole pages.
        assert_eq!(locked().0, DEPTH as u64 * 4096);
        drop(tower);
        assert_eq!(locked().0, 0);
    }
}

#[test]
fn weights_outside_a_lease_are_poison() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, 2, 3);
    let pager = open(&CudaOptions { poisons: true, ..CudaOptions::default() });
    let tower = build(&pager, "tower", &path, 2);
    let pass = tower.pass().unwrap();
    let escaped = pass.stem(|scale| Ok(scale.clone())).unwrap();
    assert!(escaped.to_dtype(DType::F32).is_ok());
    drop(pass);
    assert!(escaped.to_dtype(DType::F32).is_err());
    assert!((&escaped + 1.).is_err());
    run(&tower).unwrap();
    drop(tower);

    // Where bindings stay, they end with the model.
    let pager = open(&CudaOptions { poisons: false, ..CudaOptions::default() });
    let tower = build(&pager, "tower", &path, 2);
    let pass = tower.pass().unwrap();
    let escaped = pass.stem(|scale| Ok(scale.clone())).unwrap();
    drop(pass);
    assert!(escaped.to_dtype(DType::F32).is_ok());
    drop(tower);
    assert!(escaped.to_dtype(DType::F32).is_err());
}

#[test]
fn options_that_make_no_sense_are_refused() {
    for options in [
        CudaOptions { compute: DType::U8, ..CudaOptions::default() },
        CudaOptions { buffers: 1, ..CudaOptions::default() },
        CudaOptions { buffer: Bytes(1000), ..CudaOptions::default() },
    ] {
        assert!(matches!(Cuda::new(&options), Err(Error::Device(_))), "{options:?}");
    }
}

/// Layers whose weights are large enough to be copied from where their file lies.
fn wide(pager: &Pager, path: &Path, depth: usize) -> Paged<(), Linear> {
    let builder = ModelBuilder::new(pager, "wide", Arc::new(Checkpoint::open(path).unwrap()));
    let layer =
        |i: usize| builder.block(&format!("layers.{i}")).linear(WIDE, WIDE, Bias::Yes).unwrap();
    let layers = (0..depth).map(layer).collect();
    builder.finish((), layers).unwrap()
}

const WIDE: usize = 512;

#[test]
fn registered_and_copied_files_give_the_same_bits_and_all_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.safetensors");
    let weight =
        |i: usize| TensorSpec::new(format!("layers.{i}.weight"), Dtype::BF16, [WIDE, WIDE]);
    let bias = |i: usize| TensorSpec::new(format!("layers.{i}.bias"), Dtype::BF16, [WIDE]);
    let specs: Vec<TensorSpec> = (0..DEPTH).flat_map(|i| [bias(i), weight(i)]).collect();
    let mut writer = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    for (seed, spec) in specs.iter().enumerate() {
        let value = |i: usize| bf16::from_f32(((i * 7 + seed * 13) as f32).sin() * 0.05);
        let count = spec.shape.iter().product::<usize>();
        let bytes: Vec<u8> = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let pass = |model: &Paged<(), Linear>| {
        let device = model.pager().device().candle().clone();
        let mut x = Tensor::ones((3, WIDE), DType::BF16, &device).unwrap();
        for block in model.pass().unwrap().blocks() {
            x = block.unwrap().run(|layer| layer.forward(&x)?.tanh()).unwrap();
        }
        let x = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let resident = open(&CudaOptions::default());
    let expected = pass(&wide(&resident, &path, DEPTH));
    for files in [Files::Registered, Files::Copied] {
        let cuda = Cuda::new(&CudaOptions { files, ..CudaOptions::default() }).unwrap();
        let locked = cuda.locked_counter();
        let pager = Pager::over(cuda).unwrap();
        let model = wide(&pager, &path, DEPTH);
        pager.plan(Budget::Min).unwrap();
        for _ in 0..4 {
            assert_eq!(pass(&model), expected, "{files:?}");
        }
        let report = pager.report();
        // Registered, a block comes in three copies: whole pages of its weight, and what was gathered before
        // and behind them. All weights but the first begin inside a page that they share.
        let each = if files == Files::Registered { 3 } else { 1 };
        assert!(report.copies >= 3 * each * DEPTH as u64, "{files:?}: {report}");
        assert!(locked().0 >= (DEPTH * 2 * WIDE * WIDE) as u64, "{files:?}: {}", locked());
        drop(model);
        assert_eq!(locked(), Bytes(0), "{files:?}");
    }
}
