//! The index of a sharded checkpoint: which tensor lies in which file.
//!
//! `{"metadata": {…}, "weight_map": {"tensor": "file"}}`, as transformers and diffusers write it. A file name in it is data from
//! outside: it must be a plain name of a file beside the index, or an index could point anywhere on the disk.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path};

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::{Fault, Quoted, Result};
use crate::json::read_json;

/// A shard index, its file names checked.
#[derive(Deserialize)]
pub(crate) struct Index {
    /// Tensor name to shard file name.
    #[serde(deserialize_with = "distinct")]
    pub(crate) weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index; every shard it names is a plain file name.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let index: Self = read_json(path)?;
        for (tensor, shard) in &index.weight_map {
            if !is_plain_name(shard) {
                return Err(Fault::new(
                    path,
                    "a shard's plain file name, in the folder of the index",
                    format!("`{}`", Quoted(shard)),
                    "this index points outside of its folder: do not use it",
                )
                .tensor(tensor)
                .into());
            }
        }
        Ok(index)
    }

    /// The shards in name order, each with the first tensor mapped to it.
    pub(crate) fn shards(&self) -> BTreeMap<&str, &str> {
        let mut shards = BTreeMap::new();
        for (tensor, shard) in &self.weight_map {
            shards.entry(shard.as_str()).or_insert(tensor.as_str());
        }
        shards
    }
}

/// Whether `name` is the name of a file and nothing more: no folder, no drive, no `..`, on any system.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name);
    single && !name.contains(['/', '\\', ':', '\0'])
}

/// A map of strings in which no key occurs twice.
fn distinct<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    struct Distinct;
    impl<'de> Visitor<'de> for Distinct {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of file names by tensor")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut names = BTreeMap::new();
            while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                if names.contains_key(&tensor) {
                    return Err(A::Error::custom(format_args!(
                        "tensor `{}` is mapped twice",
                        Quoted(&tensor)
                    )));
                }
                names.insert(tensor, shard);
            }
            Ok(names)
        }
    }
    deserializer.deserialize_map(Distinct)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_only() {
        for good in ["model-00001-of-00002.safetensors", "a b", "..a", ".hidden"] {
            assert!(is_plain_name(good), "{good}");
        }
        for bad in ["", ".", "..", "/a", "a/", "a/b", "../a", "./a", "a\\b", "C:a", "a\0b"] {
            assert!(!is_plain_name(bad), "{bad:?}");
        }
    }
}
