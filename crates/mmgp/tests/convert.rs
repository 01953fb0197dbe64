//! Converted pipelines: the same bytes out, laid out for streaming, readable by others, never half.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, process::Command, time::Duration};

use mmgp_io::{Checkpoint, Dtype};

mod common;
use common::{demo, mmgp};

const MODELS: [(&str, &str); 3] = [
    ("transformer", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
    ("text_encoder_2", "model"),
];

fn convert(dir: &Path, to: &str, more: &[&str]) -> common::Run {
    let demo = demo();
    let mut args = vec!["convert", demo.to_str().unwrap(), to];
    args.extend(more);
    mmgp(dir, &args)
}

fn latents(dir: &Path, more: &[&str]) -> String {
    let mut args = vec!["generate", "red heart", "--steps", "2", "--out", "it.png"];
    args.extend(more);
    let run = mmgp(dir, &args);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(!run.stderr.contains("warning"), "{}", run.stderr);
    run.latents().to_string()
}

#[test]
fn a_converted_pipeline_draws_what_the_original_draws() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let lora = format!("{}:0.7", demo().join("../tiny-flux-lora/riso.safetensors").display());
    for (to, quantize) in [
        ("dense", &[][..]),
        ("int8", &["--quantize", "transformer,text_encoder_2"]),
        ("fp8", &["--quantize", "fp8,text_encoder_2"]),
    ] {
        let run = convert(dir, to, quantize);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        for more in [&[][..], &["--lora", &lora]] {
            let original = latents(dir, &[quantize, more].concat());
            for budget in ["min", "50%", "unlimited"] {
                let converted =
                    latents(dir, &[&["--model", to, "--budget", budget], more].concat());
                assert_eq!(converted, original, "{to} at {budget} with {more:?}");
            }
        }
    }
    // For int8 activations, which need a GPU; without them such weights draw nearly the same.
    let rotated = ["--quantize", "int8", "--int8-activations"];
    let run = convert(dir, "rotated", &rotated);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let file = dir.join("rotated/transformer/diffusion_pytorch_model.safetensors");
    let file = Checkpoint::open(file).unwrap();
    let codes = file.get("transformer_blocks.0.ff.net.2.weight._hadamard256").unwrap();
    assert_eq!(codes.dtype(), Dtype::I8);
    let drawn = latents(dir, &["--model", "rotated", "--budget", "min"]);
    assert_eq!(latents(dir, &["--model", "rotated"]), drawn);
    assert_ne!(latents(dir, &["--quantize", "int8"]), drawn);
    assert_eq!(convert(dir, "other", &["--int8-activations"]).code, Some(2));

    let again = convert(dir, "dense", &[]);
    assert!(again.code == Some(1) && again.stderr.contains("exists already"), "{}", again.stderr);
    assert_eq!(convert(dir, "dense", &["--overwrite"]).code, Some(0));
    let same = mmgp(dir, &["convert", "dense", "dense", "--overwrite"]);
    assert!(same.code == Some(1) && same.stderr.contains("one folder"), "{}", same.stderr);
}

#[test]
fn files_are_laid_out_for_streaming_and_the_reference_reader_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    convert(dir.path(), "int8", &["--quantize", "transformer,text_encoder_2"]);
    for (part, stem) in MODELS {
        let file = dir.path().join("int8").join(part).join(format!("{stem}.safetensors"));
        let bytes = fs::read(&file).unwrap();
        let (len, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((8 + len) % 4096, 0, "data starts at a page");
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");

        // Entries stand in file order, whole multiples of 256 first and aligned.
        let text = std::str::from_utf8(&bytes[8..8 + len]).unwrap();
        let mut views: Vec<_> = Checkpoint::open(&file).unwrap().iter().cloned().collect();
        views.sort_by_key(|view| (view.range().start, view.range().end));
        let place = |name: &str| text.find(&format!("\"{name}\":{{\"dtype\"")).unwrap();
        assert!(views.windows(2).all(|w| place(w[0].name()) < place(w[1].name())));
        let odd = |len: u64| !len.is_multiple_of(256);
        assert!(views.windows(2).all(|w| !odd(w[0].len()) || odd(w[1].len())), "the tail is last");
        assert!(views.iter().filter(|v| !odd(v.len())).all(|v| v.range().start % 256 == 0));

        // q, k and v stand side by side, in any form.
        if part == "transformer" {
            let names: Vec<&str> = views.iter().map(|view| view.name()).collect();
            let at = |name: &str| names.iter().position(|n| *n == name).unwrap();
            let q = at("single_transformer_blocks.1.attn.to_q.weight._data");
            assert_eq!(names[q + 1], "single_transformer_blocks.1.attn.to_k.weight._data");
            assert_eq!(names[q + 2], "single_transformer_blocks.1.attn.to_v.weight._data");
            assert_eq!(names[q + 3], "single_transformer_blocks.1.proj_mlp.weight._data");
            assert_eq!(views[q].dtype(), Dtype::I8);
            assert!(at("single_transformer_blocks.1.attn.to_q.weight._scale") > q + 3);
        }
    }
}

#[test]
fn a_kill_at_any_moment_leaves_whole_files() {
    let dir = tempfile::tempdir().unwrap();
    let run = convert(dir.path(), "int8", &["--quantize", "transformer,text_encoder_2"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let expected = latents(dir.path(), &["--model", "int8"]);
    let (mut killed, mut state) = (0, 88172645463325252u64);
    for _ in 0..100 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mmgp"))
            .args(["convert", demo().to_str().unwrap(), "int8", "--overwrite"])
            .args(["--quantize", "transformer,text_encoder_2"])
            .current_dir(dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        std::thread::sleep(Duration::from_micros(state % 120_000));
        killed += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        for (part, stem) in MODELS {
            let file = dir.path().join("int8").join(part).join(format!("{stem}.safetensors"));
            Checkpoint::open(file).unwrap();
        }
    }
    assert!(killed >= 5, "only {killed} of 100 were still running");
    let run =
        convert(dir.path(), "int8", &["--overwrite", "--quantize", "transformer,text_encoder_2"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(latents(dir.path(), &["--model", "int8"]), expected);
    let mut left = Vec::new();
    find(dir.path(), &mut left);
    assert!(left.is_empty(), "strays: {left:?}");
}

fn find(dir: &Path, left: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            find(&entry.path(), left);
        } else if entry.file_name().to_string_lossy().ends_with(".tmp") {
            left.push(entry.path().display().to_string());
        }
    }
}
