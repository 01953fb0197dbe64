//! A CUDA toolkit put together from Python wheels, for machines that have none.
//!
//! The CUDA code can so be built and linted where there is neither a GPU nor a driver. A folder is made beside its
//! final name and renamed at the end, with a stamp of the wheels' versions: one that lacks the stamp is replaced.
//! An installed toolkit that `CUDA_HOME` names comes first. The headers of CUTLASS, which are no part of a toolkit, get a folder
//! and a stamp of their own in the same way, unless `CUTLASS_HOME` names some.

use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::step;

/// The wheels of CUDA 13.0 that building needs; they share one folder, `nvidia/cu13`.
const WHEELS: [&str; 8] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-curand==10.4.0.35",
    "nvidia-cublas==13.1.*",
];

/// What is linked by name without a version.
const LINKED: [(&str, &str); 5] = [
    ("libcudart.so", "libcudart.so.13"),
    ("libcublas.so", "libcublas.so.13"),
    ("libcublasLt.so", "libcublasLt.so.13"),
    ("libcurand.so", "libcurand.so.10"),
    ("libnvrtc.so", "libnvrtc.so.13"),
];

/// The wheel of CUTLASS, and where it keeps its sources and its licence.
const CUTLASS: &str = "nvidia-cutlass==4.2.0.0";
const CUTLASS_SOURCE: &str = "cutlass_library/source";
const CUTLASS_LICENCE: &str = "nvidia_cutlass-4.2.0.0.dist-info/licenses/LICENSE.txt";

const STAMP: &str = "mmgp-toolkit.txt";

/// The options of `cuda-toolkit`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to put it, with CUTLASS within, instead of target/cuda-toolkit and target/cutlass; CUDA_HOME and
    /// CUTLASS_HOME are not looked at then
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where wheels are kept; those found there are not fetched again
    #[arg(long)]
    wheels: Option<PathBuf>,
}

/// A variable's name and value.
type Variable = (&'static str, OsString);

/// Makes the toolkit when it is missing and prints its environment.
pub(crate) fn run(args: &Args) -> Result<()> {
    let wheels = args.wheels.as_deref();
    let env = match &args.dir {
        Some(dir) => {
            let dir = env::current_dir()?.join(dir);
            assemble(&dir, wheels)?;
            with_cutlass(variables(&dir)?, &dir.join("cutlass"), wheels)?
        }
        None => environment_with(wheels)?,
    };
    for (name, value) in env {
        println!("export {name}='{}'", value.to_string_lossy());
    }
    Ok(())
}

/// What a cargo command that builds the CUDA code needs, the toolkit made when it is missing.
pub(crate) fn environment() -> Result<Vec<Variable>> {
    environment_with(None)
}

fn environment_with(wheels: Option<&Path>) -> Result<Vec<Variable>> {
    let named = |name| env::var_os(name).filter(|home| !home.is_empty());
    let toolkit = match named("CUDA_HOME") {
        Some(home) => variables(Path::new(&home))?,
        None => {
            let dir = step::target().join("cuda-toolkit");
            assemble(&dir, wheels)?;
            variables(&dir)?
        }
    };
    match named("CUTLASS_HOME") {
        Some(home) => Ok([toolkit, vec![("CUTLASS_HOME", home)]].concat()),
        None => with_cutlass(toolkit, &step::target().join("cutlass"), wheels),
    }
}

/// `toolkit`, and CUTLASS in `dir`, fetched when it is missing. The build goes on without it, so that it cannot be
/// fetched is told and no error.
fn with_cutlass(
    mut toolkit: Vec<Variable>,
    dir: &Path,
    wheels: Option<&Path>,
) -> Result<Vec<Variable>> {
    match cutlass(dir, wheels) {
        Ok(()) => toolkit.push(("CUTLASS_HOME", dir.into())),
        Err(why) => eprintln!("warning: going on without CUTLASS: {why:#}"),
    }
    Ok(toolkit)
}

fn variables(home: &Path) -> Result<Vec<Variable>> {
    let before = |name: &str, dirs: &[PathBuf]| {
        let old = env::var_os(name).filter(|old| !old.is_empty()).unwrap_or_default();
        let old: Vec<PathBuf> = env::split_paths(&old)
            .filter(|dir| !dir.as_os_str().is_empty() && !dirs.contains(dir))
            .collect();
        env::join_paths(dirs.iter().chain(&old))
    };
    let lib = home.join("lib64");
    Ok(vec![
        ("CUDA_HOME", home.into()),
        ("CUDA_PATH", home.into()),
        ("PATH", before("PATH", &[home.join("bin")])?),
        ("LIBRARY_PATH", before("LIBRARY_PATH", &[lib.clone(), lib.join("stubs")])?),
        ("CUDA_COMPUTE_CAP", env::var_os("CUDA_COMPUTE_CAP").unwrap_or_else(|| "80".into())),
    ])
}

fn assemble(dir: &Path, wheels: Option<&Path>) -> Result<()> {
    fetched(dir, &WHEELS, wheels, |part| {
        let made = part.join("nvidia/cu13");
        finish(&made)?;
        Ok(made)
    })
}

/// The headers alone, and their licence.
fn cutlass(dir: &Path, wheels: Option<&Path>) -> Result<()> {
    fetched(dir, &[CUTLASS], wheels, |part| {
        let made = part.join("cutlass");
        fs::create_dir(&made)?;
        fs::rename(part.join(CUTLASS_SOURCE).join("include"), made.join("include"))?;
        fs::rename(part.join(CUTLASS_LICENCE), made.join("LICENSE.txt"))?;
        Ok(made)
    })
}

/// Puts what `make` leaves in a folder of the unpacked `wheels` in place of `dir`, unless that was made of them.
fn fetched(
    dir: &Path,
    wheels: &[&str],
    kept: Option<&Path>,
    make: impl FnOnce(&Path) -> Result<PathBuf>,
) -> Result<()> {
    let stamp = wheels.join("\n") + "\n";
    if fs::read_to_string(dir.join(STAMP)).is_ok_and(|found| found == stamp) {
        return Ok(());
    }
    let part = dir.with_extension("part");
    remove(&part)?;
    fs::create_dir_all(&part)?;
    let kept = match kept {
        Some(kept) => env::current_dir()?.join(kept),
        None => part.join("wheels"),
    };
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"]).arg(&kept);
    // Standard output is for the environment alone.
    step::run("fetch", pip.arg("--find-links").arg(&kept).args(wheels).stdout(std::io::stderr()))?;
    for wheel in wheels {
        let (name, version) = wheel.split_once("==").unwrap_or((wheel, ""));
        let start = format!("{}-{}", name.replace('-', "_"), version.trim_end_matches('*'));
        let file = list(&kept)?
            .into_iter()
            .find(|file| file.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&start)))
            .with_context(|| format!("no wheel {start} in {}", kept.display()))?;
        let mut unpack = Command::new("python3");
        step::run("unpack", unpack.args(["-m", "zipfile", "-e"]).arg(&file).arg(&part))?;
    }
    let made = make(&part)?;
    fs::write(made.join(STAMP), stamp)?;
    remove(dir)?;
    fs::rename(&made, dir)?;
    remove(&part)
}

