//! `cargo xtask memory`: what a run needs beside its weights, seen from outside the process.
//!
//! Runs `mmgp generate` under several budgets and samples the anonymous memory that the operating
//! system counts for it. The run without a budget tells what is needed beside the weights; every other
//! one must stay below its budget, plus that, plus a margin.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::step::{cargo, root, run as build};

/// What a run may need beyond its budget and what the unlimited run needs beside its weights.
const MARGIN: u64 = 256_000_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The pipeline's folder
    #[arg(long)]
    model: PathBuf,
    /// Budgets to try beside `unlimited`
    #[arg(long, value_delimiter = ',', default_value = "min,25%,50%")]
    budgets: Vec<String>,
    /// Arguments for `generate`, such as `--steps 2 --width 512 --height 512`
    #[arg(last = true)]
    generate: Vec<String>,
}

struct Outcome {
    anonymous: u64,
    held: u64,
    budget: u64,
    seconds: f64,
    line: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    build("build", &mut cargo(&["build", "--release", "-p", "mmgp"]))?;
    let free = outcome(args, "unlimited")?;
    let beside = free.anonymous.saturating_sub(free.held);
    println!(
        "{:>10}{:>12}{:>12}{:>14}{:>14}{:>9}  latents",
        "budget", "MB", "held MB", "anonymous MB", "allowed MB", "s"
    );
    let row = |name: &str, o: &Outcome, allowed: u64| {
        let mb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
        let budget = if o.budget == u64::MAX { "none".into() } else { mb(o.budget) };
        let hash = o.line.rsplit(' ').next().unwrap_or_default().trim_end_matches(')');
        println!(
            "{name:>10}{budget:>12}{:>12}{:>14}{:>14}{:>9.1}  {hash}",
            mb(o.held),
            mb(o.anonymous),
            mb(allowed),
            o.seconds
        );
    };
    row("unlimited", &free, free.anonymous);
    let mut over = Vec::new();
    for budget in &args.budgets {
        let it = outcome(args, budget)?;
        let allowed = it.budget + beside + MARGIN;
        row(budget, &it, allowed);
        ensure!(it.line == free.line, "budget {budget} drew something else");
        if it.anonymous > allowed {
            over.push(budget.as_str());
        }
    }
    ensure!(over.is_empty(), "more memory than allowed at {}", over.join(", "));
    Ok(())
}

fn outcome(args: &Args, budget: &str) -> Result<Outcome> {
    let folder = root().join("target").join("memory");
    fs::create_dir_all(&folder)?;
    let begun = Instant::now();
    let mut child = Command::new(root().join("target/release/mmgp"))
        .args(["generate", "a lighthouse", "--out", "it.png", "--budget", budget, "--model"])
        .arg(fs::canonicalize(&args.model)?)
        .args(&args.generate)
        .current_dir(&folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut anonymous = 0;
    while child.try_wait()?.is_none() {
        anonymous = anonymous.max(read_anonymous(&status).unwrap_or(0));
        std::thread::sleep(Duration::from_millis(2));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let output = child.wait_with_output()?;
    let report = String::from_utf8(output.stderr)?;
    if !output.status.success() {
        bail!("budget {budget}: {report}");
    }
    // The report's last row: name, on disk, in slots, budget, held, read, each with its unit.
    let row = report.lines().find(|l| l.starts_with("all ")).context("no report")?;
    let fields: Vec<&str> = row.split_whitespace().collect();
    let (limit, rest) = match fields.get(5) {
        Some(&"none") => (u64::MAX, &fields[6..]),
        _ => (bytes(&fields[5..])?, &fields[7..]),
    };
    let line = String::from_utf8(output.stdout)?.trim().to_string();
    Ok(Outcome { anonymous, held: bytes(rest)?, budget: limit, seconds, line })
}

/// `6.54 MB`, as the report prints it.
fn bytes(fields: &[&str]) -> Result<u64> {
    let [number, unit, ..] = fields else { bail!("the report has no such column") };
    let unit = match *unit {
        "GB" => 1e9,
        "MB" => 1e6,
        "kB" => 1e3,
        _ => 1.,
    };
    Ok((number.parse::<f64>()? * unit) as u64)
}

fn read_anonymous(status: &PathBuf) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}
