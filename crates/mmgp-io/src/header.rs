//! Reads and validates the header of a safetensors file.
//!
//! A file is an 8 byte little-endian length, that many bytes of JSON, and the tensors back to back
//! (<https://github.com/huggingface/safetensors#format>). Everything is checked before anyone sees a tensor: the JSON as it
//! streams by (duplicate names, unknown dtypes, sizes), then the ranges together (overlaps, holes, trailing bytes). What this reader accepts, the
//! reference implementation accepts and reads alike. Nothing is allocated because a number in the file asks for it: memory is
//! bounded by the header bytes that are really there.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::de::{
    DeserializeSeed, Deserializer as _, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::dtype::{self, Dtype};
use crate::error::{Fault, Quoted, Result};
use crate::mapped::SourceFile;

/// The longest header that is read, in bytes: the reference implementation's limit.
pub(crate) const MAX_HEADER: u64 = 100_000_000;
/// The name under which a header keeps its metadata.
pub(crate) const METADATA: &str = "__metadata__";
/// The most dimensions a tensor may have; without a limit, two bytes of header would become eight of memory.
const MAX_RANK: usize = 64;
const PREFIX: u64 = 8;
const DAMAGED: &str =
    "the file is damaged or was not written by a safetensors writer: download or convert it again";

/// A tensor as the header describes it, validated.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Arc<str>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Box<[usize]>,
    pub(crate) elements: u64,
    /// Absolute in the file.
    pub(crate) range: Range<u64>,
}

/// A validated header.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of the bytes.
    pub(crate) entries: Vec<Entry>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Reads the header of `file` by positioned reads (never through the map, which may have lost its pages) and checks all of it.
pub(crate) fn read(file: &SourceFile) -> Result<Header> {
    let path = file.path();
    if file.len() < PREFIX {
        return Err(Fault::new(
            path,
            "a safetensors file, whose first 8 bytes are the header's length",
            format!("{} bytes in all", file.len()),
            DAMAGED,
        )
        .at(0)
        .into());
    }
    let mut prefix = [0u8; PREFIX as usize];
    file.read_exact_at(&mut prefix, 0)?;
    let announced = u64::from_le_bytes(prefix);
    let remedy = what_it_is(prefix).unwrap_or(DAMAGED);
    if announced > MAX_HEADER {
        return Err(Fault::new(
            path,
            format!("a header of at most {MAX_HEADER} bytes"),
            format!("{announced} bytes announced"),
            remedy,
        )
        .at(0)
        .into());
    }
    let room = file.len() - PREFIX;
    if announced > room {
        return Err(Fault::new(
            path,
            format!("a header inside the {room} bytes that follow"),
            format!("{announced} bytes announced"),
            remedy,
        )
        .at(0)
        .into());
    }
    // At most MAX_HEADER, and no more than the file really has.
    let mut bytes = vec![0u8; announced as usize];
    file.read_exact_at(&mut bytes, PREFIX)?;
    parse(path, &bytes, file.len())
}

/// Parses and checks the header `bytes` of a file that is `file_len` bytes long; `path` is for messages.
fn parse(path: &Path, bytes: &[u8], file_len: u64) -> Result<Header> {
    let json = std::str::from_utf8(bytes).map_err(|e| {
        Fault::new(path, "a header in UTF-8", "bytes that are not", DAMAGED)
            .at(PREFIX + e.valid_up_to() as u64)
    })?;
    if !json.starts_with('{') {
        let found = json.chars().next().map_or("an empty header".into(), |c| format!("{c:?}"));
        return Err(Fault::new(path, "a header that begins with `{`", found, DAMAGED)
            .at(PREFIX)
            .into());
    }
    let data_start = PREFIX + bytes.len() as u64;
    let mut state =
        State { data_start, data_len: file_len - data_start, current: None, fault: None };
    let mut json_reader = serde_json::Deserializer::from_str(json);
    let parsed = (&mut json_reader)
        .deserialize_map(HeaderVisitor { state: &mut state })
        .and_then(|header| json_reader.end().map(|()| header));
    let (entries, metadata) = parsed.map_err(|error| {
        let offset = PREFIX + offset_of(json, error.line(), error.column());
        let (expected, found) = state
            .fault
            .take()
            .unwrap_or_else(|| ("a valid header".into(), crate::json::message(&error)));
        let mut fault = Fault::new(path, expected, found, DAMAGED).at(offset);
        fault.tensor = state.current.take();
        fault
    })?;
    let mut entries: Vec<Entry> = entries.into_values().collect();
    entries.sort_by(|a, b| {
        (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name))
    });
    check_layout(path, &entries, data_start, file_len)?;
    Ok(Header { entries, metadata })
}

