//! `mmgp convert`: a pipeline's weights in streaming order, dense, int8 or fp8.

use std::path::PathBuf;

use mmgp::{Activations, DeviceChoice, Offload, Overwrite, QuantizationType, Settings};

use super::quantize::Quantize;

/// Write a pipeline anew: each model as one file in the order in which it streams, int8 or fp8 if wanted.
///
/// A converted pipeline starts as fast as its file can be read, and codes are not made again at each
/// start. Python's safetensors, quanto and mmgp read the files too, but for rotated weights.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mmgp convert ~/models/FLUX.1-dev ~/models/FLUX.1-dev-int8 --quantize transformer,text_encoder_2")]
pub(crate) struct Args {
    /// A pipeline's folder in diffusers' layout
    from: PathBuf,

    /// The folder to write
    to: PathBuf,

    #[command(flatten)]
    quantize: Quantize,

    /// Make int8 weights for `generate --int8-activations`: rotated against outliers where a layer has a multiple of 256
    /// inputs, which this program alone reads
    #[arg(long, requires = "quantize")]
    int8_activations: bool,

    /// Replace files that exist
    #[arg(long)]
    overwrite: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut settings = Settings::default();
    args.quantize.apply(&mut settings)?;
    if args.int8_activations && *settings.quantization_type.get() == QuantizationType::Qfloat8 {
        anyhow::bail!("--int8-activations is for int8 weights, and --quantize fp8 makes others");
    }
    let overwrite = if args.overwrite { Overwrite::Yes } else { Overwrite::No };
    let builder = Offload::builder().device(DeviceChoice::Cpu).settings(settings);
    let builder = match args.int8_activations {
        true => builder.weights_for(Activations::Int8),
        false => builder,
    };
    let mut offload = builder.build()?;
    offload.convert(&args.from, &args.to, overwrite, |part| {
        let saved = part.saved;
        let quantized = match saved.quantized {
            0 => String::new(),
            layers => format!(", {layers} layers quantized"),
        };
        println!(
            "wrote {} ({} tensors, {}{quantized})",
            part.path.display(),
            saved.tensors,
            saved.bytes
        );
    })?;
    println!("wrote {}", args.to.display());
    Ok(())
}
