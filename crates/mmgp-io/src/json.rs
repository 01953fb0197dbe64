//! Small JSON files: configs and shard indexes.
//!
//! They come from the same places as weights do, so their size is bounded, and an error says where in the file it is.

use std::io::Read as _;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::mapped::open_regular;

/// The largest JSON file that is read: 64 MiB.
const MAX_JSON: u64 = 64 << 20;

/// Reads a JSON file (a `config.json`, a scheduler's or a tokenizer's configuration) into `T`.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::TooLarge`] beyond 64 MiB, [`Error::Json`] with file, line and column if it is not
/// JSON or not a `T`.
pub fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<T> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    open_regular(path)?
        .take(MAX_JSON + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, "read", e))?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(Error::TooLarge { path: path.to_path_buf(), limit: MAX_JSON });
    }
    serde_json::from_slice(&bytes).map_err(|error| Error::Json {
        path: path.to_path_buf(),
        line: error.line(),
        column: error.column(),
        message: message(&error),
    })
}

/// What a JSON error says, without the place that serde_json adds at its end; it can quote the file, so it is cut as a name would be.
pub(crate) fn message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = text.strip_suffix(&place).unwrap_or(&text);
    match message.char_indices().nth(400) {
        Some((cut, _)) => format!("{}…", &message[..cut]),
        None => message.to_owned(),
    }
}

/// JSON as Python mmgp puts it into a header's metadata: base64 of the text, under a key that ends in
/// `_base64`.
pub fn base64_json(value: &serde_json::Value) -> String {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    BASE64_STANDARD.encode(value.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    #[test]
    fn errors_carry_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, "{\n  \"layers\": \"19\"\n}").unwrap();
        let error = read_json::<std::collections::BTreeMap<String, u32>>(&path).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("config.json:2:"), "{message}");
        assert!(message.ends_with("expected u32"), "{message}");
        fs::write(&path, "{\"layers\": 19}").unwrap();
        let config: std::collections::BTreeMap<String, u32> = read_json(&path).unwrap();
        assert_eq!(config["layers"], 19);
        assert!(matches!(read_json::<u8>(dir.path().join("none.json")), Err(Error::Io { .. })));
    }

    #[test]
    fn giants_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::File::create(&path).unwrap().set_len(MAX_JSON + 1).unwrap();
        assert!(matches!(read_json::<u8>(&path), Err(Error::TooLarge { .. })));
    }
}
