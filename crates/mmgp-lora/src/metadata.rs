//! Alpha and rank from an adapter's configuration, in the header of its file or beside it.
//!
//! diffusers writes PEFT's `LoraConfig` as JSON under `lora_adapter_metadata`, every key with the
//! model's place in the pipeline before it; PEFT on its own writes `adapter_config.json` beside the
//! file. A pattern is a regular expression for the end of a module's name, and the first that
//! matches counts (`peft.utils.get_pattern_key`).

use std::{collections::BTreeMap, fmt, path::Path};

use mmgp_io::read_json;
use regex::bytes::{RegexSet, RegexSetBuilder};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;

use crate::{Error, Result, error::Quoted};

/// The key of the header's metadata.
const METADATA: &str = "lora_adapter_metadata";
/// The name of PEFT's file.
const CONFIG: &str = "adapter_config.json";
/// The most memory in bytes that compiled patterns may take.
const MAX_PATTERNS: usize = 64 << 20;

/// What scales the modules of a file, by the model's place in the pipeline; `""` where none is named.
#[derive(Debug, Default)]
pub(crate) struct Scaling(BTreeMap<String, Config>);

#[derive(Debug, Default)]
struct Config {
    alpha: Option<f32>,
    rank: Option<usize>,
    alphas: Option<Patterns<f32>>,
    ranks: Option<Patterns<usize>>,
    root: bool,
}

impl Scaling {
    /// From the metadata of a header; nothing if it has none.
    ///
    /// # Errors
    /// What is no configuration.
    pub(crate) fn in_header(file: &Path, metadata: Option<&String>) -> Result<Self> {
        let Some(text) = metadata else { return Ok(Self::default()) };
        let object = serde_json::from_str::<Object>(text).map_err(|error| Error::Metadata {
            file: file.into(),
            entry: METADATA.into(),
            expected: "a JSON object".into(),
            found: Quoted(&error.to_string()).to_string(),
        })?;
        Self::read(file, METADATA, object)
    }

    /// From PEFT's own configuration beside the file; nothing if there is none.
    ///
    /// # Errors
    /// What is no configuration.
    pub(crate) fn beside(file: &Path) -> Result<Self> {
        let path = file.with_file_name(CONFIG);
        if !path.exists() {
            return Ok(Self::default());
        }
        Self::read(&path, CONFIG, read_json::<Object>(&path)?)
    }

    /// The factor of a module of this rank: alpha / rank (by its square root with rsLoRA), and 1
    /// where nothing is known.
    ///
    /// # Errors
    /// Another rank than the configuration's.
    pub(crate) fn scale(
        &self,
        file: &Path,
        component: Option<&str>,
        module: &str,
        rank: usize,
    ) -> Result<f32> {
        let of_component = self.0.get(component.unwrap_or_default());
        let Some(config) = of_component.or_else(|| self.0.get("")) else { return Ok(1.) };
        let expected = config.ranks.as_ref().and_then(|r| r.get(module)).or(config.rank);
        if let Some(expected) = expected
            && expected != rank
        {
            return Err(Error::Metadata {
                file: file.into(),
                entry: format!("rank of `{}`", Quoted(module)),
                expected: format!("{expected}, as the configuration says"),
                found: rank.to_string(),
            });
        }
        let alpha = config.alphas.as_ref().and_then(|a| a.get(module)).or(config.alpha);
        let alpha = alpha.unwrap_or(rank as f32);
        Ok(alpha / if config.root { (rank as f32).sqrt() } else { rank as f32 })
    }

    fn read(file: &Path, place: &str, Object(entries): Object) -> Result<Self> {
        let mut scaling = Self::default();
        for (key, node) in &entries {
            let (component, name) = key.rsplit_once('.').unwrap_or(("", key));
            let wrong = |expected: &str, found: String| Error::Metadata {
                file: file.into(),
                entry: format!("{place}, `{}`", Quoted(key)),
                expected: expected.into(),
                found: Quoted(&found).to_string(),
            };
            let alpha = |node: &Node| match node.value().and_then(Value::as_f64) {
                Some(alpha) if (alpha as f32).is_finite() => Ok(alpha as f32),
                _ => Err(wrong("a number", node.to_string())),
            };
            let rank = |node: &Node| match node.value().and_then(Value::as_u64) {
                Some(rank) if rank > 0 => Ok(rank as usize),
                _ => Err(wrong("a rank from 1", node.to_string())),
            };
            let config = scaling.0.entry(component.to_string()).or_default();
            match (name, node) {
                (_, Node::Other(Value::Null)) => {}
                ("lora_alpha", node) => config.alpha = Some(alpha(node)?),
                ("r", node) => config.rank = Some(rank(node)?),
                ("use_rslora", Node::Other(Value::Bool(root))) => config.root = *root,
                ("use_rslora", node) => return Err(wrong("true or false", node.to_string())),
                ("alpha_pattern", node) => {
                    config.alphas = Some(Patterns::read(node, &wrong, alpha)?);
                }
                ("rank_pattern", node) => {
                    config.ranks = Some(Patterns::read(node, &wrong, rank)?);
                }
                _ => {}
            }
        }
        Ok(scaling)
    }
}

