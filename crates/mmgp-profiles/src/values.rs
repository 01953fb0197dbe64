//! The values that settings take, and how they read as text.

use std::{fmt, str::FromStr};

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// Off.
    #[default]
    Off,
    /// On.
    On,
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Switch::On { "on" } else { "off" })
    }
}

impl FromStr for Switch {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text.to_ascii_lowercase().as_str() {
            "on" | "true" | "yes" | "1" => Ok(Switch::On),
            "off" | "false" | "no" | "0" => Ok(Switch::Off),
            _ => Err("`on` or `off`"),
        }
    }
}

/// Some of a pipeline's models.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Models {
    /// None of them.
    #[default]
    None,
    /// All of them.
    All,
    /// The large text encoders: `text_encoder` and `text_encoder_2` where the name of their class
    /// contains T5, Llama or LLM, as Python mmgp detects them.
    Encoders,
    /// Those of these names.
    Named(Vec<String>),
}

impl Models {
    /// Whether a model that is called `name` and is of `class` (`T5EncoderModel`) is one of them.
    pub fn contains(&self, name: &str, class: &str) -> bool {
        match self {
            Models::None => false,
            Models::All => true,
            Models::Encoders => {
                let class = class.to_ascii_lowercase();
                matches!(name, "text_encoder" | "text_encoder_2")
                    && ["t5", "llama", "llm"].iter().any(|large| class.contains(large))
            }
            Models::Named(names) => names.iter().any(|n| n == name),
        }
    }

    /// The names in it, where it is made of names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = if let Models::Named(names) = self { names.as_slice() } else { &[] };
        names.iter().map(String::as_str)
    }
}

impl fmt::Display for Models {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Models::None => f.write_str("none"),
            Models::All => f.write_str("all"),
            Models::Encoders => f.write_str("encoders"),
            Models::Named(names) => f.write_str(&names.join(",")),
        }
    }
}

impl FromStr for Models {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text.to_ascii_lowercase().as_str() {
            "none" | "false" | "off" => Ok(Models::None),
            "all" | "true" | "on" | "*" => Ok(Models::All),
            "encoders" => Ok(Models::Encoders),
            _ => {
                let Names(names) = text.parse().map_err(|_| {
                    "names of models separated by commas, `all`, `none`, or `encoders` (the large \
                     text encoders)"
                })?;
                Ok(Models::Named(names))
            }
        }
    }
}

/// A share above 0 and at most 1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Fraction(f64);

impl Fraction {
    pub(crate) const SAFETY: Fraction = Fraction(0.8);

    /// `None` if it is not above 0 and at most 1.
    pub const fn new(share: f64) -> Option<Self> {
        if share > 0. && share <= 1. { Some(Self(share)) } else { None }
    }

    /// The share.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Fraction {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        text.parse().ok().and_then(Fraction::new).ok_or("a number above 0 and at most 1")
    }
}

/// A number format that weights are quantized to while they are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuantizationType {
    /// int8, symmetric, one scale per output channel.
    #[default]
    Qint8,
    /// fp8 (e4m3), one scale per output channel.
    Qfloat8,
}

impl fmt::Display for QuantizationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QuantizationType::Qint8 => f.write_str("qint8"),
            QuantizationType::Qfloat8 => f.write_str("qfloat8"),
        }
    }
}

impl FromStr for QuantizationType {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text.to_ascii_lowercase().as_str() {
            "qint8" | "int8" => Ok(QuantizationType::Qint8),
            "qfloat8" | "qfloat8_e4m3fn" | "fp8" => Ok(QuantizationType::Qfloat8),
            _ => Err("`qint8` or `qfloat8`"),
        }
    }
}

/// A list of names or patterns, as text.
pub(crate) struct Names(pub(crate) Vec<String>);

impl FromStr for Names {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_string()).collect();
        if names.iter().any(String::is_empty) {
            return Err("entries separated by commas, none of them empty");
        }
        Ok(Names(names))
    }
}

/// A name without what its spellings differ in: `pinnedMemory`, `pinned_memory`, `Pinned-Memory`.
pub(crate) fn plain(name: &str) -> String {
    let letters = name.trim().chars().filter(|c| !matches!(c, '_' | '-'));
    letters.map(|c| c.to_ascii_lowercase()).collect()
}
