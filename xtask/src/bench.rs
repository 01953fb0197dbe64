//! The benches, and one table of ratios out of what they measured.
//!
//! Ours and the reference run in turn, and a ratio is the median over such pairs; seconds alone say
//! more about the machine. Nothing is asserted.

use std::{env, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::step::{self, cargo, root};

/// What is compared, and the folder in which its bench leaves what it measured.
const RATIOS: &[(&str, &str)] = &[
    ("open a file of 2000 tensors / the safetensors crate", "header"),
    ("make an image, bf16 as it lies / memcpy", "image-bf16"),
    ("make an image, bf16 widened to f32 / memcpy", "image-f32"),
    ("`Linear` bf16, 64 tokens / candle in f32", "linear-64-f32"),
    ("`Linear` bf16, 64 tokens / candle in bf16", "linear-64-bf16"),
    ("`Linear` bf16, 512 tokens / candle in f32", "linear-512-f32"),
    ("`Linear` bf16, 512 tokens / candle in bf16", "linear-512-bf16"),
    ("pass of 64 tokens, budget `min` / resident", "streaming-64-min"),
    ("pass of 64 tokens, two slots / resident", "streaming-64-two-slots"),
    ("pass of 64 tokens, budget 50% / resident", "streaming-64-half"),
    ("pass of 512 tokens, budget `min` / resident", "streaming-512-min"),
    ("pass of 512 tokens, two slots / resident", "streaming-512-two-slots"),
    ("pass of 512 tokens, budget 50% / resident", "streaming-512-half"),
];

/// Runs the benches, prints the table and writes it to `target/bench/ratios.md`.
pub(crate) fn run() -> Result<()> {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
    let dir = root().join(target).join("bench");
    let measured = dir.join("criterion");
    // What an earlier run measured must not end up in this one's table.
    if measured.exists() {
        fs::remove_dir_all(&measured).with_context(|| format!("{}", measured.display()))?;
    }
    // Over the whole workspace, so that dependencies are those that the tests were built with.
    let mut command = cargo(&["bench", "--workspace"]);
    for bench in ["header", "image", "linear", "streaming"] {
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
