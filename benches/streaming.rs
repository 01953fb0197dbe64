//! A pass over a tower of linear layers that streams through a budget, against the pass over the
//! same tower resident.
//!
//! The file is in the operating system's memory, so this is the cost of paging itself: copies that
//! share two cores and their memory with the product.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{hint::black_box, path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use mmgp_benches::{compare, random, settings, write_random};
use mmgp_io::Checkpoint;
use mmgp_quant::{Bias, Linear};
use mmgp_residency::{Budget, Bytes, ModelBuilder, Paged, Pager, Result};

const WIDTH: usize = 1536;
const INNER: usize = 4 * WIDTH;
const DEPTH: usize = 8;

type Tower = Paged<(), (Linear, Linear)>;

fn tower(path: &Path) -> Tower {
    let pager = Pager::new(&Device::Cpu).unwrap();
    let builder = ModelBuilder::new(&pager, "tower", Arc::new(Checkpoint::open(path).unwrap()));
    let block = |i: usize| {
        let w = builder.block(&format!("blocks.{i}"));
        let up = w.pp("up").linear(WIDTH, INNER, Bias::No).unwrap();
        (up, w.pp("down").linear(INNER, WIDTH, Bias::No).unwrap())
    };
    let blocks = (0..DEPTH).map(block).collect();
    builder.finish((), blocks).unwrap()
}

fn pass(tower: &Tower, x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for block in tower.pass()?.blocks() {
        // The scale keeps values of the same size from block to block.
        x = block?.run(|(up, down)| down.forward(&up.forward(&x)?)? * 3e-4)?;
    }
    Ok(x)
}

fn streaming(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let tensors: Vec<_> = (0..DEPTH)
        .flat_map(|i| {
            [
                (format!("blocks.{i}.up.weight"), vec![INNER, WIDTH]),
                (format!("blocks.{i}.down.weight"), vec![WIDTH, INNER]),
            ]
        })
        .collect();
    write_random(&path, &tensors).unwrap();

    let (resident, paged) = (tower(&path), tower(&path));
    resident.pager().plan(Budget::Unlimited).unwrap();
    let block = paged.pager().plan(Budget::Min).unwrap().minimum.0;
    for tokens in [64, 512] {
        let x = Tensor::from_vec(random(tokens * WIDTH, 5), (tokens, WIDTH), &Device::Cpu).unwrap();
        for (name, budget) in [
            ("min", Budget::Min),
            ("two-slots", Budget::Bytes(Bytes(2 * block))),
            ("half", Budget::Percent(50.)),
        ] {
            paged.pager().plan(budget).unwrap();
            // The first pass reads what stays, the second learns that passes repeat.
            for _ in 0..2 {
                let bits = |x: Tensor| x.to_vec2::<f32>().unwrap();
                assert_eq!(bits(pass(&paged, &x).unwrap()), bits(pass(&resident, &x).unwrap()));
            }
            let ours = || drop(black_box(pass(&paged, &x).unwrap()));
            let reference = || drop(black_box(pass(&resident, &x).unwrap()));
            compare(c, &format!("streaming-{tokens}-{name}"), None, ours, reference).unwrap();
        }
    }
}

criterion_group!(name = benches; config = settings(); targets = streaming);
criterion_main!(benches);
