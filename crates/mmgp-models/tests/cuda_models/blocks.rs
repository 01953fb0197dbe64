//! Blocks on a GPU, where products write where attention reads and attention beside them, and what the CPU computes. These
//! tests fail where no CUDA device can be opened.

use candle_core::{DType, Device, Tensor};
use mmgp_models::nn::{DoubleBlock, Heads, Joint, Rope, SingleBlock, TextPlace, cuda};
use mmgp_quant::{MemorySource, SharedInput, Weights};

use crate::gpu;

/// Numbers that are the same in each run, about normal.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as f32 / (1u64 << 31) as f32 - 0.5
    }

    /// Values of about `size`, rounded to bf16, f32 on the CPU.
    fn tensor(&mut self, shape: &[usize], size: f64) -> Tensor {
        let len: usize = shape.iter().product();
        let values = (0..len).map(|_| 1.7 * (0..4).map(|_| self.next()).sum::<f32>()).collect();
        let t = (Tensor::from_vec(values, shape, &Device::Cpu).unwrap() * size).unwrap();
        t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
    }
}

/// Tensors by their names below a block.
struct Named(Vec<(String, Tensor)>);

impl Named {
    fn linear(&mut self, random: &mut Random, name: &str, inputs: usize, outputs: usize) {
        let weight = random.tensor(&[outputs, inputs], (inputs as f64).powf(-0.5));
        self.0.push((format!("{name}.weight"), weight));
        self.0.push((format!("{name}.bias"), random.tensor(&[outputs], 0.2)));
    }

    fn norm(&mut self, random: &mut Random, name: &str, dim: usize) {
        let weight = (random.tensor(&[dim], 0.1) + 1.).unwrap();
        self.0.push((format!("{name}.weight"), weight));
    }

    fn on(&self, device: &Device, dtype: DType) -> Weights {
        let mut source = MemorySource::new(device).computing_in(dtype);
        for (name, tensor) in &self.0 {
            source = source.with(name, tensor.to_dtype(dtype).unwrap().to_device(device).unwrap());
        }
        Weights::new(source)
    }
}

fn single(random: &mut Random, heads: Heads) -> Named {
    let (mut all, width) = (Named(Vec::new()), heads.width());
    all.linear(random, "norm.linear", width, 3 * width);
    for name in ["attn.to_q", "attn.to_k", "attn.to_v"] {
        all.linear(random, name, width, width);
    }
    all.linear(random, "proj_mlp", width, 4 * width);
    all.linear(random, "proj_out", 5 * width, width);
    all.norm(random, "attn.norm_q", heads.dim);
    all.norm(random, "attn.norm_k", heads.dim);
    all
}

fn double(random: &mut Random, heads: Heads) -> Named {
    let (mut all, width) = (Named(Vec::new()), heads.width());
    for (norm, ff) in [("norm1", "ff"), ("norm1_context", "ff_context")] {
        all.linear(random, &format!("{norm}.linear"), width, 6 * width);
        all.linear(random, &format!("{ff}.net.0.proj"), width, 4 * width);
        all.linear(random, &format!("{ff}.net.2"), 4 * width, width);
    }
    for name in ["to_q", "to_k", "to_v", "to_out.0", "to_add_out"] {
        all.linear(random, &format!("attn.{name}"), width, width);
    }
    for name in ["add_q_proj", "add_k_proj", "add_v_proj"] {
        all.linear(random, &format!("attn.{name}"), width, width);
    }
    for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
        all.norm(random, &format!("attn.{name}"), heads.dim);
    }
    all
}

fn values(t: &Tensor) -> Vec<f32> {
    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Relative error.
fn error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (mut off, mut all) = (0., 0.);
    for (got, want) in values(got).into_iter().zip(values(want)) {
        off += f64::from(got - want).powi(2);
        all += f64::from(want).powi(2);
    }
    (off / all).sqrt()
}

#[test]
fn cuda_blocks_are_near_the_cpu() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    let mut random = Random(7);
    for (batch, text, image, heads) in [
        (1, 20, 70, Heads { count: 2, dim: 64 }),
        (2, 33, 130, Heads { count: 3, dim: 128 }),
        (1, 5, 4, Heads { count: 2, dim: 24 }),
    ] {
        let (width, tokens) = (heads.width(), text + image);
        let (singles, doubles) = (single(&mut random, heads), double(&mut random, heads));
        let [x, y] = [image, text].map(|n| random.tensor(&[batch, n, width], 1.));
        let activated = random.tensor(&[batch, width], 0.5);
        let ids = (random.tensor(&[tokens, 1], 40.)).round().unwrap();
        let (same, other) = (vec![tokens - 2; batch], (0..batch).map(|i| tokens - i).collect());
        let places: [&dyn Fn() -> Option<Vec<usize>>; 3] =
            [&|| None, &|| Some(same.clone()), &|| Some(Vec::clone(&other))];
        for place in places {
            let lengths = place();
            let run = |device: &Device, dtype: DType| {
                let moved = |t: &Tensor| t.to_dtype(dtype).unwrap().to_device(device).unwrap();
                let rope = Rope::new(&ids, &[heads.dim], 10_000., device).unwrap();
                let joint = Joint {
                    activated: &SharedInput::new(moved(&activated)),
                    rope: &rope,
                    text: lengths.as_deref().map_or(TextPlace::First, TextPlace::Last),
                };
                let block = DoubleBlock::new(heads, &doubles.on(device, dtype)).unwrap();
                let (image, text) = block.forward(&moved(&x), &moved(&y), &joint).unwrap();
                let all = match joint.text {
                    TextPlace::First => Tensor::cat(&[&text, &image], 1).unwrap(),
                    TextPlace::Last(_) => Tensor::cat(&[&image, &text], 1).unwrap(),
                };
                let block = SingleBlock::new(heads, &singles.on(device, dtype)).unwrap();
                [block.forward(&all, &joint).unwrap(), image, text]
            };
            let want = run(&Device::Cpu, DType::F32);
            cuda::enable(&device);
            cuda::enable_attention(&device);
            let (got, again) = (run(&there, DType::BF16), run(&there, DType::BF16));
            cuda::disable(&device);
            for ((got, again), want) in got.iter().zip(&again).zip(&want) {
                let off = error(got, want);
                println!("{batch} of {text} + {image} tokens, {heads:?}: off by {off:.4}");
                assert!(off < 0.02, "{heads:?}, {text} + {image} tokens: off by {off}");
                assert!(values(got) == values(again), "other bits");
            }
        }
    }
}
