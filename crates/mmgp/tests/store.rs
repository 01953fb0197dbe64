//! The store: made in the first run, mapped in the second, never half, healed when damaged.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use mmgp::{Bytes, Offload, Settings, Store};

mod common;
use common::{demo, mmgp};

const QUANTIZE: [&str; 2] = ["--quantize", "transformer,text_encoder_2"];

/// Whatever else fills the disk that the tests run on, they have this much.
const SPARE: [&str; 2] = ["--store-spare", "1MB"];

fn generate(dir: &Path, store: &str) -> common::Run {
    let args = ["generate", "red heart", "--steps", "2", "--out", "it.png", "--store", store];
    mmgp(dir, &[&args[..], &QUANTIZE, &SPARE].concat())
}

fn files(store: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(store).into_iter().flatten().map(|f| f.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_second_start_takes_what_the_first_one_made() {
    let dir = tempfile::tempdir().unwrap();
    let off = generate(dir.path(), "off");
    assert_eq!(off.code, Some(0), "{}", off.stderr);
    let first = generate(dir.path(), "store");
    assert_eq!(first.latents(), off.latents());
    assert_eq!(first.stderr.matches("kept ").count(), 2, "{}", first.stderr);
    let before = files(&dir.path().join("store"));
    let second = generate(dir.path(), "store");
    assert_eq!(second.latents(), off.latents());
    assert!(!second.stderr.contains("kept "), "{}", second.stderr);
    assert_eq!(files(&dir.path().join("store")), before);

    let list = mmgp(dir.path(), &["store", "list", "--store", "store"]);
    assert!(list.stdout.contains("2 models") && list.stdout.contains("tiny-flux/transformer"));
    // Another recipe is another entry.
    let args = ["--exclude", "*.attn.*", "--store", "store", "--steps", "2", "--out", "it.png"];
    let other =
        mmgp(dir.path(), &[&["generate", "red heart"][..], &QUANTIZE, &SPARE, &args].concat());
    assert_eq!(other.stderr.matches("kept ").count(), 2, "{}", other.stderr);
    assert_ne!(other.latents(), off.latents());
    let clear = mmgp(dir.path(), &["store", "clear", "--store", "store"]);
    assert_eq!(clear.code, Some(0), "{}", clear.stderr);
    assert!(files(&dir.path().join("store")).is_empty());
}

#[test]
fn damaged_and_hostile_entries_are_named_and_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let expected = generate(dir.path(), "store").latents().to_string();
    let transformer = files(&store)
        .into_iter()
        .find(|f| {
            f.extension().is_some_and(|e| e == "safetensors")
                && f.to_string_lossy().contains("/transformer-")
        })
        .unwrap();
    let whole = fs::read(&transformer).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    fs::write(&transformer, &damaged).unwrap();
    let run = generate(dir.path(), "store");
    assert_eq!(run.code, Some(1));
    for part in ["damaged", "block `", "transformer-", "again"] {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    let healed = generate(dir.path(), "store");
    assert!(healed.stderr.contains("kept transformer") && healed.latents() == expected);

    // Cut short, without its note, with a note that is none: each is made anew at once.
    let note = transformer.with_extension("note.json");
    for damage in [
        &|| fs::write(&transformer, &whole[..whole.len() - 9]).unwrap() as (),
        &|| fs::remove_file(&note).unwrap(),
        &|| fs::write(&note, "{\"bytes\": -1}").unwrap(),
        &|| fs::write(&note, "[".repeat(1000)).unwrap(),
    ] as [&dyn Fn(); 4]
    {
        damage();
        let run = generate(dir.path(), "store");
        assert!(
            run.stderr.contains("kept transformer") && run.latents() == expected,
            "{}",
            run.stderr
        );
    }
}

#[test]
fn a_store_without_room_keeps_nothing_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let said = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let heard = said.clone();
    let store = Store::at(dir.path()).with_cap(Bytes(2_000_000)).with_spare(Bytes(1_000_000));
    let mut settings = Settings::default();
    settings.set("quantize_transformer", "on").unwrap();
    settings.set("extra_models_to_quantize", "text_encoder_2").unwrap();
    let tell = move |line: &str| heard.borrow_mut().push(line.to_string());
    let mut offload =
        Offload::builder().settings(settings).store(store.clone(), tell).build().unwrap();
    offload.pipeline(demo()).unwrap();
    let said = said.borrow();
    assert!(said[0].contains("transformer") && said[0].contains("no room"), "{said:?}");
    assert!(said[1].contains("kept text_encoder_2"), "{said:?}");
    assert_eq!(store.entries().unwrap().len(), 1);
}

#[test]
fn a_disk_without_room_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (free, all) = mmgp_io::disk_space(dir.path()).unwrap();
    assert!(0 < free && free <= all);
    let kept = |spare: &str| {
        let args = ["--steps", "1", "--store", "store", "--store-spare", spare];
        let run = mmgp(dir.path(), &[&["generate", "red heart"][..], &QUANTIZE, &args].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let models = Store::at(dir.path().join("store")).entries().unwrap().len();
        assert_eq!(run.stderr.matches("no room").count(), 2 - models, "{}", run.stderr);
        models
    };
    assert_eq!(kept(&format!("{all}B")), 0);
    assert_eq!(kept("1MB"), 2);
}

#[test]
fn a_kill_at_any_moment_leaves_whole_entries_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let expected = generate(dir.path(), "off").latents().to_string();
    let (mut killed, mut state) = (0, 88172645463325252u64);
    for round in 0..100 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mmgp"))
            .args(["generate", "red heart", "--steps", "1", "--out", "it.png", "--store", "store"])
            .args(QUANTIZE)
            .args(SPARE)
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        std::thread::sleep(Duration::from_micros(state % 200_000));
        killed += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        for entry in Store::at(dir.path().join("store")).entries().unwrap() {
            mmgp_io::Checkpoint::open(entry.path).unwrap();
        }
        if round % 10 == 9 {
            mmgp(dir.path(), &["store", "clear", "--store", "store"]);
        }
    }
    assert!(killed >= 5, "only {killed} of 100 were still running");
    assert_eq!(generate(dir.path(), "store").latents(), expected);
    let store = dir.path().join("store");
    let strays = |f: &PathBuf| f.to_string_lossy().ends_with(".tmp");
    assert!(!files(&store).iter().any(strays), "{:?}", files(&store));
}
