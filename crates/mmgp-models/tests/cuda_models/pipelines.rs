//! The tiny pipelines on a GPU: in f32 what diffusers draws, in bf16 and int8 near it, and the same bits under
//! every budget.

#[path = "../pipelines/run.rs"]
mod run;

use candle_core::{DType, Device};
use mmgp_models::{Activations, OpenOptions, nn};
use mmgp_residency::{Cuda, CudaOptions, Pager};
use run::{Error, Runner};

use crate::alone;

#[test]
fn tiny_pipelines_have_the_same_bits_under_every_budget() -> Result<(), Error> {
    let _guard = alone();
    let int8 = || OpenOptions { quantize: vec!["transformer".into()], ..OpenOptions::default() };
    let w8a8 = || OpenOptions { activations: Activations::Int8, ..int8() };
    // Random weights of few channels: bf16 has an error of a few percent after some steps.
    for (what, compute, options, allowed) in [
        ("f32", DType::F32, OpenOptions::default(), None),
        ("bf16", DType::BF16, OpenOptions::default(), Some(0.3)),
        ("bf16, int8 weights", DType::BF16, int8(), Some(0.5)),
        ("bf16, int8 weights and activations", DType::BF16, w8a8(), Some(0.5)),
    ] {
        let first = Pager::over(Cuda::new(&CudaOptions { compute, ..Default::default() })?)?;
        let Device::Cuda(device) = first.device().candle() else { return Err("no GPU".into()) };
        nn::cuda::enable_tested(device)?;
        let pager = || Ok(first.beside()?);
        let frames = compute == DType::F32;
        let runner = Runner { pager: &pager, options, allowed, frames };
        for name in [
            "cogvideox-2b",
            "cogvideox-5b",
            "cogvideox-5b-i2v",
            "cogvideox-1.5-5b-i2v",
            "hunyuanvideo",
        ] {
            runner.run(name).map_err(|error| format!("{what}, {name}: {error}"))?;
        }
    }
    Ok(())
}
