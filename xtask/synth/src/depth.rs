//! How many blocks a transformer has, as people write it.

use std::str::FromStr;

/// Blocks of a transformer: `42`, or double and single ones `19+38`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Blocks of two streams, or all of them.
    pub double: usize,
    /// Blocks of one stream, where there are two kinds.
    pub single: Option<usize>,
}

impl Depth {
    /// Both numbers, where there are two kinds of blocks.
    ///
    /// # Errors
    /// One number.
    pub fn both(self) -> Result<(usize, usize), String> {
        let single =
            self.single.ok_or("expected two numbers such as 3+5: double and single blocks")?;
        Ok((self.double, single))
    }
}

impl FromStr for Depth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse().ok();
        let depth = match text.split_once('+') {
            Some((double, single)) => number(double).zip(number(single).map(Some)),
            None => number(text).zip(Some(None)),
        };
        let depth = depth.map(|(double, single)| Self { double, single });
        depth.ok_or_else(|| "expected a number, or two such as 3+5".into())
    }
}
