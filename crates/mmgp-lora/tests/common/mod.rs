//! A tower with joined layers and adapters for it, in files of this test's own.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::{Bias, Linear};
use mmgp_residency::{ModelBuilder, Paged, Pager, Result};

pub const WIDTH: usize = 20;
pub const MLP: usize = 33;
pub const DEPTH: usize = 3;

/// A block joins q, k, v and the MLP's input; its output layer reads v and the MLP.
pub type Tower = Paged<Linear, (Linear, Linear)>;

/// A tensor of f32 values that is stored as `dtype`.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Numbers between -1 and 1, rounded to `dtype`.
pub fn stored(name: impl Into<String>, dtype: Dtype, shape: &[usize], seed: u32) -> Stored {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let value = (state >> 8) as f32 / 8388608. - 1.;
        match dtype {
            Dtype::BF16 => bf16::from_f32(value).to_f32(),
            Dtype::F16 => f16::from_f32(value).to_f32(),
            _ => value,
        }
    };
    let values = (0..shape.iter().product()).map(|_| next()).collect();
    Stored { name: name.into(), dtype, shape: shape.to_vec(), values }
}

pub fn write_with(path: &Path, tensors: &[Stored], metadata: &BTreeMap<String, String>) {
    let spec = |t: &Stored| TensorSpec::new(t.name.clone(), t.dtype, t.shape.clone());
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let mut writer = Writer::create(path, &specs, metadata, Overwrite::Yes).unwrap();
    for tensor in tensors {
        for value in &tensor.values {
            let bytes = match tensor.dtype {
                Dtype::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
                Dtype::F64 => f64::from(*value).to_le_bytes().to_vec(),
                Dtype::F32 => value.to_le_bytes().to_vec(),
                Dtype::I64 => (*value as i64).to_le_bytes().to_vec(),
                _ => vec![*value as u8],
            };
            writer.write(&tensor.name, &bytes).unwrap();
        }
    }
    writer.finish().unwrap();
}

pub fn write(path: &Path, tensors: &[Stored]) {
    write_with(path, tensors, &BTreeMap::new());
}

/// The linear layers of the tower: `(name, outputs, inputs)`.
pub fn layers() -> Vec<(String, usize, usize)> {
    let mut layers = vec![("embed".to_string(), WIDTH, WIDTH)];
    for i in 0..DEPTH {
        for name in ["attn.to_q", "attn.to_k", "attn.to_v"] {
            layers.push((format!("blocks.{i}.{name}"), WIDTH, WIDTH));
        }
        layers.push((format!("blocks.{i}.proj_mlp"), MLP, WIDTH));
        layers.push((format!("blocks.{i}.proj_out"), WIDTH, WIDTH + MLP));
    }
    layers
}

/// The tower's own weights, small enough for its numbers to stay near 1.
pub fn tower_weights() -> Vec<Stored> {
    let mut tensors = Vec::new();
    for (i, (name, outputs, inputs)) in layers().into_iter().enumerate() {
        let seed = 100 + i as u32;
        let mut weight = stored(format!("{name}.weight"), Dtype::F32, &[outputs, inputs], seed);
        weight.values.iter_mut().for_each(|v| *v *= 0.2);
        tensors.push(weight);
        tensors.push(stored(format!("{name}.bias"), Dtype::F32, &[outputs], seed + 1000));
    }
    tensors
}

pub fn build(pager: &Pager, name: &str, path: &Path) -> Tower {
    let builder = ModelBuilder::new(pager, name, Arc::new(Checkpoint::open(path).unwrap()));
    let stem = builder.stem().pp("embed").linear(WIDTH, WIDTH, Bias::Yes).unwrap();
    let blocks = (0..DEPTH)
        .map(|i| {
            let w = builder.block(&format!("blocks.{i}"));
            let joined = [
                ("attn.to_q", WIDTH),
                ("attn.to_k", WIDTH),
                ("attn.to_v", WIDTH),
                ("proj_mlp", MLP),
            ];
            let joined = w.linear_joined(&joined, WIDTH, Bias::Yes).unwrap();
            (joined, w.pp("proj_out").linear(WIDTH + MLP, WIDTH, Bias::Yes).unwrap())
        })
        .collect();
    builder.finish(stem, blocks).unwrap()
}

