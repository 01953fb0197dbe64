//! Whole pipelines against diffusers, over models that `pipelines/make.py` made: latents and frames,
//! the same bits under every budget.

#[path = "pipelines/run.rs"]
mod run;

use candle_core::Device;
use mmgp_models::OpenOptions;
use mmgp_residency::Pager;
use run::{Error, Runner};

fn run(name: &str) -> Result<(), Error> {
    let pager = || Ok(Pager::new(&Device::Cpu)?);
    let options = OpenOptions::default();
    Runner { pager: &pager, options, allowed: None, frames: true }.run(name)
}

#[test]
fn cogvideox_2b() -> Result<(), Error> {
    run("cogvideox-2b")
}

#[test]
fn cogvideox_5b() -> Result<(), Error> {
    run("cogvideox-5b")
}

#[test]
fn cogvideox_5b_from_a_picture() -> Result<(), Error> {
    run("cogvideox-5b-i2v")
}

#[test]
fn cogvideox_1_5_from_a_picture() -> Result<(), Error> {
    run("cogvideox-1.5-5b-i2v")
}

#[test]
fn hunyuanvideo() -> Result<(), Error> {
    run("hunyuanvideo")
}
