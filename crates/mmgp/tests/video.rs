//! Videos by the command: every format, the same bits under every budget, with int8 and with an adapter;
//! what fails to be decoded is kept and decoded later.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use mmgp::{Denoised, read_picture};

mod common;
use common::{Run, mmgp};

fn tiny(name: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mmgp-models/tests/pipelines");
    models.join(name).canonicalize().unwrap()
}

/// Two steps of the tiny pipeline in `model`.
fn generate(dir: &Path, model: &Path, args: &[&str]) -> Run {
    let model = model.to_str().unwrap();
    let given =
        ["generate", "a red panda plays", "--model", model, "--steps", "2", "--store", "off"];
    mmgp(dir, &[&given[..], &["--device", "cpu", "--max-sequence-length", "226"], args].concat())
}

fn names(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name());
    let mut names: Vec<_> = files.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn endings_decide_the_format_and_budgets_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny("cogvideox-5b");
    let args = ["--width", "32", "--height", "32", "--frames", "9", "--fps", "5"];
    let run = |more: &[&str]| {
        let run = generate(dir.path(), &model, &[&args[..], more].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.latents().to_string()
    };
    let latents = run(&["--budget", "min", "--out", "it.mp4"]);
    for out in ["it.gif", "it.webp", "it.png"] {
        assert_eq!(run(&["--budget", "unlimited", "--out", out]), latents);
    }
    assert_eq!(names(dir.path()), ["it", "it.gif", "it.mp4", "it.webp"]);
    assert_eq!(fs::read_dir(dir.path().join("it")).unwrap().count(), 9);
    let first = fs::read(dir.path().join("it.mp4")).unwrap();
    assert_eq!(run(&["--budget", "50%", "--out", "again.mp4"]), latents);
    assert!(fs::read(dir.path().join("again.mp4")).unwrap() == first);
    // Named after the prompt.
    run(&[]);
    assert!(dir.path().join("a-red-panda-plays.mp4").is_file());
    assert!(!names(dir.path()).iter().any(|name| name.contains("latents")));

    let text = String::from_utf8_lossy(&first);
    for part in ["a red panda plays", "size: 32x32, 9 frames", "guidance: 6, dynamic"] {
        assert!(text.contains(part), "{part}");
    }
}

#[test]
fn int8_has_the_same_bits_under_every_budget() {
    let dir = tempfile::tempdir().unwrap();
    for model in ["cogvideox-2b", "hunyuanvideo"] {
        let model = tiny(model);
        let args = ["--width", "32", "--height", "32", "--frames", "1", "--out", "it.png"];
        let run = |more: &[&str]| {
            let run = generate(dir.path(), &model, &[&args[..], more].concat());
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            run.latents().to_string()
        };
        let plain = run(&[]);
        let int8 = ["--quantize", "transformer,text_encoder"];
        let latents = run(&[&int8[..], &["--budget", "min"]].concat());
        assert_ne!(latents, plain);
        for budget in ["60%", "unlimited"] {
            assert_eq!(run(&[&int8[..], &["--budget", budget]].concat()), latents, "{budget}");
        }
    }
}

#[test]
fn an_adapter_rides_with_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny("cogvideox-5b");
    let lora = dir.path().join("style.safetensors");
    // Width 32 of the tiny model; diffusers' names.
    let layers = ["0.attn1.to_q", "1.attn1.to_out.0", "1.ff.net.2"];
    let mut tensors = std::collections::HashMap::new();
    let dev = candle_core::Device::Cpu;
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(model.join("transformer/config.json")).unwrap()).unwrap();
    let of = |key: &str| config[key].as_u64().unwrap() as usize;
    let width = of("num_attention_heads") * of("attention_head_dim");
    for layer in layers {
        let inputs = if layer.contains("ff") { 4 * width } else { width };
        let name = format!("transformer.transformer_blocks.{layer}");
        let ramp = |rows: usize, columns: usize| {
            let values = (0..rows * columns).map(|i| (i % 7) as f32 * 0.05 - 0.15);
            candle_core::Tensor::from_iter(values, &dev).unwrap().reshape((rows, columns)).unwrap()
        };
        tensors.insert(format!("{name}.lora_A.weight"), ramp(2, inputs));
        tensors.insert(format!("{name}.lora_B.weight"), ramp(width, 2));
    }
    candle_core::safetensors::save(&tensors, &lora).unwrap();
    let lora = lora.to_str().unwrap();
    let run = |more: &[&str]| {
        let size = ["--width", "32", "--height", "32", "--frames", "5", "--out", "it.gif"];
        let run = generate(dir.path(), &model, &[&size[..], more].concat());
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.latents().to_string()
    };
    let with = run(&["--lora", lora, "--budget", "min"]);
    assert_ne!(with, run(&[]));
    assert_eq!(with, run(&["--lora", lora, "--budget", "unlimited"]));
}

