//! What can be wrong with an adapter is an error that names file, tensor, expected and found.
#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf};

use candle_core::Device;
use mmgp_io::Dtype;
use mmgp_lora::{Adapter, AdapterSet, Error, StepWeights, Unfit};
use mmgp_residency::Pager;
use proptest::prelude::*;

mod common;
use common::{Stored, Tower, adapter, build, folder, layers, pair, run, stored, write};

struct Bench {
    dir: tempfile::TempDir,
    set: AdapterSet,
    tower: Tower,
}

impl Bench {
    fn new() -> Self {
        let (dir, path) = folder();
        let pager = Pager::new(&Device::Cpu).unwrap();
        let tower = build(&pager, "transformer", &path);
        Self { dir, set: AdapterSet::new(&pager, &["transformer"]), tower }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("style.safetensors")
    }

    fn load(&mut self, tensors: &[Stored], unfit: Unfit) -> mmgp_lora::Result<Vec<String>> {
        write(&self.path(), tensors);
        let adapter = Adapter::open(self.path())?;
        let skipped = self.set.load(&[(adapter, StepWeights::default())], unfit)?;
        Ok(skipped.into_iter().map(|s| format!("{}: {}", s.tensor, s.reason)).collect())
    }

    /// The error of a file, which names the file and the parts given.
    fn error(&mut self, tensors: &[Stored], parts: &[&str]) -> Error {
        let error = self.load(tensors, Unfit::Fail).unwrap_err();
        let text = error.to_string();
        for part in parts.iter().chain([&"style.safetensors"]) {
            assert!(text.contains(part), "no `{part}` in: {text}");
        }
        assert!(self.set.is_empty());
        error
    }
}

fn q() -> [Stored; 2] {
    pair("transformer.", &layers()[1], 2, Dtype::F32, 5)
}

#[test]
fn a_key_that_fits_nothing_fails_with_what_is_like_it() {
    let mut bench = Bench::new();
    let good = adapter("transformer.", Dtype::F32, 1, |name| name.contains("to_v"));
    let mut wrong = good.clone();
    for i in 0..5 {
        let layer = (format!("blocks.{i}.attn.to_queries"), 20, 20);
        wrong.extend(pair("transformer.", &layer, 2, Dtype::F32, i));
    }
    wrong.push(stored("transformer.something.else", Dtype::F32, &[2], 1));
    let parts = [
        "11 of 17 keys",
        "`transformer.something.else`",
        "`transformer.blocks.0.attn.to_queries.lora_A.weight` (most like `blocks.0.attn.to_q`)",
        "…",
    ];
    let error = bench.error(&wrong, &parts);
    let Error::Unknown(unknown) = error else { panic!("{error}") };
    assert_eq!((unknown.count, unknown.of, unknown.first.len()), (11, 17, 3));
    assert_eq!(unknown.first[0].1, None, "nothing is like it");

    let skipped = bench.load(&wrong, Unfit::Skip).unwrap();
    assert_eq!(skipped.len(), 6);
    assert!(skipped[1].contains("to_queries.lora_A.weight: no such layer"), "{}", skipped[1]);
    let lenient = run(&bench.tower).unwrap();
    bench.load(&good, Unfit::Fail).unwrap();
    assert_eq!(run(&bench.tower).unwrap(), lenient, "the rest is loaded");
}

#[test]
fn shapes_must_fit_the_model_and_each_other() {
    let mut bench = Bench::new();
    let [a, b] = q();
    let (name_a, name_b) = (a.name.clone(), b.name.clone());
    let a_of = |shape: &[usize]| stored(name_a.clone(), Dtype::F32, shape, 1);
    let b_of = |shape: &[usize]| stored(name_b.clone(), Dtype::F32, shape, 1);
    bench.error(&[a_of(&[2, 21]), b.clone()], &["lora_A", "[2, 21]", "[2, 20]", "20 inputs"]);
    bench.error(&[a.clone(), b_of(&[60, 2])], &["lora_B", "[60, 2]", "[20, 2]", "20 outputs"]);
    bench.error(&[a.clone(), b_of(&[20, 3])], &["lora_B", "[20, 3]", "[outputs, 2]"]);
    bench.error(&[a_of(&[0, 20]), b_of(&[20, 0])], &["lora_A", "[0, 20]", "rank of at least 1"]);
    bench.error(&[a_of(&[2, 20, 1, 1]), b.clone()], &["lora_A", "[2, 20, 1, 1]"]);
    bench.error(&[a_of(&[]), b.clone()], &["lora_A", "[]"]);
    bench.error(&[a.clone(), b_of(&[20])], &["lora_B", "[20]"]);
    let skipped = bench.load(&[a_of(&[2, 21]), b.clone()], Unfit::Skip).unwrap();
    assert!(skipped[0].contains("[2, 21]"), "{skipped:?}");
    bench.set.clear().unwrap();

    let alpha =
        |shape: &[usize]| stored("transformer.blocks.0.attn.to_q.alpha", Dtype::F32, shape, 1);
    bench.error(&[a.clone(), b.clone(), alpha(&[2])], &["alpha", "one number"]);
    bench.error(&[a.clone(), b.clone(), alpha(&[0])], &["alpha", "one number"]);
    let typed = Stored { dtype: Dtype::I64, ..a.clone() };
    bench.error(&[typed, b.clone()], &["lora_A", "I64", "BF16"]);
    let typed = Stored { dtype: Dtype::I64, ..alpha(&[]) };
    bench.error(&[a, b, typed], &["alpha", "I64"]);
}

