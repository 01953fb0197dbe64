//! Number formats and the one [`Linear`] layer.
//!
//! Three nouns carry the crate. A [`Format`] recognises how a weight is stored and opens it; a
//! [`QuantTensor`] is such a weight, which knows how to multiply; a [`Linear`] holds one of them, a
//! bias and a side slot for adapters. Models ask a [`Weights`] for their layers by name and never
//! learn which format answered: a weight stays on the device in the form it travels in.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use mmgp_quant::{Bias, MemorySource, Weights};
//!
//! # fn main() -> mmgp_quant::Result<()> {
//! let dev = Device::Cpu;
//! let source = MemorySource::new(&dev)
//!     .with("proj.weight", Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &dev)?)
//!     .with("proj.bias", Tensor::new(&[0f32, 0., 10.], &dev)?);
//! let layer = Weights::new(source).pp("proj").linear(2, 3, Bias::Yes)?;
//! let y = layer.forward(&Tensor::new(&[[1f32, 1.]], &dev)?)?;
//! assert_eq!(y.to_vec2::<f32>()?, [[3., 7., 21.]]);
//! # Ok(())
//! # }
//! ```

#[cfg(any(test, feature = "cuda"))]
mod card;
mod codes;
mod decode;
mod error;
mod format;
mod formats;
mod input;
mod kernels;
mod linear;
mod low_rank;
mod policy;
#[cfg(any(test, feature = "cuda"))]
mod self_test;
mod side;
mod target;
mod weights;

#[cfg(any(test, feature = "cuda"))]
pub use card::Card;
pub use codes::Codes;
pub use error::{Error, Result};
pub use format::{Epilogue, Format, QuantTensor, formats};
pub use input::{CodedRows, Input, SharedInput};
#[cfg(feature = "cuda")]
pub use kernels::cuda::{
    Int8Kernel, Kernel, KernelImage, Parameter, disable_fp8, enable_fp8, fp8_enabled,
    fp8_multiplies, fp8_product, kernel_images, product_library, w8a8, w8a8_by,
};
pub use kernels::fp8::{from_e4m3, to_e4m3};
pub use kernels::int8::{NotFinite, Real, decode, quantize, quantize_rows};
pub use kernels::rotation::rotate;
pub use linear::{Bias, Linear};
pub use low_rank::{Band, add_low_rank};
pub use policy::QuantPolicy;
#[cfg(feature = "cuda")]
pub use self_test::{self_test, self_test_fp8};
pub use side::{Side, SideSlot};
pub use target::{Target, TargetPart};
pub use weights::{Form, MemorySource, Part, Source, Stored, Weights, join_parts};
