//! Opening a checkpoint of 2000 tensors, header parsed and validated, against the safetensors crate
//! on the bytes of the same file.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{Criterion, criterion_group, criterion_main};
use mmgp_benches::{compare, settings, write_random};
use mmgp_io::Checkpoint;
use safetensors::SafeTensors;

const TENSORS: usize = 2000;

fn header(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let name = |i: usize| format!("transformer_blocks.{}.attn.to_q.{}.weight", i / 20, i % 20);
    let tensors: Vec<_> = (0..TENSORS).map(|i| (name(i), vec![2, 2])).collect();
    write_random(&path, &tensors).unwrap();

    let ours = || assert_eq!(Checkpoint::open(&path).unwrap().len(), TENSORS);
    let reference = || {
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), TENSORS);
    };
    compare(c, "header", None, ours, reference).unwrap();
}

criterion_group!(name = benches; config = settings(); targets = header);
criterion_main!(benches);
