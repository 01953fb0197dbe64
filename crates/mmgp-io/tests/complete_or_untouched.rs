//! A written file is complete or not there, and what stood there before stays until then; shards come all together.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mmgp_io::{
    Checkpoint, Dtype, Error, Overwrite, ShardOptions, TensorSpec, Writer, write_sharded,
    write_sharded_with,
};

fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("a", Dtype::U8, [3]),
        TensorSpec::new("none", Dtype::F32, [0, 4]),
        TensorSpec::new("b", Dtype::BF16, []),
    ]
}

fn create(path: &Path, overwrite: Overwrite) -> mmgp_io::Result<Writer> {
    Writer::create(path, &specs(), &BTreeMap::new(), overwrite)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn says(error: Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn order_and_completeness_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let mut writer = create(&path, Overwrite::No).unwrap();
    says(
        writer.write("b", &[1, 2]).unwrap_err(),
        &["w.safetensors", "tensor `b`", "`a`, which has 0 of its 3 bytes"],
    );
    writer.write("a", &[1, 2]).unwrap();
    says(
        writer.write("a", &[3, 4]).unwrap_err(),
        &["tensor `a`", "3 bytes in all", "2 bytes after 2"],
    );
    says(writer.write("b", &[1]).unwrap_err(), &["`a`, which has 2 of its 3 bytes"]);
    writer.write("a", &[3]).unwrap();
    // `none` has no bytes and may be left out.
    writer.write("b", &[4]).unwrap();
    says(
        writer.write("zzz", &[4]).unwrap_err(),
        &["tensor `zzz`", "`b`, which has 1 of its 2 bytes"],
    );
    writer.write("b", &[5]).unwrap();
    says(writer.write("zzz", &[4]).unwrap_err(), &["no more tensors"]);
    writer.finish().unwrap();
    assert_eq!(names(dir.path()), ["w.safetensors"]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().bytes(), [1, 2, 3]);
    assert_eq!(checkpoint.tensor("b").unwrap().bytes(), [4, 5]);
}

#[test]
fn unfinished_files_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    fs::write(&path, "old").unwrap();
    says(create(&path, Overwrite::No).unwrap_err(), &["w.safetensors", "exists already"]);

    let mut writer = create(&path, Overwrite::Yes).unwrap();
    writer.write("a", &[1, 2, 3]).unwrap();
    drop(writer);
    let mut writer = create(&path, Overwrite::Yes).unwrap();
    writer.write("a", &[1, 2, 3]).unwrap();
    says(
        writer.finish().unwrap_err(),
        &["w.safetensors", "tensor `b`", "2 bytes before the end", "0 bytes"],
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["w.safetensors"]);

    // Appeared after the writer began.
    let path = dir.path().join("v.safetensors");
    let mut writer = create(&path, Overwrite::No).unwrap();
    writer.write("a", &[1, 2, 3]).unwrap();
    writer.write("b", &[1, 2]).unwrap();
    fs::write(&path, "new").unwrap();
    assert!(matches!(writer.finish(), Err(Error::Exists { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["v.safetensors", "w.safetensors"]);
}

#[test]
fn an_open_checkpoint_outlives_its_replacement() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let write = |value: u8| {
        let mut writer = create(&path, Overwrite::Yes).unwrap();
        writer.write("a", &[value; 3]).unwrap();
        writer.write("b", &[value; 2]).unwrap();
        writer.finish().unwrap();
    };
    write(1);
    let old = Checkpoint::open(&path).unwrap();
    write(2);
    assert_eq!(old.tensor("a").unwrap().bytes(), [1; 3]);
    let new = Checkpoint::open(&path).unwrap();
    assert_eq!(new.tensor("a").unwrap().bytes(), [2; 3]);
    assert_ne!(old.files()[0].identity(), new.files()[0].identity());
}

#[test]
fn specs_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let refuse = |specs: &[TensorSpec], parts: &[&str]| {
        says(Writer::create(&path, specs, &BTreeMap::new(), Overwrite::No).unwrap_err(), parts);
    };
    let a = TensorSpec::new("a", Dtype::U8, [1]);
    refuse(&[a.clone(), a.clone()], &["w.safetensors", "tensor `a`", "second tensor"]);
    refuse(&[TensorSpec::new("__metadata__", Dtype::U8, [1])], &["reserves"]);
    refuse(&[TensorSpec::new("x", Dtype::F4, [3])], &["tensor `x`", "F4 [3]"]);
    refuse(&[TensorSpec::new("x", Dtype::U8, [usize::MAX, 2])], &["tensor `x`"]);
    let half = TensorSpec::new("x", Dtype::U8, [1 << 60]);
    let many: Vec<_> =
        (0..17).map(|i| TensorSpec { name: i.to_string(), ..half.clone() }).collect();
    refuse(&many, &["tensor `15`", "fits 64 bits"]);
    refuse(&[TensorSpec::new("x".repeat(100_000_001), Dtype::U8, [1])], &["100000000", "shards"]);
    assert!(names(dir.path()).is_empty());
    let nowhere = dir.path().join("none").join("w.safetensors");
    says(create(&nowhere, Overwrite::No).unwrap_err(), &["none/w.safetensors", "cannot create"]);
}

fn fill(
    spec: &TensorSpec,
    sink: &mut dyn FnMut(&[u8]) -> mmgp_io::Result<()>,
) -> mmgp_io::Result<()> {
    (0..spec.bytes().unwrap()).try_for_each(|i| sink(&[i as u8]))
}

fn four() -> Vec<TensorSpec> {
    [("d", 4), ("a", 6), ("c", 30), ("b", 2)]
        .map(|(name, len)| TensorSpec::new(name, Dtype::U8, [len]))
        .into()
}

#[test]
fn shards_are_cut_between_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let opened = write_sharded(dir.path(), "model", &four(), 10, fill).unwrap();
    assert_eq!(
        names(dir.path()),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    assert_eq!(opened, dir.path().join("model.safetensors.index.json"));
    let checkpoint = Checkpoint::open_dir(dir.path(), &["model"]).unwrap();
    assert_eq!((checkpoint.len(), checkpoint.bytes(), checkpoint.files().len()), (4, 42, 3));
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert!(
        checkpoint.tensor("c").unwrap().file().path().ends_with("model-00002-of-00003.safetensors")
    );
    assert_eq!(checkpoint.tensor("a").unwrap().bytes(), [0, 1, 2, 3, 4, 5]);
    let index: serde_json::Value = mmgp_io::read_json(&opened).unwrap();
    assert_eq!(index["metadata"]["total_size"], 42);

    // Nothing is replaced unless it may be; then the old checkpoint of this name does not linger.
    assert!(matches!(
        write_sharded(dir.path(), "model", &four(), 100, fill),
        Err(Error::Exists { .. })
    ));
    let options =
        ShardOptions { max_shard_bytes: 100, metadata: BTreeMap::new(), overwrite: Overwrite::Yes };
    let single = write_sharded_with(dir.path(), "model", &four(), &options, fill).unwrap();
    assert_eq!(single, dir.path().join("model.safetensors"));
    assert!(!opened.exists());
    assert_eq!(Checkpoint::open(&single).unwrap().bytes(), 42);
}

#[test]
fn a_failing_shard_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let error = write_sharded(dir.path(), "model", &four(), 10, |spec, sink| {
        if spec.name == "b" { sink(&[1]) } else { fill(spec, sink) }
    });
    says(error.unwrap_err(), &["model-00003-of-00003.safetensors", "tensor `b`", "1 bytes"]);
    assert!(names(dir.path()).is_empty());
    says(
        write_sharded(dir.path(), "../m", &four(), 10, fill).unwrap_err(),
        &["plain file name", "`../m`"],
    );
    write_sharded(dir.path(), "empty", &[], 10, fill).unwrap();
    assert!(Checkpoint::open_dir(dir.path(), &["empty"]).unwrap().is_empty());
}

