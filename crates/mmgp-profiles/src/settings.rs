//! Settings: every option of Python mmgp's `offload.all` that has a meaning here, with its origin.
//!
//! A profile sets some, a user overrides any; each keeps where it came from. What cannot act on this
//! machine is kept and listed as such by [`Settings::explain`]; what would mislead is refused by
//! [`Settings::set`].

use std::{fmt, str::FromStr};

use mmgp_residency::{Budget, Budgets};

use crate::{
    Amount, Amounts, Error, Fraction, Models, Profile, QuantizationType, Result, Switch,
    error::list,
    values::{Names, plain},
};

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// This profile set it.
    Profile(Profile),
    /// The user set it.
    User,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Profile(profile) => write!(f, "profile {}", profile.number()),
            Origin::User => f.write_str("user"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting<T> {
    value: T,
    origin: Origin,
}

impl<T> Setting<T> {
    pub(crate) const fn new(value: T, origin: Origin) -> Self {
        Self { value, origin }
    }

    /// The value.
    pub const fn get(&self) -> &T {
        &self.value
    }

    /// Where it came from.
    pub const fn origin(&self) -> Origin {
        self.origin
    }

    /// Replaces the whole value by the user's: of a profile's budgets, say, none is kept.
    pub fn set(&mut self, value: T) {
        *self = Self::new(value, Origin::User);
    }

    fn read(&mut self, name: &'static str, text: &str) -> Result<()>
    where
        T: FromStr<Err = &'static str>,
    {
        self.set(text.parse().map_err(|expected| wrong(name, text, expected))?);
        Ok(())
    }
}

/// How the models of a pipeline are held in memory, and in which form.
///
/// The defaults are those of Python mmgp, but nothing is quantized unless a profile or the user
/// says so: quantization changes the picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What each model may hold beside the budget of all models; empty is no limit. A profile's
    /// amount is raised to what a model needs at least; a user's is refused below it.
    ///
    /// Python mmgp ignores an amount for all models and takes `N%` for N times the capacity; here
    /// the one bounds each model, and the other is a share of the weights of the model it is for.
    pub budgets: Setting<Amounts>,
    /// Whether the model `transformer` is quantized.
    pub quantize_transformer: Setting<Switch>,
    /// Further models that are quantized.
    pub extra_models_to_quantize: Setting<Models>,
    /// What they are quantized to.
    pub quantization_type: Setting<QuantizationType>,
    /// Patterns of modules and parameters that are not quantized.
    pub quantize_exclude: Setting<Vec<String>>,
    /// Models whose weights wait in pinned memory.
    pub pinned_memory: Setting<Models>,
    /// Whether adapters wait in pinned memory, too.
    pub pinned_peft_lora: Setting<Switch>,
    /// Whether of the pinned models only the repeated blocks are pinned.
    pub partial_pinning: Setting<Switch>,
    /// The share of RAM that may be pinned; `None` for half of it.
    pub perc_reserved_mem_max: Setting<Option<Fraction>>,
    /// Whether the next block is fetched while one computes.
    pub async_transfers: Setting<Switch>,
    /// VRAM that each model leaves free.
    pub working_vram: Setting<Amounts>,
    /// The share of VRAM that weights may take.
    pub vram_safety_coefficient: Setting<Fraction>,
    /// Models that take adapters.
    pub loras: Setting<Models>,
}

impl Default for Settings {
    fn default() -> Self {
        fn default<T>(value: T) -> Setting<T> {
            Setting::new(value, Origin::Default)
        }
        Self {
            budgets: default(Amounts::default()),
            quantize_transformer: default(Switch::Off),
            extra_models_to_quantize: default(Models::None),
            quantization_type: default(QuantizationType::Qint8),
            quantize_exclude: default(Vec::new()),
            pinned_memory: default(Models::None),
            pinned_peft_lora: default(Switch::Off),
            partial_pinning: default(Switch::Off),
            perc_reserved_mem_max: default(None),
            async_transfers: default(Switch::On),
            working_vram: default(Amounts::default()),
            vram_safety_coefficient: default(Fraction::SAFETY),
            loras: default(Models::None),
        }
    }
}

/// The names of all settings.
pub(crate) const NAMES: [&str; 13] = [
    "budgets",
    "quantize_transformer",
    "extra_models_to_quantize",
    "quantization_type",
    "quantize_exclude",
    "pinned_memory",
    "pinned_peft_lora",
    "partial_pinning",
    "perc_reserved_mem_max",
    "async_transfers",
    "working_vram",
    "vram_safety_coefficient",
    "loras",
];

/// Options of Python mmgp that are not taken, and what does their work.
const REFUSED: [(&str, &str); 5] = [
    ("compile", "kernels are compiled into the program; leave it out"),
    ("compile_mode", "kernels are compiled into the program; leave it out"),
    (
        "convert_weights_float_to",
        "weights keep the dtype of their file; leave it out, or quantize to make them smaller",
    ),
    (
        "co_tenants_map",
        "models stay together as far as the budget has room; raise the budget instead",
    ),
    ("verbose_level", "it is an option of the program, `--verbose`, not of its memory"),
];

impl Settings {
    /// Overrides the setting `name` by the user's `text`. Names are those of the fields or of
    /// Python mmgp (`pinned_memory`, `pinnedMemory`), in any case, with `_`, `-` or nothing between
    /// words. The value is replaced whole, and unchanged on an error.
    ///
    /// # Errors
    /// A name that is unknown or refused; a text that the setting does not take.
    pub fn set(&mut self, name: &str, text: &str) -> Result<()> {
        let text = text.trim();
        let nothing = ["none", "0", "auto"].contains(&text.to_ascii_lowercase().as_str());
        match plain(name).as_str() {
            "budgets" => self.budgets.set(text.parse()?),
            "quantizetransformer" => {
                self.quantize_transformer.read("quantize_transformer", text)?
            }
            "extramodelstoquantize" => {
                self.extra_models_to_quantize.read("extra_models_to_quantize", text)?;
            }
            "quantizationtype" => self.quantization_type.read("quantization_type", text)?,
            "quantizeexclude" if nothing => self.quantize_exclude.set(Vec::new()),
            "quantizeexclude" => {
                let patterns = text.parse::<Names>();
                let patterns = patterns.map_err(|e| wrong("quantize_exclude", text, e))?;
                self.quantize_exclude.set(patterns.0);
            }
            "pinnedmemory" => self.pinned_memory.read("pinned_memory", text)?,
            "pinnedpeftlora" => self.pinned_peft_lora.read("pinned_peft_lora", text)?,
            "partialpinning" => self.partial_pinning.read("partial_pinning", text)?,
            "percreservedmemmax" if nothing => self.perc_reserved_mem_max.set(None),
            "percreservedmemmax" => {
                let share = text.parse().map_err(|e| wrong("perc_reserved_mem_max", text, e))?;
                self.perc_reserved_mem_max.set(Some(share));
            }
            "asynctransfers" => self.async_transfers.read("async_transfers", text)?,
            "workingvram" => {
                let amounts: Amounts = text.parse()?;
                if amounts.amounts().any(|amount| amount == Amount::Min) {
                    return Err(wrong("working_vram", text, "MiB, amounts with units, or shares"));
                }
                self.working_vram.set(amounts);
            }
            "vramsafetycoefficient" => {
                self.vram_safety_coefficient.read("vram_safety_coefficient", text)?;
            }
            "loras" => self.loras.read("loras", text)?,
            other => {
                return Err(match REFUSED.iter().find(|(name, _)| plain(name) == other) {
                    Some(&(name, instead)) => Error::Refused { name, instead },
                    None => Error::Unknown { name: name.into(), known: list(NAMES) },
                });
            }
        }
        Ok(())
    }

    /// The budgets of a pipeline of `models`: `total` over all of them, and a cap for each that
    /// [`budgets`](Self::budgets) bounds. A profile's caps are raised to what a model needs at
    /// least ([`Budget::AtLeastMin`]; the plan says where), since a profile knows no model, and
    /// those of models that the pipeline lacks are left out. A user's cap that is too small is
    /// refused by the plan.
    ///
    /// # Errors
    /// A user's budget for a model that the pipeline lacks.
    pub fn budgets_of<S: AsRef<str>>(&self, models: &[S], total: Budget) -> Result<Budgets> {
        let amounts = self.budgets.get();
        let preset = matches!(self.budgets.origin(), Origin::Profile(_));
        if !preset {
            known("budgets", amounts.names(), models)?;
        }
        let caps = models.iter().filter_map(|model| {
            let cap = match amounts.of(model.as_ref())? {
                Amount::Bytes(bytes) if bytes.0 == 0 => return None,
                Amount::Bytes(bytes) if preset => Budget::AtLeastMin(bytes),
                Amount::Bytes(bytes) => Budget::Bytes(bytes),
                Amount::Percent(share) => Budget::Percent(share),
                Amount::Min => Budget::Min,
            };
            Some((model.as_ref().to_string(), cap))
        });
        Ok(Budgets { total, models: caps.collect() })
    }

    /// Which of `models`, given as name and class (`("text_encoder_2", "T5EncoderModel")`), are
    /// quantized while they are loaded.
    ///
    /// # Errors
    /// A model named by [`extra_models_to_quantize`](Self::extra_models_to_quantize) that is not
    /// there.
    pub fn models_to_quantize<'a>(&self, models: &[(&'a str, &str)]) -> Result<Vec<&'a str>> {
        let extra = self.extra_models_to_quantize.get();
        let names: Vec<&str> = models.iter().map(|(name, _)| *name).collect();
        known("extra_models_to_quantize", extra.names(), &names)?;
        let transformer = *self.quantize_transformer.get() == Switch::On;
        let chosen = models.iter().filter(|(name, class)| {
            (transformer && *name == "transformer") || extra.contains(name, class)
        });
        Ok(chosen.map(|(name, _)| *name).collect())
    }
}

fn wrong(name: &'static str, text: &str, expected: &str) -> Error {
    Error::Value { name, found: text.into(), expected: expected.into() }
}

/// Checks that `models` has all that `setting` names.
fn known<'a, S: AsRef<str>>(
    setting: &'static str,
    mut names: impl Iterator<Item = &'a str>,
    models: &[S],
) -> Result<()> {
    match names.find(|name| models.iter().all(|model| model.as_ref() != *name)) {
        None => Ok(()),
        Some(model) => {
            Err(Error::NoSuchModel { setting, model: model.into(), known: list(models) })
        }
    }
}
