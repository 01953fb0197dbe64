//! A T5 file with its decoder loads as encoder alone: what is not needed is neither read nor reported.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_models::text::t5::{T5Config, T5Encoder};
use mmgp_quant::QuantPolicy;
use mmgp_residency::{Budget, ModelBuilder, Pager};

#[test]
fn the_decoder_of_a_t5_file_is_never_read() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../vectors/core/t5");
    let encoder = Checkpoint::open(case.join("model.safetensors")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let mut specs: Vec<TensorSpec> = encoder.iter().map(TensorSpec::from).collect();
    let own = specs.len();
    specs.push(TensorSpec::new(
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        Dtype::F32,
        [50, 44],
    ));
    specs.push(TensorSpec::new("decoder.final_layer_norm.weight", Dtype::F32, [44]));
    specs.push(TensorSpec::new("lm_head.weight", Dtype::F32, [97, 44]));
    let mut writer = Writer::create(&file, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    for spec in &specs[..own] {
        writer.write(&spec.name, encoder.tensor(&spec.name).unwrap().bytes()).unwrap();
    }
    // NaN: it would show if any of it got into a result.
    for spec in &specs[own..] {
        let nan = f32::NAN.to_le_bytes().repeat(spec.shape.iter().product());
        writer.write(&spec.name, &nan).unwrap();
    }
    writer.finish().unwrap();

    let config = T5Config::from_file(case.join("config.json")).unwrap();
    let ids = Tensor::new(&[[3u32, 9, 27, 1]], &Device::Cpu).unwrap();
    for quantize in [false, true] {
        let mut results = Vec::new();
        for path in [&file, &case.join("model.safetensors")] {
            let pager = Pager::new(&Device::Cpu).unwrap();
            let files = Arc::new(Checkpoint::open(path).unwrap());
            let mut builder = ModelBuilder::new(&pager, "text_encoder_2", files);
            if quantize {
                builder.quantize(QuantPolicy::default());
            }
            let model = T5Encoder::new(&config, builder).unwrap();
            assert!(model.unused().is_empty(), "{:?}", model.unused());
            pager.plan(Budget::Min).unwrap();
            let states = model.forward(&ids, None).unwrap();
            assert_eq!(pager.report().models[0].read.0, encoder.bytes());
            results.push(states.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        assert_eq!(results[0], results[1]);
        assert!(results[0].iter().all(|v| v.is_finite()));
    }
}
