//! The `mmgp` command. Each subcommand is one file under `commands/`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod commands;
#[cfg(not(feature = "cuda"))]
mod sibling;

/// Tells the two builds of the command apart.
const VERSION: &str = if cfg!(feature = "cuda") {
    concat!(env!("CARGO_PKG_VERSION"), " (CUDA)")
} else {
    env!("CARGO_PKG_VERSION")
};

/// Runs generative models that are larger than the machine.
///
/// Weights are paged: of a model only the blocks that the memory budget has room for are in memory
/// at once, the next one is fetched while one computes. Results do not depend on the budget.
#[derive(Parser)]
#[command(version = VERSION, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(Box<commands::generate::Args>),
    Decode(Box<commands::decode::Args>),
    Convert(commands::convert::Args),
    Store(commands::store::Args),
    #[cfg(feature = "cuda")]
    #[command(hide = true)]
    CompileKernels(commands::compile_kernels::Args),
}

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet, so nothing reads the environment at the same time.
    // candle puts backtraces into the text of its errors, which is for users here.
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "0") };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing::Level::WARN.into())
                .from_env_lossy(),
        )
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let result = match Cli::parse().command {
        Command::Generate(args) => commands::generate::run(&args),
        Command::Decode(args) => commands::decode::run(&args),
        Command::Convert(args) => commands::convert::run(&args),
        Command::Store(args) => commands::store::run(&args),
        #[cfg(feature = "cuda")]
        Command::CompileKernels(args) => commands::compile_kernels::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.downcast_ref().is_some_and(mmgp::Error::is_cancelled) => {
            // Whoever adds a context says what was kept.
            match error.chain().len() {
                1 => eprintln!("cancelled; nothing was written"),
                _ => eprintln!("cancelled; {error}"),
            }
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
