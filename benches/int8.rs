//! int8: making it against memcpy, stepping with it against bf16, writing it and starting from it
//! against moving the same bytes.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    hint::black_box,
    io::{Read, Write},
    path::Path,
    sync::Arc,
};

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use mmgp_benches::{compare, random, settings, write_random};
use mmgp_io::{Checkpoint, Overwrite};
use mmgp_quant::{Bias, Linear, QuantPolicy, quantize};
use mmgp_residency::{Budget, ModelBuilder, Paged, Pager};
use rayon::prelude::*;

const BLOCKS: usize = 8;
const WIDTH: usize = 1536;
const PIECE: usize = 8 << 20;

type Tower = Paged<(), [Linear; 2]>;

fn tower(pager: &Pager, path: &Path, prepare: impl FnOnce(&mut ModelBuilder)) -> Tower {
    let mut builder = ModelBuilder::new(pager, "tower", Arc::new(Checkpoint::open(path).unwrap()));
    prepare(&mut builder);
    let block = |i: usize| {
        let w = builder.block(&format!("blocks.{i}"));
        let layer = |name: &str, from, to| w.pp(name).linear(from, to, Bias::No).unwrap();
        [layer("up", WIDTH, 4 * WIDTH), layer("down", 4 * WIDTH, WIDTH)]
    };
    let blocks = (0..BLOCKS).map(block).collect();
    builder.finish((), blocks).unwrap()
}

fn pass(tower: &Tower, x: &Tensor) {
    let mut x = x.clone();
    for block in tower.pass().unwrap().blocks() {
        x = block.unwrap().run(|[up, down]| down.forward(&up.forward(&x)?)).unwrap();
    }
    black_box(x);
}

/// Reads a file in pieces into memory that is kept, as a start does.
fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(fs::metadata(path).unwrap().len() as usize);
    fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn int8(c: &mut Criterion) {
    let weight: Vec<bf16> = random(32 << 20, 1).into_iter().map(bf16::from_f32).collect();
    let bytes = 2 * weight.len() as u64;
    let (mut codes, mut copy) = (vec![0u8; weight.len()], weight.clone());
    let mut scales = vec![bf16::ZERO; weight.len() / 4096];
    let ours = || quantize(&weight, 4096, &mut codes, &mut scales).unwrap();
    let memcpy = || {
        let pieces = copy.par_chunks_mut(PIECE / 2).zip(weight.par_chunks(PIECE / 2));
        pieces.for_each(|(to, from)| to.copy_from_slice(from));
    };
    compare(c, "int8-quantize", Some(bytes), ours, memcpy).unwrap();
    drop((weight, copy, codes, scales));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    let shapes = |i: usize| {
        [
            (format!("blocks.{i}.up.weight"), vec![4 * WIDTH, WIDTH]),
            (format!("blocks.{i}.down.weight"), vec![WIDTH, 4 * WIDTH]),
        ]
    };
    write_random(&path, &(0..BLOCKS).flat_map(shapes).collect::<Vec<_>>()).unwrap();
    let quantized = |builder: &mut ModelBuilder| builder.quantize(QuantPolicy::default());
    let pager = Pager::new(&Device::Cpu).unwrap();
    let (dense, int8) = (tower(&pager, &path, |_| ()), tower(&pager, &path, quantized));
    pager.plan(Budget::Unlimited).unwrap();
    for tokens in [64, 512] {
        let x = random(tokens * WIDTH, 3);
        let x = Tensor::from_vec(x, (tokens, WIDTH), &Device::Cpu).unwrap();
        pass(&dense, &x);
        pass(&int8, &x);
        compare(c, &format!("int8-step-{tokens}"), None, || pass(&int8, &x), || pass(&dense, &x))
            .unwrap();
    }
    drop((dense, int8));

    // Read, quantize, write, sync; against reading and writing as many bytes.
    let making = Pager::new(&Device::Cpu).unwrap();
    let _int8 = tower(&making, &path, quantized);
    let (saved, other) = (dir.path().join("saved.safetensors"), dir.path().join("other"));
    let save = || {
        making.save("tower", &saved, &BTreeMap::new(), Overwrite::Yes).unwrap();
    };
    let source = fs::metadata(&path).unwrap().len();
    let mut piece = vec![0; PIECE];
    let move_bytes = || {
        let mut from = fs::File::open(&path).unwrap();
        let mut to = fs::File::create(&other).unwrap();
        loop {
            let len = from.read(&mut piece).unwrap();
            if len == 0 {
                break;
            }
            to.write_all(&piece[..len / 2]).unwrap();
        }
        to.sync_all().unwrap();
    };
    compare(c, "int8-write", Some(source), save, move_bytes).unwrap();

    making.save("tower", &saved, &BTreeMap::new(), Overwrite::Yes).unwrap();
    let reading = Pager::new(&Device::Cpu).unwrap();
    let _saved = tower(&reading, &saved, |_| ());
    let digests = reading.digests("tower").unwrap();
    let start = || {
        let pager = Pager::new(&Device::Cpu).unwrap();
        let tower = tower(&pager, &saved, |builder| builder.expect(digests.clone()));
        pager.plan(Budget::Unlimited).unwrap();
        for block in tower.pass().unwrap().blocks() {
            drop(block.unwrap());
        }
    };
    let length = fs::metadata(&saved).unwrap().len();
    compare(c, "int8-start", Some(length), start, || drop(black_box(read(&saved)))).unwrap();
}

criterion_group!(name = benches; config = settings(); targets = int8);
criterion_main!(benches);