/// Values by the pattern that a module's name ends in; of several that match, the first.
#[derive(Debug)]
struct Patterns<T> {
    names: RegexSet,
    values: Vec<T>,
}

impl<T: Copy> Patterns<T> {
    fn read(
        node: &Node,
        wrong: &dyn Fn(&str, String) -> Error,
        value: impl Fn(&Node) -> Result<T>,
    ) -> Result<Self> {
        let Node::Object(Object(entries)) = node else {
            return Err(wrong("an object of patterns", node.to_string()));
        };
        let names = entries.iter().map(|(pattern, _)| format!(r"^(?:.*\.)?(?:{pattern})$"));
        let names = RegexSetBuilder::new(names)
            .unicode(false)
            .size_limit(MAX_PATTERNS)
            .build()
            .map_err(|error| wrong("regular expressions", error.to_string()))?;
        let values = entries.iter().map(|(_, node)| value(node)).collect::<Result<_>>()?;
        Ok(Self { names, values })
    }

    fn get(&self, module: &str) -> Option<T> {
        let first = self.names.matches(module.as_bytes()).iter().next()?;
        self.values.get(first).copied()
    }
}

/// JSON whose objects keep the order of their entries, since the first pattern counts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Node {
    Object(Object),
    Other(Value),
}

impl Node {
    fn value(&self) -> Option<&Value> {
        match self {
            Node::Object(_) => None,
            Node::Other(value) => Some(value),
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Node::Object(_) => f.write_str("an object"),
            Node::Other(value) => Quoted(&value.to_string()).fmt(f),
        }
    }
}

struct Object(Vec<(String, Node)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<Object, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Object(entries))
            }
        }
        from.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaling(json: &str) -> Result<Scaling> {
        Scaling::in_header(Path::new("a.safetensors"), Some(&json.to_string()))
    }

    #[test]
    fn the_first_pattern_that_matches_the_end_counts() {
        let scaling = scaling(
            r#"{"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.revision": null,
                "transformer.rank_pattern": {"^b.to_k": 2},
                "transformer.alpha_pattern": {"to_q": 2, "a.to_q": 16, "x.*.to_v": 1.5},
                "text_encoder.lora_alpha": 3, "text_encoder.use_rslora": true}"#,
        )
        .unwrap();
        let scale = |component, module, rank| {
            scaling.scale(Path::new("a"), Some(component), module, rank).unwrap()
        };
        assert_eq!(scale("transformer", "a.to_k", 4), 2.);
        assert_eq!(scale("transformer", "a.to_q", 4), 0.5, "the first, not the longest");
        assert_eq!(scale("transformer", "b.to_q", 4), 0.5);
        assert_eq!(scale("transformer", "b.xto_q", 4), 2., "whole names only");
        assert_eq!(scale("transformer", "x.7.to_v", 4), 0.375);
        assert_eq!(scale("transformer", "b.to_k", 2), 4., "^ is where the name begins");
        assert_eq!(scale("text_encoder", "a", 9), 1., "by the root of the rank");
        assert_eq!(scale("unet", "a", 9), 1.);
        let error = scaling.scale(Path::new("a"), Some("transformer"), "c.b.to_k", 2).unwrap_err();
        assert!(error.to_string().contains("expected 4"), "{error}");
    }

    #[test]
    fn what_is_no_configuration_is_named() {
        for (json, part) in [
            ("{", "lora_adapter_metadata"),
            ("[]", "JSON object"),
            (r#"{"transformer.lora_alpha": "8"}"#, "`transformer.lora_alpha`"),
            (r#"{"lora_alpha": 1e99}"#, "a number"),
            (r#"{"r": 0}"#, "a rank from 1"),
            (r#"{"r": -4}"#, "found -4"),
            (r#"{"use_rslora": 1}"#, "true or false"),
            (r#"{"alpha_pattern": [1]}"#, "an object of patterns"),
            (r#"{"alpha_pattern": {"(": 1}}"#, "regular expressions"),
            (r#"{"alpha_pattern": {"(((a{99}){99}){99}){99}": 1}}"#, "regular expressions"),
            (r#"{"alpha_pattern": {"a": {}}}"#, "found an object"),
        ] {
            let error = scaling(json).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("a.safetensors"), "{json}: {error}");
        }
        assert!(scaling(&"[".repeat(100_000)).is_err());
        assert!(scaling(&format!("{}1{}", r#"{"a":"#.repeat(9999), "}".repeat(9999))).is_err());
    }
}
