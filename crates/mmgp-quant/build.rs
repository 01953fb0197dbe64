//! Compiles the CUDA kernels ahead; does nothing without the feature `cuda`.

mod nvcc;

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::PathBuf,
};

fn main() {
    println!("cargo::rerun-if-changed=nvcc.rs");
    println!("cargo::rustc-check-cfg=cfg(w8a8_sm90)");
    println!("cargo::rerun-if-changed=src/kernels/cuda/rotation.cuh");
    nvcc::fatbin("src/kernels/cuda/int8.cu", "int8");
    nvcc::fatbin("src/kernels/cuda/w8a8.cu", "w8a8");
    if env::var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(why) = hopper("src/kernels/cuda/w8a8_sm90.cu")
    {
        println!("cargo::error={why}");
        std::process::exit(1);
    }
}

/// Makes a static library of the product on Hopper, and a digest of it, which is empty where CUTLASS is missing: cards
/// of that kind then multiply as all others do.
fn hopper(source: &str) -> Result<(), String> {
    println!("cargo::rerun-if-changed={source}");
    println!("cargo::rerun-if-env-changed=CUTLASS_HOME");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo set no OUT_DIR")?);
    let digest = |bytes: &[u8]| {
        fs::write(out.join("w8a8_sm90.digest"), bytes).map_err(|why| format!("digest: {why}"))
    };
    let include = env::var_os("CUTLASS_HOME").map(|home| PathBuf::from(home).join("include"));
    let Some(include) = include.filter(|dir| dir.join("cutlass/cutlass.h").is_file()) else {
        println!(
            "cargo::warning=products in int8 will be slower on Hopper: CUTLASS_HOME names no headers \
             of CUTLASS 4.2; `cargo xtask cuda-toolkit` fetches them"
        );
        return digest(&[]);
    };
    let arguments = [
        "-lib",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
        "-gencode",
        "arch=compute_90a,code=sm_90a", // the only cards with its instructions
        "-Xcompiler",
        "-fPIC",
        "-isystem",
        &include.to_string_lossy(),
    ];
    let library = out.join("libmmgp_w8a8_sm90.a");
    nvcc::run(&arguments.map(String::from), source, &library)?;
    let mut hasher = DefaultHasher::new();
    fs::read(&library).map_err(|why| format!("{}: {why}", library.display()))?.hash(&mut hasher);
    digest(&hasher.finish().to_le_bytes())?;
    println!("cargo::rustc-cfg=w8a8_sm90");
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=mmgp_w8a8_sm90");
    // As candle links it too.
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}
