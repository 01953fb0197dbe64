//! Compiles a file of CUDA kernels ahead into one fat binary; does nothing without the feature `cuda`. Build
//! scripts include this file.
//!
//! The binary holds machine code of the GPUs that are common and, for all others from compute
//! capability 8.0 on, PTX that the driver compiles.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// Compute capabilities that get machine code.
const MACHINE: &[&str] = &["80", "86", "89", "90", "120"];
/// The one that gets PTX.
const PTX: &str = "80";

/// Compiles `source` to `NAME.fatbin` in cargo's folder for output.
pub(crate) fn fatbin(source: &str, name: &str) {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={source}");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if let Err(why) = compile(source, name) {
        println!("cargo::error={why}");
        std::process::exit(1);
    }
}

fn compile(source: &str, name: &str) -> Result<(), String> {
    let mut arguments = vec!["-fatbin".into()];
    for sm in MACHINE {
        arguments.extend(["-gencode".into(), format!("arch=compute_{sm},code=sm_{sm}")]);
    }
    arguments.extend(["-gencode".into(), format!("arch=compute_{PTX},code=compute_{PTX}")]);
    let out = env::var_os("OUT_DIR").ok_or("cargo set no OUT_DIR")?;
    run(&arguments, source, &PathBuf::from(out).join(format!("{name}.fatbin")))
}

/// Runs the compiler on `source`.
pub(crate) fn run(arguments: &[String], source: &str, to: &Path) -> Result<(), String> {
    let nvcc = match env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin").join("nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let mut command = Command::new(&nvcc);
    command.args(["-std=c++17", "-O3"]).args(arguments).arg("-o").arg(to).arg(source);
    let output = command.output().map_err(|why| {
        format!(
            "the feature `cuda` needs the CUDA 13 toolkit, but {} cannot be run ({why}): set \
             CUDA_HOME to a toolkit, or fetch one with `cargo xtask cuda-toolkit`",
            nvcc.display()
        )
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " | ");
        return Err(format!("{} failed on {source}: {said}", nvcc.display()));
    }
    Ok(())
}
