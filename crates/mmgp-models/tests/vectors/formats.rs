//! Quantized weights as public programs write them: what they decode to, and products with them.

use std::sync::Arc;

use candle_core::DType;
use mmgp_io::{Checkpoint, Dtype};
use mmgp_quant::{Bias, Linear};
use mmgp_residency::{Budget, ModelBuilder};

use crate::{
    Outcome,
    case::{Case, Error},
    classes::{Outputs, flux},
};

pub(crate) fn run(case: &Case) -> Result<Outcome, Error> {
    let file = case.dir.join("model.safetensors");
    if !file.is_file() {
        return Ok(Outcome::Skipped("this file format is not built yet".into()));
    }
    let checkpoint = Arc::new(Checkpoint::open(&file)?);
    let int8 = |checkpoint: &Checkpoint| {
        let mut codes = checkpoint.iter().filter(|v| v.name().ends_with("._data")).peekable();
        codes.peek().is_some() && codes.all(|view| view.dtype() == Dtype::I8)
    };
    match case.about.class.as_str() {
        _ if !int8(&checkpoint) => {
            Ok(Outcome::Skipped("this number format is not built yet".into()))
        }
        "FluxTransformer2DModel" => transformer(case, &checkpoint),
        _ => layers(case, &checkpoint),
    }
}

/// Every layer decodes to the weight, and multiplies as the library that wrote it does.
fn layers(case: &Case, checkpoint: &Arc<Checkpoint>) -> Result<Outcome, Error> {
    let pager = crate::device::pager()?;
    let mut builder = ModelBuilder::new(&pager, "layers", checkpoint.clone());
    builder.round_int8();
    let outputs = case.outputs();
    let names: Vec<&str> = outputs.iter().filter_map(|name| name.strip_suffix(".y")).collect();
    let mut layers: Vec<Linear> = Vec::new();
    for name in &names {
        let weights = builder.block(name);
        let inputs = case.input(&format!("{name}.x"))?.dim(1)?;
        let rows = [format!("{name}.weight._scale"), format!("{name}.weight")];
        let rows = rows.iter().find_map(|name| checkpoint.get(name)).ok_or("no weight")?;
        let bias = Bias::from(weights.contains("bias"));
        layers.push(weights.linear(inputs, rows.shape()[0], bias)?);
    }
    let model = builder.finish((), layers)?;
    pager.plan(Budget::Min)?;
    for (name, visit) in names.iter().zip(model.pass()?.blocks()) {
        let x = case.input(&format!("{name}.x"))?;
        let (weight, y) =
            visit?.run(|layer| Ok((layer.decode()?.to_dtype(DType::F32)?, layer.forward(x)?)))?;
        case.check(&format!("{name}.weight"), &weight)?;
        case.check(&format!("{name}.y"), &y)?;
    }
    case.done()
}

/// A whole transformer, with weights rounded as quanto does and in f32.
fn transformer(case: &Case, checkpoint: &Arc<Checkpoint>) -> Result<Outcome, Error> {
    for (output, rounded) in [("sample", true), ("sample_float32_weights", false)] {
        for budget in [Budget::Unlimited, Budget::Min] {
            let pager = crate::device::pager()?;
            let mut builder = ModelBuilder::new(&pager, "transformer", checkpoint.clone());
            if rounded {
                builder.round_int8();
            }
            let forward = flux(case, builder)?;
            pager.plan(budget)?;
            let outputs: Outputs = forward()?;
            case.check(output, &outputs["sample"])?;
        }
    }
    case.done()
}