/// The ranges, sorted, must cover the data exactly: no overlap, no hole, nothing behind the last.
fn check_layout(path: &Path, entries: &[Entry], data_start: u64, file_len: u64) -> Result<()> {
    let mut end = data_start;
    let mut before = "the header";
    for entry in entries {
        let start = entry.range.start;
        if start != end {
            let what = if start < end { "an overlap" } else { "a hole" };
            return Err(Fault::new(
                path,
                format!("its data at byte {end}, where `{}` ends", Quoted(before)),
                format!("{what}: it starts at byte {start}"),
                DAMAGED,
            )
            .tensor(&*entry.name)
            .at(start)
            .into());
        }
        end = entry.range.end;
        before = &entry.name;
    }
    if end != file_len {
        return Err(Fault::new(
            path,
            format!("the end of the file at byte {end}, where `{}` ends", Quoted(before)),
            format!("{} trailing bytes", file_len - end),
            DAMAGED,
        )
        .at(end)
        .into());
    }
    Ok(())
}

/// What the first bytes say about a file that is no safetensors file, as advice.
fn what_it_is(prefix: [u8; 8]) -> Option<&'static str> {
    if prefix == *b"version " {
        Some("this is a Git LFS pointer, not the file: fetch the file itself (`git lfs pull`)")
    } else if prefix.starts_with(b"PK\x03\x04") || prefix.starts_with(b"\x80\x02\x8a\x0a") {
        Some(
            "this is a PyTorch pickle, which can run code and is not read: convert it to safetensors",
        )
    } else if prefix.starts_with(b"GGUF") {
        Some("this is a GGUF file, not a safetensors file")
    } else if prefix.starts_with(b"<") && (prefix[1] == b'!' || prefix[1].is_ascii_alphabetic()) {
        Some("this looks like a web page that was saved instead of the file: download it again")
    } else {
        None
    }
}

/// Bytes from the start of `json` to a line and column (both from 1) of it.
fn offset_of(json: &str, line: usize, column: usize) -> u64 {
    let line_start: usize =
        json.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (line_start + column.saturating_sub(1)).min(json.len()) as u64
}

/// What the visitors share: where the data lies, and what went wrong in more words than a serde error holds.
struct State {
    data_start: u64,
    data_len: u64,
    current: Option<String>,
    fault: Option<(String, String)>,
}

impl State {
    fn refuse<E: serde::de::Error>(
        &mut self,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> E {
        self.fault = Some((expected.into(), found.into()));
        E::custom("refused")
    }
}

struct HeaderVisitor<'a> {
    state: &'a mut State,
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = (BTreeMap<Arc<str>, Entry>, BTreeMap<String, String>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let state = self.state;
        let mut entries = BTreeMap::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                if metadata.is_some() {
                    return Err(state.refuse("one `__metadata__`", "a second one"));
                }
                metadata = Some(map.next_value_seed(MetadataSeed { state })?);
                continue;
            }
            state.current = Some(name.clone());
            let name: Arc<str> = name.into();
            if entries.contains_key(&name) {
                return Err(state.refuse("every name once", "a second tensor of this name"));
            }
            let entry = map.next_value_seed(TensorSeed { state, name: Arc::clone(&name) })?;
            entries.insert(name, entry);
            state.current = None;
        }
        Ok((entries, metadata.unwrap_or_default()))
    }
}

struct MetadataSeed<'a> {
    state: &'a mut State,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: serde::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__` to be an object of strings")
    }

    // The reference reader takes `null` for "none".
    fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if metadata.contains_key(&key) {
                return Err(self
                    .state
                    .refuse("every metadata key once", format!("`{}` again", Quoted(&key))));
            }
            let value = map.next_value::<String>().inspect_err(|error| {
                self.state.fault = Some((
                    format!("a string as value of the metadata key `{}`", Quoted(&key)),
                    Quoted(&error.to_string()).to_string(),
                ));
            })?;
            metadata.insert(key, value);
        }
        Ok(metadata)
    }
}

