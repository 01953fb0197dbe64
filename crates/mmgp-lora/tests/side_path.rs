//! A side path is the dense sum, in any plan the same bits, and weights act without reading.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, fs};

use candle_core::Device;
use mmgp_io::Dtype;
use mmgp_lora::{Adapter, AdapterSet, StepWeights, Steps, Unfit};
use mmgp_residency::{Budget, Bytes, Error as Paging, Pager};

mod common;
use common::{
    adapter, bits, build, folder, layers, merged, pair, reference, relative, run, stored, write,
    write_with,
};

fn open(dir: &tempfile::TempDir, name: &str, tensors: &[common::Stored]) -> Adapter {
    let path = dir.path().join(name);
    write(&path, tensors);
    Adapter::open(&path).unwrap()
}

fn weights(text: &str) -> StepWeights {
    text.parse().unwrap()
}

/// Adapters of different dtypes, ranks, prefixes and layers, one with alphas.
fn three() -> [Vec<common::Stored>; 3] {
    let mut first = adapter("transformer.", Dtype::F32, 1, |_| true);
    for (i, layer) in layers().iter().enumerate().filter(|(i, _)| i % 3 != 1) {
        let mut alpha = stored(format!("transformer.{}.alpha", layer.0), Dtype::F32, &[], 1);
        alpha.values[0] = 0.5 + i as f32;
        first.push(alpha);
    }
    let second = adapter("base_model.model.", Dtype::BF16, 2, |name| {
        name.contains("to_k") || name.contains("proj") || name == "embed"
    });
    let third = adapter("", Dtype::BF16, 3, |name| name.contains("1.attn.to_"));
    [first, second, third]
}

#[test]
fn base_and_adapters_equal_the_dense_sum_and_every_plan_the_same_bits() {
    let (dir, path) = folder();
    let files = three();
    let expected =
        reference(dir.path(), &merged(&[(&files[0], 0.7), (&files[1], -1.25), (&files[2], 1.)]));
    let plain = reference(dir.path(), &merged(&[]));
    assert!(relative(&expected, &plain) > 0.1, "the adapters do something");

    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "transformer", &path);
    let mut set = AdapterSet::new(&pager, &["transformer"]);
    pager.plan(Budget::Unlimited).unwrap();
    let loaded: Vec<_> = ["a", "b", "c"]
        .iter()
        .zip(&files)
        .map(|(name, tensors)| open(&dir, name, tensors))
        .zip(["0.7", "-1.25", "1"].map(weights))
        .collect();
    assert_eq!(set.load(&loaded, Unfit::Fail).unwrap(), []);
    let got = run(&tower).unwrap();
    let off = relative(&got, &expected);
    assert!(off < 1e-5, "{off}");

    let least = pager.plan(Budget::Min).unwrap().minimum.0;
    let all = pager.report().models[0].weights.0;
    for budget in (0..=4).map(|i| least + (all - least) * i / 4) {
        pager.plan(Budget::Bytes(Bytes(budget))).unwrap();
        for _ in 0..2 {
            assert_eq!(bits(&run(&tower).unwrap()), bits(&got), "budget {budget}");
        }
        assert!(pager.report().budget == Bytes(budget));
    }
    set.clear().unwrap();
    assert_eq!(bits(&run(&tower).unwrap()), bits(&plain));
}

#[test]
fn what_is_loaded_is_counted_and_kept_within_the_budget() {
    let (dir, path) = folder();
    let [first, ..] = three();
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "transformer", &path);
    let before = pager.plan(Budget::Min).unwrap();
    let mut set = AdapterSet::new(&pager, &["transformer"]);
    set.load(&[(open(&dir, "a", &first), weights("1"))], Unfit::Fail).unwrap();
    run(&tower).unwrap();
    let (report, plan) = (pager.report(), pager.plan(Budget::Min).unwrap());
    let attached = report.models[0].attached;
    assert!(attached.0 > 0 && plan.weights.0 == before.weights.0 + attached.0);
    assert!(report.peak <= plan.minimum && report.peak > before.minimum);

    // A budget that the model fits and the model with an adapter does not.
    set.clear().unwrap();
    pager.plan(Budget::Bytes(before.minimum)).unwrap();
    let plain = run(&tower).unwrap();
    let error = set.load(&[(open(&dir, "a", &first), weights("1"))], Unfit::Fail).unwrap_err();
    assert!(error.to_string().contains("too small"), "{error}");
    assert!(set.is_empty());
    assert_eq!(bits(&run(&tower).unwrap()), bits(&plain));
}

