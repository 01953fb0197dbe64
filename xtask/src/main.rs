//! The project's chores, as `cargo xtask …`.
//!
//! Every chore is a short list of cargo's own commands. What needs the library's crates lives in a
//! package of its own and is run from here, so that this one builds in seconds.
#![forbid(unsafe_code)]

mod bench;
mod bundle;
mod ci;
mod memory;
mod step;
mod toolkit;

use std::{ffi::OsString, process::Command};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's chores")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Everything that CI checks, in one command.
    Ci(ci::Args),
    /// The benches, and one table of ratios, written to target/bench/ratios.md; with --gpu, the GPU's;
    /// with --peers, other systems on it too
    Bench(bench::Args),
    /// The command, the GPU's tests and its bench in bundle/mmgp-cuda.tar.xz, for machines without Rust
    Bundle(bundle::Args),
    /// A CUDA toolkit for machines without one, and the environment that names it.
    CudaToolkit(toolkit::Args),
    /// What runs under several budgets need, seen from outside the process.
    Memory(memory::Args),
    /// Writes a pipeline's folder of random weights in true shapes; `synth --help` says more
    #[command(disable_help_flag = true)]
    Synth {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().chore {
        Chore::Ci(args) => ci::run(&args),
        Chore::Bench(args) => bench::run(&args),
        Chore::Bundle(args) => bundle::run(&args),
        Chore::CudaToolkit(args) => toolkit::run(&args),
        Chore::Memory(args) => memory::run(&args),
        Chore::Synth { args } => synth(&args),
    }
}

/// Runs the package that knows the models.
fn synth(args: &[OsString]) -> anyhow::Result<()> {
    // Not `cargo run --package`: over the whole workspace, dependencies are those that are built
    // already for the tests.
    let mut build = step::cargo(&["build", "--release", "--workspace", "--bin", "mmgp-synth"]);
    step::run("build", &mut build)?;
    let status = Command::new(step::target().join("release/mmgp-synth")).args(args).status()?;
    match status.success() {
        true => Ok(()),
        false => std::process::exit(status.code().unwrap_or(1)),
    }
}
