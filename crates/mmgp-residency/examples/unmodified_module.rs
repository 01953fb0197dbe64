//! An unmodified candle module, paged whole: T5 as candle-transformers writes it.
//!
//! `cargo run --release -p mmgp-residency --example unmodified_module -- DIR` where DIR is a folder
//! with a T5 encoder's `config.json` and `model.safetensors`; by default the demo's.

use std::{error::Error, path::PathBuf, sync::Arc};

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::t5::{Config, T5EncoderModel};
use mmgp_io::{Checkpoint, read_json};
use mmgp_residency::{Budget, ModelBuilder, Pager, check_pageable};

fn main() -> Result<(), Box<dyn Error>> {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-flux/text_encoder_2");
    let dir = std::env::args().nth(1).map_or(PathBuf::from(demo), PathBuf::from);
    let config: Config = read_json(dir.join("config.json"))?;
    let checkpoint = Arc::new(Checkpoint::open_dir(&dir, &["model"])?);

    let pager = Pager::new(&Device::Cpu)?;
    check_pageable(&pager, "t5", checkpoint.clone(), DType::F32, |vb| {
        T5EncoderModel::load(vb, &config)
    })?;

    // The constructor is candle's own and sees placeholders; its weights become f32 as they are read.
    let builder = ModelBuilder::new(&pager, "t5", checkpoint);
    let module = T5EncoderModel::load(builder.var_builder(DType::F32), &config)?;
    let model = builder.finish(module, Vec::<()>::new())?;
    println!("{}", pager.plan(Budget::Unlimited)?);

    let ids = Tensor::new(&[[3u32, 9, 1]], &Device::Cpu)?;
    // candle's T5 keeps a cache, so `forward` wants `&mut`; a clone shares the paged tensors.
    let states = model.pass()?.stem(|t5| t5.clone().forward(&ids))?;
    println!("hidden states {:?}, mean {}", states.dims(), states.mean_all()?.to_scalar::<f32>()?);

    println!("{}", pager.report());
    Ok(())
}
