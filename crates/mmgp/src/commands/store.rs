//! `mmgp store`: what is kept for the next start.

use anyhow::bail;
use clap::Subcommand;

use super::quantize::StoreArg;

/// Show or clear what is kept for the next start: models that were quantized on the fly, times of passes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,

    /// The store's folder [default: mmgp in the user's cache folder]
    #[arg(long, global = true, value_name = "DIR")]
    store: Option<StoreArg>,
}

#[derive(Subcommand)]
enum Action {
    /// List the models, the one used last first
    List,
    /// Remove them all, and the times
    Clear,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Some(store) = StoreArg::store(args.store.as_ref()) else {
        bail!(
            "there is no store: neither a home nor a cache folder is known; name one with --store"
        );
    };
    match args.action {
        Action::List => {
            let entries = store.entries()?;
            for entry in &entries {
                println!(
                    "{:>10}  {}  of {}",
                    entry.bytes,
                    entry.path.display(),
                    entry.source.display()
                );
            }
            let all = mmgp::Bytes(entries.iter().map(|entry| entry.bytes.0).sum());
            println!("{all} in {} models in {}", entries.len(), store.folder().display());
        }
        Action::Clear => {
            println!("removed {} from {}", store.clear()?, store.folder().display());
        }
    }
    Ok(())
}
