//! Writes a checkpoint in shards with an index, as transformers and diffusers name and read them.
//!
//! All shards are complete, under temporary names, before the first gets its own, and the index comes last: a failure while writing
//! leaves nothing, one among the renames leaves whole shards without their index, never an index without its shards.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Fault, Result};
use crate::index::is_plain_name;
use crate::writer::{Overwrite, Sealed, TensorSpec, Writer, plan};

/// How [`write_sharded_with`] splits, describes and places a checkpoint.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// The most tensor bytes in one file; a tensor that is larger gets a file of its own.
    pub max_shard_bytes: u64,
    /// The `__metadata__` of every shard.
    pub metadata: BTreeMap<String, String>,
    /// Whether files of these names may be replaced.
    pub overwrite: Overwrite,
}

/// Writes `{stem}-0000N-of-0000M.safetensors` and `{stem}.safetensors.index.json` into `dir`, or `{stem}.safetensors` alone if all of it
/// fits one shard; with `format=pt` as metadata, over no existing file. Returns the path to open. See [`write_sharded_with`].
///
/// # Errors
/// As [`write_sharded_with`].
pub fn write_sharded(
    dir: impl AsRef<Path>,
    stem: &str,
    specs: &[TensorSpec],
    max_shard_bytes: u64,
    fill: impl FnMut(&TensorSpec, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<PathBuf> {
    let options = ShardOptions {
        max_shard_bytes,
        metadata: BTreeMap::from([("format".into(), "pt".into())]),
        overwrite: Overwrite::No,
    };
    write_sharded_with(dir, stem, specs, &options, fill)
}

/// Writes a checkpoint in shards, cut between tensors in the order given. `fill` is called once for each tensor, in that order, and passes
/// its bytes on in pieces of any size. Returns the path to open: the index, or the only file.
///
/// With [`Overwrite::Yes`] this replaces the checkpoint `stem`: a `{stem}.safetensors` beside a new index, or an index beside a new
/// `{stem}.safetensors`, is removed, for a reader could take it for the new one.
///
/// # Errors
/// As [`Writer::create`], [`Writer::write`] and [`Writer::finish`], whatever `fill` returns, [`Error::Malformed`] if `stem` is not a
/// plain file name, and [`Error::Exists`] for any file that must not be replaced.
pub fn write_sharded_with(
    dir: impl AsRef<Path>,
    stem: &str,
    specs: &[TensorSpec],
    options: &ShardOptions,
    mut fill: impl FnMut(&TensorSpec, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<PathBuf> {
    let dir = dir.as_ref();
    if !is_plain_name(stem) {
        return Err(Fault::new(
            dir,
            "a plain file name as stem",
            format!("`{stem}`"),
            "name the folder apart from the stem",
        )
        .into());
    }
    let single = dir.join(format!("{stem}.safetensors"));
    let index = dir.join(format!("{stem}.safetensors.index.json"));
    let plan = plan(&index, specs)?;
    let shards = cut(&plan, options.max_shard_bytes);
    let names: Vec<String> = match shards.len() {
        1 => vec![format!("{stem}.safetensors")],
        n => (1..=n).map(|i| format!("{stem}-{i:05}-of-{n:05}.safetensors")).collect(),
    };
    let (opened, stale) = if shards.len() == 1 { (single, index) } else { (index, single) };
    if options.overwrite == Overwrite::No {
        let shards = names.iter().map(|name| dir.join(name));
        if let Some(path) = shards
            .chain([opened.clone(), stale.clone()])
            .find(|path| path.symlink_metadata().is_ok())
        {
            return Err(Error::Exists { path });
        }
    }

    let mut sealed = Vec::with_capacity(shards.len() + 1);
    let mut specs_left = specs;
    for (count, name) in shards.iter().zip(&names) {
        let (mine, rest) = specs_left.split_at(*count);
        specs_left = rest;
        let mut writer =
            Writer::create(dir.join(name), mine, &options.metadata, options.overwrite)?;
        for spec in mine {
            fill(spec, &mut |bytes| writer.write(&spec.name, bytes))?;
        }
        sealed.push(writer.seal()?);
    }
    if shards.len() > 1 {
        let json = index_json(&opened, &plan, &shards, &names)?;
        sealed.push(Sealed::from_bytes(&opened, &json, options.overwrite)?);
    }
    for file in sealed {
        file.publish()?;
    }
    match fs::remove_file(&stale) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(&stale, "remove the replaced checkpoint", e))
        }
        _ => Ok(opened),
    }
}

/// How many tensors go into each shard: as many as fit, in order, at least one shard.
fn cut(plan: &[(String, u64)], max: u64) -> Vec<usize> {
    let mut counts = vec![0usize];
    let mut used = 0u64;
    for (_, len) in plan {
        let last = counts.len() - 1;
        if counts[last] > 0 && used.saturating_add(*len) > max {
            counts.push(1);
            used = *len;
        } else {
            counts[last] += 1;
            used = used.saturating_add(*len);
        }
    }
    counts
}

fn index_json(
    path: &Path,
    plan: &[(String, u64)],
    shards: &[usize],
    names: &[String],
) -> Result<Vec<u8>> {
    let files =
        shards.iter().zip(names).flat_map(|(count, name)| std::iter::repeat_n(name, *count));
    let weight_map: BTreeMap<&str, &str> = plan
        .iter()
        .zip(files)
        .map(|((tensor, _), file)| (tensor.as_str(), file.as_str()))
        .collect();
    let total_size: u64 = plan.iter().map(|(_, len)| len).sum();
    let index =
        serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    serde_json::to_vec_pretty(&index).map_err(|e| Error::io(path, "write the index", e.into()))
}
