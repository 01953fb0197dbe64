//! Bad input through the command: a clear error that names its place, exit code 1, nothing written.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

mod common;
use common::{copy_of_demo, edit, mmgp, pictures, replace};

const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";

/// Damages a copy of the demo and expects an error that contains all of `expected`.
fn refused(damage: impl FnOnce(&Path), more: &[&str], expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let root = copy_of_demo(dir.path());
    damage(&root);
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let mut args = vec!["generate", "red heart", "--steps", "1", "--model", root.to_str().unwrap()];
    args.extend(more);
    let run = mmgp(&work, &args);
    assert!(matches!(run.code, Some(1 | 2)), "code {:?}: {}", run.code, run.stderr);
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    for text in expected {
        assert!(run.stderr.contains(text), "no {text:?} in: {}", run.stderr);
    }
    assert!(run.stdout.is_empty(), "{}", run.stdout);
    assert!(pictures(&work).is_empty(), "something was written");
}

/// Replaces a safetensors file's header.
fn header(file: &Path, change: impl FnOnce(String) -> String) {
    let bytes = fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = change(String::from_utf8(bytes[8..8 + len].to_vec()).unwrap());
    let mut new = (text.len() as u64).to_le_bytes().to_vec();
    new.extend(text.as_bytes());
    new.extend(&bytes[8 + len..]);
    replace(file, new);
}

#[test]
fn damaged_weight_files() {
    let cut = |root: &Path| {
        let file = root.join(TRANSFORMER);
        let bytes = fs::read(&file).unwrap();
        replace(&file, &bytes[..bytes.len() - 1000]);
    };
    refused(cut, &[], &["diffusion_pytorch_model.safetensors", "expected", "found"]);
    let huge = |root: &Path| {
        let mut bytes = (1u64 << 63).to_le_bytes().to_vec();
        bytes.extend(b"{}");
        replace(&root.join(TRANSFORMER), bytes);
    };
    refused(huge, &[], &["diffusion_pytorch_model.safetensors", "9223372036854775808"]);
    refused(
        |root| replace(&root.join(TRANSFORMER), "x"),
        &[],
        &["diffusion_pytorch_model.safetensors"],
    );
    let shape = |root: &Path| {
        header(&root.join(TRANSFORMER), |h| {
            h.replacen("\"shape\":[192,64]", "\"shape\":[64,192]", 1)
        });
    };
    refused(shape, &[], &["`x_embedder.weight`", "[192, 64]", "[64, 192]", TRANSFORMER]);
    let missing = |root: &Path| {
        header(&root.join(TRANSFORMER), |h| {
            h.replacen("\"x_embedder.bias\"", "\"x_embedder.bios\"", 1)
        });
    };
    refused(missing, &[], &["x_embedder.bias", "x_embedder.bios", TRANSFORMER]);
    let dtype = |root: &Path| {
        header(&root.join(TRANSFORMER), |h| h.replacen("\"BF16\"", "\"F32\"", 1));
    };
    refused(dtype, &[], &[TRANSFORMER, "expected", "found"]);
    let codes = |root: &Path| {
        header(&root.join("vae/diffusion_pytorch_model.safetensors"), |h| {
            h.replacen("\"BF16\"", "\"I16\"", 400)
        });
    };
    refused(codes, &[], &["vae/diffusion_pytorch_model.safetensors", "I16"]);
    let twice = |root: &Path| {
        header(&root.join(TRANSFORMER), |h| {
            h.replacen("\"x_embedder.bias\"", "\"x_embedder.weight\"", 1)
        });
    };
    refused(twice, &[], &["x_embedder.weight", TRANSFORMER]);
    refused(
        |root| fs::remove_file(root.join(TRANSFORMER)).unwrap(),
        &[],
        &["transformer", "safetensors"],
    );
}

#[test]
fn a_shard_index_that_leaves_its_folder() {
    let index = |root: &Path| {
        fs::remove_file(root.join(TRANSFORMER)).unwrap();
        let index = r#"{"metadata":{},"weight_map":{"x_embedder.weight":"../../etc/passwd"}}"#;
        let file = "transformer/diffusion_pytorch_model.safetensors.index.json";
        fs::write(root.join(file), index).unwrap();
    };
    refused(index, &[], &["index.json", "../../etc/passwd"]);
}

