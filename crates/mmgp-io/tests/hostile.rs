//! Every way a file can be wrong, each as its own small file: none is opened, none panics, and the message names the place.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use mmgp_io::{Checkpoint, Error};
use tempfile::TempDir;

/// A safetensors file of a header and data, as they are.
fn file(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

fn open(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("w.safetensors");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path)
}

/// The file is refused with a message that names it and holds all of `parts`.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    says(open(bytes), &[&["w.safetensors"], parts].concat());
}

#[track_caller]
fn says(result: Result<Checkpoint, Error>, parts: &[&str]) {
    let message = result.expect_err("must be refused").to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// One tensor `a` with these fields, over four bytes of data.
#[track_caller]
fn tensor_refused(fields: &str, parts: &[&str]) {
    refused(&file(format!("{{\"a\":{{{fields}}}}}"), &[0; 4]), &[&["tensor `a`"], parts].concat());
}

#[test]
fn accepts_what_the_format_allows() {
    // A scalar, tensors without bytes, an unknown field, metadata, spaces behind the JSON, names in any order.
    let header = r#"{"z":{"dtype":"F32","shape":[],"data_offsets":[0,4],"note":[1,{}]},
        "e":{"dtype":"BF16","shape":[0,7],"data_offsets":[4,4]},"__metadata__":{"format":"pt"},
        "b":{"dtype":"F4","shape":[2,2],"data_offsets":[4,6]}}      "#;
    let checkpoint = open(&file(header, &[1, 2, 3, 4, 5, 6])).unwrap();
    assert_eq!(checkpoint.iter().map(|t| t.name()).collect::<Vec<_>>(), ["b", "e", "z"]);
    assert_eq!(checkpoint.tensor("z").unwrap().bytes(), [1, 2, 3, 4]);
    assert_eq!(checkpoint.tensor("z").unwrap().elements(), 1);
    assert!(checkpoint.tensor("e").unwrap().is_empty());
    assert_eq!(checkpoint.tensor("b").unwrap().bytes(), [5, 6]);
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert_eq!(checkpoint.bytes(), 6);
    assert!(open(&file("{}", &[])).unwrap().is_empty());
    assert!(open(&file(r#"{"__metadata__":null}"#, &[])).unwrap().metadata().is_empty());
}

#[test]
fn shorter_than_its_length_field() {
    refused(&[], &["at byte 0", "0 bytes in all"]);
    refused(&[1, 0, 0, 0, 0, 0, 0], &["at byte 0", "7 bytes in all"]);
}

#[test]
fn header_length_of_2_to_63_and_more() {
    for length in [1u64 << 63, u64::MAX] {
        let bytes = [&length.to_le_bytes()[..], b"{}"].concat();
        refused(&bytes, &["at byte 0", &format!("{length} bytes announced")]);
    }
}

#[test]
fn header_beyond_the_file() {
    let bytes = [&3u64.to_le_bytes()[..], b"{}"].concat();
    refused(&bytes, &["at byte 0", "inside the 2 bytes that follow", "3 bytes announced"]);
}

#[test]
fn header_of_more_than_100_mb() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("w.safetensors");
    fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
    says(
        Checkpoint::open(&path),
        &["w.safetensors", "at most 100000000", "100000001 bytes announced"],
    );
}

#[test]
fn header_that_is_no_utf8() {
    refused(&file(b"{\"\xff\":1}", &[]), &["at byte 10", "UTF-8"]);
}

#[test]
fn header_that_is_no_json() {
    refused(&file("{\"a\":", &[]), &["valid header", "EOF", "tensor `a`"]);
    refused(&file("", &[]), &["at byte 8", "empty header"]);
    refused(&file("[1]", &[]), &["begins with `{`", "'['"]);
    refused(&file(" {}", &[]), &["begins with `{`", "' '"]);
    refused(&file("{} x", &[]), &["at byte 11", "trailing characters"]);
    refused(&file("{}\0", &[]), &["at byte 10", "trailing characters"]);
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    refused(&file(&deep, &[]), &["tensor `a`"]);
    let deep = format!("{{\"a\":{{\"x\":{}", "[".repeat(100_000));
    refused(&file(&deep, &[]), &["tensor `a`"]);
}

#[test]
fn duplicate_names() {
    let a = r#""a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
    refused(&file(format!("{{{a},{a}}}"), &[0; 2]), &["tensor `a`", "second tensor of this name"]);
    // The same name in other letters of the JSON.
    let escaped = r#""\u0061":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}"#;
    refused(
        &file(format!("{{{a},{escaped}}}"), &[0; 4]),
        &["tensor `a`", "second tensor of this name"],
    );
    refused(&file(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), &["one `__metadata__`"]);
}

#[test]
fn unknown_dtypes() {
    let fields = |dtype| format!(r#""dtype":"{dtype}","shape":[4],"data_offsets":[0,4]"#);
    tensor_refused(&fields("Q8"), &["`Q8`", "BF16, F32", "at byte"]);
    tensor_refused(&fields("u8"), &["`u8`"]);
    tensor_refused(&fields("F8_E4M3FNUZ"), &["`F8_E4M3FNUZ`"]);
    tensor_refused(r#""dtype":5,"shape":[4],"data_offsets":[0,4]"#, &["expected a string"]);
}

#[test]
fn shapes_that_overflow() {
    let big = 1u64 << 40;
    tensor_refused(
        &format!(r#""dtype":"U8","shape":[{big},{big}],"data_offsets":[0,4]"#),
        &["product", "1099511627776"],
    );
    tensor_refused(
        &format!(r#""dtype":"U8","shape":[{big},{big},0],"data_offsets":[0,0]"#),
        &["product"],
    );
    tensor_refused(
        &format!(r#""dtype":"F64","shape":[{}],"data_offsets":[0,4]"#, 1u64 << 61),
        &["below 2^61, in F64"],
    );
    tensor_refused(r#""dtype":"U8","shape":[-4],"data_offsets":[0,4]"#, &["-4"]);
    tensor_refused(r#""dtype":"U8","shape":[4.0],"data_offsets":[0,4]"#, &["4.0"]);
    tensor_refused(
        r#""dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,4]"#,
        &["floating point"],
    );
    let ranks = vec!["1"; 65].join(",");
    tensor_refused(
        &format!(r#""dtype":"U8","shape":[4,{ranks}],"data_offsets":[0,4]"#),
        &["more than 64 dimensions"],
    );
}

#[test]
fn sizes_that_do_not_match() {
    tensor_refused(
        r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#,
        &["8 bytes for F32 [2]", "4 bytes"],
    );
    tensor_refused(
        r#""dtype":"U8","shape":[2],"data_offsets":[0,4]"#,
        &["2 bytes for U8 [2]", "4 bytes"],
    );
    tensor_refused(
        r#""dtype":"F4","shape":[7],"data_offsets":[0,4]"#,
        &["whole number of bytes", "[7]"],
    );
}

#[test]
fn offsets_that_are_wrong() {
    tensor_refused(r#""dtype":"U8","shape":[4],"data_offsets":[4,0]"#, &["reversed", "[4, 0]"]);
    tensor_refused(
        r#""dtype":"U8","shape":[5],"data_offsets":[0,5]"#,
        &["inside the 4 bytes", "out of range", "[0, 5]"],
    );
    let max = u64::MAX;
    tensor_refused(
        &format!(r#""dtype":"U8","shape":[4],"data_offsets":[{},{max}]"#, max - 4),
        &["out of range"],
    );
    tensor_refused(r#""dtype":"U8","shape":[4],"data_offsets":[0]"#, &["invalid length 1"]);
    tensor_refused(r#""dtype":"U8","shape":[4],"data_offsets":[0,4,4]"#, &["at byte"]);
}

#[test]
fn overlaps_holes_and_trailing_bytes() {
    let two = |first: [u64; 2], second: [u64; 2], data: &[u8]| {
        let fields = |[start, end]: [u64; 2]| {
            format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{start},{end}]}}"#, end - start)
        };
        file(format!(r#"{{"a":{},"b":{}}}"#, fields(first), fields(second)), data)
    };
    assert_eq!(open(&two([2, 4], [0, 2], &[0; 4])).unwrap().len(), 2);
    refused(&two([0, 3], [2, 4], &[0; 4]), &["tensor `b`", "an overlap", "where `a` ends"]);
    refused(&two([0, 4], [0, 4], &[0; 4]), &["tensor `b`", "an overlap"]);
    refused(&two([0, 4], [2, 2], &[0; 4]), &["tensor `b`", "an overlap"]);
    refused(&two([0, 1], [2, 4], &[0; 4]), &["tensor `b`", "a hole", "where `a` ends"]);
    refused(&two([1, 2], [2, 4], &[0; 4]), &["tensor `a`", "a hole", "where `the header` ends"]);
    refused(&two([0, 2], [2, 4], &[0; 7]), &["3 trailing bytes", "where `b` ends"]);
    refused(&file("{}", &[0]), &["1 trailing bytes"]);
}

#[test]
fn metadata_that_is_not_strings() {
    refused(&file(r#"{"__metadata__":{"n":5}}"#, &[]), &["metadata key `n`", "integer `5`"]);
    refused(&file(r#"{"__metadata__":{"n":{}}}"#, &[]), &["metadata key `n`", "map"]);
    refused(&file(r#"{"__metadata__":"x"}"#, &[]), &["__metadata__", "string \"x\""]);
    refused(
        &file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, &[]),
        &["metadata key once", "`k` again"],
    );
}

#[test]
fn fields_that_are_missing_or_twice() {
    tensor_refused(r#""shape":[4],"data_offsets":[0,4]"#, &["missing field `dtype`"]);
    tensor_refused(r#""dtype":"U8","data_offsets":[0,4]"#, &["missing field `shape`"]);
    tensor_refused(r#""dtype":"U8","shape":[4]"#, &["missing field `data_offsets`"]);
    tensor_refused(
        r#""dtype":"U8","shape":[4],"data_offsets":[0,4],"dtype":"I8""#,
        &["one `dtype`"],
    );
    refused(&file(r#"{"a":7}"#, &[]), &["tensor `a`", "integer `7`"]);
}

#[test]
fn other_kinds_of_files_are_recognized() {
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", &["Git LFS pointer"]);
    refused(b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00archive/data.pkl", &["PyTorch pickle"]);
    refused(b"GGUF\x03\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00", &["GGUF"]);
    refused(b"<!DOCTYPE html><html></html>", &["web page"]);
}

#[test]
fn names_cannot_write_to_the_terminal_nor_fill_it() {
    let a = r#""\u001b[2J":{"dtype":"U8","shape":[2],"data_offsets":[0,4]}"#;
    refused(&file(format!("{{{a}}}"), &[0; 4]), &["tensor `\\u{1b}[2J`"]);
    let long = "x".repeat(1_000_000);
    for header in [
        format!(r#"{{"{long}":{{"dtype":"U8","shape":[2],"data_offsets":[0,4]}}}}"#),
        format!(r#"{{"a":{{"dtype":"{long}","shape":[2],"data_offsets":[0,4]}}}}"#),
        format!(r#"{{"a":"{long}"}}"#),
        format!(r#"{{"__metadata__":{{"{long}":1}}}}"#),
    ] {
        assert!(open(&file(header, &[0; 4])).unwrap_err().to_string().len() < 2000);
    }
}

/// A folder with an index and shards, each shard holding one-byte tensors of the given names.
struct Shards(TempDir);

impl Shards {
    fn new(map: &[(&str, &str)], shards: &[(&str, &[&str])]) -> Self {
        let map: Vec<String> =
            map.iter().map(|(tensor, shard)| format!("{tensor:?}:{shard:?}")).collect();
        Self::with_index(
            &format!("{{\"metadata\":{{\"total_size\":1}},\"weight_map\":{{{}}}}}", map.join(",")),
            shards,
        )
    }

    fn with_index(index: &str, shards: &[(&str, &[&str])]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("m.safetensors.index.json"), index).unwrap();
        for (name, tensors) in shards {
            let fields: Vec<String> = tensors
                .iter()
                .enumerate()
                .map(|(i, tensor)| {
                    format!(
                        r#""{tensor}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#,
                        i + 1
                    )
                })
                .collect();
            fs::write(
                dir.path().join(name),
                file(format!("{{{}}}", fields.join(",")), &vec![9; tensors.len()]),
            )
            .unwrap();
        }
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("m.safetensors.index.json")
    }

    fn open(&self) -> Result<Checkpoint, Error> {
        Checkpoint::open(self.path())
    }
}

#[test]
fn an_index_and_its_shards() {
    let shards =
        Shards::new(&[("a", "1"), ("b", "2"), ("c", "1")], &[("1", &["c", "a"]), ("2", &["b"])]);
    let checkpoint = shards.open().unwrap();
    assert_eq!(checkpoint.len(), 3);
    assert_eq!(checkpoint.files().len(), 2);
    assert_eq!(checkpoint.path(), shards.path());
    assert!(checkpoint.tensor("b").unwrap().file().path().ends_with("2"));
}

#[test]
fn shards_outside_of_the_folder() {
    for name in ["../../etc/passwd", "/etc/passwd", "sub/1", "..", ".", "", "..\\1", "C:1", "./1"] {
        let escaped = name.replace('\\', "\\\\");
        says(
            Shards::new(&[("a", name)], &[]).open(),
            &["m.safetensors.index.json", "tensor `a`", &format!("`{escaped}`")],
        );
    }
}

#[test]
fn shards_that_are_missing() {
    let error = Shards::new(&[("a", "1"), ("b", "2")], &[("1", &["a"])]).open();
    assert!(matches!(&error, Err(Error::MissingShard { shard, .. }) if shard == "2"));
    says(error, &["m.safetensors.index.json", "shard `2`", "tensor `b`"]);
}

#[test]
fn tensors_the_shard_lacks() {
    let shards = Shards::new(&[("a", "1"), ("b", "1")], &[("1", &["a"])]);
    says(shards.open(), &["m.safetensors.index.json", "tensor `b`", "in `1`", "no such tensor"]);
}

#[test]
fn tensors_mapped_elsewhere() {
    let shards = Shards::new(&[("a", "1"), ("b", "2")], &[("1", &["a", "b"]), ("2", &["b"])]);
    says(
        shards.open(),
        &["1: tensor `b`", "in `2` alone", "m.safetensors.index.json maps it", "at byte"],
    );
}

#[test]
fn tensors_in_two_shards() {
    // Not in the index, so neither shard is right.
    let shards = Shards::new(&[("a", "1"), ("b", "2")], &[("1", &["a", "x"]), ("2", &["b", "x"])]);
    let error = shards.open();
    assert!(matches!(&error, Err(Error::DuplicateTensor { tensor, .. }) if tensor == "x"));

    let files: Vec<PathBuf> = ["1", "2"].map(|name| shards.0.path().join(name)).into();
    says(Checkpoint::from_files(&files), &["tensor `x`", "both in", "/1 and in", "/2;"]);
    says(Checkpoint::from_files(&[]), &["at least one file"]);
}

#[test]
fn a_damaged_shard_is_named() {
    let shards = Shards::new(&[("a", "1")], &[("1", &["a"])]);
    let path = shards.0.path().join("1");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    says(shards.open(), &["/1: tensor `a`", "out of range"]);
}

#[test]
fn an_index_that_is_none() {
    says(Shards::with_index("{", &[]).open(), &["m.safetensors.index.json:1:1", "EOF"]);
    says(
        Shards::with_index("{}", &[]).open(),
        &["m.safetensors.index.json", "missing field `weight_map`"],
    );
    says(Shards::with_index(r#"{"weight_map":{"a":1}}"#, &[]).open(), &["integer `1`"]);
    let twice = r#"{"weight_map":{"a":"1","a":"2"}}"#;
    says(Shards::with_index(twice, &[]).open(), &["tensor `a` is mapped twice"]);
}

#[test]
fn folders_say_what_was_looked_for() {
    let dir = TempDir::new().unwrap();
    let open = |dir: &Path| Checkpoint::open_dir(dir, &["diffusion_pytorch_model", "model"]);
    says(
        open(dir.path()),
        &[
            "diffusion_pytorch_model.safetensors, diffusion_pytorch_model.safetensors.index.json, diffusion_pytorch_model.fp16.safetensors",
            "model.bf16.safetensors",
            "no weight files at all",
        ],
    );
    fs::write(dir.path().join("pytorch_model.bin"), b"PK").unwrap();
    says(open(dir.path()), &["pytorch_model.bin", "pickle", "convert it to safetensors"]);
    fs::write(dir.path().join("other.safetensors"), file("{}", &[])).unwrap();
    says(open(dir.path()), &["other.safetensors", "give that path itself"]);

    // A variant, then what is preferred to it.
    fs::write(dir.path().join("model.fp16.safetensors"), file("{}", &[])).unwrap();
    assert!(open(dir.path()).unwrap().path().ends_with("model.fp16.safetensors"));
    fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map":{}}"#).unwrap();
    assert!(open(dir.path()).unwrap().path().ends_with("model.safetensors.index.json"));
    fs::write(dir.path().join("model.safetensors"), file("{}", &[])).unwrap();
    assert!(open(dir.path()).unwrap().path().ends_with("model.safetensors"));

    says(open(&dir.path().join("none")), &["none", "cannot open"]);
    says(open(&dir.path().join("model.safetensors")), &["expected a model's folder"]);
}

#[test]
fn missing_tensors_come_with_the_nearest_names() {
    let names: &[&str] = &["blocks.0.attn.to_q.weight", "blocks.0.attn.to_k.weight", "norm.bias"];
    let shards = Shards::new(&[], &[("1", names)]);
    let checkpoint = Checkpoint::open(shards.0.path().join("1")).unwrap();
    let message = checkpoint.tensor("model.blocks.0.attn.to_q.weight").unwrap_err().to_string();
    assert!(message.contains("/1: no tensor `model.blocks.0.attn.to_q.weight`; the nearest names are `blocks.0.attn.to_q.weight`"), "{message}");
    let message = checkpoint.tensor("zzz").unwrap_err().to_string();
    assert!(message.contains("nor one with a name like it"), "{message}");
}

#[test]
fn reads_outside_of_a_tensor() {
    let shards = Shards::new(&[], &[("1", &["a", "b"])]);
    let checkpoint = Checkpoint::open(shards.0.path().join("1")).unwrap();
    let tensor = checkpoint.tensor("a").unwrap();
    let mut byte = [0];
    tensor.read_into(0, &mut byte).unwrap();
    assert_eq!(byte, [9]);
    tensor.read_into(1, &mut []).unwrap();
    for offset in [1, 2, u64::MAX] {
        let message = tensor.read_into(offset, &mut byte).unwrap_err().to_string();
        assert!(message.contains("tensor `a`"), "{message}");
    }
}
