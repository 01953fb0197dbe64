//! Contract 4: what goes wrong is an error that names its place, and the pager goes on.
#![allow(clippy::unwrap_used)]

use std::{fs, sync::Arc, sync::atomic::Ordering};

use candle_core::{DType, Device};
use mmgp_io::Checkpoint;
use mmgp_residency::{Budget, Error, ModelBuilder, Pager, check_pageable};

mod common;
use common::{WIDTH, build, run, write};

#[test]
fn a_file_cut_short_after_it_was_opened_is_an_error_at_the_lease() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 4, 3);
    let whole = fs::read(&path).unwrap();
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 4);
    pager.plan(Budget::Min).unwrap();
    let expected = run(&tower).unwrap();

    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(whole.len() as u64 / 2)
        .unwrap();
    let error = run(&tower).unwrap_err();
    assert!(matches!(error, Error::Io(_)), "{error}");
    assert!(error.to_string().contains("a.safetensors"), "{error}");

    fs::write(&path, whole).unwrap();
    assert_eq!(run(&tower).unwrap(), expected, "the pager is as good as before");
}

#[test]
fn two_blocks_of_one_slot_cannot_be_leased_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 4, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 4);
    pager.plan(Budget::Min).unwrap();
    let pass = tower.pass().unwrap();
    let mut blocks = pass.blocks();
    let held = blocks.next().unwrap().unwrap();
    let error = blocks.next().unwrap().err().unwrap().to_string();
    assert!(error.contains("`layers.1`") && error.contains("`layers.0`"), "{error}");
    assert!(matches!(pager.plan(Budget::Min), Err(Error::Busy { .. })));
    drop(held);
}

#[test]
fn weights_outside_a_lease_are_poison() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 2, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 2);
    pager.plan(Budget::Unlimited).unwrap();
    let pass = tower.pass().unwrap();
    let escaped = pass.stem(|scale| Ok(scale.clone())).unwrap();
    assert_eq!(escaped.to_vec1::<f32>().unwrap().len(), WIDTH);
    drop(pass);
    assert!(escaped.to_vec1::<f32>().is_err());
    assert!((&escaped + 1.).is_err());
}

#[test]
fn cancelling_ends_the_pass_at_the_next_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 4, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 4);
    let pass = tower.pass().unwrap();
    let mut blocks = pass.blocks();
    drop(blocks.next().unwrap().unwrap());
    pager.cancel_flag().store(true, Ordering::Relaxed);
    assert!(matches!(blocks.next().unwrap().err().unwrap(), Error::Cancelled));
    pager.cancel_flag().store(false, Ordering::Relaxed);
    drop(pass);
    run(&tower).unwrap();
}

#[test]
fn constructors_that_compute_on_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 2, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    check_pageable(&pager, "fine", checkpoint.clone(), DType::F32, |vb| {
        candle_nn::linear_no_bias(WIDTH, WIDTH, vb.pp("layers.0.up"))
    })
    .unwrap();
    let error = check_pageable(&pager, "folds", checkpoint.clone(), DType::F32, |vb| {
        vb.get(WIDTH, "scale")?.exp()
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`folds`") && error.contains("`scale`"), "{error}");

    let builder = ModelBuilder::new(&pager, "wrong", checkpoint);
    let error = builder.stem().tensor(&[WIDTH + 1], "scale").unwrap_err().to_string();
    assert!(
        error.contains("a.safetensors") && error.contains("[25]") && error.contains("[24]"),
        "{error}"
    );
    let error = builder.stem().tensor(&[WIDTH], "scales").unwrap_err().to_string();
    assert!(error.contains("`scales`") && error.contains("a.safetensors"), "{error}");
}