#[test]
fn values_must_be_numbers() {
    let mut bench = Bench::new();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let [mut a, mut b] = pair("transformer.", &layers()[1], 2, dtype, 5);
            b.values[7] = value;
            bench.error(&[a.clone(), b.clone()], &["lora_B", "at byte", &value.to_string()]);
            b.values[7] = 1.;
            a.values[39] = value;
            bench.error(&[a, b], &["lora_A", "at byte"]);
        }
    }
    let [a, b] = q();
    let mut alpha = stored("transformer.blocks.0.attn.to_q.alpha", Dtype::F32, &[], 1);
    alpha.values[0] = f32::NAN;
    bench.error(&[a, b, alpha], &["alpha", "NaN"]);
}

#[test]
fn files_that_are_no_adapters_are_named() {
    let mut bench = Bench::new();
    let [a, b] = q();
    assert!(matches!(bench.error(&[], &["without tensors"]), Error::Empty { .. }));
    bench.error(&common::tower_weights(), &["32 tensors", "blocks.0.attn.to_k.bias", "peft"]);
    bench.error(std::slice::from_ref(&a), &["lora_A.weight", "stands alone, expected lora_B"]);
    bench.error(std::slice::from_ref(&b), &["lora_B.weight", "stands alone, expected lora_A"]);
    let twice = Stored { name: a.name.replace("A.weight", "A.default.weight"), ..a.clone() };
    bench.error(&[a.clone(), b.clone(), twice], &["lora_A.weight", "lora_A.default.weight"]);
    let magnitude = a.name.replace("lora_A.weight", "lora_magnitude_vector");
    let dora = [a.clone(), b.clone(), stored(magnitude, Dtype::F32, &[20], 1)];
    bench.error(&dora, &["lora_magnitude_vector", "DoRA"]);
    let skipped = bench.load(&dora, Unfit::Skip).unwrap();
    assert!(skipped[0].contains("DoRA"), "{skipped:?}");
    bench.set.clear().unwrap();
    let alone = stored("transformer.blocks.0.attn.to_q.alpha", Dtype::F32, &[], 1);
    bench.error(&[alone], &["1 of 1 keys", "alpha"]);
    // A name that would move the cursor or fill the screen.
    let evil =
        stored(format!("a\x1b[2J{}.lora_A.weight", "x".repeat(5000)), Dtype::F32, &[2, 2], 1);
    let other = Stored { name: evil.name.replace("lora_A", "lora_B"), ..evil.clone() };
    let text = bench.error(&[evil, other], &["2 of 2 keys"]).to_string();
    assert!(!text.contains('\x1b') && text.len() < 1000, "{text}");
    assert!(Adapter::open(bench.dir.path().join("none.safetensors")).is_err());
    assert!(Adapter::open(bench.dir.path()).is_err());
}

#[test]
fn a_file_cut_short_after_loading_is_an_error_at_the_lease() {
    let mut bench = Bench::new();
    bench.load(&q(), Unfit::Fail).unwrap();
    let whole = fs::read(bench.path()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(bench.path()).unwrap();
    file.set_len(whole.len() as u64 - 8).unwrap();
    let error = run(&bench.tower).unwrap_err().to_string();
    assert!(error.contains("style.safetensors"), "{error}");
    fs::write(bench.path(), whole).unwrap();
    run(&bench.tower).unwrap();
    bench.set.clear().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a file's bytes are, opening and loading it ends with an adapter or an error.
    #[test]
    fn damaged_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        thread_local! {
            static BENCH: std::cell::RefCell<(Bench, Vec<u8>)> = {
                let bench = Bench::new();
                let metadata = r#"{"transformer.lora_alpha": 4, "transformer.r": 2,
                    "transformer.alpha_pattern": {"to_q": 3}}"#;
                let metadata = [("lora_adapter_metadata".to_string(), metadata.to_string())];
                common::write_with(&bench.path(), &q(), &metadata.into());
                let bytes = fs::read(bench.path()).unwrap();
                std::cell::RefCell::new((bench, bytes))
            };
        }
        BENCH.with_borrow_mut(|(bench, bytes)| {
            let mut bytes = bytes.clone();
            // Mostly in the header, where meaning is.
            for (at, value) in &edits {
                let len = if value % 4 == 0 { bytes.len() } else { 600.min(bytes.len()) };
                bytes[at.index(len)] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let path = bench.dir.path().join("damaged.safetensors");
            fs::write(&path, bytes).unwrap();
            if let Ok(adapter) = Adapter::open(&path) {
                for unfit in [Unfit::Fail, Unfit::Skip] {
                    let adapters = [(adapter.clone(), StepWeights::default())];
                    if bench.set.load(&adapters, unfit).is_ok() {
                        run(&bench.tower).unwrap();
                    }
                }
            }
        });
    }
}
