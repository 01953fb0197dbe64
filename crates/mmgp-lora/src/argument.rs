//! `FILE[:WEIGHT]`, as the command line gives an adapter.

use std::{path::PathBuf, str::FromStr};

use crate::{Error, Result, StepWeights};

/// An adapter's file and its weights over the steps, 1 if none were given.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterArg {
    /// The file.
    pub file: PathBuf,
    /// Its weights.
    pub weights: StepWeights,
}

impl FromStr for AdapterArg {
    type Err = Error;

    /// The weight is what follows the last `:` if it holds only digits and `.-,;`, so that
    /// `C:\style.safetensors` is a file.
    fn from_str(text: &str) -> Result<Self> {
        let weight = |c: char| c.is_ascii_digit() || ".-,;".contains(c);
        match text.rsplit_once(':') {
            Some((file, weights)) if !weights.is_empty() && weights.chars().all(weight) => {
                Ok(Self { file: file.into(), weights: weights.parse()? })
            }
            _ => Ok(Self { file: text.into(), weights: StepWeights::default() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_follows_the_last_colon() {
        for (text, file, weights) in [
            ("a.safetensors", "a.safetensors", "1"),
            ("a.safetensors:0.5", "a.safetensors", "0.5"),
            ("a.safetensors:-.5,1;2", "a.safetensors", "-0.5,1;2"),
            (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", "1"),
            (r"C:\loras\a.safetensors:1,0", r"C:\loras\a.safetensors", "1,0"),
            ("dir:7/a", "dir:7/a", "1"),
            ("a:", "a:", "1"),
            ("a:0.5:0.7", "a:0.5", "0.7"),
            ("a:1e3", "a:1e3", "1"),
        ] {
            let arg: AdapterArg = text.parse().unwrap();
            assert_eq!(arg.file, PathBuf::from(file), "{text}");
            assert_eq!(arg.weights.to_string(), weights, "{text}");
        }
        for text in ["a:1,,2", "a:--1", "a:;", "a:1.2.3", "a:-"] {
            assert!(text.parse::<AdapterArg>().is_err(), "{text}");
        }
    }
}
