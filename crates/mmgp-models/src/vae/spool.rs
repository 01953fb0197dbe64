//! Frames that wait on the disk.
//!
//! The file has no name and is gone with the process. It lies where large temporary files belong:
//! `TMPDIR`, if that is set, else `/var/tmp`, since `/tmp` often is memory.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Frames of one size, in f32.
pub(super) struct Spool {
    file: BufWriter<File>,
    folder: PathBuf,
    /// `[batch, channels, height, width]` of a frame; empty before the first.
    shape: Vec<usize>,
    frames: usize,
}

impl Spool {
    /// # Errors
    /// A folder that cannot be written to.
    pub(super) fn new() -> Result<Self> {
        let large = Path::new("/var/tmp");
        let folder = match std::env::var_os("TMPDIR") {
            None if large.is_dir() => large.to_path_buf(),
            _ => std::env::temp_dir(),
        };
        let file = tempfile::tempfile_in(&folder).map_err(|e| failed(&folder, e))?;
        Ok(Self { file: BufWriter::new(file), folder, shape: Vec::new(), frames: 0 })
    }

    /// The number of frames.
    pub(super) fn len(&self) -> usize {
        self.frames
    }

    /// Appends frames `[batch, channels, n, height, width]`.
    ///
    /// # Errors
    /// Frames of another size; a disk that is full.
    pub(super) fn push(&mut self, frames: &Tensor) -> Result<()> {
        let frames = frames.permute([2, 0, 1, 3, 4])?.to_dtype(DType::F32)?;
        let shape = &frames.dims()[1..];
        if self.frames > 0 && self.shape != shape {
            return Err(Error::Input(format!("frames of {shape:?} after {:?}", self.shape)));
        }
        self.shape = shape.to_vec();
        for frame in frames.to_device(&Device::Cpu)?.chunk(frames.dim(0)?, 0)? {
            let mut bytes = Vec::new();
            for value in frame.flatten_all()?.to_vec1::<f32>()? {
                bytes.extend(value.to_le_bytes());
            }
            self.file.write_all(&bytes).map_err(|e| failed(&self.folder, e))?;
            self.frames += 1;
        }
        self.file.flush().map_err(|e| failed(&self.folder, e))
    }

    /// Frame `index`: `[batch, channels, 1, height, width]`.
    ///
    /// # Errors
    /// A frame that there is not; a disk that fails.
    pub(super) fn frame(&self, index: usize) -> Result<Tensor> {
        if index >= self.frames {
            return Err(Error::Input(format!("frame {index} of {}", self.frames)));
        }
        let mut bytes = vec![0; 4 * self.shape.iter().product::<usize>()];
        let at = (index * bytes.len()) as u64;
        self.file.get_ref().read_exact_at(&mut bytes, at).map_err(|e| failed(&self.folder, e))?;
        let values =
            bytes.chunks_exact(4).map(|v| f32::from_le_bytes(v.try_into().unwrap_or_default()));
        let frame = Tensor::from_iter(values, &Device::Cpu)?.reshape(self.shape.as_slice())?;
        Ok(frame.unsqueeze(2)?)
    }
}

fn failed(folder: &Path, source: io::Error) -> Error {
    Error::Spool { folder: folder.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_went() -> Result<()> {
        let mut spool = Spool::new()?;
        let x = Tensor::randn(0f32, 1., (2, 3, 5, 4, 7), &Device::Cpu)?;
        spool.push(&x.narrow(2, 0, 3)?)?;
        spool.push(&x.narrow(2, 3, 2)?)?;
        assert_eq!(spool.len(), 5);
        for i in (0..5).rev() {
            let (got, want) = (spool.frame(i)?, x.narrow(2, i, 1)?);
            assert_eq!(got.dims(), want.dims());
            assert_eq!((got - want)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.);
        }
        assert!(spool.frame(5).is_err());
        assert!(spool.push(&x.narrow(3, 0, 2)?).is_err());
        Ok(())
    }
}
