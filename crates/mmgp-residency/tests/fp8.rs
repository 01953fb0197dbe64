//! Weights in fp8: made on the fly, saved and read again, and as other programs store them plainly.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::{Bias, Codes, Linear, QuantPolicy, from_e4m3, to_e4m3};
use mmgp_residency::{Budget, ModelBuilder, Paged, Pager};

mod common;
use common::{build, build_with, run, write};

#[test]
fn fp8_made_on_the_fly_has_the_same_bits_under_every_budget_and_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 7, 1);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let dense = build(&pager, "dense", &path, 7);
    let fp8 = build_with(&pager, "fp8", &path, 7, |b| {
        b.quantize(QuantPolicy::new(Codes::Fp8, &[]).unwrap());
    });
    let plan = pager.plan(Budget::Unlimited).unwrap();
    assert!(plan.models[1].bytes < plan.models[0].bytes);
    let (exact, expected) = (run(&dense).unwrap(), run(&fp8).unwrap());
    let off = far(&exact, &expected);
    // Three bits of mantissa: half a step is 1/16 at most and 2.6 % in the mean, and the input is added to each product.
    assert!(off > 0.001 && off < 0.04, "{off}");
    for budget in [Budget::Min, Budget::Percent(40.), Budget::Percent(70.)] {
        pager.plan(budget).unwrap();
        assert_eq!(run(&fp8).unwrap(), expected, "{budget}");
    }
    let form = |name: &str| {
        let report = pager.report();
        report.models.iter().find(|m| m.name == name).map(|m| m.form.clone()).unwrap()
    };
    assert!(form("fp8").split('+').any(|f| f == "fp8"), "{}", form("fp8"));

    let saved = dir.path().join("saved.safetensors");
    let all = pager.save("fp8", &saved, &BTreeMap::new(), Overwrite::No).unwrap();
    assert_eq!(all.quantized, 7 + 3);
    let file = Checkpoint::open(&saved).unwrap();
    let codes = file.get("layers.1.down.weight._data").unwrap();
    assert_eq!((codes.dtype(), codes.shape()), (Dtype::F8E4M3, &[24, 24][..]));
    assert_eq!(file.get("layers.1.down.weight._scale").unwrap().dtype(), Dtype::F32);
    let read = build(&pager, "read", &saved, 7);
    assert_eq!(run(&read).unwrap(), expected);
    assert!(form("read").split('+').any(|f| f == "fp8"), "{}", form("read"));
    // What is fp8 stays so.
    let again = build_with(&pager, "again", &saved, 7, |b| b.quantize(QuantPolicy::default()));
    assert_eq!(run(&again).unwrap(), expected);
}

fn far(exact: &[u32], found: &[u32]) -> f32 {
    let pairs = || exact.iter().zip(found).map(|(a, b)| (f32::from_bits(*a), f32::from_bits(*b)));
    let off: f32 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
    (off / pairs().map(|(a, _)| a * a).sum::<f32>()).sqrt()
}

/// A layer, a table and a norm, all of them in e4m3, and what else is named.
fn plain(path: &Path, more: &[(&str, &[usize])]) {
    let mut specs = vec![
        TensorSpec::new("table", Dtype::F8E4M3, [3, 4]),
        TensorSpec::new("norm", Dtype::F8E4M3, [4]),
        TensorSpec::new("layers.0.up.weight", Dtype::F8E4M3, [5, 4]),
        TensorSpec::new("layers.0.up.bias", Dtype::F8E4M3, [5]),
    ];
    specs.extend(
        more.iter().map(|(name, shape)| TensorSpec::new(*name, Dtype::F32, shape.to_vec())),
    );
    let mut writer = Writer::create(path, &specs, &BTreeMap::new(), Overwrite::Yes).unwrap();
    for spec in &specs {
        let count = spec.shape.iter().product::<usize>();
        let bytes = match spec.dtype {
            Dtype::F8E4M3 => (0..count).map(|i| to_e4m3((i as f32).sin() * 3.)).collect(),
            _ => vec![0; count * 4],
        };
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

type Small = Paged<(Tensor, Tensor), Linear>;

fn open(pager: &Pager, path: &Path) -> mmgp_quant::Result<Small> {
    let mut builder = ModelBuilder::new(pager, "plain", Arc::new(Checkpoint::open(path).unwrap()));
    builder.quantize(QuantPolicy::default());
    let stem = builder.stem();
    let stem = (stem.tensor_as_stored(&[3, 4], "table")?, stem.tensor(&[4], "norm")?);
    let layer = builder.block("layers.0").pp("up").linear(4, 5, Bias::Yes)?;
    Ok(builder.finish(stem, vec![layer]).unwrap())
}

#[test]
fn a_file_of_e4m3_alone_is_read_as_the_numbers_that_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plain.safetensors");
    plain(&path, &[]);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let model = open(&pager, &path).unwrap();
    pager.plan(Budget::Min).unwrap();
    let value = |i: usize| from_e4m3(to_e4m3((i as f32).sin() * 3.));
    let pass = model.pass().unwrap();
    let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (table, norm) = pass.stem(|(table, norm)| Ok((flat(table)?, flat(norm)?))).unwrap();
    assert_eq!(table, (0..12).map(value).collect::<Vec<_>>());
    assert_eq!(norm, (0..4).map(value).collect::<Vec<_>>());
    for block in pass.blocks() {
        let x = Tensor::new(&[[1f32, -2., 0.5, 4.]], &Device::Cpu).unwrap();
        let (y, decoded, format) = block
            .unwrap()
            .run(|layer| Ok((layer.forward(&x)?, layer.decode()?, layer.format())))
            .unwrap();
        assert_eq!((format, decoded.dtype()), ("fp8", DType::BF16));
        let weights: Vec<bf16> = decoded.flatten_all().unwrap().to_vec1().unwrap();
        assert!(weights.iter().enumerate().all(|(i, w)| w.to_f32() == value(i)));
        let row = |o: usize| {
            [1., -2., 0.5, 4.].iter().enumerate().map(move |(i, x)| x * value(o * 4 + i))
        };
        let expected: Vec<f32> = (0..5).map(|o| row(o).sum::<f32>() + value(o)).collect();
        let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
        assert!(y.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4), "{y:?} {expected:?}");
    }
}

#[test]
fn scales_that_are_not_understood_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scaled.safetensors");
    let pager = Pager::new(&Device::Cpu).unwrap();
    for (leaf, shape) in
        [("scale_weight", &[][..]), ("weight_scale", &[1]), ("weight_scale_inv", &[5, 1])]
    {
        let name = format!("layers.0.up.{leaf}");
        plain(&path, &[(&name, shape)]);
        let error = open(&pager, &path).map(drop).unwrap_err().to_string();
        for part in ["scaled.safetensors", &name, "layers.0.up.weight", "weight._scale"] {
            assert!(error.contains(part), "no {part} in: {error}");
        }
    }
}
