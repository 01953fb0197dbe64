//! The demo's pipeline on a GPU, by the tensor library's operations and by our kernels: in f32 what diffusers
//! drew, in bf16 and int8 near it, and the same bits under every budget.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use mmgp_models::{Activations, ModelIndex, OpenOptions, nn, open_pipeline};
use mmgp_residency::{Budget, Cuda, CudaOptions, Pager};

use crate::alone;

const PROMPTS: [&str; 3] = ["red heart", "a picture of a rocket", "cat face"];

fn assets(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

#[test]
fn the_pipeline_draws_the_same_under_every_budget_and_what_diffusers_draws() {
    draws_what_diffusers_draws(false);
}

#[test]
fn the_pipeline_draws_the_same_with_our_kernels() {
    draws_what_diffusers_draws(true);
}

fn draws_what_diffusers_draws(kernels: bool) {
    let _guard = alone();
    let path = assets("tiny-flux-reference").join("reference.safetensors");
    let reference = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    assert!(ModelIndex::read(&assets("tiny-flux")).is_ok());
    let int8 = OpenOptions {
        quantize: vec!["transformer".into(), "text_encoder_2".into()],
        ..OpenOptions::default()
    };
    let w8a8 = OpenOptions { activations: Activations::Int8, ..int8.clone() };
    for (what, compute, options, allowed) in [
        ("f32", DType::F32, OpenOptions::default(), 1e-3),
        ("f32, int8 weights", DType::F32, int8.clone(), 0.1),
        ("bf16", DType::BF16, OpenOptions::default(), 0.1),
        ("bf16, int8 weights", DType::BF16, int8, 0.15),
        ("bf16, int8 weights and activations", DType::BF16, w8a8, 0.3),
    ] {
        let first = Pager::over(Cuda::new(&CudaOptions { compute, ..Default::default() }).unwrap());
        let first = first.unwrap();
        let Device::Cuda(device) = first.device().candle() else { panic!("no GPU") };
        if kernels {
            nn::cuda::enable_tested(device).unwrap();
        } else {
            nn::cuda::disable(device);
        }
        for (i, prompt) in PROMPTS.iter().enumerate() {
            let mut seen: Option<(Vec<f32>, Vec<u8>)> = None;
            for budget in [Budget::Unlimited, Budget::Min, Budget::Percent(50.)] {
                let pager = first.beside().unwrap();
                let mut pipeline = open_pipeline(&assets("tiny-flux"), &pager, &options).unwrap();
                pager.plan(budget).unwrap();
                let request = pipeline.defaults().request(prompt);
                let output = pipeline.generate(&request, &mut |_| ()).unwrap();
                let got = (output.latents.values, output.frames[0].rgb.clone());
                let same = seen.get_or_insert_with(|| got.clone());
                assert!(*same == got, "{what}, {prompt}, {budget}: other bits");
            }
            let (latents, _) = seen.unwrap();
            let want = reference[&format!("p{i}.w0.final_latents")].flatten_all().unwrap();
            let want = want.to_vec1::<f32>().unwrap();
            assert_eq!(latents.len(), want.len());
            let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
            let error = norm(&mut latents.iter().zip(&want).map(|(a, b)| a - b))
                / norm(&mut want.iter().copied());
            println!("{what}: {prompt}: latents off by {error:.1e}, kernels {kernels}");
            assert!(error <= allowed, "{what}, {prompt}: off by {error:e}, kernels {kernels}");
        }
    }
}