/// What wheels leave out: run bits, links, and a driver to link against.
fn finish(home: &Path) -> Result<()> {
    for bin in ["bin", "nvvm/bin"] {
        for file in list(&home.join(bin))?.iter().filter(|file| file.is_file()) {
            fs::set_permissions(file, fs::Permissions::from_mode(0o755))?;
        }
    }
    let lib = home.join("lib");
    for (link, file) in LINKED {
        ensure!(lib.join(file).is_file(), "the wheels hold no lib/{file}");
        symlink(file, lib.join(link))?;
    }
    symlink("lib", home.join("lib64"))?;
    let stubs = lib.join("stubs");
    fs::create_dir_all(&stubs)?;
    let code: String = driver_names()?
        .iter()
        .map(|name| format!("int {name}(void) {{ return 999; }}\n"))
        .collect();
    let source = stubs.join("stub.c");
    fs::write(&source, code)?;
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]).arg(stubs.join("libcuda.so"));
    step::run("stub", cc.arg(source))?;
    Ok(())
}

/// The driver's functions that cudarc declares.
fn driver_names() -> Result<BTreeSet<String>> {
    let out = step::cargo(&["metadata", "--format-version", "1", "--all-features"])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    ensure!(out.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&out.stdout)?;
    let manifest = metadata["packages"]
        .as_array()
        .and_then(|all| all.iter().find(|package| package["name"] == "cudarc"))
        .and_then(|package| package["manifest_path"].as_str())
        .context("cudarc is no dependency of this workspace")?;
    let sys = Path::new(manifest).with_file_name("src").join("driver/sys");
    let mut names = BTreeSet::new();
    for file in list(&sys)?.iter().filter(|file| file.extension().is_some_and(|e| e == "rs")) {
        for rest in fs::read_to_string(file)?.split("fn cu").skip(1) {
            let tail = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
            // `fn culib` is cudarc's own.
            if tail.starts_with(|c: char| c.is_ascii_uppercase()) {
                names.insert(format!("cu{tail}"));
            }
        }
    }
    ensure!(!names.is_empty(), "no driver functions in {}", sys.display());
    Ok(names)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let all = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    Ok(all.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
}

/// Removes a folder, or a link to one without what it points to.
fn remove(dir: &Path) -> Result<()> {
    match fs::symlink_metadata(dir) {
        Ok(meta) if meta.is_symlink() => fs::remove_file(dir)?,
        Ok(_) => fs::remove_dir_all(dir)?,
        Err(_) => {}
    }
    Ok(())
}
