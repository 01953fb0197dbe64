//! What is attached to a block rides with it: read, leased, budgeted and given back with the block,
//! and replaced wholly or not at all.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::Form;
use mmgp_residency::{Attachment, Attachments, Budget, Bytes, Error, Pager, Segment};

mod common;
use common::{Tower, build, run, write};

/// A file with `left` `[4, 2]` in bf16 and `right` `[4, 3]` in f32 or bf16, counting from 0.
fn extra(path: &Path, right: Dtype) -> Arc<Checkpoint> {
    let specs = [
        TensorSpec::new("left", Dtype::BF16, [4, 2]),
        TensorSpec::new("right", right, [4, 3]),
        TensorSpec::new("odd", Dtype::I64, [4]),
    ];
    let mut writer = Writer::create(path, &specs, &BTreeMap::new(), Overwrite::Yes).unwrap();
    for spec in &specs {
        for i in 0..spec.shape.iter().product::<usize>() {
            let bytes = match spec.dtype {
                Dtype::BF16 => bf16::from_f32(i as f32).to_le_bytes().to_vec(),
                Dtype::F32 => (i as f32).to_le_bytes().to_vec(),
                _ => (i as i64).to_le_bytes().to_vec(),
            };
            writer.write(&spec.name, &bytes).unwrap();
        }
    }
    writer.finish().unwrap();
    Arc::new(Checkpoint::open(path).unwrap())
}

/// `left` and `right` side by side.
fn side_by_side(file: &Checkpoint, block: usize) -> Attachment {
    let segment = |name: &str, element| Segment {
        source: file.tensor(name).unwrap().clone(),
        element,
        stride: Some(5),
    };
    let segments = vec![segment("left", 0), segment("right", 2)];
    Attachment { block, name: "both".into(), shape: vec![4, 5], form: Form::AsStored, segments }
}

fn attach(pager: &Pager, tensors: Vec<Attachment>) -> Result<Vec<Tensor>, Error> {
    let mut got = Vec::new();
    let change = Attachments { model: "a".into(), tensors };
    pager.attach(&[change], |placeholders| got = placeholders[0].clone())?;
    Ok(got)
}

fn seen(tower: &Tower, block: usize, tensor: &Tensor) -> Vec<Vec<f32>> {
    let pass = tower.pass().unwrap();
    for visit in pass.blocks() {
        let visit = visit.unwrap();
        if visit.index() + 1 == block {
            let read = |_: &_| tensor.to_dtype(DType::F32)?.to_vec2::<f32>();
            return visit.run(read).unwrap();
        }
    }
    unreachable!("no such block")
}

#[test]
fn what_is_attached_is_leased_with_its_block_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 5, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 5);
    let before = pager.plan(Budget::Min).unwrap();
    let expected = run(&tower).unwrap();
    for (right, dtype) in [(Dtype::BF16, DType::BF16), (Dtype::F32, DType::F32)] {
        let file = extra(&dir.path().join("extra.safetensors"), right);
        // Block 2 is the largest, so that the smallest budget grows.
        let tensors = attach(&pager, vec![side_by_side(&file, 2)]).unwrap();
        assert_eq!(tensors[0].dtype(), dtype, "bf16 travels as bf16, a mixture is widened");
        for budget in [Budget::Min, Budget::Percent(60.), Budget::Unlimited] {
            pager.plan(budget).unwrap();
            for _ in 0..2 {
                let rows = seen(&tower, 2, &tensors[0]);
                assert_eq!(rows[0], [0., 1., 0., 1., 2.]);
                assert_eq!(rows[3], [6., 7., 9., 10., 11.]);
            }
            assert!(tensors[0].to_dtype(DType::F64).is_err(), "poison outside its block");
            assert_eq!(run(&tower).unwrap(), expected, "the model itself does not change");
        }
        let plan = pager.plan(Budget::Min).unwrap();
        assert_eq!(plan.weights.0, before.weights.0 + 256);
        assert_eq!(plan.minimum.0, before.minimum.0 + 256);
        assert_eq!(pager.report().models[0].attached, Bytes(256));
    }
    attach(&pager, Vec::new()).unwrap();
    assert_eq!(pager.plan(Budget::Min).unwrap(), before);
    assert_eq!(run(&tower).unwrap(), expected);
}

#[test]
fn a_failed_attachment_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 5, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 5);
    let file = extra(&dir.path().join("extra.safetensors"), Dtype::F32);
    let first = attach(&pager, vec![side_by_side(&file, 2)]).unwrap();
    let plan = pager.plan(Budget::Min).unwrap();
    pager.plan(Budget::Bytes(plan.minimum)).unwrap();

    let change = |edit: &dyn Fn(&mut Attachment)| {
        let mut wrong = side_by_side(&file, 2);
        edit(&mut wrong);
        attach(&pager, vec![wrong]).unwrap_err().to_string()
    };
    let odd = file.tensor("odd").unwrap().clone();
    let error = change(&|a| a.block = 6);
    assert!(error.contains("`a`") && error.contains("6 blocks"), "{error}");
    let error = change(&|a| a.shape = vec![5, 5]);
    assert!(error.contains("`both`") && error.contains("20 elements"), "{error}");
    let error = change(&|a| a.segments[1].element = 3);
    assert!(error.contains("extra.safetensors") && error.contains("`right`"), "{error}");
    let error = change(&|a| a.segments[1].stride = Some(2));
    assert!(error.contains("`right`"), "{error}");
    let error = change(&|a| a.segments[0].source = odd.clone());
    assert!(error.contains("I64"), "{error}");
    let error = change(&|a| a.shape = vec![usize::MAX, 4, 5]);
    assert!(error.contains("`both`"), "{error}");
    let two = vec![side_by_side(&file, 2), side_by_side(&file, 2)];
    assert!(matches!(attach(&pager, two), Err(Error::BudgetTooSmall { .. })));
    let other = Attachments { model: "b".into(), tensors: vec![side_by_side(&file, 1)] };
    let error = pager.attach(&[other], |_| panic!("not installed")).unwrap_err().to_string();
    assert!(error.contains("`b`"), "{error}");
    {
        let _pass = tower.pass().unwrap();
        assert!(matches!(attach(&pager, Vec::new()), Err(Error::Busy { .. })));
    }
    assert_eq!(seen(&tower, 2, &first[0])[3], [6., 7., 9., 10., 11.]);
    assert_eq!(pager.plan(Budget::Min).unwrap(), plan);
}

#[test]
fn targets_are_listed_with_their_blocks_until_the_model_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write(&path, 4, 3);
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "a", &path, 4);
    let targets = pager.targets("a").unwrap();
    let found: Vec<(usize, &str)> =
        targets.iter().map(|t| (t.block, &*t.target.parts[0].name)).collect();
    assert_eq!(found[..3], [(1, "layers.0.up"), (2, "layers.1.up"), (2, "layers.1.down")]);
    assert!(pager.targets("b").is_none());
    let file = extra(&dir.path().join("extra.safetensors"), Dtype::F32);
    attach(&pager, vec![side_by_side(&file, 2)]).unwrap();
    drop(tower);
    assert!(pager.targets("a").is_none() && pager.models().is_empty());
    attach(&pager, Vec::new()).unwrap(); // nothing to do
    assert!(attach(&pager, vec![side_by_side(&file, 2)]).is_err());
}
