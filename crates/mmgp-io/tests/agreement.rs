//! We and the reference implementation read each other's files, and agree on damaged ones: what we accept, it accepts, and sees the
//! same ranges.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::fs;

use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView as TheirView;

type Tensor = (TensorSpec, Vec<u8>);

fn tensor(name: String) -> impl Strategy<Value = Tensor> {
    let shape = prop::collection::vec(0usize..5, 0..4);
    (prop::sample::select(Dtype::ALL.to_vec()), shape, any::<u64>()).prop_map(
        move |(dtype, mut shape, seed)| {
            let mut spec = TensorSpec::new(name.clone(), dtype, shape.clone());
            if spec.bytes().is_none() {
                // Four of the packed ones always fill whole bytes.
                shape.push(4);
                spec.shape = shape;
            }
            let len = spec.bytes().unwrap();
            let bytes = (0..len).map(|i| (seed.wrapping_mul(i + 1) >> 13) as u8).collect();
            (spec, bytes)
        },
    )
}

fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let names = prop::collection::btree_set("[a-z.\\\\\"é \u{1}]{0,12}", 0..8);
    names
        .prop_map(|names| names.into_iter().map(tensor).collect::<Vec<_>>())
        .prop_flat_map(|tensors| tensors)
        .prop_shuffle()
}

fn metadata() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(any::<String>(), any::<String>(), 0..4)
}

fn their_dtype(dtype: Dtype) -> safetensors::Dtype {
    serde_json::from_value(serde_json::Value::String(dtype.to_string())).unwrap()
}

/// Each tensor of `checkpoint` is what the reference sees in the same bytes.
fn same(checkpoint: &Checkpoint, bytes: &[u8]) {
    let theirs = SafeTensors::deserialize(bytes).expect("accepted by us alone");
    assert_eq!(checkpoint.len(), theirs.len());
    for ours in checkpoint.iter() {
        let theirs = theirs.tensor(ours.name()).unwrap();
        assert_eq!(their_dtype(ours.dtype()), theirs.dtype());
        assert_eq!(ours.shape(), theirs.shape());
        let start = theirs.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(ours.range(), start as u64..(start + theirs.data().len()) as u64);
        assert_eq!(ours.bytes(), theirs.data());
        let mut read = vec![0; ours.len() as usize];
        ours.read_into(0, &mut read).unwrap();
        assert_eq!(read, theirs.data());
    }
}

fn written_by_us(
    tensors: &[Tensor],
    metadata: &BTreeMap<String, String>,
    chunk: usize,
) -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(&path, &specs, metadata, Overwrite::No).unwrap();
    for (spec, bytes) in tensors {
        for piece in bytes.chunks(chunk) {
            writer.write(&spec.name, piece).unwrap();
        }
    }
    writer.finish().unwrap();
    let bytes = fs::read(&path).unwrap();
    (dir, bytes)
}

fn check(checkpoint: &Checkpoint, tensors: &[Tensor], metadata: &BTreeMap<String, String>) {
    assert_eq!(checkpoint.len(), tensors.len());
    assert_eq!(checkpoint.metadata(), metadata);
    for (spec, bytes) in tensors {
        let view = checkpoint.tensor(&spec.name).unwrap();
        assert_eq!(&TensorSpec::from(view), spec);
        assert_eq!(view.bytes(), bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ours_reads_back(tensors in tensors(), metadata in metadata(), chunk in 1usize..40) {
        let (dir, bytes) = written_by_us(&tensors, &metadata, chunk);
        prop_assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
        let checkpoint = Checkpoint::open(dir.path().join("t.safetensors")).unwrap();
        check(&checkpoint, &tensors, &metadata);
        same(&checkpoint, &bytes);
    }

    #[test]
    fn theirs_reads_back(tensors in tensors(), metadata in metadata()) {
        let views = tensors.iter().map(|(spec, bytes)| {
            (spec.name.as_str(), TheirView::new(their_dtype(spec.dtype), spec.shape.clone(), bytes).unwrap())
        });
        // Given an empty map and no tensors, the reference writes what it cannot read itself.
        let theirs = Some(metadata.clone().into_iter().collect::<HashMap<_, _>>()).filter(|map| !map.is_empty());
        let bytes = safetensors::serialize(views, theirs).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        fs::write(&path, &bytes).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        check(&checkpoint, &tensors, &metadata);
        same(&checkpoint, &bytes);
    }
}

#[derive(Clone, Debug)]
enum Damage {
    Set(prop::sample::Index, u8),
    /// A byte that JSON cares about, in the header.
    Syntax(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Repeat(prop::sample::Index, usize),
    Truncate(prop::sample::Index),
    Extend(u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    let syntax = prop::sample::select(b"0123456789{}[]\":, ".to_vec());
    prop_oneof![
        1 => (index(), any::<u8>()).prop_map(|(i, b)| Damage::Set(i, b)),
        4 => (index(), syntax).prop_map(|(i, b)| Damage::Syntax(i, b)),
        1 => index().prop_map(Damage::Remove),
        1 => (index(), 1usize..40).prop_map(|(i, n)| Damage::Repeat(i, n)),
        1 => index().prop_map(Damage::Truncate),
        1 => any::<u8>().prop_map(Damage::Extend),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    if bytes.is_empty() {
        return;
    }
    match damage {
        Damage::Set(i, b) => {
            let i = i.index(bytes.len());
            bytes[i] = *b;
        }
        Damage::Syntax(i, b) if bytes.len() > 8 => {
            let i = 8 + i.index(bytes.len() - 8);
            bytes[i] = *b;
        }
        Damage::Remove(i) => {
            bytes.remove(i.index(bytes.len()));
        }
        Damage::Repeat(i, n) => {
            let i = i.index(bytes.len());
            let piece = bytes[i..(i + n).min(bytes.len())].to_vec();
            bytes.splice(i..i, piece);
        }
        Damage::Truncate(i) => bytes.truncate(i.index(bytes.len())),
        Damage::Extend(b) => bytes.push(*b),
        Damage::Syntax(..) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic_and_never_disagree(
        tensors in tensors(),
        damages in prop::collection::vec(damage(), 1..4),
        fix_length in any::<bool>(),
    ) {
        let views = tensors.iter().map(|(spec, bytes)| {
            (spec.name.as_str(), TheirView::new(their_dtype(spec.dtype), spec.shape.clone(), bytes).unwrap())
        });
        let mut bytes = safetensors::serialize(views, None).unwrap();
        let (old, header) = (bytes.len(), u64::from_le_bytes(bytes[..8].try_into().unwrap()));
        for damage in &damages {
            apply(&mut bytes, damage);
        }
        if fix_length && bytes.len() >= 8 {
            // The header grows or shrinks with the file, so that damage reaches what lies behind its length.
            let length = (header + bytes.len() as u64).saturating_sub(old as u64);
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        fs::write(&path, &bytes).unwrap();
        match Checkpoint::open(&path) {
            Ok(checkpoint) => same(&checkpoint, &bytes),
            Err(error) => prop_assert!(error.to_string().contains("t.safetensors")),
        }
    }
}
