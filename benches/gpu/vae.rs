//! What decoding a picture takes: FLUX' autoencoder with random weights, in a process of its own.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context as _, Result, ensure};
use candle_core::Tensor;
use mmgp_benches::random;
use mmgp_io::{Dtype, TensorSpec};
use mmgp_models::vae::kl::{KlConfig, KlDecoder};
use mmgp_residency::{Budget, ModelBuilder, Pager};
use serde::Serialize;
use serde_json::json;

use crate::{
    card::{Card, used_as_told},
    files::{Files, sketched},
    measure::bits,
    row::median,
};

const MODEL: &str = "vae";
/// Decodes that are timed, after two that are not.
const TIMES: usize = 7;

/// What is measured, of one picture.
#[derive(Debug, Serialize)]
pub(crate) struct Decode {
    system: &'static str,
    /// Of either side.
    pixels: usize,
    /// Weights are read in it, and what is made once is made.
    first_s: f64,
    /// Median of `times`.
    decode_s: f64,
    times: Vec<f64>,
    /// Over what was in use before the process opened the device.
    peak_vram_bytes: Option<u64>,
    weight_bytes: u64,
    /// Whether every value of the picture is a number.
    finite: bool,
    card: String,
}

/// Measures it.
///
/// # Errors
/// Files or a device that are not to be had.
pub(crate) fn measure(files: &Files, ordinal: Option<usize>, pixels: usize) -> Result<Decode> {
    let config = config()?;
    let checkpoint = files.other("vae", &tensors(&config)?)?;
    let idle = used_as_told();
    let card = Card::open(ordinal, None)?;
    let builder = ModelBuilder::new(card.pager(), MODEL, checkpoint);
    let decoder = KlDecoder::new(&config, builder)?;
    card.pager().plan(Budget::Unlimited)?;
    let side = pixels / 8;
    ensure!(side * 8 == pixels && side > 0, "{pixels} pixels are no multiple of 8");
    let count = config.latent_channels * side * side;
    let shape = (1, config.latent_channels, side, side);
    let latents = Tensor::from_vec(random(count, 1), shape, card.device())?;
    let watch = card.watch();
    let decode = || {
        card.synchronize()?;
        let begun = Instant::now();
        let picture = decoder.decode(&latents)?;
        card.synchronize()?;
        anyhow::Ok((begun.elapsed().as_secs_f64(), picture))
    };
    let (first_s, picture) = decode()?;
    decode()?;
    let times: Vec<f64> = (0..TIMES).map(|_| Ok(decode()?.0)).collect::<Result<_>>()?;
    let peak = watch.peak();
    let told = used_as_told().zip(card.used()).zip(idle);
    Ok(Decode {
        system: "mmgp",
        pixels,
        first_s,
        decode_s: median(times.clone()),
        times,
        peak_vram_bytes: peak.zip(told).map(|(peak, ((told, now), idle))| {
            // What the driver keeps for itself is in one figure only.
            (peak + told).saturating_sub(now + idle)
        }),
        weight_bytes: card.pager().report().peak.0,
        finite: bits(&picture)?.iter().all(|&bits| f32::from_bits(bits).is_finite()),
        card: card.name(),
    })
}

/// Measures it and writes JSON.
///
/// # Errors
/// Those of [`measure`]; a file that cannot be written.
pub(crate) fn write(files: &Files, ordinal: Option<usize>, pixels: usize, to: &Path) -> Result<()> {
    let text = serde_json::to_string(&measure(files, ordinal, pixels)?)?;
    println!("{text}");
    fs::write(to, text).with_context(|| format!("{}", to.display()))
}

fn config() -> Result<KlConfig> {
    Ok(serde_json::from_value(json!({
        "down_block_types": (vec!["DownEncoderBlock2D"; 4]),
        "up_block_types": (vec!["UpDecoderBlock2D"; 4]),
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": false,
        "use_post_quant_conv": false,
    }))?)
}

fn tensors(config: &KlConfig) -> Result<Vec<TensorSpec>> {
    let pager = Pager::new(&candle_core::Device::Cpu)?;
    let (builder, sketch) = ModelBuilder::sketch(&pager, MODEL, Dtype::BF16);
    KlDecoder::new(config, builder)?;
    Ok(sketched(&sketch))
}

#[cfg(test)]
mod tests {
    use mmgp_models::flux::FluxConfig;

    use super::*;

    #[test]
    fn a_picture_is_decoded_and_the_file_is_of_that_autoencoder() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(Some(dir.path()), &FluxConfig::default()).unwrap();
        let decode = measure(&files, None, 16).unwrap();
        assert!(decode.finite && decode.times.len() == TIMES && decode.decode_s > 0.);
        // The published decoder has 49,545,475 parameters.
        let tensors = tensors(&config().unwrap()).unwrap();
        let bytes: u64 = tensors.iter().filter_map(TensorSpec::bytes).sum();
        assert_eq!(bytes / 2, 49_545_475);
        assert!(decode.weight_bytes >= bytes);
        assert!(measure(&files, None, 12).is_err());
    }
}
