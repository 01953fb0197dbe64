//! The GPU's kernels behind the functions of `nn`: what the CPU computes, over random shapes and dtypes, and how
//! long they take beside the tensor library's own operations (`--nocapture`). These tests fail where no CUDA
//! device can be opened.

use std::time::Instant;

use candle_core::{CudaDevice, D, DType, Device, Result, Tensor};
use mmgp_models::nn::{
    self, Activation, Conv2d, GroupNorm, HeadRows, Heads, LayerNorm, Projected, RmsNorm, Rope,
    Window, cuda,
};
use mmgp_quant::{Bias, Input, MemorySource, Weights};

use crate::gpu;

const EPS: f64 = 1e-6;
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn of(&mut self, choices: &[usize]) -> usize {
        choices[self.next() as usize % choices.len()]
    }

    /// About normal, rounded to `dtype`, f32 on the CPU.
    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let len: usize = shape.iter().product();
        let mut value =
            || (0..4).map(|_| self.next() as f32 / (1u64 << 31) as f32 - 0.5).sum::<f32>();
        let values: Vec<f32> = (0..len).map(|_| 1.7 * value()).collect();
        let t = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        t.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
    }
}

/// The values of `t` with at least 0.5 added to their sizes, of alternating signs: a norm of a few values that
/// happen to lie side by side would multiply the last bits of their mean.
fn apart(t: &Tensor, dtype: DType) -> Tensor {
    let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let sign = |i: usize| if i.is_multiple_of(2) { 1. } else { -1. };
    let values = values.iter().enumerate().map(|(i, v)| sign(i) * (v.abs() + 0.5)).collect();
    let t = Tensor::from_vec(values, t.dims(), &Device::Cpu).unwrap();
    t.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

fn weights(device: &Device, dtype: DType, all: &[(&str, &Tensor)]) -> Weights {
    let mut source = MemorySource::new(device).computing_in(dtype);
    for (name, tensor) in all {
        source = source.with(*name, tensor.to_dtype(dtype).unwrap().to_device(device).unwrap());
    }
    Weights::new(source)
}

/// Half a unit of the dtype's last place, which is its rounding: at most 2⁻⁸, 2⁻¹¹ and 2⁻²⁴ of a value. Of f32
/// operations in another order, a hundred times what they cost.
fn near(what: &str, got: &Tensor, want: &Tensor, dtype: DType) {
    assert_eq!((got.dims(), got.dtype()), (want.dims(), dtype), "{what}");
    let rounding = match dtype {
        DType::BF16 => 2f32.powi(-8),
        DType::F16 => 2f32.powi(-11),
        _ => 2f32.powi(-24),
    };
    let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (at, (got, want)) in values(&got).into_iter().zip(values(want)).enumerate() {
        let allowed = rounding * want.abs() + 1e-5 * (1. + want.abs());
        let error = (got - want).abs();
        assert!(error <= allowed, "{what}, {dtype:?}, element {at}: {got} for {want}");
    }
}

/// Runs `f` on the CPU and, twice, on the GPU with its kernels, which must give the same bits.
fn twins(
    device: &CudaDevice,
    what: &str,
    dtype: DType,
    inputs: &[Tensor],
    f: impl Fn(&Device, DType, &[Tensor]) -> Result<Tensor>,
) {
    let want = f(&Device::Cpu, DType::F32, inputs).unwrap();
    let there = Device::Cuda(device.clone());
    let moved: Vec<Tensor> =
        inputs.iter().map(|t| t.to_dtype(dtype).unwrap().to_device(&there).unwrap()).collect();
    cuda::enable(device);
    let shapes: Vec<&[usize]> = inputs.iter().map(Tensor::dims).collect();
    let got = f(&there, dtype, &moved).unwrap();
    let again = f(&there, dtype, &moved).unwrap();
    cuda::disable(device);
    near(&format!("{what} of {shapes:?}"), &got, &want, dtype);
    let bits = |t: &Tensor| {
        let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert!(bits(&got) == bits(&again), "{what} of {shapes:?}, {dtype:?}: other bits");
}

const WIDTHS: [usize; 12] = [1, 2, 7, 12, 31, 44, 64, 128, 1000, 3072, 3073, 5120];

#[test]
fn cuda_nn_self_test_passes_and_decides_nothing() {
    let (device, _guard) = gpu();
    cuda::disable(&device);
    cuda::self_test(&device).unwrap();
    assert!(!cuda::enabled(&device));
    // With event tracking, as a library's user may have it.
    let tracking = CudaDevice::new_with_stream(0).unwrap();
    cuda::self_test(&tracking).unwrap();
    assert_eq!(cuda::kernel_image()[..4], 0xba55_ed50u32.to_le_bytes());
}

#[test]
fn cuda_norms_equal_the_cpu() {
    let (device, _guard) = gpu();
    let mut random = Random(1);
    for dtype in DTYPES {
        for width in WIDTHS {
            let (batch, tokens) = (random.of(&[1, 2, 3]), random.of(&[1, 2, 5, 77]));
            let x = apart(&random.tensor(&[batch, tokens, width], dtype), dtype);
            let mods = random.tensor(&[batch, 3 * width], dtype);
            let (w, b) = (random.tensor(&[width], dtype), random.tensor(&[width], dtype));
            let part = move |t: &Tensor, i: usize| t.narrow(1, i * width, width);
            twins(&device, "layer_norm_modulated", dtype, &[x.clone(), mods.clone()], |_, _, t| {
                nn::layer_norm_modulated(&t[0], &part(&t[1], 2)?, &part(&t[1], 0)?, EPS)
            });
            let all = [x.clone(), mods, w, b];
            twins(&device, "modulated weights", dtype, &all, |device, dtype, t| {
                let all = [("weight", &t[2]), ("bias", &t[3])];
                let norm = LayerNorm::new(&weights(device, dtype, &all), width, EPS).unwrap();
                norm.forward_modulated(&t[0], &part(&t[1], 2)?, &part(&t[1], 0)?)
            });
            twins(&device, "layer_norm", dtype, &all, |device, dtype, t| {
                let all = [("weight", &t[2]), ("bias", &t[3])];
                let norm = LayerNorm::new(&weights(device, dtype, &all), width, EPS).unwrap();
                norm.forward(&t[0].transpose(0, 1)?)
            });
            twins(&device, "rms_norm", dtype, &all, |device, dtype, t| {
                let all = [("weight", &t[2])];
                RmsNorm::new(&weights(device, dtype, &all), width, EPS).unwrap().forward(&t[0])
            });
        }
    }
}

#[test]
fn cuda_heads_equal_the_cpu() {
    let (device, _guard) = gpu();
    let mut random = Random(2);
    for dtype in DTYPES {
        for dim in [2, 6, 10, 44, 64, 72, 128, 130, 256, 512] {
            let heads = Heads { count: random.of(&[1, 2, 3, 24]), dim };
            let (text, image) = (random.of(&[1, 5, 33]), random.of(&[1, 7, 64]));
            let (batch, first) = (random.of(&[1, 2]), random.of(&[0, 3, 8]));
            let a = random.tensor(&[batch, text, first + heads.width() + 3], dtype);
            let a = apart(&a, dtype);
            let b = apart(&random.tensor(&[batch, image, first + heads.width()], dtype), dtype);
            let w = random.tensor(&[dim], dtype);
            let ids = random.tensor(&[text + image, 1], DType::F32).affine(50., 0.).unwrap();
            for (normed, turned) in [(false, false), (false, true), (true, false), (true, true)] {
                let all = [a.clone(), b.clone(), w.clone()];
                twins(&device, "heads", dtype, &all, |device, dtype, t| {
                    let weights = weights(device, dtype, &[("weight", &t[2])]);
                    let norm = RmsNorm::new(&weights, dim, EPS).unwrap();
                    let rope = Rope::new(&ids, &[dim], 10_000., device)?;
                    let (before, behind) = (rope.narrow(0, text)?, rope.narrow(text, image)?);
                    let part = |rows, rope| HeadRows {
                        rows,
                        first,
                        norm: normed.then_some(&norm),
                        rope: turned.then_some(rope),
                    };
                    heads.join(&[part(&t[0], &before), part(&t[1], &behind)])
                });
            }
            let q = random.tensor(&[batch, heads.count, text, dim], dtype);
            twins(&device, "attention", DType::F32, &[q], |_, _, t| {
                nn::attention(&t[0], &t[0], &t[0], 0.01, &[]) // its result goes through merge
            });
        }
    }
}

#[test]
fn cuda_gates_and_activations_equal_the_cpu() {
    let (device, _guard) = gpu();
    let mut random = Random(3);
    for dtype in DTYPES {
        for width in WIDTHS {
            let (batch, tokens) = (random.of(&[1, 2, 3]), random.of(&[1, 2, 5, 77]));
            let x = random.tensor(&[batch, tokens, width], dtype);
            let y = random.tensor(&[batch, tokens + 3, width], dtype);
            let gate = random.tensor(&[batch, 2 * width], dtype);
            twins(&device, "gated_add", dtype, &[x.clone(), y, gate], |_, _, t| {
                let gate = t[2].narrow(1, width, width)?;
                nn::gated_add(&t[0], &t[1].narrow(1, 3, tokens)?, &gate)
            });
            let both = random.tensor(&[batch, tokens, 2 * width], dtype);
            for function in [
                Activation::Relu,
                Activation::Gelu,
                Activation::GeluTanh,
                Activation::QuickGelu,
                Activation::Silu,
            ] {
                let name = format!("{function:?}");
                let all = [x.clone(), both.clone()];
                twins(&device, &name, dtype, &all, |_, _, t| function.apply(&t[0]));
                twins(&device, &name, dtype, &all, |_, _, t| {
                    let half = |i: usize| t[1].narrow(D::Minus1, i * width, width);
                    function.apply_times(&half(0)?.contiguous()?, &half(1)?.contiguous()?)
                });
            }
        }
    }
}

/// Within products or behind them: to what the dtype's rounding before GELU, and a tanh off by 2^-10, may cost.
#[test]
fn cuda_gelu_of_a_layer_is_near_the_cpu() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    let mut random = Random(5);
    for dtype in DTYPES {
        for (batch, tokens, own, inputs, outputs) in
            [(1, 77, 24, 64, 96), (2, 5, 128, 512, 256), (1, 3, 7, 12, 31), (1, 130, 8, 40, 16)]
        {
            let x = random.tensor(&[batch, tokens, inputs], dtype);
            let a = random.tensor(&[batch, tokens, own], dtype);
            let w = random.tensor(&[outputs, inputs], dtype);
            let w = (w / (inputs as f64).sqrt()).unwrap().to_dtype(dtype).unwrap();
            let (w, b) = (w.to_dtype(DType::F32).unwrap(), random.tensor(&[outputs], dtype));
            let layer = |device: &Device, dtype| {
                let weights = weights(device, dtype, &[("weight", &w), ("bias", &b)]);
                weights.linear(inputs, outputs, Bias::Yes).unwrap()
            };
            let (here, layer_there) = (layer(&Device::Cpu, DType::F32), layer(&there, dtype));
            let moved = |t: &Tensor| t.to_dtype(dtype).unwrap().to_device(&there).unwrap();
            cuda::enable(&device);
            let joined = nn::join_gelu(&moved(&a), &layer_there, &moved(&x).into()).unwrap();
            let alone = Activation::GeluTanh.of(&layer_there, &moved(&x).into()).unwrap();
            let again = nn::join_gelu(&moved(&a), &layer_there, &moved(&x).into()).unwrap();
            cuda::disable(&device);
            let values = |t: &Tensor| {
                let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert!(values(&joined) == values(&again), "other bits");
            let before = here.forward(&x).unwrap();
            let want = before.gelu().unwrap();
            let beside = joined.narrow(2, own, outputs).unwrap();
            assert_eq!(values(&joined.narrow(2, 0, own).unwrap()), values(&a));
            let rounding = match dtype {
                DType::BF16 => 2f32.powi(-8),
                DType::F16 => 2f32.powi(-11),
                _ => 2f32.powi(-20),
            };
            let card = if dtype == DType::F32 { 0. } else { 2f32.powi(-10) };
            // The library may take another algorithm where rows lie further apart, and adds the bias to a rounded product where it
            // does not do that within.
            let (mut most, biases) = (0f32, values(&b));
            for found in [&alone, &beside] {
                let wanted = values(&want).into_iter().zip(values(&before));
                let wanted = wanted.zip(biases.iter().cycle());
                for (got, ((want, before), bias)) in values(found).into_iter().zip(wanted) {
                    let allowed = (2.2 * rounding + card) * (before.abs() + bias.abs()) + 1e-5;
                    let error = (got - want).abs();
                    most = most.max(error);
                    assert!(error <= allowed, "{tokens} of {inputs}, {dtype:?}: {got} for {want}");
                }
            }
            println!("GELU of [{tokens}, {inputs}] to {outputs}, {dtype:?}: off by {most:.1e}");
        }
    }
}

/// Queries, keys and values of one stream and of two, which products write into one tensor where they may, are what they
/// are apart.
#[test]
fn cuda_projections_are_near_the_cpu() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    let mut random = Random(6);
    for dtype in DTYPES {
        for (batch, lengths, count, dim) in [
            (1, vec![9], 2, 64),
            (1, vec![5, 70], 3, 128),
            (2, vec![6], 2, 128),
            (2, vec![3, 4], 2, 64),
            (1, vec![4, 8], 2, 6),
        ] {
            let heads = Heads { count, dim };
            let (width, inputs) = (heads.width(), 32);
            let total: usize = lengths.iter().sum();
            let ids = (random.tensor(&[total, 1], DType::F32) * 50.).unwrap();
            let ids = ids.round().unwrap();
            let streams: Vec<[Tensor; 5]> = lengths
                .iter()
                .map(|&tokens| {
                    let w = random.tensor(&[3 * width, inputs], dtype);
                    let x = apart(&random.tensor(&[batch, tokens, inputs], dtype), dtype);
                    let bias = apart(&random.tensor(&[3 * width], dtype), dtype);
                    [x, w, bias, random.tensor(&[dim], dtype), random.tensor(&[dim], dtype)]
                })
                .collect();
            let run = |device: &Device, dtype: DType| {
                let rope = Rope::new(&ids, &[dim], 10_000., device).unwrap();
                let mut made = Vec::new();
                let mut first = 0;
                for ([x, w, bias, q, k], &tokens) in streams.iter().zip(&lengths) {
                    let all = [("weight", w), ("bias", bias)];
                    let linear = weights(device, dtype, &all).linear(inputs, 3 * width, Bias::Yes);
                    let norm = |weight: &Tensor| {
                        RmsNorm::new(&weights(device, dtype, &[("weight", weight)]), dim, EPS)
                    };
                    let x = Input::from(x.to_dtype(dtype).unwrap().to_device(device).unwrap());
                    let rope = rope.narrow(first, tokens).unwrap();
                    first += tokens;
                    made.push((x, linear.unwrap(), norm(q).unwrap(), norm(k).unwrap(), rope));
                }
                let streams: Vec<Projected<'_>> = made
                    .iter()
                    .map(|(x, linear, q, k, rope)| Projected { linear, x, norms: [q, k], rope })
                    .collect();
                heads.project(&streams).unwrap()
            };
            let want = run(&Device::Cpu, DType::F32);
            cuda::enable(&device);
            let got = run(&there, dtype);
            cuda::disable(&device);
            let apart = run(&there, dtype);
            for ((got, want), apart) in got.iter().zip(&want).zip(&apart) {
                assert_eq!((got.dims(), got.dtype()), (want.dims(), dtype));
                let far = |t: &Tensor| {
                    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                    let far = (&t - want).unwrap().abs().unwrap().max_all().unwrap();
                    far.to_scalar::<f32>().unwrap()
                };
                let allowed = match dtype {
                    DType::BF16 => 0.06,
                    DType::F16 => 0.008,
                    _ => 2e-4,
                };
                let size = want.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                let what = format!("{heads:?} of {lengths:?}, {dtype:?}");
                assert!(far(got) <= allowed * size, "{what}: {} of {size}", far(got));
                assert!(far(apart) <= allowed * size, "{what}, apart: {} of {size}", far(apart));
            }
        }
    }
}

#[test]
fn cuda_group_norms_equal_the_cpu() {
    let (device, _guard) = gpu();
    let mut random = Random(4);
    for dtype in DTYPES {
        for (shape, groups) in [
            (vec![1, 4, 1], 4),
            (vec![2, 12, 5, 7], 3),
            (vec![1, 64, 64, 64], 32),
            (vec![2, 32, 3, 20, 21], 8),
            (vec![1, 8, 300, 301], 1),
        ] {
            let x = random.tensor(&shape, dtype);
            let (w, b) = (random.tensor(&[shape[1]], dtype), random.tensor(&[shape[1]], dtype));
            for silu in [false, true] {
                for in_place in [false, true] {
                    let all = [x.clone(), w.clone(), b.clone()];
                    twins(&device, "group_norm", dtype, &all, |device, dtype, t| {
                        let all = [("weight", &t[1]), ("bias", &t[2])];
                        let weights = weights(device, dtype, &all);
                        let norm = GroupNorm::new(&weights, groups, shape[1], EPS).unwrap();
                        let own = t[0].copy()?;
                        match (silu, in_place) {
                            (false, false) => norm.forward(&own),
                            (false, true) => norm.in_place(own),
                            (true, false) => norm.forward_silu(&own),
                            (true, true) => norm.silu_in_place(own),
                        }
                    });
                }
            }
        }
    }
}

/// Not a test of anything: how long each takes at FLUX's shapes, beside the tensor library's own operations and
/// the time that the bytes take at 3.35 TB/s.
#[test]
fn cuda_nn_times() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    let tensor = |shape: &[usize]| {
        let t = Tensor::randn(0f32, 1., shape, &there).unwrap();
        t.to_dtype(DType::BF16).unwrap()
    };
    let (tokens, width) = (4608, 3072);
    let heads = Heads { count: 24, dim: 128 };
    let (x, y) = (tensor(&[1, tokens, width]), tensor(&[1, tokens, width]));
    let (vector, weight) = (tensor(&[1, width]), tensor(&[128]));
    let rows = tensor(&[1, tokens, 3 * width]);
    let layer = |outputs: usize| {
        let source = MemorySource::new(&there)
            .with("weight", tensor(&[outputs, width]))
            .with("bias", tensor(&[outputs]));
        Weights::new(source).linear(width, outputs, Bias::Yes).unwrap()
    };
    let (qkv, up, read) = (layer(3 * width), layer(4 * width), Input::from(&x));
    let hidden = tensor(&[1, tokens, 4 * width]);
    let source = MemorySource::new(&there).with("weight", weight).with("bias", tensor(&[128]));
    let weights = Weights::new(source);
    let norm = RmsNorm::new(&weights, 128, EPS).unwrap();
    let ids = Tensor::zeros((tokens, 3), DType::F32, &Device::Cpu).unwrap();
    let rope = Rope::new(&ids, &[16, 56, 56], 10_000., &there).unwrap();
    let group = GroupNorm::new(&weights, 32, 128, EPS).unwrap();
    let picture = tensor(&[1, 128, 1024, 1024]);
    let own = picture.copy().unwrap();
    let (text, image) = (rope.narrow(0, 512).unwrap(), rope.narrow(512, 4096).unwrap());
    let (text_rows, image_rows) =
        (rows.narrow(1, 0, 512).unwrap(), rows.narrow(1, 512, 4096).unwrap());
    // Read and written, in values of two bytes.
    let one = tokens * width;
    type Run<'a> = Box<dyn Fn() -> Result<Tensor> + 'a>;
    let cases: Vec<(&str, usize, Run<'_>)> = vec![
        (
            "layer_norm_modulated",
            2 * one,
            Box::new(|| nn::layer_norm_modulated(&x, &vector, &vector, EPS)),
        ),
        ("gated_add", 3 * one, Box::new(|| nn::gated_add(&x, &y, &vector))),
        (
            "q: norm and rope",
            2 * one + 2 * tokens * 128,
            Box::new(|| heads.split(&rows, 0, Some(&norm), Some(&rope))),
        ),
        (
            "the same, of text and image",
            2 * one + 2 * tokens * 128,
            Box::new(|| {
                let part =
                    |rows, rope| HeadRows { rows, first: 0, norm: Some(&norm), rope: Some(rope) };
                heads.join(&[part(&text_rows, &text), part(&image_rows, &image)])
            }),
        ),
        ("gelu_tanh", 8 * one, Box::new(|| Activation::GeluTanh.apply(&hidden))),
        ("gelu", 8 * one, Box::new(|| Activation::Gelu.apply(&hidden))),
        ("silu", 8 * one, Box::new(|| Activation::Silu.apply(&hidden))),
        (
            "gelu_tanh times",
            12 * one,
            Box::new(|| Activation::GeluTanh.apply_times(&hidden, &hidden)),
        ),
        (
            "q, k, v: product, norm, rope",
            7 * one,
            Box::new(|| {
                let norms = [&norm, &norm];
                let stream = Projected { linear: &qkv, x: &read, norms, rope: &rope };
                let [q, ..] = heads.project(&[stream])?;
                Ok(q)
            }),
        ),
        ("their product", 4 * one, Box::new(|| qkv.forward(&x))),
        ("up: product, GELU", 5 * one, Box::new(|| Activation::GeluTanh.of(&up, &read))),
        ("up: product", 5 * one, Box::new(|| up.forward(&x))),
        ("up: joined", 7 * one, Box::new(|| nn::join_gelu(&y, &up, &read))),
        (
            "group norm, silu, in place",
            3 * picture.elem_count(),
            Box::new(|| group.silu_in_place(own.clone())),
        ),
    ];
    println!(
        "{:30} {:>10} {:>8} {:>6} {:>12} {:>9}",
        "bf16", "own µs", "GB/s", "of", "library µs", "at most"
    );
    for (name, values, run) in cases {
        let time = || seconds(&there, 20, || drop(run().unwrap()));
        cuda::enable(&device);
        let kernel = time();
        cuda::disable(&device);
        let library = time();
        let bytes = 2. * values as f64;
        println!(
            "{name:30} {:>10.1} {:>8.0} {:>5.0}% {:>12.1} {:>9.1}",
            kernel * 1e6,
            bytes / kernel / 1e9,
            100. * bytes / kernel / 3.35e12,
            library * 1e6,
            bytes / 3.35e12 * 1e6,
        );
    }
}

