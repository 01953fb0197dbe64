//! What needs an NVIDIA GPU, in one program, since each holds all kernels: with `--nocapture` what products take is told too.
//! These tests fail where no CUDA device can be opened.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // helpers of tests may panic

mod fp8;
mod linear;
mod rotated;
mod self_test;

use candle_core::{CudaDevice, DType, Device, Tensor};
use mmgp_quant::{Codes, Form, MemorySource, Part, Source, Stored};

type Any = Box<dyn std::error::Error>;

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn gpu() -> (Device, CudaDevice) {
    let device = CudaDevice::new_with_stream(0).expect("these tests need a CUDA device");
    (Device::Cuda(device.clone()), device)
}

/// A memory source with another compute dtype, whose products may make their input codes.
struct In {
    source: MemorySource,
    dtype: DType,
    activations: Option<Codes>,
}

impl Source for In {
    fn stored(&self, name: &str) -> Option<Stored> {
        self.source.stored(name)
    }

    fn tensor(&self, parts: &[Part], form: Form) -> mmgp_quant::Result<Tensor> {
        match form {
            Form::Compute => Ok(self.source.tensor(parts, Form::AsStored)?.to_dtype(self.dtype)?),
            form => self.source.tensor(parts, form),
        }
    }

    fn quantizes_activations(&self) -> Option<Codes> {
        self.activations
    }

    fn device(&self) -> &Device {
        self.source.device()
    }

    fn compute_dtype(&self) -> DType {
        self.dtype
    }

    fn origin(&self) -> String {
        self.source.origin()
    }
}

fn rand(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
}
