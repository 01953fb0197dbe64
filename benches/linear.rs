//! `Linear` with a bf16 weight on the CPU, against the tensor library's own products: in f32, which
//! needs the weight at twice its bytes, and in bf16.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use mmgp_benches::{compare, random, settings};
use mmgp_quant::{Bias, MemorySource, Weights};

const INPUTS: usize = 1536;
const OUTPUTS: usize = 6144;

fn linear(c: &mut Criterion) {
    let dev = Device::Cpu;
    let weight = Tensor::from_vec(random(OUTPUTS * INPUTS, 1), (OUTPUTS, INPUTS), &dev).unwrap();
    let half = weight.to_dtype(DType::BF16).unwrap();
    let source = MemorySource::new(&dev).with("weight", half.clone());
    let layer = Weights::new(source).linear(INPUTS, OUTPUTS, Bias::No).unwrap();
    for tokens in [64, 512] {
        let x = Tensor::from_vec(random(tokens * INPUTS, 2), (tokens, INPUTS), &dev).unwrap();
        let narrow = x.to_dtype(DType::BF16).unwrap();
        let ours = || drop(black_box(layer.forward(&x).unwrap()));
        let f32 = || drop(black_box(x.matmul(&weight.t().unwrap()).unwrap()));
        let bf16 = || drop(black_box(narrow.matmul(&half.t().unwrap()).unwrap()));
        compare(c, &format!("linear-{tokens}-f32"), None, ours, f32).unwrap();
        compare(c, &format!("linear-{tokens}-bf16"), None, ours, bf16).unwrap();
    }
}

criterion_group!(name = benches; config = settings(); targets = linear);
criterion_main!(benches);
