//! Random weights must still draw: the latents of a whole run stay finite and of the size of noise.
//!
//! Widths are small, so that the run takes a second; depths are those of the large test folders, and
//! what is written is the same function of names and shapes.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
use mmgp_models::{OpenOptions, Picture, Request, open_pipeline};
use mmgp_residency::{Budget, Pager};
use mmgp_synth::{CogVideoX, Flux, Folder, Options};
use serde_json::{Value, json};

/// The folder's models, narrower.
fn narrow(mut folder: Folder, changes: &[(&str, Value)]) -> Folder {
    for (model, changes) in changes {
        let config = folder.config(model).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
    }
    folder
}

fn t5() -> Value {
    json!({"vocab_size": 2000, "d_model": 128, "d_ff": 320, "num_heads": 2})
}

/// Writes the folder, opens it and draws.
fn draw(folder: &Folder, models: &[&str], change: impl FnOnce(&mut Request)) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("pipeline");
    let options = Options { seed: 7, shard_bytes: 1_000_000 };
    let mut written = Vec::new();
    folder.write(&dir, &options, |model| written.push(model.model)).unwrap();
    assert_eq!(written, models);
    assert!(dir.join("transformer/diffusion_pytorch_model.safetensors.index.json").is_file());
    let error = folder.write(&dir, &options, |_| ()).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");

    let pager = Pager::new(&Device::Cpu).unwrap();
    let mut pipeline = open_pipeline(&dir, &pager, &OpenOptions::default()).unwrap();
    assert_eq!(pipeline.unused(), []);
    pager.plan(Budget::Percent(50.)).unwrap();
    let mut request = pipeline.defaults().request("a red heart and a blue star");
    request.max_sequence_length = 32;
    change(&mut request);
    assert_eq!((request.width, request.height), (64, 64));
    let output = pipeline.generate(&request, &mut |_| ()).unwrap();

    let latents = &output.latents.values;
    assert!(latents.iter().all(|v| v.is_finite()));
    let n = latents.len() as f64;
    let mean = latents.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let square = latents.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let deviation = square.sqrt();
    println!("{}, {} steps: deviation {deviation:.3}", pipeline.class(), request.steps);
    assert!((0.1..10.).contains(&deviation), "{deviation}");
    assert_eq!(output.frames.len(), request.frames);
    for frame in &output.frames {
        let (low, high) = (frame.rgb.iter().min().unwrap(), frame.rgb.iter().max().unwrap());
        assert!(high - low > 32, "a picture of {low}..{high} shows nothing");
    }
}

fn flux(kind: Flux, double: usize, single: usize, steps: usize) {
    let folder = narrow(
        Folder::flux(kind, double, single, 4),
        &[
            (
                "transformer",
                json!({"num_attention_heads": 2, "joint_attention_dim": 128, "pooled_projection_dim": 64}),
            ),
            (
                "text_encoder",
                json!({"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}),
            ),
            ("text_encoder_2", t5()),
            ("vae", json!({"block_out_channels": [32, 32, 64, 64], "sample_size": 64})),
        ],
    );
    let models = ["text_encoder", "text_encoder_2", "transformer", "vae"];
    draw(&folder, &models, |request| request.steps = steps);
}

fn cogvideox(kind: CogVideoX, layers: usize, steps: usize) {
    let sample = json!({
        "num_attention_heads": 2, "text_embed_dim": 128, "sample_width": 8, "sample_height": 8,
        "sample_frames": 9, "max_text_seq_length": 32,
    });
    let folder = narrow(
        Folder::cogvideox(kind, layers, 4),
        &[
            ("transformer", sample),
            ("text_encoder", t5()),
            ("vae", json!({"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1})),
        ],
    );
    draw(&folder, &["text_encoder", "transformer", "vae"], |request| {
        request.steps = steps;
        if kind == CogVideoX::LargeFromPicture {
            let rgb = (0..64 * 64 * 3).map(|i| (i % 251) as u8).collect();
            request.image = Some(Picture { width: 64, height: 64, rgb });
        }
    });
}

#[test]
fn hunyuanvideo_in_four_steps() {
    let folder = narrow(
        Folder::hunyuanvideo(2, 3, 5),
        &[
            (
                "transformer",
                json!({"num_attention_heads": 2, "text_embed_dim": 128, "pooled_projection_dim": 64}),
            ),
            (
                "text_encoder",
                json!({
                    "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "vocab_size": 240,
                }),
            ),
            (
                "text_encoder_2",
                json!({"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}),
            ),
            ("vae", json!({"block_out_channels": [32, 32, 64, 64]})),
        ],
    );
    let models = ["text_encoder", "text_encoder_2", "transformer", "vae"];
    draw(&folder, &models, |request| {
        request.steps = 4;
        (request.width, request.height, request.frames) = (64, 64, 5);
    });
}

#[test]
fn cogvideox_2b_in_four_steps() {
    cogvideox(CogVideoX::Small, 3, 4);
}

#[test]
fn cogvideox_5b_in_four_steps() {
    cogvideox(CogVideoX::Large, 3, 4);
}

#[test]
fn cogvideox_5b_from_a_picture() {
    cogvideox(CogVideoX::LargeFromPicture, 2, 2);
}

#[test]
fn dev_in_eight_steps() {
    flux(Flux::Dev, 3, 5, 8);
}

#[test]
fn schnell_in_four_steps() {
    flux(Flux::Schnell, 3, 5, 4);
}

#[test]
fn schnell_at_full_depth() {
    flux(Flux::Schnell, 19, 38, 2);
}