#[test]
fn configs_that_no_model_can_have() {
    let config = |from: &'static str, to: &'static str| {
        move |root: &Path| edit(&root.join("transformer/config.json"), from, to)
    };
    let file = "transformer/config.json";
    let heads = config("\"num_attention_heads\": 6", "\"num_attention_heads\": 0");
    refused(heads, &[], &[file, "num_attention_heads", "expected", "found 0"]);
    let layers = config("\"num_layers\": 3", "\"num_layers\": 1000000000");
    refused(layers, &[], &[file, "num_layers", "1000000000"]);
    let deep = config("\"num_single_layers\": 5", "\"num_single_layers\": 6");
    refused(deep, &[], &["single_transformer_blocks.5", "diffusion_pytorch_model.safetensors"]);
    let axes = |root: &Path| {
        let file = root.join("transformer/config.json");
        let text = fs::read_to_string(&file).unwrap().split_whitespace().collect::<String>();
        replace(&file, text.replace("[8,12,12]", "[8,12,14]"));
    };
    refused(axes, &[], &[file, "axes_dims_rope", "32", "[8, 12, 14]"]);
    refused(
        |root| replace(&root.join(file), "{\"num_layers\": "),
        &[],
        &["transformer/config.json:1:"],
    );
    refused(|root| replace(&root.join(file), "[]"), &[], &[file]);
    let vae = |root: &Path| {
        edit(&root.join("vae/config.json"), "\"norm_num_groups\": 8", "\"norm_num_groups\": 7")
    };
    refused(vae, &[], &["vae/config.json", "norm_num_groups", "7"]);
    let clip = |root: &Path| {
        edit(
            &root.join("text_encoder/config.json"),
            "\"num_attention_heads\": 4",
            "\"num_attention_heads\": 0",
        );
    };
    refused(clip, &[], &["text_encoder/config.json", "num_attention_heads"]);
    let t5 = |root: &Path| {
        edit(&root.join("text_encoder_2/config.json"), "\"num_heads\": 4", "\"num_heads\": 0")
    };
    refused(t5, &[], &["text_encoder_2/config.json", "num_heads"]);
    let width = |root: &Path| {
        edit(
            &root.join("text_encoder_2/config.json"),
            "\"d_model\": 128",
            "\"d_model\": 4000000000",
        )
    };
    refused(width, &[], &["text_encoder_2"]);
    let scheduler = |root: &Path| {
        edit(
            &root.join("scheduler/scheduler_config.json"),
            "\"num_train_timesteps\": 1000",
            "\"num_train_timesteps\": 0",
        );
    };
    refused(scheduler, &[], &["scheduler_config.json", "num_train_timesteps"]);
}

#[test]
fn folders_that_are_no_pipeline() {
    refused(
        |root| fs::remove_file(root.join("model_index.json")).unwrap(),
        &[],
        &["model_index.json"],
    );
    let index = |from: &'static str, to: &'static str| {
        move |root: &Path| edit(&root.join("model_index.json"), from, to)
    };
    refused(
        index("FluxPipeline", "FluxxPipeline"),
        &[],
        &["_class_name", "FluxxPipeline", "FluxPipeline"],
    );
    refused(
        index("FluxTransformer2DModel", "Unet"),
        &[],
        &["model_index.json", "transformer", "Unet"],
    );
    let class =
        |root: &Path| edit(&root.join("transformer/config.json"), "FluxTransformer2DModel", "Unet");
    refused(class, &[], &["transformer/config.json", "_class_name", "Unet"]);
    refused(
        |root| replace(&root.join("generate.json"), "{\"step\": 3}"),
        &[],
        &["generate.json", "step"],
    );
    let dir = tempfile::tempdir().unwrap();
    let run = mmgp(dir.path(), &["generate", "x", "--model", "/nowhere"]);
    assert!(run.code == Some(1) && run.stderr.contains("/nowhere"), "{}", run.stderr);
}

#[test]
fn broken_tokenizers() {
    let file = "tokenizer_2/tokenizer.json";
    refused(|root| replace(&root.join(file), "{"), &[], &[file]);
    refused(|root| replace(&root.join(file), "{\"version\": \"1.0\", \"model\": 3}"), &[], &[file]);
    refused(|root| fs::remove_file(root.join(file)).unwrap(), &[], &["tokenizer_2"]);
}

#[test]
fn requests_that_cannot_be_drawn() {
    let fine = |_: &Path| {};
    refused(fine, &["--width", "100"], &["width", "100", "16"]);
    refused(fine, &["--height", "0"], &["height", "0"]);
    refused(fine, &["--width", "1000000000000"], &["width"]);
    refused(fine, &["--steps", "0"], &["steps"]);
    refused(fine, &["--max-sequence-length", "0"], &["sequence"]);
    refused(fine, &["--max-sequence-length", "100000"], &["sequence", "512"]);
    refused(fine, &["--guidance", "nan"], &["guidance"]);
    refused(fine, &["--budget", "lots"], &["lots", "25%"]);
    refused(fine, &["--budget", "1MB"], &["1.00 MB", "smallest budget that works", "5.84 MB"]);
    refused(fine, &["--out", "nowhere/it.png"], &["nowhere"]);
    refused(fine, &["--out", "it.jpg"], &["it.jpg", ".png"]);
}

#[test]
fn quantized_activations_on_the_cpu() {
    for codes in ["int8", "fp8"] {
        let activations = format!("--{codes}-activations");
        let options = [&activations, "--quantize", codes, "--store", "off", "--device", "cpu"];
        refused(|_| {}, &options, &[&format!("{codes} activations need a GPU")]);
    }
    let both = ["--int8-activations", "--fp8-activations"];
    refused(|_| {}, &both, &["cannot be used with"]);
    refused(|_| {}, &["--quantize", "int8,fp8"], &["int8 or fp8, not both"]);
}