#[test]
fn cuda_nn_attention_holds_no_scores() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    match cuda::cudnn_version() {
        Ok(version) => println!("cuDNN {version}"),
        Err(why) => panic!("no cuDNN: {why}"),
    }
    cuda::self_test_attention(&device, DType::BF16).unwrap();
    cuda::self_test_attention(&device, DType::F16).unwrap();
    println!("| heads | tokens | dim | ms | TFLOP/s | ms in chunks |");
    println!("|---|---|---|---|---|---|");
    for (heads, tokens, dim) in
        [(24, 1_536, 128), (24, 4_608, 128), (24, 4_608, 64), (24, 16_896, 128), (48, 17_776, 64)]
    {
        // In the rows of a joined projection, where models have them.
        let rows = Tensor::randn(0f32, 1., (1, tokens, 3 * heads * dim), &there).unwrap();
        let rows = rows.to_dtype(DType::BF16).unwrap();
        let part = |i: usize| {
            let part = rows.narrow(2, i * heads * dim, heads * dim).unwrap();
            part.reshape((1, tokens, heads, dim)).unwrap().transpose(1, 2).unwrap()
        };
        let (q, k, v) = (part(0), part(1), part(2));
        let scale = 1. / (dim as f64).sqrt();
        let run = || nn::attention(&q, &k, &v, scale, &[]).unwrap();
        let time = |repeats: u32| seconds(&there, repeats, || drop(run()));
        cuda::enable(&device);
        cuda::enable_attention(&device);
        let whole = run();
        let took = time(10);
        cuda::disable(&device);
        cuda::enable(&device);
        let pieces = run();
        let chunks = time(1);
        cuda::disable(&device);
        let worst = worst(&whole, &pieces);
        let operations = 4. * (heads * tokens * tokens * dim) as f64;
        println!(
            "| {heads} | {tokens} | {dim} | {:.3} | {:.0} | {:.3} |",
            took * 1e3,
            operations / took / 1e12,
            chunks * 1e3
        );
        assert!(worst < 0.02, "{heads} heads of {dim}, {tokens} tokens: off by {worst}");
    }
}

