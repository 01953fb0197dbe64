//! int8 on the fly and LoRA on the demo: close to the references, and the same bytes under every
//! budget.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use candle_core::{DType, Device, Tensor};
use mmgp::{AdapterArg, Budget, Offload, Pipeline, Settings, StepWeights, Unfit};
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_lora::{Adapter, AdapterSet};
use mmgp_models::{
    flux::latents::unpack,
    vae::kl::{KlConfig, KlDecoder},
};
use mmgp_quant::{Bias, QuantPolicy};
use mmgp_residency::{ModelBuilder, Pager};

mod common;
use common::{demo, mmgp};

fn lora() -> PathBuf {
    demo().join("../tiny-flux-lora/riso.safetensors")
}

fn relative(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut ours.iter().zip(theirs).map(|(a, b)| a - b)) / norm(&mut theirs.iter().copied())
}

/// The decoded picture of packed latents before it is rounded to bytes: `[3, 128, 128]` of 0..1.
fn decoded(latents: &[f32]) -> Vec<f32> {
    let pager = Pager::new(&Device::Cpu).unwrap();
    let vae = demo().join("vae");
    let checkpoint = Checkpoint::open_dir(&vae, &["diffusion_pytorch_model"]).unwrap();
    let config = KlConfig::from_file(vae.join("config.json")).unwrap();
    let builder = ModelBuilder::new(&pager, "vae", Arc::new(checkpoint));
    let decoder = KlDecoder::new(&config, builder).unwrap();
    let latents = Tensor::from_slice(latents, (1, 64, 64), &Device::Cpu).unwrap();
    let picture = decoder.decode(&unpack(&latents, 8, 8).unwrap()).unwrap();
    let values = picture.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(|v| (v / 2. + 0.5).clamp(0., 1.)).collect()
}

#[test]
fn int8_pictures_stay_close_to_the_reference() {
    let reference = candle_core::safetensors::load(
        demo().join("../tiny-flux-reference/reference.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    let mut settings = Settings::default();
    settings.set("quantize_transformer", "on").unwrap();
    settings.set("extra_models_to_quantize", "text_encoder_2").unwrap();
    let mut offload = Offload::builder().settings(settings).build().unwrap();
    let mut pipeline = offload.pipeline(demo()).unwrap();
    for (i, prompt) in ["red heart", "a picture of a rocket", "cat face"].into_iter().enumerate() {
        let ours = decoded(&latents(&offload, &mut *pipeline, prompt));
        let theirs = reference[&format!("p{i}.w0.image")].flatten_all().unwrap();
        let theirs = theirs.to_vec1::<f32>().unwrap();
        let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        let mse = ours.iter().zip(&theirs).map(square).sum::<f64>() / ours.len() as f64;
        let psnr = -10. * mse.log10();
        println!("{prompt}: int8 PSNR {psnr:.2} dB");
        assert!((56.5..80.).contains(&psnr), "{prompt}: PSNR {psnr:.2} dB");
    }
}

#[test]
fn every_budget_gives_the_same_file_with_int8_and_lora() {
    let dir = tempfile::tempdir().unwrap();
    let lora = format!("{}:0.3,0.9", lora().display());
    let mut hashes = Vec::new();
    for options in
        [&["--quantize", "int8"][..], &["--lora", &lora], &["--quantize", "int8", "--lora", &lora]]
    {
        let mut seen: Option<(String, Vec<u8>)> = None;
        for budget in ["min", "8MB", "60%", "unlimited"] {
            let mut args = vec!["generate", "red heart", "--steps", "3", "--out", "it.png"];
            args.extend(["--budget", budget]);
            args.extend(options);
            let run = mmgp(dir.path(), &args);
            assert_eq!(run.code, Some(0), "{budget}: {}", run.stderr);
            let result = (run.latents().to_string(), fs::read(dir.path().join("it.png")).unwrap());
            assert_eq!(seen.get_or_insert_with(|| result.clone()), &result, "{options:?} {budget}");
        }
        hashes.push(seen.unwrap().0);
    }
    assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2]);
}

fn latents(offload: &Offload, pipeline: &mut dyn Pipeline, prompt: &str) -> Vec<f32> {
    let request = pipeline.defaults().request(prompt);
    offload.generate(pipeline, &request, &mut |_| ()).unwrap().latents.values
}

