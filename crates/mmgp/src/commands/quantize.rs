//! Options that subcommands share: what becomes int8 or fp8, and where it is kept.

use std::{convert::Infallible, path::PathBuf, str::FromStr};

use anyhow::Context;
use mmgp::{Bytes, Settings, Store};

#[derive(clap::Args)]
pub(crate) struct Quantize {
    /// Make weights int8 while they are read: `int8` for the transformer, or names of models
    /// (transformer,text_encoder_2), or `off`. `fp8` is the transformer too, and makes all of them fp8 (e4m3)
    /// instead: fp8 or fp8,text_encoder_2
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    quantize: Option<Vec<String>>,

    /// Layers that are not quantized: a pattern of full names, such as *.attn.* (repeatable)
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
}

/// `--store`: a folder, `off`, or by default the user's cache.
#[derive(Clone, Debug)]
pub(crate) enum StoreArg {
    Off,
    At(PathBuf),
}

impl FromStr for StoreArg {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "off" { StoreArg::Off } else { StoreArg::At(text.into()) })
    }
}

impl StoreArg {
    /// The store that is meant, if any.
    pub(crate) fn store(arg: Option<&Self>) -> Option<Store> {
        match arg {
            Some(StoreArg::Off) => None,
            Some(StoreArg::At(folder)) => Some(Store::at(folder)),
            None => Store::of_user(),
        }
    }
}

/// Options on what is kept for the next start.
#[derive(clap::Args)]
pub(crate) struct Keep {
    /// Where quantized models, and times of passes, are kept for the next start: a folder, or `off`
    /// [default: mmgp in the user's cache folder]
    #[arg(long, value_name = "DIR|off")]
    store: Option<StoreArg>,

    /// Disk space that stays free beside what is kept, such as 20GB; where it would not, models are
    /// quantized at each start [default: a tenth of the disk]
    #[arg(long, value_name = "BYTES", value_parser = super::bytes)]
    store_spare: Option<Bytes>,
}

impl Keep {
    /// The store that is meant, if any.
    pub(crate) fn store(&self) -> Option<Store> {
        let store = StoreArg::store(self.store.as_ref())?;
        Some(match self.store_spare {
            Some(spare) => store.with_spare(spare),
            None => store,
        })
    }
}

impl Quantize {
    /// Overrides `settings` by what was given.
    pub(crate) fn apply(&self, settings: &mut Settings) -> anyhow::Result<()> {
        let mut set = |name: &str, text: &str| settings.set(name, text).map_err(mmgp::Error::from);
        if let Some(quantize) = &self.quantize {
            let named = |name: &str| quantize.iter().any(|q| q == name);
            let others: Vec<&str> = quantize
                .iter()
                .map(String::as_str)
                .filter(|name| !["int8", "fp8", "transformer", "off"].contains(name))
                .collect();
            anyhow::ensure!(
                !(named("int8") && named("fp8")),
                "--quantize: weights become int8 or fp8, not both"
            );
            if named("int8") {
                set("quantization_type", "qint8")?;
            }
            if named("fp8") {
                set("quantization_type", "qfloat8")?;
            }
            let transformer = named("int8") || named("fp8") || named("transformer");
            set("quantize_transformer", if transformer { "on" } else { "off" })?;
            let others = if others.is_empty() { "none".into() } else { others.join(",") };
            set("extra_models_to_quantize", &others).context("--quantize")?;
        }
        if !self.exclude.is_empty() {
            set("quantize_exclude", &self.exclude.join(",")).context("--exclude")?;
        }
        Ok(())
    }
}
