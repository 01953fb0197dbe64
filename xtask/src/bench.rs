//! The benches, and one table of ratios out of what they measured; or, with `--gpu`, steps of a large
//! transformer on a GPU, and with `--peers`, the same in other systems and in ours.
//!
//! Ours and the reference run in turn, and a ratio is the median over such pairs; seconds alone say
//! more about the machine. Nothing is asserted.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    ci::CUDA_FEATURES,
    step::{self, cargo, target},
    toolkit,
};

/// The options of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Steps of a FLUX.1-dev transformer on the GPU under several budgets, instead of the benches
    #[arg(long, group = "large")]
    gpu: bool,
    /// Steps of that transformer in PyTorch, diffusers and Python mmgp too, at no less VRAM than ours
    #[arg(long, group = "large")]
    peers: bool,
    /// About a minute of it
    #[arg(long, requires = "gpu", conflicts_with = "all")]
    quick: bool,
    /// Every combination
    #[arg(long, requires = "gpu")]
    all: bool,
    /// Where the model's files are kept, instead of /dev/shm or else the folder of temporary files
    #[arg(long, requires = "large")]
    dir: Option<PathBuf>,
    /// Where gpu.json, gpu.md and gpu.svg go, or peers.json and so on, instead of target/bench
    #[arg(long, requires = "large")]
    out: Option<PathBuf>,
    /// More options of `mmgp-gpu-bench`, or of `benches/peers/compare.py`
    #[arg(last = true, requires = "large")]
    more: Vec<String>,
}

/// What is compared, and the folder in which its bench leaves what it measured.
const RATIOS: &[(&str, &str)] = &[
    ("open a file of 2000 tensors / the safetensors crate", "header"),
    ("make an image, bf16 as it lies / memcpy", "image-bf16"),
    ("make an image, bf16 widened to f32 / memcpy", "image-f32"),
    ("`Linear` bf16, 64 tokens / candle in f32", "linear-64-f32"),
    ("`Linear` bf16, 64 tokens / candle in bf16", "linear-64-bf16"),
    ("`Linear` bf16, 512 tokens / candle in f32", "linear-512-f32"),
    ("`Linear` bf16, 512 tokens / candle in bf16", "linear-512-bf16"),
    ("quantize bf16 to int8 / memcpy of the bf16", "int8-quantize"),
    ("step of 64 tokens, int8 / bf16", "int8-step-64"),
    ("step of 512 tokens, int8 / bf16", "int8-step-512"),
    ("read bf16, quantize, write, sync / read and write the bytes, sync", "int8-write"),
    ("start from the store, blocks checked / read its bytes", "int8-start"),
    ("pass of 64 tokens, budget `min` / resident", "streaming-64-min"),
    ("pass of 64 tokens, two slots / resident", "streaming-64-two-slots"),
    ("pass of 64 tokens, budget 50% / resident", "streaming-64-half"),
    ("pass of 512 tokens, budget `min` / resident", "streaming-512-min"),
    ("pass of 512 tokens, two slots / resident", "streaming-512-two-slots"),
    ("pass of 512 tokens, budget 50% / resident", "streaming-512-half"),
];

/// Runs the benches that `args` asks for.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.gpu || args.peers { gpu(args) } else { ratios() }
}

/// Builds the GPU's bench and runs it, or has it run in turn with other systems.
fn gpu(args: &Args) -> Result<()> {
    let environment = toolkit::environment()?;
    let mut build = cargo(&["build", "--release", "--workspace", "--bin", "mmgp-gpu-bench"]);
    step::run("build", build.arg(CUDA_FEATURES).envs(environment.iter().cloned()))?;

    let program = target().join("release/mmgp-gpu-bench");
    // CUDA's libraries are found where it was built with them.
    let libraries = environment.iter().find(|(name, _)| *name == "CUDA_HOME");
    let libraries = libraries.map(|(_, home)| {
        let old = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let old = env::split_paths(&old).filter(|dir| !dir.as_os_str().is_empty());
        env::join_paths([Path::new(home).join("lib64")].into_iter().chain(old))
    });
    let libraries = libraries.transpose()?;
    let mut bench = match args.peers {
        false => Command::new(program),
        true => {
            let mut compare = Command::new("python3");
            compare.arg(step::root().join("benches/peers/compare.py")).arg("--bench").arg(program);
            compare
        }
    };
    match (libraries, args.peers) {
        // PyTorch brings its own.
        (Some(paths), true) => bench.arg("--libraries").arg(paths),
        (Some(paths), false) => bench.env("LD_LIBRARY_PATH", paths),
        (None, _) => &mut bench,
    };
    for (option, wanted) in [("--quick", args.quick), ("--all", args.all)] {
        bench.args(wanted.then_some(option));
    }
    if let Some(dir) = &args.dir {
        bench.arg("--dir").arg(dir);
    }
    bench.arg("--out").arg(args.out.clone().unwrap_or_else(|| target().join("bench")));
    if let Some(commit) = step::commit() {
        bench.args(["--commit", &commit]);
    }
    step::run("bench", bench.args(&args.more))?;
    Ok(())
}

/// Runs criterion's benches, prints the table and writes it to `target/bench/ratios.md`.
fn ratios() -> Result<()> {
    let dir = target().join("bench");
    let measured = dir.join("criterion");
    // What an earlier run measured must not end up in this one's table.
    if measured.exists() {
        fs::remove_dir_all(&measured).with_context(|| format!("{}", measured.display()))?;
    }
    // Over the whole workspace, so that dependencies are those that the tests were built with.
    let mut command = cargo(&["bench", "--workspace"]);
    for bench in ["header", "image", "int8", "linear", "streaming"] {
        command.args(["--bench", bench]);
    }
    step::run("bench", command.env("CRITERION_HOME", &measured))?;

    let table = table(&measured)?;
    let path = dir.join("ratios.md");
    fs::write(&path, &table).with_context(|| format!("{}", path.display()))?;
    println!("\n{table}\nwritten to {}", path.display());
    Ok(())
}

fn table(measured: &Path) -> Result<String> {
    let mut table =
        String::from("| what / reference | ours | reference | ratio |\n|---|--:|--:|--:|\n");
    for (what, group) in RATIOS {
        let Pairs { bytes, pairs } = Pairs::read(&measured.join(group).join("pairs.json"))?;
        let shown = |seconds: f64| match bytes {
            Some(bytes) => format!("{:.2} ms, {:.1} GB/s", seconds * 1e3, bytes / seconds * 1e-9),
            None => format!("{:.2} ms", seconds * 1e3),
        };
        let ours = shown(median(pairs.iter().map(|p| p.0)));
        let reference = shown(median(pairs.iter().map(|p| p.1)));
        let ratio = median(pairs.iter().map(|p| p.0 / p.1));
        writeln!(table, "| {what} | {ours} | {reference} | {ratio:.2} |")?;
    }
    Ok(table)
}

/// What a bench measured: seconds of ours and of the reference right after it.
struct Pairs {
    bytes: Option<f64>,
    pairs: Vec<(f64, f64)>,
}

impl Pairs {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("{}", path.display()))?;
        let json: Value =
            serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
        let pair = |pair: &Value| Some((pair[0].as_f64()?, pair[1].as_f64()?));
        let pairs: Option<Vec<_>> =
            json["pairs"].as_array().and_then(|all| all.iter().map(pair).collect());
        let pairs = pairs.with_context(|| format!("{}: no pairs", path.display()))?;
        Ok(Self { bytes: json["bytes"].as_f64(), pairs })
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