#[test]
fn lora_draws_what_diffusers_draws_and_goes_without_a_trace() {
    let reference = candle_core::safetensors::load(
        demo().join("../tiny-flux-reference/reference.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    let reference = |name: &str| reference[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut offload = Offload::builder().budget(Budget::Percent(40.)).build().unwrap();
    let mut pipeline = offload.pipeline(demo()).unwrap();
    let plain = latents(&offload, &mut *pipeline, "cat face");
    let argument =
        |weight: &str| -> AdapterArg { format!("{}:{weight}", lora().display()).parse().unwrap() };
    offload.load_loras_into_model(&mut *pipeline, &[argument("0.5")], Unfit::Fail).unwrap();
    for (i, prompt) in ["red heart", "a picture of a rocket", "cat face"].into_iter().enumerate() {
        for weight in ["0.5", "1"] {
            let weights: StepWeights = weight.parse().unwrap();
            offload.activate_loras(&mut *pipeline, &[weights]).unwrap();
            let error = relative(
                &latents(&offload, &mut *pipeline, prompt),
                &reference(&format!("p{i}.w{weight}.final_latents")),
            );
            println!("{prompt} at {weight}: {error:.1e}");
            assert!(error < 1e-3, "{prompt} at {weight}: {error}");
        }
    }
    // Twice the same file at half the weight is the file at its weight.
    let twice = [argument("0.5"), argument("0.5")];
    offload.load_loras_into_model(&mut *pipeline, &twice, Unfit::Fail).unwrap();
    let error = relative(
        &latents(&offload, &mut *pipeline, "red heart"),
        &reference("p0.w1.final_latents"),
    );
    assert!(error < 1e-3, "{error}");

    let broken = tempfile::tempdir().unwrap();
    let file = broken.path().join("other.safetensors");
    let specs = [TensorSpec::new("transformer.blocks.0.lora_A.weight", Dtype::F32, [1, 4])];
    let mut writer = Writer::create(&file, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    writer.write(&specs[0].name, &[0; 16]).unwrap();
    writer.finish().unwrap();
    let other = [file.to_str().unwrap().parse().unwrap()];
    offload.load_loras_into_model(&mut *pipeline, &other, Unfit::Fail).unwrap_err();
    let again = relative(
        &latents(&offload, &mut *pipeline, "red heart"),
        &reference("p0.w1.final_latents"),
    );
    assert_eq!(again, error, "a failed load leaves the set as it was");

    offload.load_loras_into_model(&mut *pipeline, &[], Unfit::Fail).unwrap();
    assert_eq!(latents(&offload, &mut *pipeline, "cat face"), plain);
}

#[test]
fn int8_with_an_adapter_equals_the_adapter_added_to_the_decoded_weight() {
    let dir = tempfile::tempdir().unwrap();
    let (n, k, r) = (20, 48, 3);
    let dev = Device::Cpu;
    let random =
        |rows: usize, columns: usize| Tensor::randn(0f32, 1., (rows, columns), &dev).unwrap();
    let write = |name: &str, tensors: &[(&str, &Tensor)]| {
        let file = dir.path().join(name);
        let spec = |(name, t): &(&str, &Tensor)| TensorSpec::new(*name, Dtype::F32, t.dims());
        let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
        let mut writer = Writer::create(&file, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
        for (name, tensor) in tensors {
            for value in tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
                writer.write(name, &value.to_le_bytes()).unwrap();
            }
        }
        writer.finish().unwrap();
        file
    };
    let (w, a, b, x) = (random(n, k), random(r, k), random(n, r), random(7, k));
    let base = write("base.safetensors", &[("block.to_q.weight", &w)]);
    let adapter = [("block.to_q.lora_A.weight", &a), ("block.to_q.lora_B.weight", &b)];
    let adapter = write("adapter.safetensors", &adapter);

    let pager = Pager::new(&dev).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(base).unwrap());
    let mut builder = ModelBuilder::new(&pager, "transformer", checkpoint);
    builder.quantize(QuantPolicy::default());
    let layer = builder.block("block").pp("to_q").linear(k, n, Bias::No).unwrap();
    assert_eq!(layer.format(), "int8");
    let model = builder.finish((), vec![layer]).unwrap();
    let mut set = AdapterSet::new(&pager, &["transformer"]);
    let weight = StepWeights::constant(0.7).unwrap();
    set.load(&[(Adapter::open(adapter).unwrap(), weight)], Unfit::Fail).unwrap();
    let visit = model.pass().unwrap().blocks().next().unwrap().unwrap();
    let (y, decoded) = visit.run(|layer| Ok((layer.forward(&x)?, layer.decode()?))).unwrap();
    assert_eq!(decoded.dtype(), DType::F32);
    let merged = (decoded + (b.matmul(&a).unwrap() * 0.7).unwrap()).unwrap();
    let expected = x.matmul(&merged.t().unwrap()).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(relative(&values(&y), &values(&expected)) < 1e-4);
}

#[test]
fn options_that_name_nothing_are_refused_with_what_would_do() {
    let dir = tempfile::tempdir().unwrap();
    for (options, expected) in [
        (&["--quantize", "vae"][..], "transformer"),
        (&["--quantize", "unet"], "unet"),
        (&["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
        (&["--budgets", "unet=100"], "unet"),
        (&["--budgets", "transformer=1"], "transformer"),
        (&["--budgets", "lots"], "lots"),
        (&["--profile", "6"], "6"),
        (&["--lora", "a.safetensors:1,,2"], "1,,2"),
    ] {
        let mut args = vec!["generate", "red heart", "--steps", "1"];
        args.extend(options);
        let run = mmgp(dir.path(), &args);
        assert!(matches!(run.code, Some(1 | 2)), "{options:?}: {}", run.stderr);
        assert!(
            run.stderr.contains(expected) && !run.stderr.contains("panicked"),
            "{}",
            run.stderr
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_profile_is_one_line() {
    let (offload, mut pipeline) =
        Offload::profile(demo(), mmgp::Profile::VerylowRamLowVram).unwrap();
    let profile = latents(&offload, &mut *pipeline, "red heart");
    let mut settings = Settings::default();
    settings.set("quantize_transformer", "on").unwrap();
    settings.set("extra_models_to_quantize", "text_encoder_2").unwrap();
    let mut by_hand = Offload::builder().settings(settings).build().unwrap();
    let mut pipeline = by_hand.pipeline(demo()).unwrap();
    assert_eq!(profile, latents(&by_hand, &mut *pipeline, "red heart"));
}
