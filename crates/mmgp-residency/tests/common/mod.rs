//! A tower of linear layers in a file, for the tests of paging.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::{Bias, Linear};
use mmgp_residency::{ModelBuilder, Paged, Pager, Result};

pub const WIDTH: usize = 24;

/// The stem scales; a block is one layer or, every other one, two, so that sizes differ.
pub type Tower = Paged<Tensor, (Linear, Option<Linear>)>;

/// Writes a tower of `depth` blocks in bf16, f32 and f16.
pub fn write(path: &Path, depth: usize, seed: u32) {
    let mut specs = vec![TensorSpec::new("scale", Dtype::BF16, [WIDTH])];
    for i in 0..depth {
        let spec = |name: &str, dtype, shape: &[usize]| {
            TensorSpec::new(format!("layers.{i}.{name}"), dtype, shape.to_vec())
        };
        specs.push(spec("up.weight", Dtype::BF16, &[WIDTH, WIDTH]));
        if i % 2 == 1 {
            specs.push(spec("down.weight", Dtype::F32, &[WIDTH, WIDTH]));
            specs.push(spec("down.bias", Dtype::F16, &[WIDTH]));
        }
    }
    let mut writer = Writer::create(path, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    let mut state = seed | 1;
    for spec in &specs {
        for _ in 0..spec.shape.iter().product::<usize>() {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            let value = (state >> 8) as f32 / 8388608. * 0.5 - 0.25;
            let bytes = match spec.dtype {
                Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            };
            writer.write(&spec.name, &bytes).unwrap();
        }
    }
    writer.finish().unwrap();
}

pub fn build(pager: &Pager, name: &str, path: &Path, depth: usize) -> Tower {
    build_with(pager, name, path, depth, |_| ())
}

pub fn build_with(
    pager: &Pager,
    name: &str,
    path: &Path,
    depth: usize,
    prepare: impl FnOnce(&mut ModelBuilder),
) -> Tower {
    let checkpoint = Arc::new(Checkpoint::open(path).unwrap());
    let mut builder = ModelBuilder::new(pager, name, checkpoint);
    prepare(&mut builder);
    let stem = builder.stem().tensor(&[WIDTH], "scale").unwrap();
    let blocks = (0..depth)
        .map(|i| {
            let w = builder.block(&format!("layers.{i}"));
            let up = w.pp("up").linear(WIDTH, WIDTH, Bias::No).unwrap();
            let down = (i % 2 == 1).then(|| w.pp("down").linear(WIDTH, WIDTH, Bias::Yes).unwrap());
            (up, down)
        })
        .collect();
    builder.finish(stem, blocks).unwrap()
}

/// One pass; the bits of its result.
pub fn run(tower: &Tower) -> Result<Vec<u32>> {
    Ok(values(tower)?.into_iter().map(f32::to_bits).collect())
}

/// One pass on the pager's device, in its compute dtype.
pub fn values(tower: &Tower) -> Result<Vec<f32>> {
    let pager = tower.pager().clone();
    let (device, dtype) = (pager.device().candle(), pager.device().compute_dtype());
    let start: Vec<f32> = (0..3 * WIDTH).map(|i| (i as f32).sin()).collect();
    let pass = tower.pass()?;
    let mut x = pass.stem(|scale| {
        Tensor::from_slice(&start, (3, WIDTH), device)?.to_dtype(dtype)?.broadcast_mul(scale)
    })?;
    for block in pass.blocks() {
        x = block?.run(|(up, down)| {
            let y = up.forward(&x)?;
            let y = match down {
                Some(down) => down.forward(&y.gelu()?)?,
                None => y,
            };
            &x + y
        })?;
    }
    pass.stem(|scale| x.broadcast_mul(scale)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>())
}