/// softmax(q · kᵀ · scale) · v of one item in f64, `[queries, heads · dim]`, and the same with the sizes of `v`.
fn formula(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<[Vec<f64>; 2]> {
    let f64s = |t: &Tensor| t.contiguous()?.to_dtype(DType::F64);
    let (q, k, v) = (f64s(q)?, f64s(k)?, f64s(v)?);
    let (heads, groups) = (q.dim(0)?, k.dim(0)?);
    let mut parts = [Vec::new(), Vec::new()];
    for head in 0..heads {
        let group = head / (heads / groups);
        let (k, v) = (k.get(group)?, v.get(group)?);
        let scores = (q.get(head)?.matmul(&k.t()?)? * scale)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
        parts[0].push(weights.matmul(&v)?);
        parts[1].push(weights.matmul(&v.abs()?)?);
    }
    let [mean, sizes] = parts.map(|heads| Tensor::cat(&heads, 1)?.flatten_all()?.to_vec1::<f64>());
    Ok([mean?, sizes?])
}

/// The bits of what is on the GPU, as f32.
fn bits(t: &Tensor) -> Vec<u32> {
    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// A weight is rounded to the dtype before it multiplies a value, and the result after all: half a unit of the last
/// place each, at most 2⁻⁸ and 2⁻¹¹. What is left of f32 and of an f16 weight below 2⁻¹⁴ is less than 10⁻⁴.
#[test]
fn cuda_flash_equals_the_formula() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    cuda::self_test_flash(&device).unwrap();
    assert_eq!(cuda::flash_image()[..4], 0xba55_ed50u32.to_le_bytes());
    cuda::disable(&device);
    cuda::enable(&device);
    cuda::enable_flash(&device);
    let mut random = Random(5);
    for (dtype, unit) in [(DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))] {
        let mut most = 0f64;
        for case in 0..60 {
            let (groups, sharing) = (random.of(&[1, 2, 3]), random.of(&[1, 1, 2, 4]));
            let (heads, dim) = (groups * sharing, random.of(&[8, 40, 64, 64, 72, 96, 128, 128]));
            let batch = if case == 0 { 19 } else { random.of(&[1, 2, 3]) };
            let queries = random.of(&[1, 2, 31, 64, 127, 128, 129, 300]);
            let keys = random.of(&[1, 7, 31, 32, 33, 63, 64, 65, 128, 200, 333]);
            let lengths: Vec<usize> =
                (0..batch).map(|_| 1 + random.next() as usize % keys).collect();
            // From flat weights to such that a few keys have all of it.
            let scale = [0.01, 0.3, 1., 4.][random.next() as usize % 4] / (dim as f64).sqrt();
            let what = format!(
                "{dtype:?}, {batch} of {heads} heads over {groups}, {queries} by {keys} {lengths:?}, dim {dim}, {scale}"
            );
            let q = random.tensor(&[batch, queries, heads * dim], dtype);
            let kv = random.tensor(&[batch, keys, 2 * groups * dim], dtype);
            // Behind an item's keys nothing may be read.
            let kv: Vec<Tensor> = lengths
                .iter()
                .enumerate()
                .map(|(item, &n)| {
                    let seen = kv.get(item).unwrap().narrow(0, 0, n).unwrap();
                    let nan =
                        Tensor::full(f32::NAN, (keys - n, seen.dim(1).unwrap()), &Device::Cpu);
                    if n == keys { seen } else { Tensor::cat(&[seen, nan.unwrap()], 0).unwrap() }
                })
                .collect();
            let kv = Tensor::stack(&kv, 0).unwrap();
            let split = |t: &Tensor, first: usize, count: usize| {
                let (batch, tokens, _) = t.dims3().unwrap();
                let t = t.narrow(2, first, count * dim).unwrap();
                t.reshape((batch, tokens, count, dim)).unwrap().transpose(1, 2).unwrap()
            };
            let parts = |q: &Tensor, kv: &Tensor| {
                [split(q, 0, heads), split(kv, 0, groups), split(kv, groups * dim, groups)]
            };
            let moved = |t: &Tensor| t.to_dtype(dtype).unwrap().to_device(&there).unwrap();
            let [q, k, v] = parts(&q, &kv);
            let [gq, gk, gv] = [&q, &k, &v].map(moved);
            let run = |[q, k, v]: [&Tensor; 3], keys: &[usize]| {
                nn::attention_up_to(q, k, v, scale, keys).unwrap()
            };
            let got = run([&gq, &gk, &gv], &lengths);
            assert_eq!(
                (got.dims(), got.dtype()),
                (&[batch, queries, heads * dim][..], dtype),
                "{what}"
            );
            for (item, &n) in lengths.iter().enumerate() {
                let seen = |t: &Tensor| t.get(item).unwrap().narrow(1, 0, n).unwrap();
                let own = q.get(item).unwrap();
                let [want, sizes] = formula(&own, &seen(&k), &seen(&v), scale).unwrap();
                let got = got.get(item).unwrap().to_device(&Device::Cpu).unwrap();
                let got = got.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                let got = got.to_vec1::<f64>().unwrap();
                for (at, (got, (want, size))) in got.iter().zip(want.iter().zip(&sizes)).enumerate()
                {
                    let allowed = unit * (want.abs() + size) + 1e-4 * (1. + size);
                    let error = (got - want).abs();
                    assert!(
                        error <= allowed,
                        "{what}: item {item}, element {at}: {got} for {want}"
                    );
                    most = most.max(error / allowed);
                }
            }

            let whole = bits(&got);
            let same = |other: &Tensor, what_else: &str| {
                assert!(whole == bits(other), "{what}: other bits {what_else}");
            };
            same(&run([&gq, &gk, &gv], &lengths), "at a second run");
            // Within the rows of a projection, and of those, not where a vector begins.
            let joined = |skipped: usize| {
                let [q, k, v] =
                    [&q, &k, &v].map(|t| t.transpose(1, 2).unwrap().flatten_from(2).unwrap());
                let wide = |t: Tensor| {
                    let t = t.pad_with_zeros(2, skipped, 16).unwrap();
                    moved(&t.contiguous().unwrap())
                };
                let (q, kv) = (wide(q), wide(Tensor::cat(&[k, v], 2).unwrap()));
                [
                    split(&q, skipped, heads),
                    split(&kv, skipped, groups),
                    split(&kv, skipped + groups * dim, groups),
                ]
            };
            for skipped in [0, 24, 3] {
                let [q, k, v] = joined(skipped);
                same(&run([&q, &k, &v], &lengths), "in wider rows");
            }
            // Alone: the last item, and of it the last queries, which are others of their block then.
            let (item, from) = (batch - 1, queries / 3);
            let one = |t: &Tensor| t.narrow(0, item, 1).unwrap();
            let rest = one(&gq).narrow(2, from, queries - from).unwrap();
            let alone = run([&rest, &one(&gk), &one(&gv)], &lengths[item..]);
            let part = got.narrow(0, item, 1).unwrap().narrow(1, from, queries - from).unwrap();
            assert!(bits(&part) == bits(&alone), "{what}: other bits alone");
        }
        println!("{dtype:?}: at most {:.0}% of what rounding allows", 100. * most);
    }
    cuda::disable(&device);
}

