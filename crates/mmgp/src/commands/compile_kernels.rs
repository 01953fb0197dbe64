//! `mmgp compile-kernels`: what the command starts itself when a GPU is first used on a machine.

/// Has the driver compile some of the tensor library's kernels, which it keeps.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which of them.
    name: String,
    /// The GPU's number.
    ordinal: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    Ok(mmgp::compile_kernels(&args.name, args.ordinal)?)
}
