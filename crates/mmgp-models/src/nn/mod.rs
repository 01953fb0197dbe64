//! The operations that models are made of, one function each.
//!
//! Activations are in the compute dtype (f32 on the CPU). Every function has a kernel for the CPU,
//! safe code that makes one pass over memory, and the same formula in the tensor library's own
//! operations for other devices. Kernels of NVIDIA GPUs stand behind the same functions (`cuda`), and are
//! used where they were tested. No result depends on the number of threads.

mod activation;
mod add;
mod attention;
mod conv;
mod conv3d;
mod copies;
mod cpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)] // the only place of this crate
pub mod cuda;
#[cfg(all(test, not(feature = "cuda")))]
#[allow(dead_code)] // its tests run without a GPU
#[path = "cuda/shape.rs"]
mod cuda_shape;
mod embed;
mod feed_forward;
mod group_norm;
mod heads;
mod joint;
mod modulation;
mod norms;
mod patch;
mod rope;
mod samples;
mod spread;

#[cfg(feature = "cuda")]
pub(crate) use activation::joined_gelu;
pub use activation::{Activation, join_gelu};
pub use add::{add, add_scaled};
#[cfg(feature = "cuda")]
pub(crate) use attention::softmax;
pub use attention::{attention, attention_up_to, causal_mask, chunk_rows};
pub use conv::{Conv2d, Padding, Window, strip_rows};
pub use conv3d::Conv3d;
pub use copies::{contiguous, look_up};
pub use embed::{Mlp, timestep_embedding};
pub use feed_forward::FeedForward;
pub use group_norm::GroupNorm;
pub use heads::{HeadRows, Heads, Projected, gated_add, gated_add_norm};
pub use joint::{DoubleBlock, Joint, SingleBlock, TextPlace};
pub use modulation::Modulation;
pub use norms::{LayerNorm, RmsNorm, layer_norm_modulated, layer_norm_modulated_for};
pub use patch::{Patch, PatchConv};
pub use rope::{Pairs, Rope};
pub use samples::Samples;
pub use spread::spread_affine_silu;
