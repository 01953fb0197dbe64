//! One archive for a GPU machine that has no Rust: the command, the bench and the tests that need a GPU, and
//! a script that runs them. Vectors and the demo are read from the checkout that it is unpacked in.
//!
//! The command is the CUDA build and is packed under the name that the CPU build looks for beside itself,
//! `mmgp-cuda`. The CPU build is not packed: it would take a second build of candle and 2.7 MB.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    ci::CUDA_FEATURES,
    step::{self, cargo, root},
    toolkit,
};

/// What a GPU machine without a toolchain runs beside the tests whose names begin with `cuda`: tests
/// that run on the device which their environment names.
const ON_ANY_DEVICE: &[&str] = &["vectors"];

/// The programs that are packed, and what they are called there.
const PROGRAMS: [(&str, &str); 3] =
    [("mmgp", "mmgp-cuda"), ("mmgp-gpu-bench", "mmgp-gpu-bench"), ("mmgp-synth", "mmgp-synth")];

/// Scripts that go with them.
const SCRIPTS: [&str; 6] = ["run.sh", "vram.py", "memory.py", "video.py", "trace.c", "trace.py"];

/// Programs and tests hold the same code, so the dictionary spans several of them.
const XZ: &str = "--lzma2=preset=6,dict=256MiB -T1";

/// The options of `bundle`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Pack the demo and the vectors too, for a machine without a checkout
    #[arg(long)]
    with_data: bool,
}

/// Builds and packs `bundle/mmgp-cuda.tar.xz`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let bundle = root().join("bundle");
    let staged = bundle.join("mmgp-cuda");
    if staged.exists() {
        fs::remove_dir_all(&staged)?;
    }
    fs::create_dir_all(staged.join("tests"))?;
    for (name, built, is_test) in build()? {
        let to = if is_test { staged.join("tests") } else { staged.clone() }.join(name);
        let mut strip = Command::new("strip");
        step::run("strip", strip.arg("-o").arg(&to).arg(&built))?;
    }
    for script in SCRIPTS {
        fs::copy(root().join("xtask/bundle").join(script), staged.join(script))?;
    }
    fs::write(staged.join("built-in"), root().display().to_string())?;
    if let Some(commit) = step::commit() {
        fs::write(staged.join("commit"), commit)?;
    }
    let env = toolkit::environment()?;
    if let Some((_, home)) = env.iter().find(|(name, _)| *name == "CUTLASS_HOME") {
        // Its licence wants to go where what was compiled of it goes.
        let licence = Path::new(home).join("LICENSE.txt");
        if licence.is_file() {
            fs::copy(licence, staged.join("LICENSE-CUTLASS.txt"))?;
        }
    }
    if args.with_data {
        for data in ["assets", "vectors"] {
            let mut copy = Command::new("cp");
            step::run("copy", copy.arg("-r").arg(root().join(data)).arg(&staged))?;
        }
        // Tests find their data from a crate's folder.
        for dir in fs::read_dir(root().join("crates"))? {
            fs::create_dir_all(staged.join("crates").join(dir?.file_name()))?;
        }
    }
    let archive = bundle.join("mmgp-cuda.tar.xz");
    let mut tar = Command::new("tar");
    tar.current_dir(&bundle).env("XZ_OPT", XZ).args(["-cJf"]).arg(&archive).arg("mmgp-cuda");
    step::run("pack", &mut tar)?;
    let bytes = fs::metadata(&archive)?.len();
    eprintln!("{}: {:.1} MB", archive.display(), bytes as f64 / 1e6);
    Ok(())
}

/// `(name, executable, whether it is a test)` of everything that is packed.
fn build() -> Result<Vec<(String, PathBuf, bool)>> {
    let mut build = cargo(&["build", "--release", "--workspace", "--bins", "--test", "cuda*"]);
    build.args(ON_ANY_DEVICE.iter().flat_map(|test| ["--test", test]));
    build.args([CUDA_FEATURES, "--message-format=json-render-diagnostics"]);
    build.envs(toolkit::environment()?).stdout(Stdio::piped());
    let mut child = build.spawn().context("cannot run cargo")?;
    let said = child.stdout.take().context("cargo has no output")?;
    let mut found = Vec::new();
    for line in BufReader::new(said).lines() {
        let line: Value = serde_json::from_str(&line?).unwrap_or_default();
        let (Some(name), Some(built)) =
            (line["target"]["name"].as_str(), line["executable"].as_str())
        else {
            continue;
        };
        let is = |kind: &str| line["target"]["kind"][0] == kind;
        let wanted = name.starts_with("cuda") || ON_ANY_DEVICE.contains(&name);
        let is_test = is("test") && wanted;
        let program = PROGRAMS.iter().find(|program| program.0 == name && is("bin"));
        let program = program.filter(|_| line["profile"]["test"] == false);
        if let Some(name) = program.map(|program| program.1).or(is_test.then_some(name)) {
            found.push((name.to_string(), Path::new(built).to_path_buf(), is_test));
        }
    }
    ensure!(child.wait()?.success(), "the build failed");
    for (program, packed) in PROGRAMS {
        let built = found.iter().any(|(name, _, is_test)| name == packed && !is_test);
        ensure!(built, "cargo built no {program}");
    }
    Ok(found)
}