#[test]
fn cuda_flash_beside_cudnn() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    let cudnn = cuda::cudnn_version().is_ok();
    println!("| bf16, heads | tokens | dim | flash, ms | TFLOP/s | cuDNN, ms | in chunks, ms |");
    println!("|---|---|---|---|---|---|---|");
    for (heads, tokens, dim) in
        [(24, 4_608, 128), (24, 1_536, 128), (24, 4_608, 64), (24, 17_550, 64)]
    {
        let rows = Tensor::randn(0f32, 1., (1, tokens, 3 * heads * dim), &there).unwrap();
        let rows = rows.to_dtype(DType::BF16).unwrap();
        let part = |i: usize| {
            let part = rows.narrow(2, i * heads * dim, heads * dim).unwrap();
            part.reshape((1, tokens, heads, dim)).unwrap().transpose(1, 2).unwrap()
        };
        let (q, k, v) = (part(0), part(1), part(2));
        let scale = 1. / (dim as f64).sqrt();
        let run = || nn::attention(&q, &k, &v, scale, &[]).unwrap();
        let timed = |repeats: u32, enable: fn(&CudaDevice)| {
            cuda::disable(&device);
            cuda::enable(&device);
            enable(&device);
            (run(), 1e3 * seconds(&there, repeats, || drop(run())))
        };
        let (chunks, slow) = timed(1, |_| ());
        let whole = cudnn.then(|| timed(10, cuda::enable_attention).1);
        let (flash, took) = timed(10, cuda::enable_flash);
        cuda::disable(&device);
        let operations = 4. * (heads * tokens * tokens * dim) as f64;
        println!(
            "| {heads} | {tokens} | {dim} | {took:.3} | {:.0} | {} | {slow:.3} |",
            operations / took / 1e9,
            whole.map_or("none".into(), |ms| format!("{ms:.3}")),
        );
        let worst = worst(&flash, &chunks);
        assert!(worst < 0.02, "{heads} heads of {dim}, {tokens} tokens: off by {worst}");
    }
}

