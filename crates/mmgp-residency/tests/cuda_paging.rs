//! Contract 1 on a GPU: one recipe, one result, whatever is resident, locked or staged.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device};
use mmgp_residency::{Budget, Bytes, Cuda, CudaOptions, Error, Pager, Transfers};

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
    let pager = open(&CudaOptions::default());
    let tower = build(&pager, "tower", &path, 2);
    let pass = tower.pass().unwrap();
    let escaped = pass.stem(|scale| Ok(scale.clone())).unwrap();
    assert!(escaped.to_dtype(DType::F32).is_ok());
    drop(pass);
    assert!(escaped.to_dtype(DType::F32).is_err());
    assert!((&escaped + 1.).is_err());
    run(&tower).unwrap();
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
