//! The command on the demo: the picture, its names, and the same bytes under every budget.
#![allow(clippy::unwrap_used)]

use std::fs;

mod common;
use common::{copy_of_demo, demo, mmgp, pictures, pixels};

#[test]
fn the_picture_is_the_one_that_diffusers_draws() {
    let dir = tempfile::tempdir().unwrap();
    for (prompt, reference) in
        [("red heart", "p0_w0"), ("a picture of a rocket", "p1_w0"), ("cat face", "p2_w0")]
    {
        let run = mmgp(dir.path(), &["generate", prompt, "--seed", "42", "--out", "it.png"]);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(run.stdout.contains("wrote it.png"), "{}", run.stdout);
        let ours = pixels(&dir.path().join("it.png"));
        let theirs = pixels(&demo().join(format!("../tiny-flux-reference/{reference}.png")));
        assert_eq!(ours.len(), theirs.len());
        let square = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
        let mse = ours.iter().zip(&theirs).map(square).sum::<f64>() / ours.len() as f64;
        let psnr = 10. * (255f64.powi(2) / mse.max(1e-9)).log10();
        assert!(psnr >= 45., "{prompt}: PSNR {psnr:.1} dB");
    }
}

#[test]
fn every_budget_gives_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen: Option<(String, Vec<u8>)> = None;
    for budget in ["min", "25%", "50%", "unlimited", "auto", "7MB"] {
        let out = format!("{}.png", budget.trim_end_matches('%'));
        let args = ["generate", "red heart", "--steps", "3", "--budget", budget, "--out", &out];
        let run = mmgp(dir.path(), &args);
        assert_eq!(run.code, Some(0), "{budget}: {}", run.stderr);
        assert!(run.stderr.contains("transformer"), "no report: {}", run.stderr);
        // No terminal, so a line for each step.
        assert_eq!(run.stderr.matches(" of 3: ").count(), 3, "{}", run.stderr);
        let result = (run.latents().to_string(), fs::read(dir.path().join(out)).unwrap());
        assert_eq!(seen.get_or_insert_with(|| result.clone()), &result, "{budget}");
    }
}

#[test]
fn pictures_are_numbered_and_seeds_count_up() {
    let dir = tempfile::tempdir().unwrap();
    let run = mmgp(
        dir.path(),
        &["generate", "Red heart!", "--steps", "1", "--count", "2", "--seed", "5"],
    );
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let hashes: Vec<_> = run.stdout.lines().map(|l| l.rsplit(' ').next().unwrap()).collect();
    let names: Vec<_> =
        pictures(dir.path()).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["red-heart-2.png", "red-heart.png"]);
    let again = mmgp(dir.path(), &["generate", "Red heart!", "--steps", "1", "--seed", "6"]);
    assert!(
        again.stdout.contains("red-heart-3.png") && again.stdout.contains(hashes[1]),
        "{}",
        again.stdout
    );
    assert_ne!(hashes[0], hashes[1]);
    // The encoders ran once for both pictures.
    let row = |run: &common::Run, name: &str| {
        let line = run
            .stderr
            .lines()
            .find(|l| l.starts_with(name) && l.contains("bf16"))
            .unwrap()
            .to_string();
        line.split_whitespace().rev().nth(3).unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(row(&run, "text_encoder_2"), row(&again, "text_encoder_2"));
    assert_eq!(row(&run, "transformer"), 2 * row(&again, "transformer"));
}

#[test]
fn files_say_how_they_were_made() {
    let dir = tempfile::tempdir().unwrap();
    mmgp(dir.path(), &["generate", "red ♥", "--steps", "1", "--seed", "9", "--out", "it.png"]);
    let bytes = fs::read(dir.path().join("it.png")).unwrap();
    let has = |text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(has("red ♥") && has("seed") && has("recipe") && has("steps: 1"));
}

#[test]
fn a_prompt_that_is_too_long_is_cut_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = "a picture of a rocket ".repeat(60);
    let run = mmgp(dir.path(), &["generate", &prompt, "--steps", "1", "--out", "it.png"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stderr.contains("warning") && run.stderr.contains("cut"), "{}", run.stderr);
    assert_eq!(pictures(dir.path()).len(), 1);
}

#[test]
fn tensors_that_nobody_uses_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let root = copy_of_demo(dir.path());
    common::edit(&root.join("transformer/config.json"), "\"num_layers\": 3", "\"num_layers\": 2");
    let args =
        ["generate", "x", "--steps", "1", "--model", root.to_str().unwrap(), "--out", "it.png"];
    let run = mmgp(dir.path(), &args);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(
        run.stderr.contains("warning") && run.stderr.contains("`transformer_blocks.2."),
        "{}",
        run.stderr
    );
}

#[test]
fn real_folders_differ_and_give_the_same_latents() {
    use mmgp_io::{Checkpoint, TensorSpec};
    let dir = tempfile::tempdir().unwrap();
    let root = copy_of_demo(dir.path());
    let latents = |root: &std::path::Path| {
        let root = root.to_str().unwrap();
        let args = ["generate", "red heart", "--steps", "2", "--model", root, "--out", "it.png"];
        let run = mmgp(dir.path(), &args);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(!run.stderr.contains("warning"), "{}", run.stderr);
        run.latents().to_string()
    };
    let expected = latents(&root);

    // Shards with an index, as large models come.
    for (part, stem) in [("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")] {
        let file = root.join(part).join(format!("{stem}.safetensors"));
        let whole = Checkpoint::open(&file).unwrap();
        let specs: Vec<TensorSpec> = whole.iter().map(TensorSpec::from).collect();
        fs::remove_file(&file).unwrap();
        mmgp_io::write_sharded(root.join(part), stem, &specs, whole.bytes() / 3, |spec, write| {
            write(whole.tensor(&spec.name)?.bytes())
        })
        .unwrap();
        assert!(root.join(part).join(format!("{stem}.safetensors.index.json")).is_file());
    }
    // A CLIP tokenizer in its older files only, and CLIP weights without their prefix.
    fs::remove_file(root.join("tokenizer/tokenizer.json")).unwrap();
    let file = root.join("text_encoder/model.safetensors");
    let whole = Checkpoint::open(&file).unwrap();
    let short = |name: &str| name.strip_prefix("text_model.").unwrap().to_string();
    let views: Vec<_> = whole.iter().cloned().collect();
    let specs: Vec<_> =
        views.iter().map(|v| TensorSpec::new(short(v.name()), v.dtype(), v.shape())).collect();
    fs::remove_file(&file).unwrap();
    let mut writer =
        mmgp_io::Writer::create(&file, &specs, &Default::default(), mmgp_io::Overwrite::No)
            .unwrap();
    for (view, spec) in views.iter().zip(&specs) {
        writer.write(&spec.name, view.bytes()).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(latents(&root), expected);
}

#[test]
fn ctrl_c_stops_at_the_next_block_and_leaves_nothing() {
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_mmgp"))
        .args(["generate", "red heart", "--steps", "10000"])
        .current_dir(dir.path())
        .env("XDG_CACHE_HOME", dir.path().join("cache"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{stderr}");
    assert!(stderr.contains("cancelled"), "{stderr}");
    assert!(pictures(dir.path()).is_empty());
}