#[test]
fn latents_outlive_a_decode_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (tiny("cogvideox-2b"), dir.path().to_path_buf());
    let good = generate(&out, &model, &["--frames", "9", "--out", "good.webp"]);
    assert_eq!(good.code, Some(0), "{}", good.stderr);

    let kept = kept_latents(&out, &model, &[]);
    let run =
        mmgp(&out, &["decode", kept.to_str().unwrap(), "--out", "again.webp", "--device", "cpu"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(fs::read(out.join("again.webp")).unwrap() == fs::read(out.join("good.webp")).unwrap());
    assert!(kept.is_file(), "they are the user's now");

    // Another model, other files.
    let flux = common::demo();
    let run = mmgp(&out, &["decode", kept.to_str().unwrap(), "--model", flux.to_str().unwrap()]);
    assert!(
        run.code == Some(1) && run.stderr.contains("latents of a CogVideoXPipeline"),
        "{}",
        run.stderr
    );
    let weights = fs::read(model.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    for (name, content) in [("a.safetensors", &b"junk"[..]), ("b.safetensors", &weights)] {
        fs::write(out.join(name), content).unwrap();
        let run = mmgp(&out, &["decode", name]);
        assert!(run.code == Some(1) && run.stderr.contains(name), "{}", run.stderr);
    }
}

/// What a run leaves that is stopped while it decodes: the latents of a run whose output's folder goes away.
fn kept_latents(dir: &Path, model: &Path, args: &[&str]) -> PathBuf {
    let place = dir.join("place");
    fs::create_dir(&place).unwrap();
    // The frames of a folder that holds something else are not written, which shows after denoising.
    let taken = place.join("it");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("mine.txt"), "mine").unwrap();
    let given = ["--frames", "9", "--out", "place/it.png"];
    let run = generate(dir, model, &[&given[..], args].concat());
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("mmgp decode"), "{}", run.stderr);
    let kept = place.join("it.latents.safetensors");
    let denoised = Denoised::open(&kept).unwrap();
    assert_eq!(denoised.about.request.frames, 9);
    assert_eq!(denoised.latents.shape[1], 3);
    kept
}

#[test]
fn a_video_begins_with_a_picture_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny("cogvideox-5b-i2v");
    let run = generate(dir.path(), &model, &[]);
    assert!(run.code == Some(1) && run.stderr.contains("needs a picture"), "{}", run.stderr);
    let image = model.join("image.png");
    assert!(read_picture(&image, 200, 100).is_ok());
    let run =
        generate(dir.path(), &model, &["--image", image.to_str().unwrap(), "--out", "it.mp4"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    // Its latents need no picture any more.
    let kept = kept_latents(dir.path(), &model, &["--image", image.to_str().unwrap()]);
    let args = ["decode", kept.to_str().unwrap(), "--out", "again.mp4", "--device", "cpu"];
    let decoded = mmgp(dir.path(), &args);
    assert_eq!(decoded.code, Some(0), "{}", decoded.stderr);
    let file = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert!(file("again.mp4") == file("it.mp4"));
    let plain = tiny("cogvideox-5b");
    let run = generate(dir.path(), &plain, &["--image", image.to_str().unwrap()]);
    assert!(run.code == Some(1) && run.stderr.contains("takes no picture"), "{}", run.stderr);
}

#[test]
fn what_cannot_be_drawn_is_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let video = tiny("cogvideox-2b");
    let flux = common::demo();
    for (model, args, part) in [
        (&video, &["--frames", "8"][..], "nearest below is 5"),
        (&video, &["--width", "40"], "multiple of 16"),
        (&video, &["--negative", "x", "--guidance", "1"], "needs a guidance scale above 1"),
        (&video, &["--out", "it.avi"], ".mp4"),
        (&video, &["--fps", "0"], "above 0"),
        (&flux, &["--frames", "9"], "draws pictures"),
        (&flux, &["--negative", "x"], "no negative prompt"),
        (&flux, &["--guidance-schedule", "dynamic"], "no dynamic guidance"),
        (&flux, &["--tiles", "off"], "no"),
        (&flux, &["--image", "none.png"], "none.png"),
        (&flux, &["--out", "it.mp4"], ".png"),
    ] {
        let run = generate(dir.path(), model, args);
        assert!(run.code.is_some_and(|code| code > 0), "{args:?}");
        assert!(run.stderr.contains(part), "{args:?}: {}", run.stderr);
    }
    assert!(names(dir.path()).is_empty());
}
