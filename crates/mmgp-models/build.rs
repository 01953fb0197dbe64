//! Compiles the CUDA kernels ahead; does nothing without the feature `cuda`.

#[path = "../mmgp-quant/nvcc.rs"]
mod nvcc;

fn main() {
    println!("cargo::rerun-if-changed=../mmgp-quant/nvcc.rs");
    println!("cargo::rerun-if-changed=../mmgp-quant/src/kernels/cuda/rotation.cuh");
    nvcc::fatbin("src/nn/cuda/nn.cu", "nn");
    nvcc::fatbin("src/nn/cuda/attention.cu", "attention");
}
