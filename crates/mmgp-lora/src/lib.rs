//! LoRA adapters as side paths: `y += s · (x Aᵀ) Bᵀ` beside the linear layers of paged models.
//!
//! Three nouns carry the crate. An [`Adapter`] is a file, checked from its header; an [`AdapterSet`]
//! puts any number of them into the side slots of a pipeline's linear layers, dense or quantized,
//! whose own weights are not touched; [`StepWeights`] say how strongly each acts at which denoising
//! step. What the adapters of a layer bring is stacked into one `A` and, for each range of rows that
//! they change, one `B`. These tensors ride in their block's image: they come, stay and go with the
//! block, and the budget counts them. Weights act at run time, so changing them reads nothing.
//!
//! ```
//! use std::{collections::BTreeMap, path::Path, sync::Arc};
//!
//! use candle_core::{Device, Tensor};
//! use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
//! use mmgp_lora::{Adapter, AdapterSet, Steps, Unfit};
//! use mmgp_quant::Bias;
//! use mmgp_residency::{Budget, ModelBuilder, Pager};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let write = |file: &Path, tensors: &[(&str, [usize; 2], &[f32])]| {
//! #     let specs: Vec<_> =
//! #         tensors.iter().map(|t| TensorSpec::new(t.0, Dtype::F32, t.1)).collect();
//! #     let mut writer = Writer::create(file, &specs, &BTreeMap::new(), Overwrite::No)?;
//! #     for t in tensors { writer.write(t.0, bytemuck::cast_slice(t.2))?; }
//! #     writer.finish()
//! # };
//! # let (model, style) = (dir.path().join("model.safetensors"), dir.path().join("style.safetensors"));
//! # write(&model, &[("block.to_q.weight", [2, 2], &[1., 0., 0., 1.])])?;
//! # write(&style, &[("transformer.block.to_q.lora_A.weight", [1, 2], &[1., 1.]),
//! #                 ("transformer.block.to_q.lora_B.weight", [2, 1], &[0., 10.])])?;
//! let pager = Pager::new(&Device::Cpu)?;
//! let builder = ModelBuilder::new(&pager, "transformer", Arc::new(Checkpoint::open(&model)?));
//! let blocks = vec![builder.block("block").pp("to_q").linear(2, 2, Bias::No)?];
//! let transformer = builder.finish((), blocks)?;
//! pager.plan(Budget::Min)?;
//!
//! let mut adapters = AdapterSet::new(&pager, &["transformer"]);
//! adapters.load(&[(Adapter::open(&style)?, "1,0.5".parse()?)], Unfit::Fail)?;
//!
//! let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
//! for (step, expected) in [[1f32, 32.], [1., 17.]].into_iter().enumerate() {
//!     adapters.set_step(step, &Steps::new(2));
//!     for block in transformer.pass()?.blocks() {
//!         let y = block?.run(|block| block.forward(&x)?.to_vec2::<f32>())?;
//!         assert_eq!(y, [expected]);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod adapter;
mod argument;
mod dialects;
mod error;
mod fit;
mod metadata;
mod set;
mod side;
mod weights;

pub use adapter::{Adapter, Module};
pub use argument::AdapterArg;
pub use error::{Error, Result, Unknown};
pub use fit::{Skipped, Unfit};
pub use set::AdapterSet;
pub use weights::{StepWeights, Steps};
