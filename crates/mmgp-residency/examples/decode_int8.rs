//! Writes the dense weights that the int8 layers of a file stand for, to compare with other readers.
//!
//! `cargo run --release -p mmgp-residency --example decode_int8 -- IN.safetensors OUT.safetensors`

use std::{collections::BTreeMap, error::Error, sync::Arc};

use candle_core::{CpuStorage, Device, Storage};
use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_quant::Bias;
use mmgp_residency::{Budget, ModelBuilder, Pager};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else {
        return Err("usage: decode_int8 IN.safetensors OUT.safetensors".into());
    };
    let checkpoint = Arc::new(Checkpoint::open(from)?);
    let pager = Pager::new(&Device::Cpu)?;
    let builder = ModelBuilder::new(&pager, "layers", checkpoint.clone());
    let (mut specs, mut layers) = (Vec::new(), Vec::new());
    for codes in checkpoint.iter() {
        let Some(layer) = codes.name().strip_suffix(".weight._data") else { continue };
        let scales = checkpoint.tensor(&format!("{layer}.weight._scale"))?;
        let &[outputs, inputs] = codes.shape() else { continue };
        let dtype: Dtype = scales.dtype();
        specs.push(TensorSpec::new(format!("{layer}.weight"), dtype, [outputs, inputs]));
        layers.push(builder.block(layer).linear(inputs, outputs, Bias::No)?);
    }
    let model = builder.finish((), layers)?;
    pager.plan(Budget::Min)?;
    let mut writer = Writer::create(to, &specs, &BTreeMap::new(), Overwrite::No)?;
    for (spec, visit) in specs.iter().zip(model.pass()?.blocks()) {
        let weight = visit?.run(|layer| layer.decode())?;
        let (storage, _) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::BF16(v)) => {
                writer.write(&spec.name, bytemuck::cast_slice(v))?
            }
            Storage::Cpu(CpuStorage::F16(v)) => {
                writer.write(&spec.name, bytemuck::cast_slice(v))?
            }
            Storage::Cpu(CpuStorage::F32(v)) => {
                writer.write(&spec.name, bytemuck::cast_slice(v))?
            }
            _ => return Err("weights decode to bf16, f16 or f32".into()),
        }
    }
    writer.finish()?;
    println!("{} layers", specs.len());
    Ok(())
}
