//! One file a subcommand.

#[cfg(feature = "cuda")]
pub(crate) mod compile_kernels;
pub(crate) mod convert;
pub(crate) mod decode;
pub(crate) mod generate;
mod machine;
mod progress;
mod quantize;
pub(crate) mod store;
mod write;

use mmgp::{GuidanceSchedule, Tiles};

/// An amount of bytes, as options take it.
fn bytes(text: &str) -> Result<mmgp::Bytes, String> {
    let amount = mmgp::Bytes::parse(text).filter(|bytes| bytes.0 > 0);
    amount.ok_or_else(|| "expected an amount such as 8GB or 6000MiB".into())
}

/// Frames a second.
fn fps(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.);
    rate.ok_or_else(|| "expected a number above 0".into())
}

fn tiles(text: &str) -> Result<Tiles, String> {
    match text {
        "on" => Ok(Tiles::On),
        "off" => Ok(Tiles::Off),
        _ => Err("expected on or off".into()),
    }
}

fn guidance_schedule(text: &str) -> Result<GuidanceSchedule, String> {
    match text {
        "constant" => Ok(GuidanceSchedule::Constant),
        "dynamic" => Ok(GuidanceSchedule::Dynamic),
        _ => Err("expected constant or dynamic".into()),
    }
}
