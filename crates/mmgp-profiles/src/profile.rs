//! The five presets of Python mmgp, with its numbers, names and values.
//!
//! A profile is a guess at what a machine can hold. It sets five of the [`Settings`]; the rest keep
//! their defaults, and each can be overridden.

use std::{fmt, str::FromStr};

use mmgp_residency::Bytes;

use crate::{
    Amount, Amounts, Error, Models, Origin, Result, Setting, Settings, Switch, values::plain,
};

/// A preset, known by its number or its name.
///
/// RAM and VRAM are what it is advertised for, with pictures of the size that models were trained
/// on. On the CPU a budget bounds the weights in RAM, and what needs a GPU has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Profile {
    /// 1, for 48 GB of RAM and 24 GB of VRAM: all models pinned, none bounded.
    HighRamHighVram = 1,
    /// 2, for 48 GB and 12 GB: all models pinned, the transformer bounded to 1200 MiB, others to
    /// 3000 MiB each.
    HighRamLowVram = 2,
    /// 3, for 32 GB and 24 GB: the transformer pinned, large text encoders quantized, none bounded.
    LowRamHighVram = 3,
    /// 4, for 32 GB and 12 GB: the transformer pinned, large text encoders quantized, the
    /// transformer bounded to 1200 MiB, others to 3000 MiB each.
    LowRamLowVram = 4,
    /// 5, for 24 GB and 10 GB: nothing pinned, large text encoders quantized, the transformer
    /// bounded to 400 MiB, others to 3000 MiB each.
    VerylowRamLowVram = 5,
}

impl Profile {
    /// All five, in the order of their numbers.
    pub const ALL: [Profile; 5] = [
        Profile::HighRamHighVram,
        Profile::HighRamLowVram,
        Profile::LowRamHighVram,
        Profile::LowRamLowVram,
        Profile::VerylowRamLowVram,
    ];

    /// Its number, 1 to 5.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Its name as in Python mmgp.
    pub const fn name(self) -> &'static str {
        match self {
            Profile::HighRamHighVram => "HighRAM_HighVRAM",
            Profile::HighRamLowVram => "HighRAM_LowVRAM",
            Profile::LowRamHighVram => "LowRAM_HighVRAM",
            Profile::LowRamLowVram => "LowRAM_LowVRAM",
            Profile::VerylowRamLowVram => "VerylowRAM_LowVRAM",
        }
    }

    /// The RAM it is advertised for (GB of 10^9 bytes; what is sold as 48 GB holds a little more).
    pub const fn ram(self) -> Bytes {
        Bytes(match self {
            Profile::HighRamHighVram | Profile::HighRamLowVram => 48_000_000_000,
            Profile::LowRamHighVram | Profile::LowRamLowVram => 32_000_000_000,
            Profile::VerylowRamLowVram => 24_000_000_000,
        })
    }

    /// The VRAM it is advertised for.
    pub const fn vram(self) -> Bytes {
        Bytes(match self {
            Profile::HighRamHighVram | Profile::LowRamHighVram => 24_000_000_000,
            Profile::HighRamLowVram | Profile::LowRamLowVram => 12_000_000_000,
            Profile::VerylowRamLowVram => 10_000_000_000,
        })
    }

    /// The settings of this profile, to be used as they are or overridden.
    pub fn settings(self) -> Settings {
        let mut settings = Settings::default();
        let origin = Origin::Profile(self);
        settings.pinned_memory = Setting::new(self.pinned(), origin);
        settings.budgets = Setting::new(self.budgets(), origin);
        settings.quantize_transformer = Setting::new(Switch::On, origin);
        settings.extra_models_to_quantize = Setting::new(self.extra_models(), origin);
        settings.async_transfers = Setting::new(Switch::On, origin);
        settings
    }

    fn pinned(self) -> Models {
        match self {
            Profile::HighRamHighVram | Profile::HighRamLowVram => Models::All,
            Profile::LowRamHighVram | Profile::LowRamLowVram => {
                Models::Named(vec!["transformer".into()])
            }
            Profile::VerylowRamLowVram => Models::None,
        }
    }

    fn budgets(self) -> Amounts {
        let transformer = match self {
            Profile::HighRamHighVram | Profile::LowRamHighVram => return Amounts::default(),
            Profile::HighRamLowVram | Profile::LowRamLowVram => 1200,
            Profile::VerylowRamLowVram => 400,
        };
        Amounts::all(Amount::mib(3000)).with("transformer", Amount::mib(transformer))
    }

    fn extra_models(self) -> Models {
        match self {
            Profile::HighRamHighVram | Profile::HighRamLowVram => Models::None,
            _ => Models::Encoders,
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Profile {
    type Err = Error;

    /// By number (`4`) or name, in any case, with `_`, `-` or nothing between words.
    fn from_str(text: &str) -> Result<Self> {
        let named = |p: &Profile| plain(text) == plain(p.name());
        let numbered = |p: &Profile| text.trim() == p.number().to_string();
        let found = Profile::ALL.into_iter().find(|p| named(p) || numbered(p));
        found.ok_or_else(|| Error::Profile {
            found: text.into(),
            known: Profile::ALL.map(|p| format!("{} ({p})", p.number())).join(", "),
        })
    }
}
