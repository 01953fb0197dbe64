//! Making a block image: a host slot filled from a file that the operating system has in memory,
//! against a copy of as many bytes as the slot then holds.
//!
//! The block is a double block of FLUX at half its width, far larger than any cache.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use candle_core::DType;
use criterion::{Criterion, criterion_group, criterion_main};
use mmgp_benches::{compare, random, settings, write_random};
use mmgp_io::Checkpoint;
use mmgp_residency::{BlockImage, Bytes, Device, Host, ImageTensor, Making, Occupancy, Segment};

const WIDTH: usize = 1536;

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = Vec::new();
    for stream in ["", "_context"] {
        for (name, outputs, inputs) in [
            ("norm1.linear", 6 * WIDTH, WIDTH),
            ("attn.to_q", WIDTH, WIDTH),
            ("attn.to_k", WIDTH, WIDTH),
            ("attn.to_v", WIDTH, WIDTH),
            ("attn.to_out", WIDTH, WIDTH),
            ("ff.net.0.proj", 4 * WIDTH, WIDTH),
            ("ff.net.2", WIDTH, 4 * WIDTH),
        ] {
            tensors.push((format!("{name}{stream}.weight"), vec![outputs, inputs]));
            tensors.push((format!("{name}{stream}.bias"), vec![outputs]));
        }
    }
    tensors
}

fn block(checkpoint: &Checkpoint, dtype: DType) -> BlockImage {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let source = checkpoint.tensor(&name).unwrap().clone();
        ImageTensor {
            name,
            dtype,
            shape,
            offset: 0,
            segments: vec![Segment { source, element: 0, stride: None }],
            making: Making::Values,
        }
    };
    BlockImage::new("block".into(), tensors().into_iter().map(tensor).collect())
}

fn image(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    write_random(&path, &tensors()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let host = Host::new().unwrap();

    for (name, dtype) in [("image-bf16", DType::BF16), ("image-f32", DType::F32)] {
        let image = block(&checkpoint, dtype);
        let mut slot = host.slot(Bytes(image.bytes), Occupancy::Alone).unwrap();
        let from = random(image.bytes as usize / 4, 7);
        let mut to = random(from.len(), 8);
        let ours = || {
            slot.fill(&image).unwrap();
        };
        let reference = || black_box(&mut to).copy_from_slice(black_box(&from));
        compare(c, name, Some(image.bytes), ours, reference).unwrap();
    }
}

criterion_group!(name = benches; config = settings(); targets = image);
criterion_main!(benches);
