//! Checks that all model configs share.
//!
//! A config is a stranger's file: every number in it is bounded before anything is computed from it,
//! and a refusal names file, key, what was expected and what was found. Bounds are far above any
//! published model; that the numbers fit the weights is checked tensor by tensor later.

use std::{
    fmt,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// The most layers of any kind.
pub(crate) const LAYERS: RangeInclusive<usize> = 1..=1024;
/// The most attention heads.
pub(crate) const HEADS: RangeInclusive<usize> = 1..=1024;
/// Widths, vocabularies, channels.
pub(crate) const WIDTH: RangeInclusive<usize> = 1..=(1 << 20);

/// Checks the values of one config file.
pub(crate) struct Check<'a> {
    file: &'a Path,
}

impl<'a> Check<'a> {
    pub(crate) fn new(file: &'a Path) -> Self {
        Self { file }
    }

    /// `value` lies in `range`.
    pub(crate) fn range(
        &self,
        key: &str,
        value: usize,
        range: RangeInclusive<usize>,
    ) -> Result<()> {
        let (from, to) = (*range.start(), *range.end());
        self.that(range.contains(&value), key, format_args!("{from} to {to}"), value)
    }

    /// `value` is a finite number above zero.
    pub(crate) fn positive(&self, key: &str, value: f64) -> Result<()> {
        self.that(value.is_finite() && value > 0., key, "a number above 0", value)
    }

    /// `ok`, or the error that says what was expected instead of `found`.
    pub(crate) fn that(
        &self,
        ok: bool,
        key: &str,
        expected: impl fmt::Display,
        found: impl fmt::Debug,
    ) -> Result<()> {
        if ok {
            return Ok(());
        }
        Err(Error::Config {
            file: PathBuf::from(self.file),
            key: key.into(),
            expected: expected.to_string(),
            found: format!("{found:?}"),
        })
    }
}