#[test]
fn weights_act_over_the_steps_without_reading() {
    let (dir, path) = folder();
    let [first, second, _] = three();
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "transformer", &path);
    let mut set = AdapterSet::new(&pager, &["transformer"]);
    let adapters = [
        (open(&dir, "a", &first), weights("0,0.5")),
        (open(&dir, "b", &second), weights("0;1,-1")),
    ];
    set.load(&adapters, Unfit::Fail).unwrap();
    pager.plan(Budget::Unlimited).unwrap();
    run(&tower).unwrap();
    let read = pager.report().models[0].read;
    let at = |a: f64, b: f64| reference(dir.path(), &merged(&[(&first, a), (&second, b)]));
    let expected = [at(0., 0.), at(0., 0.), at(0.5, 1.), at(0.5, -1.)];
    assert_eq!(bits(&run(&tower).unwrap()), bits(&expected[0]), "nothing is added at weight 0");
    for (step, expected) in expected.iter().enumerate() {
        set.set_step(step, &Steps::new(4));
        let off = relative(&run(&tower).unwrap(), expected);
        assert!(off < 1e-5, "step {step}: {off}");
    }
    set.set_weights(&[weights("0.5"), weights("1")]).unwrap();
    assert!(relative(&run(&tower).unwrap(), &expected[2]) < 1e-5);
    assert_eq!(pager.report().models[0].read, read, "weights read nothing");
    assert!(set.set_weights(&[weights("1")]).unwrap_err().to_string().contains("2 adapters"));
    let named: Vec<String> = set.adapters().map(|(_, weights)| weights.to_string()).collect();
    assert_eq!(named, ["0.5", "1"]);
}

#[test]
fn loading_replaces_the_set_or_leaves_it() {
    let (dir, path) = folder();
    let [first, second, _] = three();
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "transformer", &path);
    pager.plan(Budget::Min).unwrap();
    let plain = run(&tower).unwrap();
    let mut set = AdapterSet::new(&pager, &["transformer"]);
    let (a, b) = (open(&dir, "a", &first), open(&dir, "b", &second));
    set.load(&[(a.clone(), weights("1"))], Unfit::Fail).unwrap();
    let with_a = run(&tower).unwrap();
    set.load(&[(b.clone(), weights("1"))], Unfit::Fail).unwrap();
    let expected = reference(dir.path(), &merged(&[(&second, 1.)]));
    let with_b = run(&tower).unwrap();
    assert!(relative(&with_b, &expected) < 1e-5, "nothing of the first is left");

    // Whatever fails leaves what was there.
    let layer = ("blocks.7.attn.to_q".to_string(), 4, 4);
    let odd = open(&dir, "odd", &pair("transformer.", &layer, 2, Dtype::F32, 1));
    set.load(&[(a.clone(), weights("1")), (odd, weights("1"))], Unfit::Fail).unwrap_err();
    assert_eq!(bits(&run(&tower).unwrap()), bits(&with_b));
    {
        let _pass = tower.pass().unwrap();
        let error = set.load(&[(a.clone(), weights("1"))], Unfit::Fail).unwrap_err();
        assert!(matches!(error, mmgp_lora::Error::Residency(Paging::Busy { .. })), "{error}");
        assert!(set.clear().is_err());
    }
    assert_eq!(bits(&run(&tower).unwrap()), bits(&with_b));
    let mut other = AdapterSet::new(&pager, &["transformer"]);
    let error = other.load(&[(a.clone(), weights("1"))], Unfit::Fail).unwrap_err();
    assert!(matches!(error, mmgp_lora::Error::Taken { .. }), "{error}");
    drop(other);
    assert_eq!(bits(&run(&tower).unwrap()), bits(&with_b));

    set.load(&[(a, weights("1"))], Unfit::Fail).unwrap();
    assert_eq!(bits(&run(&tower).unwrap()), bits(&with_a));
    drop(set);
    assert_eq!(bits(&run(&tower).unwrap()), bits(&plain), "a dropped set takes its adapters along");
    let mut next = AdapterSet::new(&pager, &["transformer"]);
    next.load(&[(b, weights("1"))], Unfit::Fail).unwrap();
    assert_eq!(bits(&run(&tower).unwrap()), bits(&with_b));
    drop(tower); // before its set
}

