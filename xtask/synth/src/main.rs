//! `cargo xtask synth`: writes a pipeline's folder of random weights in true shapes.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::{Parser, ValueEnum};
use mmgp_residency::{Bytes, process_peak};
use mmgp_synth::{CogVideoX, Depth, Flux, Folder, Options};

/// Writes a pipeline's folder that `mmgp generate --model` takes: random weights in true shapes and
/// widths, of as many blocks as asked for, with the demo's tokenizers
#[derive(Parser)]
#[command(name = "cargo xtask synth")]
struct Cli {
    /// The pipeline
    #[arg(value_enum)]
    pipeline: Pipeline,
    /// Blocks of the transformer, of FLUX double and single ones [default: all; FLUX: 19+38, CogVideoX:
    /// 30 or 42]
    #[arg(long, value_name = "N|DOUBLE+SINGLE")]
    depth: Option<Depth>,
    /// Blocks of T5
    #[arg(long, value_name = "N", default_value_t = 24)]
    t5_depth: usize,
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
}

/// The folder that is asked for.
fn folder(cli: &Cli) -> Result<Folder> {
    let flux = |kind| {
        let depth = cli.depth.unwrap_or(Depth { double: 19, single: Some(38) });
        let (double, single) = depth.both().map_err(|why| anyhow!("--depth: {why}"))?;
        Ok(Folder::flux(kind, double, single, cli.t5_depth))
    };
    let cogvideox = |kind, all| {
        let depth = cli.depth.unwrap_or(Depth { double: all, single: None });
        ensure!(depth.single.is_none(), "CogVideoX has one kind of blocks: --depth N");
        Ok(Folder::cogvideox(kind, depth.double, cli.t5_depth))
    };
    match cli.pipeline {
        Pipeline::FluxDev => flux(Flux::Dev),
        Pipeline::FluxSchnell => flux(Flux::Schnell),
        Pipeline::CogVideoX2b => cogvideox(CogVideoX::Small, 30),
        Pipeline::CogVideoX5b => cogvideox(CogVideoX::Large, 42),
        Pipeline::CogVideoX5bI2v => cogvideox(CogVideoX::LargeFromPicture, 42),
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
    let tokenizers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-flux");
    let tokenizers = tokenizers.canonicalize().context("the demo's folder, for its tokenizers")?;
    let options =
        Options { seed: cli.seed, shard_bytes: cli.shard_size.0, tokenizers: &tokenizers };
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
