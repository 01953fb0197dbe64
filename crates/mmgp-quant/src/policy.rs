//! Which layers of a model become int8 or fp8 while it is read.
//!
//! Only weights of linear layers do. Upstream leaves modules alone that stand outside the repeated
//! blocks: embedders, final projections, heads; they are a small share of a model and a large share of
//! its error. Here that is the stem, whatever its layers are called. (Upstream also leaves alone the
//! last group of modules and takes groups above 2 GiB; both follow from the stem here, whose linear
//! layers are small in every model that there is.)

use glob::Pattern;

use crate::{Codes, Error, Result};

/// What is quantized, and what is not.
#[derive(Clone, Debug, Default)]
pub struct QuantPolicy {
    codes: Codes,
    exclude: Vec<Pattern>,
}

impl QuantPolicy {
    /// All linear layers of blocks as int8, but those excluded: see [`new`](Self::new).
    ///
    /// # Errors
    /// A pattern that is none.
    pub fn int8(exclude: &[String]) -> Result<Self> {
        Self::new(Codes::Int8, exclude)
    }

    /// All linear layers of blocks, but those whose full stored name (`transformer_blocks.0.ff.net.2`)
    /// matches one of `exclude`: `*` stands for any text, `?` for one character, case counts.
    ///
    /// # Errors
    /// A pattern that is none.
    pub fn new(codes: Codes, exclude: &[String]) -> Result<Self> {
        let pattern = |text: &String| {
            Pattern::new(text).map_err(|e| Error::Invalid(format!("`{text}` is no pattern: {e}")))
        };
        Ok(Self { codes, exclude: exclude.iter().map(pattern).collect::<Result<_>>()? })
    }

    /// What they become.
    pub fn codes(&self) -> Codes {
        self.codes
    }

    /// Whether the layer of this full name is left alone by name.
    pub fn excludes(&self, layer: &str) -> bool {
        let layer = layer.strip_suffix(".weight").unwrap_or(layer);
        self.exclude.iter().any(|pattern| pattern.matches(layer))
    }

    /// The patterns, for recipes.
    pub fn patterns(&self) -> Vec<&str> {
        self.exclude.iter().map(Pattern::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let policy = QuantPolicy::int8(&["*.ff.net.?".into(), "blocks.1.*".into()]).unwrap();
        assert!(policy.excludes("blocks.0.ff.net.2.weight"));
        assert!(policy.excludes("blocks.1.attn.to_q"));
        assert!(!policy.excludes("blocks.10.attn.to_q"));
        assert!(!policy.excludes("blocks.0.FF.net.2"));
        assert!(QuantPolicy::int8(&["[".into()]).unwrap_err().to_string().contains("`[`"));
    }
}
