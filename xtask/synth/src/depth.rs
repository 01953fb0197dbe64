//! How many blocks a transformer has, as people write it.

use std::str::FromStr;

/// Double and single blocks of a FLUX transformer: `19+38`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Blocks of two streams.
    pub double: usize,
    /// Blocks of one.
    pub single: usize,
}

impl FromStr for Depth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let depth = text
            .split_once('+')
            .and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        match depth {
            Some((double, single)) => Ok(Self { double, single }),
            None => Err("expected two numbers such as 3+5".into()),
        }
    }
}
