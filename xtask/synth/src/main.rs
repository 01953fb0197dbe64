//! `cargo xtask synth`: writes a pipeline's folder of random weights in true shapes.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use mmgp_residency::{Bytes, process_peak};
use mmgp_synth::{Depth, Flux, Folder, Options};

/// Writes a pipeline's folder that `mmgp generate --model` takes: random weights in true shapes and
/// widths, of as many blocks as asked for, with the demo's tokenizers
#[derive(Parser)]
#[command(name = "cargo xtask synth")]
struct Cli {
    /// The pipeline
    #[arg(value_enum)]
    pipeline: Pipeline,
    /// Double and single blocks of the transformer; the real one has 19+38
    #[arg(long, value_name = "DOUBLE+SINGLE")]
    depth: Depth,
    /// Blocks of T5; the real one has 24
    #[arg(long, value_name = "N")]
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
}

fn shard_size(text: &str) -> Result<Bytes, String> {
    match Bytes::parse(text) {
        Some(bytes) if bytes.0 > 0 => Ok(bytes),
        _ => Err("expected a size above 0 such as 2GB".into()),
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let kind = match cli.pipeline {
        Pipeline::FluxDev => Flux::Dev,
        Pipeline::FluxSchnell => Flux::Schnell,
    };
    let folder = Folder::flux(kind, cli.depth.double, cli.depth.single, cli.t5_depth);
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