/// One pass over seven tokens.
pub fn run(tower: &Tower) -> Result<Vec<f32>> {
    let start: Vec<f32> = (0..7 * WIDTH).map(|i| (i as f32).sin()).collect();
    let start = Tensor::from_vec(start, (1, 7, WIDTH), &Device::Cpu)?;
    let pass = tower.pass()?;
    let mut x = pass.stem(|embed| embed.forward(&start))?;
    for block in pass.blocks() {
        x = block?.run(|(joined, out)| {
            let y = joined.forward(&x)?;
            let part = |at, width| y.narrow(2, at, width);
            let mixed = (part(0, WIDTH)?.tanh()? * part(WIDTH, WIDTH)?)?;
            let mixed = (mixed + part(2 * WIDTH, WIDTH)?)?;
            &x + out.forward(&Tensor::cat(&[mixed, part(3 * WIDTH, MLP)?.tanh()?], 2)?)?
        })?;
    }
    Ok(x.flatten_all()?.to_vec1()?)
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// `A` and `B` of `rank` for one module.
pub fn pair(
    prefix: &str,
    layer: &(String, usize, usize),
    rank: usize,
    dtype: Dtype,
    seed: u32,
) -> [Stored; 2] {
    let (name, outputs, inputs) = layer;
    let mut pair = [
        stored(format!("{prefix}{name}.lora_A.weight"), dtype, &[rank, *inputs], seed),
        stored(format!("{prefix}{name}.lora_B.weight"), dtype, &[*outputs, rank], seed + 500),
    ];
    // Powers of two, so that rounding to the dtype stays what it was.
    pair.iter_mut().flat_map(|t| &mut t.values).for_each(|v| *v *= 0.25);
    pair
}

/// An adapter of every layer that `wanted` keeps, ranks from 1 to 4.
pub fn adapter(
    prefix: &str,
    dtype: Dtype,
    seed: u32,
    wanted: impl Fn(&str) -> bool,
) -> Vec<Stored> {
    let kept = layers().into_iter().enumerate().filter(|(_, layer)| wanted(&layer.0));
    kept.flat_map(|(i, layer)| {
        pair(prefix, &layer, 1 + (i + seed as usize) % 4, dtype, seed + i as u32)
    })
    .collect()
}

/// The tower's weights with `strength · alpha / rank · B A` of each adapter added, in f64.
pub fn merged(adapters: &[(&[Stored], f64)]) -> Vec<Stored> {
    let mut tensors = tower_weights();
    for (adapter, strength) in adapters {
        for down in adapter.iter().filter(|t| t.name.ends_with(".lora_A.weight")) {
            let find = |name: String| adapter.iter().find(|t| t.name == name);
            let up = find(down.name.replace("lora_A", "lora_B")).unwrap();
            let alpha = find(down.name.replace("lora_A.weight", "alpha"));
            let (rank, inputs) = (down.shape[0], down.shape[1]);
            let alpha = alpha.map_or(rank as f64, |t| f64::from(t.values[0]));
            let target = tensors
                .iter_mut()
                .find(|t| down.name.ends_with(&t.name.replace(".weight", ".lora_A.weight")))
                .unwrap();
            for (at, value) in target.values.iter_mut().enumerate() {
                let (row, column) = (at / inputs, at % inputs);
                let product: f64 = (0..rank)
                    .map(|r| {
                        f64::from(up.values[row * rank + r])
                            * f64::from(down.values[r * inputs + column])
                    })
                    .sum();
                *value = (f64::from(*value) + strength * alpha / rank as f64 * product) as f32;
            }
        }
    }
    tensors
}

/// What the tower with `tensors` for weights computes.
pub fn reference(dir: &Path, tensors: &[Stored]) -> Vec<f32> {
    let path = dir.join("reference.safetensors");
    write(&path, tensors);
    let pager = Pager::new(&Device::Cpu).unwrap();
    run(&build(&pager, "reference", &path)).unwrap()
}

/// ‖a − b‖ / ‖b‖.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

/// A folder with the tower's file in it.
pub fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tower.safetensors");
    write(&path, &tower_weights());
    (dir, path)
}
