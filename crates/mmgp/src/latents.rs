//! Latents on disk: what a run has reached before it is decoded, with all that decoding needs to know, so
//! that a decode that failed begins again without denoising.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};
use mmgp_models::{Latents, Request};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const TENSOR: &str = "latents";
const KEY: &str = "mmgp";

/// A run that is denoised and not yet decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Denoised {
    /// What is known of it beside the latents.
    pub about: About,
    /// The latents.
    pub latents: Latents,
}

/// What is known of a denoised run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// The pipeline's class.
    pub class: String,
    /// The pipeline's folder.
    pub model: PathBuf,
    /// What was to be drawn; without its picture.
    pub request: Request,
    /// Frames a second.
    pub fps: f64,
    /// What is written into the picture's or video's file.
    pub text: Vec<(String, String)>,
}

impl Denoised {
    /// Writes the file `path`: safetensors, with one tensor `latents` in f32.
    ///
    /// # Errors
    /// A file that exists and must not be replaced, a folder that cannot be written to. Nothing is left
    /// half-written.
    pub fn save(&self, path: impl AsRef<Path>, overwrite: Overwrite) -> Result<()> {
        let path = path.as_ref();
        let wrong =
            |why: serde_json::Error| Error::Latents { path: path.into(), why: why.to_string() };
        let about = serde_json::to_string(&self.about).map_err(wrong)?;
        let metadata = BTreeMap::from([(KEY.to_string(), about)]);
        let spec = TensorSpec::new(TENSOR, Dtype::F32, self.latents.shape.clone());
        let mut writer = Writer::create(path, &[spec], &metadata, overwrite)?;
        let bytes: Vec<u8> = self.latents.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(TENSOR, &bytes)?;
        Ok(writer.finish()?)
    }

    /// Reads such a file.
    ///
    /// # Errors
    /// A file that cannot be read or is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |why: String| Error::Latents { path: path.into(), why };
        let file = Checkpoint::open(path)?;
        let about = file.metadata().get(KEY).ok_or_else(|| {
            wrong(
                "not a file of latents as `mmgp generate` leaves them (no `mmgp` in its metadata)"
                    .into(),
            )
        })?;
        let about: About = serde_json::from_str(about).map_err(|e| wrong(e.to_string()))?;
        if !(about.fps.is_finite() && about.fps > 0.) {
            return Err(wrong(format!("fps: expected a number above 0, found {}", about.fps)));
        }
        let view = file.tensor(TENSOR)?;
        if view.dtype() != Dtype::F32 {
            return Err(wrong(format!("`{TENSOR}`: expected F32, found {:?}", view.dtype())));
        }
        let values: Vec<f32> = view
            .bytes()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap_or_default()))
            .collect();
        if values.iter().any(|v| !v.is_finite()) {
            return Err(wrong(format!("`{TENSOR}`: has values that are no numbers")));
        }
        Ok(Self { about, latents: Latents { shape: view.shape().to_vec(), values } })
    }
}