#[cfg(unix)]
#[test]
fn files_are_readable_by_whom_the_umask_allows() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("plain"), "").unwrap();
    let path = dir.path().join("w.safetensors");
    Writer::create(&path, &[], &BTreeMap::new(), Overwrite::No).unwrap().finish().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&path), mode(&dir.path().join("plain")));
}

#[test]
fn data_starts_where_it_was_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aligned.safetensors");
    let specs = [TensorSpec::new("a", Dtype::U8, [300]), TensorSpec::new("b", Dtype::U8, [5])];
    let mut writer =
        Writer::create_aligned(&path, &specs, &BTreeMap::new(), Overwrite::No, 4096).unwrap();
    writer.write("a", &[1; 300]).unwrap();
    writer.write("b", &[2; 5]).unwrap();
    writer.finish().unwrap();
    let ours = Checkpoint::open(&path).unwrap();
    assert_eq!(ours.tensor("a").unwrap().range().start % 4096, 0);
    let bytes = fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("b").unwrap().data(), [2; 5]);
}

#[test]
fn the_next_run_removes_what_a_killed_one_left_but_not_what_another_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let specs = [TensorSpec::new("a", Dtype::U8, [3])];
    let stray = dir.path().join(".model.safetensors.AbC123.tmp");
    let other = dir.path().join(".models.safetensors.AbC123.tmp");
    fs::write(&stray, "half").unwrap();
    fs::write(&other, "not ours").unwrap();
    let busy = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
    assert!(!stray.exists() && other.exists());
    let mut second = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::Yes).unwrap();
    second.write("a", &[1; 3]).unwrap();
    second.finish().unwrap();
    drop(busy);
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    left.sort();
    assert_eq!(left, [other, path]);
}

#[test]
fn a_file_larger_than_the_disk_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let specs = [TensorSpec::new("a", Dtype::U8, [1 << 58])];
    let error = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::No).unwrap_err();
    assert!(error.to_string().contains("model.safetensors") && error.to_string().contains("free"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