#[test]
fn prefixes_choose_the_model() {
    let (dir, path) = folder();
    let files = three();
    let pager = Pager::new(&Device::Cpu).unwrap();
    let towers = ["transformer", "text_encoder"].map(|name| build(&pager, name, &path));
    let mut set = AdapterSet::new(&pager, &["transformer", "text_encoder"]);
    let mut both = files[2].clone();
    both.extend(adapter("text_encoder.", Dtype::F16, 9, |name| name.contains("to_q")));
    set.load(&[(open(&dir, "a", &both), weights("1"))], Unfit::Fail).unwrap();
    let (transformer, encoder) = both.split_at(files[2].len());
    for (tower, part) in towers.iter().zip([transformer, encoder]) {
        let expected = reference(dir.path(), &merged(&[(part, 1.)]));
        assert!(relative(&run(tower).unwrap(), &expected) < 1e-5);
    }
    let missing = AdapterSet::new(&pager, &["transformer", "unet"]);
    let error = missing.check(&[], Unfit::Fail).unwrap_err().to_string();
    assert!(error.contains("`unet`") && error.contains("text_encoder"), "{error}");
}

#[test]
fn alpha_and_rank_come_from_the_configuration_too() {
    let (dir, path) = folder();
    let layer = &layers()[1];
    let json = r#""r": 2, "lora_alpha": 6, "alpha_pattern": {"to_q": 3}, "rank_pattern": {}"#;
    let prefixed =
        json.replace("\"r\"", "\"transformer.r\"").replace("\"lora", "\"transformer.lora");
    let prefixed = prefixed.replace("\"alpha", "\"transformer.alpha");
    let pager = Pager::new(&Device::Cpu).unwrap();
    let tower = build(&pager, "transformer", &path);
    let mut set = AdapterSet::new(&pager, &["transformer"]);
    let q = pair("transformer.", layer, 2, Dtype::F32, 5);
    let expected = reference(dir.path(), &merged(&[(&q, 1.5)]));

    let header = dir.path().join("header.safetensors");
    let metadata = [("lora_adapter_metadata".to_string(), format!("{{{prefixed}}}"))];
    write_with(&header, &q, &BTreeMap::from(metadata));
    set.load(&[(Adapter::open(&header).unwrap(), weights("1"))], Unfit::Fail).unwrap();
    assert!(relative(&run(&tower).unwrap(), &expected) < 1e-5);

    // PEFT's own way: a folder with a configuration beside the weights.
    let beside = dir.path().join("adapter_model.safetensors");
    write(&beside, &pair("base_model.model.", layer, 2, Dtype::F32, 5));
    fs::write(dir.path().join("adapter_config.json"), format!("{{{json}}}")).unwrap();
    set.load(&[(Adapter::open(&beside).unwrap(), weights("1"))], Unfit::Fail).unwrap();
    assert!(relative(&run(&tower).unwrap(), &expected) < 1e-5);
    write(&beside, &pair("base_model.model.", layer, 3, Dtype::F32, 5));
    let error = Adapter::open(&beside).unwrap_err().to_string();
    assert!(error.contains("expected 2") && error.contains("found 3"), "{error}");
}
