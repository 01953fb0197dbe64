//! Model files: safetensors (single, sharded, mapped, written) and JSON configs.
//!
//! Three nouns carry the crate. A [`Checkpoint`] is one model's weights, whatever number of files they lie in; it hands out
//! [`TensorView`]s: a name, a dtype, a shape and a byte range of a mapped file, never a copy. A [`Writer`] makes such files, tensor by
//! tensor, without ever holding them.
//!
//! The crate knows files and nothing else: no tensor library, no device, no model. A file is validated wholly before a single byte of
//! it is handed out, so that a view which exists is a view that can be read; a hostile header is an [`Error`] that names file,
//! tensor, byte offset, what was expected and what was found. What a header announces is never allocated.
//!
//! ```
//! use std::collections::BTreeMap;
//! use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("model.safetensors");
//!
//! // The tensors are announced first, then written in that order, in pieces of any size.
//! let specs = [TensorSpec::new("norm.weight", Dtype::F32, [2]), TensorSpec::new("norm.bias", Dtype::F32, [2])];
//! let mut writer = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::No)?;
//! writer.write("norm.weight", &1f32.to_le_bytes())?;
//! writer.write("norm.weight", &2f32.to_le_bytes())?;
//! writer.write("norm.bias", &[0; 8])?;
//! writer.finish()?;
//!
//! let checkpoint = Checkpoint::open(&path)?;
//! let weight = checkpoint.tensor("norm.weight")?;
//! assert_eq!((weight.dtype(), weight.shape()), (Dtype::F32, &[2usize][..]));
//! assert_eq!(weight.bytes()[4..], 2f32.to_le_bytes());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]

mod checkpoint;
mod dtype;
mod error;
mod header;
mod index;
mod json;
mod mapped;
mod sharded;
mod view;
mod writer;

pub use checkpoint::Checkpoint;
pub use dtype::{Dtype, UnknownDtype};
pub use error::{Error, Fault, Result};
pub use json::{base64_json, read_json};
pub use mapped::{FileIdentity, SourceFile};
pub use sharded::{ShardOptions, write_sharded, write_sharded_with};
pub use view::TensorView;
pub use writer::{Overwrite, TensorSpec, Writer, copy_file, disk_space, write_json};
