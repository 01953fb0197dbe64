//! What CI checks: formatting, lints, tests, docs, licences, each a cargo command.
//!
//! All in the release profile, because on two cores the heavy dependencies are the cost: they are
//! checked once (for clippy and the docs) and built once (for the tests), not once for each profile.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use clap::ValueEnum;

use crate::{
    step::{self, cargo},
    toolkit,
};

/// The `cuda` feature of every crate that has it, as cargo's option over the whole workspace.
pub(crate) const CUDA_FEATURES: &str = "--features=mmgp/cuda,mmgp-models/cuda,mmgp-quant/cuda,\
     mmgp-residency/cuda,mmgp-lora/cuda,mmgp-benches/cuda";

/// The options of `ci`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave a step out; may be given several times.
    #[arg(long, value_enum, value_name = "STEP")]
    skip: Vec<Step>,
    /// Lint and build the CUDA code too; needs no GPU
    #[arg(long)]
    cuda: bool,
}

/// The steps, in the order in which they run: what fails fastest comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// cargo fmt
    Fmt,
    /// cargo deny: licences, sources and bans of all dependencies
    Licences,
    /// cargo clippy
    Clippy,
    /// cargo doc
    Docs,
    /// cargo test, documentation included
    Tests,
}

impl Step {
    fn command(self) -> Command {
        match self {
            Step::Fmt => cargo(&["fmt", "--all", "--check"]),
            Step::Licences => cargo(&["deny", "check", "bans", "licenses", "sources"]),
            Step::Clippy => cargo(&[
                "clippy",
                "--release",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]),
            Step::Docs => {
                let mut command = cargo(&["doc", "--release", "--workspace", "--no-deps"]);
                command.env("RUSTDOCFLAGS", "-Dwarnings");
                command
            }
            Step::Tests => cargo(&["test", "--release", "--workspace"]),
        }
    }
}

/// Runs every step that is not skipped; the first that fails ends it.
pub(crate) fn run(args: &Args) -> Result<()> {
    let steps: Vec<Step> =
        Step::value_variants().iter().copied().filter(|step| !args.skip.contains(step)).collect();
    if steps.contains(&Step::Licences) {
        let found = cargo(&["deny", "--version"]).output().is_ok_and(|out| out.status.success());
        ensure!(
            found,
            "cargo-deny is not installed: `cargo install cargo-deny --locked`, or `--skip licences`"
        );
    }
    let mut took = Vec::new();
    for step in steps {
        let name = format!("{step:?}").to_lowercase();
        let duration = step::run(&name, &mut step.command())?;
        took.push((name, duration));
    }
    if args.cuda {
        let env = toolkit::environment()?;
        // In the release profile as all else: candle's kernels take ten minutes, once.
        let clippy = ["clippy", "--release", "--workspace", "--all-targets", CUDA_FEATURES];
        let mut clippy = cargo(&clippy);
        clippy.args(["--", "-D", "warnings"]);
        let tests = cargo(&["test", "--release", "--workspace", "--no-run", CUDA_FEATURES]);
        for (name, mut command) in [("cuda-lint", clippy), ("cuda-build", tests)] {
            let duration = step::run(name, command.envs(env.iter().cloned()))?;
            took.push((name.to_string(), duration));
        }
    }
    eprintln!();
    for (name, took) in &took {
        eprintln!("{name:<10}{:>8.1} s", took.as_secs_f64());
    }
    let all: Duration = took.iter().map(|(_, took)| *took).sum();
    eprintln!("{:<10}{:>8.1} s", "all", all.as_secs_f64());
    Ok(())
}
