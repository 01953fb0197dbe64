//! Compiles the CUDA kernels ahead; does nothing without the feature `cuda`.

mod nvcc;

fn main() {
    println!("cargo::rerun-if-changed=nvcc.rs");
    nvcc::fatbin("src/kernels/cuda/int8.cu", "int8");
}
