//! `cargo xtask synth`: writes a pipeline's folder of random weights in true shapes.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use clap::{Parser, ValueEnum};
use mmgp_residency::{Bytes, process_peak};
use mmgp_synth::{CogVideoX, Depth, Flux, Folder, Options};

/// Writes a pipeline's folder that `mmgp generate --model` takes: random weights in true shapes and
/// widths, of as many blocks as asked for, with small tokenizers
#[derive(Parser)]
#[command(name = "cargo xtask synth")]
struct Cli {
    /// The pipeline
    #[arg(value_enum)]
    pipeline: Pipeline,
    /// Blocks of the transformer, of FLUX and HunyuanVideo double and single ones [default: all: FLUX
    /// 19+38, HunyuanVideo 20+40, CogVideoX 30 or 42]
    #[arg(long, value_name = "N|DOUBLE+SINGLE")]
    depth: Option<Depth>,
    /// Blocks of the large text encoder [default: all: T5 24, Llama 32]
    #[arg(long, value_name = "N", alias = "t5-depth")]
    text_depth: Option<usize>,
    /// The folder to write, which must not exist or be empty
    #[arg(long)]
    dir: PathBuf,
    /// Other seeds give other weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The largest file of weights
    #[arg(long, default_value = "2GB", value_parser = shard_size)]
    shard_size: Bytes,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pipeline {
    FluxDev,
    FluxSchnell,
    #[value(name = "cogvideox-2b")]
    CogVideoX2b,
    #[value(name = "cogvideox-5b")]
    CogVideoX5b,
    #[value(name = "cogvideox-5b-i2v")]
    CogVideoX5bI2v,
    #[value(name = "hunyuanvideo")]
    HunyuanVideo,
}

/// The folder that is asked for.
fn folder(cli: &Cli) -> Result<Folder> {
    let both = |double, single| {
        let depth = cli.depth.unwrap_or(Depth { double, single: Some(single) });
        depth.both().map_err(|why| anyhow!("--depth: {why}"))
    };
    let flux = |kind| {
        let (double, single) = both(19, 38)?;
        Ok(Folder::flux(kind, double, single, cli.text_depth.unwrap_or(24)))
    };
    let cogvideox = |kind, all| {
        let depth = cli.depth.unwrap_or(Depth { double: all, single: None });
        ensure!(depth.single.is_none(), "CogVideoX has one kind of blocks: --depth N");
        Ok(Folder::cogvideox(kind, depth.double, cli.text_depth.unwrap_or(24)))
    };
    match cli.pipeline {
        Pipeline::FluxDev => flux(Flux::Dev),
        Pipeline::FluxSchnell => flux(Flux::Schnell),
        Pipeline::CogVideoX2b => cogvideox(CogVideoX::Small, 30),
        Pipeline::CogVideoX5b => cogvideox(CogVideoX::Large, 42),
        Pipeline::CogVideoX5bI2v => cogvideox(CogVideoX::LargeFromPicture, 42),
        Pipeline::HunyuanVideo => {
            let (double, single) = both(20, 40)?;
            Ok(Folder::hunyuanvideo(double, single, cli.text_depth.unwrap_or(32)))
        }
    }
}

fn shard_size(text: &str) -> Result<Bytes, String> {
    match Bytes::parse(text) {
        Some(bytes) if bytes.0 > 0 => Ok(bytes),
        _ => Err("expected a size above 0 such as 2GB".into()),
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let folder = folder(&cli)?;
    let options = Options { seed: cli.seed, shard_bytes: cli.shard_size.0 };
    folder.write(&cli.dir, &options, |written| {
        let seconds = written.took.as_secs_f64();
        println!(
            "{:<15}{:>5} tensors{:>11} in {seconds:.1} s ({}/s)",
            written.model,
            written.tensors,
            Bytes(written.bytes),
            Bytes((written.bytes as f64 / seconds) as u64),
        );
    })?;
    let peak = process_peak().map_or(String::new(), |peak| format!(", peak memory {peak}"));
    println!("{} is complete{peak}", cli.dir.display());
    Ok(())
}