struct TensorSeed<'a> {
    state: &'a mut State,
    name: Arc<str>,
}

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = Entry;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Entry, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let repeated = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => shape.replace(map.next_value_seed(ShapeSeed)?).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                _ => map.next_value::<IgnoredAny>().map(|_| false)?,
            };
            if repeated {
                return Err(self.state.refuse(format!("one `{}`", Quoted(&key)), "a second one"));
            }
        }
        let dtype = dtype.ok_or_else(|| A::Error::missing_field("dtype"))?;
        let shape = shape.ok_or_else(|| A::Error::missing_field("shape"))?;
        let offsets = offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        check_tensor(self.state, self.name, &dtype, shape, offsets)
    }
}

/// Checks one tensor on its own: dtype, size, and that its range lies inside the data.
fn check_tensor<E: serde::de::Error>(
    state: &mut State,
    name: Arc<str>,
    dtype: &str,
    shape: Vec<usize>,
    (start, end): (u64, u64),
) -> Result<Entry, E> {
    let Ok(dtype) = dtype.parse::<Dtype>() else {
        let known = Dtype::ALL.map(Dtype::name).join(", ");
        return Err(state.refuse(format!("a dtype of {known}"), format!("`{}`", Quoted(dtype))));
    };
    let Some(elements) = dtype::elements(&shape) else {
        return Err(state.refuse("a shape whose product fits 64 bits", format!("{shape:?}")));
    };
    let Some(bytes) = dtype.bytes_for(elements) else {
        return Err(state.refuse(
            format!("a shape that takes a whole number of bytes, below 2^61, in {dtype}"),
            format!("{shape:?}"),
        ));
    };
    if start > end {
        return Err(state
            .refuse("data_offsets that run forward", format!("reversed ones, [{start}, {end}]")));
    }
    if end > state.data_len {
        return Err(state.refuse(
            format!("data_offsets inside the {} bytes of data", state.data_len),
            format!("out of range ones, [{start}, {end}]"),
        ));
    }
    if end - start != bytes {
        return Err(state.refuse(
            format!("{bytes} bytes for {dtype} {shape:?}"),
            format!("{} bytes, data_offsets [{start}, {end}]", end - start),
        ));
    }
    Ok(Entry {
        name,
        dtype,
        shape: shape.into(),
        elements,
        range: state.data_start + start..state.data_start + end,
    })
}

/// A shape of bounded rank.
struct ShapeSeed;

impl<'de> DeserializeSeed<'de> for ShapeSeed {
    type Value = Vec<usize>;

    fn deserialize<D: serde::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed {
    type Value = Vec<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a shape: an array of at most {MAX_RANK} sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = seq.next_element::<usize>()? {
            if shape.len() == MAX_RANK {
                return Err(A::Error::custom(format_args!("more than {MAX_RANK} dimensions")));
            }
            shape.push(dim);
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::Error;

    fn fault(json: &str, data_len: usize) -> Fault {
        let file_len = PREFIX + (json.len() + data_len) as u64;
        match parse(Path::new("f"), json.as_bytes(), file_len).unwrap_err() {
            Error::Malformed(fault) => *fault,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn entries_come_in_the_order_of_their_bytes() {
        let json = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"b":{"dtype":"I16","shape":[],"data_offsets":[0,2]}}"#;
        let start = PREFIX + json.len() as u64;
        let header = parse(Path::new("f"), json.as_bytes(), start + 3).unwrap();
        let found: Vec<_> = header.entries.iter().map(|e| (&*e.name, e.range.clone())).collect();
        assert_eq!(found, [("b", start..start + 2), ("a", start + 2..start + 3)]);
    }

    #[test]
    fn offsets_of_faults_are_absolute_on_every_line() {
        assert_eq!((offset_of("ab\ncd", 1, 1), offset_of("ab\ncd", 2, 2)), (0, 4));
        // serde_json names no place at all in some cases; the header's start is the next best.
        assert_eq!((offset_of("ab", 0, 0), offset_of("ab", 1, 99)), (0, 2));
        let one = fault(r#"{"a" 1}"#, 0);
        let two = fault("{\n\"a\" 1}", 0);
        assert_eq!((one.offset, two.offset), (Some(PREFIX + 5), Some(PREFIX + 6)));
    }

    #[test]
    fn a_fault_of_the_layout_is_at_the_data() {
        let json = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        let fault = fault(json, 2);
        assert_eq!(fault.tensor.as_deref(), Some("a"));
        assert_eq!(fault.offset, Some(PREFIX + json.len() as u64 + 1));
    }

    #[test]
    fn advice_is_for_other_kinds_of_files_only() {
        assert!(what_it_is(*b"version ").is_some());
        assert!(what_it_is(640u64.to_le_bytes()).is_none());
    }
}
