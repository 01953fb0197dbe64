//! Random weights must still draw: the latents of a whole run stay finite and of the size of noise.
//!
//! Widths are small, so that the run takes a second; depths are those of the large test folders, and
//! what is written is the same function of names and shapes.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::Device;
use mmgp_models::{OpenOptions, open_pipeline};
use mmgp_residency::{Budget, Pager};
use mmgp_synth::{Flux, Folder, Options};
use serde_json::json;

fn narrow(mut folder: Folder) -> Folder {
    let transformer = &mut folder.transformer;
    transformer["num_attention_heads"] = json!(2);
    transformer["joint_attention_dim"] = json!(128);
    transformer["pooled_projection_dim"] = json!(64);
    let clip = &mut folder.text_encoder;
    clip["vocab_size"] = json!(1536);
    clip["hidden_size"] = json!(64);
    clip["intermediate_size"] = json!(256);
    clip["num_attention_heads"] = json!(2);
    let t5 = &mut folder.text_encoder_2;
    t5["vocab_size"] = json!(2000);
    t5["d_model"] = json!(128);
    t5["d_ff"] = json!(320);
    t5["num_heads"] = json!(2);
    let vae = &mut folder.vae;
    vae["block_out_channels"] = json!([32, 32, 64, 64]);
    vae["sample_size"] = json!(64);
    folder
}

fn draw(kind: Flux, double: usize, single: usize, steps: usize) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("pipeline");
    let tokenizers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-flux");
    let options = Options { seed: 7, shard_bytes: 1_000_000, tokenizers: &tokenizers };
    let mut models = Vec::new();
    let folder = narrow(Folder::flux(kind, double, single, 4));
    folder.write(&dir, &options, |written| models.push(written.model)).unwrap();
    assert_eq!(models, ["text_encoder", "text_encoder_2", "transformer", "vae"]);
    assert!(dir.join("transformer/diffusion_pytorch_model.safetensors.index.json").is_file());
    let error = folder.write(&dir, &options, |_| ()).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");

    let pager = Pager::new(&Device::Cpu).unwrap();
    let mut pipeline = open_pipeline(&dir, &pager, &OpenOptions::default()).unwrap();
    assert_eq!(pipeline.unused(), []);
    pager.plan(Budget::Percent(50.)).unwrap();
    let mut request = pipeline.defaults().request("a red heart and a blue star");
    (request.steps, request.max_sequence_length) = (steps, 32);
    assert_eq!((request.width, request.height), (64, 64));
    let output = pipeline.generate(&request, &mut |_| ()).unwrap();

    let (latents, picture) = (&output.latents.values, &output.frames[0]);
    assert!(latents.iter().all(|v| v.is_finite()));
    let n = latents.len() as f64;
    let mean = latents.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let square = latents.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let deviation = square.sqrt();
    println!("{kind:?} {double}+{single}, {steps} steps: deviation {deviation:.3}");
    assert!((0.1..10.).contains(&deviation), "{deviation}");
    let (low, high) = (picture.rgb.iter().min().unwrap(), picture.rgb.iter().max().unwrap());
    assert!(high - low > 32, "a picture of {low}..{high} shows nothing");
}

#[test]
fn dev_in_eight_steps() {
    draw(Flux::Dev, 3, 5, 8);
}

#[test]
fn schnell_in_four_steps() {
    draw(Flux::Schnell, 3, 5, 4);
}

#[test]
fn schnell_at_full_depth() {
    draw(Flux::Schnell, 19, 38, 2);
}
