//! int8 weights for products with int8 activations: their rows are rotated where they are whole groups, they are marked in files, and
//! neither kind is taken for the other.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::{Bias, Codes, Linear, QuantPolicy};
use mmgp_residency::{Budget, ModelBuilder, Paged, Pager};

/// Layers of whole groups, two of them joined, and one of another width.
const WHOLE: usize = 512;
const OTHER: usize = 96;

type Model = Paged<(), (Linear, Linear)>;

fn write(path: &Path) {
    let spec = |i: usize, name: &str, dims: [usize; 2]| {
        TensorSpec::new(format!("layers.{i}.{name}.weight"), Dtype::BF16, dims)
    };
    let specs: Vec<TensorSpec> = (0..3)
        .flat_map(|i| {
            [spec(i, "q", [48, WHOLE]), spec(i, "k", [48, WHOLE]), spec(i, "down", [WHOLE, OTHER])]
        })
        .collect();
    let mut writer = Writer::create(path, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    let mut state = 7u32;
    for spec in &specs {
        let bytes = (0..spec.shape.iter().product::<usize>()).flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32((state >> 8) as f32 / 8_388_608. - 1.).to_le_bytes()
        });
        writer.write(&spec.name, &bytes.collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
}

fn build(pager: &Pager, name: &str, path: &Path, with: impl FnOnce(&mut ModelBuilder)) -> Model {
    let mut builder = ModelBuilder::new(pager, name, Arc::new(Checkpoint::open(path).unwrap()));
    with(&mut builder);
    let block = |i| {
        let block = builder.block(&format!("layers.{i}"));
        let joined = block.linear_joined(&[("q", 48), ("k", 48)], WHOLE, Bias::No).unwrap();
        (joined, block.pp("down").linear(OTHER, WHOLE, Bias::No).unwrap())
    };
    let blocks = (0..3).map(block).collect();
    builder.finish((), blocks).unwrap()
}

fn run(model: &Model) -> Vec<u32> {
    let mut x = Tensor::arange(0f32, WHOLE as f32, &Device::Cpu).unwrap().sin().unwrap();
    x = x.reshape((1, WHOLE)).unwrap();
    for visit in model.pass().unwrap().blocks() {
        x = visit.unwrap().run(|(up, down)| down.forward(&(up.forward(&x)? / 16.)?)).unwrap();
    }
    let y: Vec<f32> = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    y.into_iter().map(f32::to_bits).collect()
}

fn far(exact: &[u32], found: &[u32]) -> f32 {
    let pairs = || exact.iter().zip(found).map(|(a, b)| (f32::from_bits(*a), f32::from_bits(*b)));
    let off: f32 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
    (off / pairs().map(|(a, _)| a * a).sum::<f32>()).sqrt()
}

fn names(path: &Path) -> Vec<String> {
    Checkpoint::open(path).unwrap().iter().map(|view| view.name().to_string()).collect()
}

fn formats(model: &Model) -> Vec<[&'static str; 2]> {
    let visits = model.pass().unwrap();
    visits
        .blocks()
        .map(|visit| visit.unwrap().run(|(a, b)| Ok([a.format(), b.format()])).unwrap())
        .collect()
}

#[test]
fn rotated_weights_have_the_same_bits_under_every_budget_and_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let int8 = QuantPolicy::default;
    let dense = build(&pager, "dense", &path, |_| ());
    let plain = build(&pager, "plain", &path, |b| b.quantize(int8()));
    let rotated = build(&pager, "rotated", &path, |b| {
        b.quantize(int8());
        b.quantize_activations(Codes::Int8);
    });
    // The same without activations, for who only writes them.
    let named = build(&pager, "named", &path, |b| {
        b.quantize(QuantPolicy::new(Codes::RotatedInt8, &[]).unwrap());
    });
    // Activations of another kind rotate nothing.
    let other = build(&pager, "other", &path, |b| {
        b.quantize(int8());
        b.quantize_activations(Codes::Fp8);
    });
    pager.plan(Budget::Unlimited).unwrap();
    assert_eq!(formats(&rotated), [["rotated_int8", "int8"]; 3]);
    assert_eq!(formats(&plain), [["int8"; 2]; 3]);
    let (exact, expected) = (run(&dense), run(&rotated));
    assert_eq!(run(&named), expected);
    let of_plain = run(&plain);
    assert_eq!(run(&other), of_plain);
    assert_ne!(of_plain, expected);
    for found in [&of_plain, &expected] {
        let off = far(&exact, found);
        assert!(off > 1e-4 && off < 0.02, "{off}");
    }
    for budget in [Budget::Min, Budget::Percent(40.)] {
        pager.plan(budget).unwrap();
        assert_eq!(run(&rotated), expected, "{budget}");
    }

    // In a file they have a name of their own, and are no quanto's.
    let saved = dir.path().join("saved.safetensors");
    let all = pager.save("rotated", &saved, &BTreeMap::new(), Overwrite::No).unwrap();
    assert_eq!(all.quantized, 9);
    let file = Checkpoint::open(&saved).unwrap();
    let codes = file.get("layers.1.k.weight._hadamard256").unwrap();
    assert_eq!((codes.dtype(), codes.shape()), (Dtype::I8, &[48, WHOLE][..]));
    assert!(file.get("layers.1.k.weight._data").is_none());
    assert!(file.get("layers.1.k.input_scale").is_none());
    assert!(file.get("layers.1.down.weight._data").is_some());
    assert_eq!(file.get("layers.1.k.weight._scale").unwrap().dtype(), Dtype::BF16);
    let metadata = file.metadata();
    assert_eq!(metadata.get("quantization_format").map(String::as_str), Some("hadamard256"));

    // It opens as what it is, whatever products take of their input, and stays so.
    let read = build(&pager, "read", &saved, |_| ());
    assert_eq!(formats(&read), [["rotated_int8", "int8"]; 3]);
    assert!(read.unused().is_empty(), "{:?}", read.unused());
    let again = build(&pager, "again", &saved, |b| b.quantize(int8()));
    let copy = dir.path().join("copy.safetensors");
    pager.save("read", &copy, &BTreeMap::new(), Overwrite::No).unwrap();
    let copied = build(&pager, "copied", &copy, |b| b.quantize_activations(Codes::Int8));
    for model in [&read, &again, &copied] {
        assert_eq!(run(model), expected);
    }
    assert_eq!(names(&copy), names(&saved));

    // What was written without the rotation is not taken for rotated.
    let of_int8 = dir.path().join("int8.safetensors");
    pager.save("plain", &of_int8, &BTreeMap::new(), Overwrite::No).unwrap();
    assert!(!names(&of_int8).iter().any(|name| name.contains("hadamard")));
    let file = Checkpoint::open(&of_int8).unwrap();
    assert_eq!(file.metadata().get("quantization_format").map(String::as_str), Some("quanto"));
    let stored = build(&pager, "stored", &of_int8, |b| {
        b.quantize(int8());
        b.quantize_activations(Codes::Int8);
    });
    assert_eq!(formats(&stored), [["int8"; 2]; 3]);
    assert_eq!(run(&stored), of_plain);
}
