//! Runs the golden vectors: small models with inputs, and outputs that other programs computed.
//!
//! `MMGP_VECTORS=DIR cargo test --release -p mmgp-models vectors` runs every case below DIR (default:
//! `vectors/` at the root of the repository), says by name what ran and what was skipped and why,
//! and fails when it finds none. Of the group `core` none may be skipped; elsewhere only the kinds
//! `lora` and `format`, where the dialect or the number format is not built yet, and such classes.

mod case;
mod classes;
mod device;
mod formats;
mod lora;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use candle_core::DType;
use case::{Case, Error};

/// What became of a case.
pub(crate) enum Outcome {
    /// Every output was compared: name and relative error.
    Ran(Vec<(String, f64)>),
    /// Why it was not run.
    Skipped(String),
}

#[test]
fn vectors() -> Result<(), Error> {
    // Cargo runs tests in the crate's folder, people type paths from the repository's.
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let root = repository.join(std::env::var_os("MMGP_VECTORS").unwrap_or("vectors".into()));
    let mut dirs = Vec::new();
    find(&root, &mut dirs)?;
    dirs.sort();
    // Not `println!`, which a passing test swallows.
    let mut out = std::io::stderr().lock();
    writeln!(out, "\nvectors below {}", root.display())?;
    let (mut ran, mut skipped, mut failed) = (0, 0, Vec::new());
    for dir in &dirs {
        let name = match dir.strip_prefix(&root) {
            Ok(name) if name != Path::new("") => name.display().to_string(),
            _ => dir.display().to_string(),
        };
        // DIR may be the group itself, or one case of it.
        let dir = &dir.canonicalize()?;
        let core = dir.parent().and_then(Path::file_name).is_some_and(|name| name == "core");
        let case = Case::open(dir);
        if device::dtype() != DType::F32 && case.as_ref().is_ok_and(|case| !case.is_model()) {
            continue;
        }
        match case.and_then(|case| classes::run(&case)) {
            Ok(Outcome::Ran(errors)) => {
                ran += 1;
                let worst = errors.iter().max_by(|a, b| a.1.total_cmp(&b.1));
                let worst =
                    worst.map_or(String::new(), |(output, e)| format!("{e:.1e} ({output})"));
                writeln!(out, "  ran      {name:<40} worst {worst}")?;
            }
            Ok(Outcome::Skipped(why)) if !core => {
                skipped += 1;
                writeln!(out, "  skipped  {name:<40} {why}")?;
            }
            Ok(Outcome::Skipped(why)) => {
                writeln!(out, "  FAILED   {name:<40} of core none may be skipped: {why}")?;
                failed.push(name);
            }
            Err(error) => {
                writeln!(out, "  FAILED   {name:<40} {error}")?;
                failed.push(name);
            }
        }
    }
    writeln!(out, "{ran} cases ran, {skipped} skipped, {} failed", failed.len())?;
    if dirs.is_empty() {
        return Err(format!("no case.json below {}", root.display()).into());
    }
    if !failed.is_empty() {
        return Err(format!("failed: {}", failed.join(", ")).into());
    }
    Ok(())
}

fn find(dir: &Path, found: &mut Vec<PathBuf>) -> Result<(), Error> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            if path.join("case.json").is_file() {
                found.push(path.clone());
            }
            find(&path, found)?;
        }
    }
    if found.is_empty() && dir.join("case.json").is_file() {
        found.push(dir.to_path_buf());
    }
    Ok(())
}
