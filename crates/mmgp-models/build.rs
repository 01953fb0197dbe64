//! Compiles the CUDA kernels ahead; does nothing without the feature `cuda`.

#[path = "../mmgp-quant/nvcc.rs"]
mod nvcc;

fn main() {
    println!("cargo::rerun-if-changed=../mmgp-quant/nvcc.rs");
    nvcc::fatbin("src/nn/cuda/nn.cu", "nn");
    nvcc::fatbin("src/nn/cuda/attention.cu", "attention");
}