#[test]
fn cuda_nn_convolution_is_what_the_tensor_library_computes() {
    let (device, _guard) = gpu();
    let there = Device::Cuda(device.clone());
    cuda::self_test_convolution(&device, DType::BF16).unwrap();
    cuda::self_test_convolution(&device, DType::F16).unwrap();
    println!("| channels | pixels | ms | TFLOP/s | ms, tensor library |");
    println!("|---|---|---|---|---|");
    for (inputs, outputs, side, window) in [
        (16, 512, 128, Window::SAME),
        (512, 512, 128, Window::SAME),
        (512, 512, 256, Window::DOUBLE),
        (256, 256, 512, Window::SAME),
        (128, 128, 1024, Window::SAME),
        (128, 3, 1024, Window::SAME),
        (384, 128, 480, Window::SAME.nearest()),
    ] {
        let rand = |shape: &[usize], scale: f64| {
            let t = Tensor::randn(0f32, 1., shape, &there).unwrap();
            (t * scale).unwrap().to_dtype(DType::BF16).unwrap()
        };
        let scale = 1. / ((inputs * 9) as f64).sqrt();
        let source = MemorySource::new(&there)
            .computing_in(DType::BF16)
            .with("weight", rand(&[outputs, inputs, 3, 3], scale))
            .with("bias", rand(&[outputs], 1.));
        let conv = Conv2d::new(&Weights::new(source), inputs, outputs, window).unwrap();
        let x = rand(&[1, inputs, side, side], 1.);
        let run = || conv.forward(&x).unwrap();
        let time = |repeats: u32| seconds(&there, repeats, || drop(run()));
        cuda::enable(&device);
        cuda::enable_convolution(&device);
        let (own, again) = (run(), run());
        assert_eq!(worst(&own, &again), 0.);
        let took = time(10);
        cuda::disable(&device);
        let library = run();
        let slow = time(2);
        let pixels = library.dim(2).unwrap() * library.dim(3).unwrap();
        let operations = (18 * inputs * outputs * pixels) as f64;
        println!(
            "| {inputs} to {outputs} | {pixels} | {:.3} | {:.0} | {:.3} |",
            took * 1e3,
            operations / took / 1e12,
            slow * 1e3
        );
        let far = worst(&own, &library);
        assert!(far < 0.1, "{inputs} to {outputs}, {window:?}: off by {far}");
    }
}

/// The most that two tensors differ by.
fn worst(a: &Tensor, b: &Tensor) -> f32 {
    let [a, b] = [a, b].map(|t| t.to_dtype(DType::F32).unwrap());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

/// Seconds of one of `repeats` runs back to back, in the median of five.
fn seconds(device: &Device, repeats: u32, run: impl Fn()) -> f64 {
    run();
    let mut times = Vec::new();
    for _ in 0..5 {
        device.synchronize().unwrap();
        let begun = Instant::now();
        (0..repeats).for_each(|_| run());
        device.synchronize().unwrap();
        times.push(begun.elapsed().as_secs_f64() / f64::from(repeats));
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
