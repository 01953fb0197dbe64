//! Amounts of memory per model, as text and as values: `transformer=1200,*=3000`.
//!
//! Numbers without a unit are MiB, as in Python mmgp, whose "MB" are MiB.

use std::{fmt, str::FromStr};

use mmgp_residency::Bytes;

use crate::{Error, Result};

const MIB: u64 = 1 << 20;

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// So many bytes; as a budget, 0 is no limit.
    Bytes(Bytes),
    /// A share, above 0 and at most 100: as a budget, percent of the weights of the one model that
    /// it is for, as they lie in slots; as working VRAM, percent of all VRAM.
    Percent(f64),
    /// The least that the model runs in; only as a budget.
    Min,
}

impl Amount {
    /// So many MiB.
    pub const fn mib(mib: u32) -> Self {
        Amount::Bytes(Bytes(mib as u64 * MIB))
    }

    /// Reads one amount; what is wrong with it otherwise.
    fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "expected MiB (`1200`), an amount with a unit (`1.2GB`, `900MiB`), \
                                a share (`30%`), `min`, or 0 for no limit";
        let digits = |c: char| c.is_ascii_digit() || c == '.';
        match text.to_ascii_lowercase().as_str() {
            "min" => return Ok(Amount::Min),
            "unlimited" => return Ok(Amount::Bytes(Bytes(0))),
            "auto" => return Err("`auto` is for the budget of all models together"),
            _ => {}
        }
        if let Some(share) = text.strip_suffix('%') {
            let share = share.trim_end();
            let share = if share.chars().all(digits) { share.parse().ok() } else { None };
            return match share {
                Some(share) if share > 0. && share <= 100. => Ok(Amount::Percent(share)),
                Some(_) => Err("a share is above 0 % and at most 100 %; 0 is no limit"),
                None => Err(EXPECTED),
            };
        }
        let bytes = match text.chars().all(digits) {
            true => Bytes::parse(&format!("{text}MiB")),
            false => Bytes::parse(text),
        };
        match bytes {
            // Not 0, which would mean the opposite.
            Some(Bytes(0)) if text.contains(|c: char| ('1'..='9').contains(&c)) => {
                Err("that is less than a byte")
            }
            Some(bytes) => Ok(Amount::Bytes(bytes)),
            None => Err(EXPECTED),
        }
    }
}

impl fmt::Display for Amount {
    /// In the form that is read back to the same amount: whole MiB without a unit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Amount::Bytes(Bytes(bytes)) if bytes % MIB == 0 => write!(f, "{}", bytes / MIB),
            Amount::Bytes(Bytes(bytes)) => write!(f, "{bytes}B"),
            Amount::Percent(share) => write!(f, "{share}%"),
            Amount::Min => f.write_str("min"),
        }
    }
}

/// An amount for each of some models, and one for each model that is not named.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Amounts {
    named: Vec<(String, Amount)>,
    others: Option<Amount>,
}

impl Amounts {
    /// `amount` for each model.
    pub fn all(amount: Amount) -> Self {
        Self { named: Vec::new(), others: Some(amount) }
    }

    /// The same, with `amount` for `model`.
    #[must_use]
    pub fn with(mut self, model: &str, amount: Amount) -> Self {
        self.named.retain(|(name, _)| name != model);
        self.named.push((model.into(), amount));
        self
    }

    /// The amount of `model`: its own, else that of models not named.
    pub fn of(&self, model: &str) -> Option<Amount> {
        let own = self.named.iter().find(|(name, _)| name == model);
        own.map(|(_, amount)| *amount).or(self.others)
    }

    /// The models that are named.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.iter().map(|(name, _)| name.as_str())
    }

    /// Whether it says nothing of any model.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty() && self.others.is_none()
    }

    /// All amounts in it.
    pub(crate) fn amounts(&self) -> impl Iterator<Item = Amount> {
        self.named.iter().map(|(_, amount)| *amount).chain(self.others)
    }
}

impl fmt::Display for Amounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.named.as_slice(), self.others) {
            ([], None) => return f.write_str("none"),
            ([], Some(amount)) => return amount.fmt(f),
            _ => {}
        }
        for (i, (name, amount)) in self.named.iter().enumerate() {
            write!(f, "{}{name}={amount}", if i == 0 { "" } else { "," })?;
        }
        self.others.map_or(Ok(()), |amount| write!(f, ",*={amount}"))
    }
}

impl FromStr for Amounts {
    type Err = Error;

    /// Entries `model=amount`, separated by commas, where `*` is every model not named; or one
    /// amount for all; or `none`. An amount is MiB (`1200`), has a unit (`1.2GB`), or is a share
    /// (`30%`), `min`, or 0 or `unlimited` for no limit.
    fn from_str(text: &str) -> Result<Self> {
        if text.trim().eq_ignore_ascii_case("none") {
            return Ok(Self::default());
        }
        let mut amounts = Self::default();
        let entries: Vec<&str> = text.split(',').map(str::trim).collect();
        for &entry in &entries {
            let wrong = |problem: String| Error::Amounts {
                found: entry.into(),
                whole: text.into(),
                problem,
            };
            let (name, amount) = match entry.split_once('=') {
                Some((name, amount)) => (name.trim(), amount.trim()),
                None if entry.is_empty() => return Err(wrong("there is an empty entry".into())),
                None if entries.len() == 1 => ("*", entry),
                None => {
                    return Err(wrong(format!(
                        "one of several entries names its model: `MODEL={entry}`, or `*={entry}` \
                         for models not named"
                    )));
                }
            };
            let amount = Amount::parse(amount).map_err(|problem| wrong(problem.into()))?;
            if name.is_empty() {
                return Err(wrong("there is no name before `=`".into()));
            }
            let twice = match name {
                "*" => amounts.others.replace(amount).is_some(),
                _ => {
                    let twice = amounts.names().any(|n| n == name);
                    amounts.named.push((name.into(), amount));
                    twice
                }
            };
            if twice {
                return Err(wrong(format!("`{name}` is there twice")));
            }
        }
        Ok(amounts)
    }
}
