//! A folder of PNG files, one for each frame, in order of their names.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use tempfile::TempDir;

use super::{Encoder, Head, Written};
use crate::{names::temporary_folder, picture};

pub(super) struct Frames {
    folder: TempDir,
    width: usize,
    height: usize,
    text: Vec<(String, String)>,
    frames: u64,
}

impl Frames {
    pub(super) fn begin(head: &Head<'_>) -> io::Result<Box<dyn Encoder>> {
        let &Head { path, width, height, fps, text } = head;
        let mut text: Vec<_> = text.iter().map(|(k, v)| ((*k).to_string(), v.clone())).collect();
        text.push(("fps".into(), fps.to_string()));
        let folder = temporary_folder(path)?;
        Ok(Box::new(Self { folder, width, height, text, frames: 0 }))
    }
}

impl Encoder for Frames {
    fn frame(&mut self, rgb: &[u8]) -> io::Result<()> {
        // A thirtieth of the time for a sixth more bytes.
        let fast = png::Compression::Fast;
        let bytes = picture::encode(self.width, self.height, rgb, &self.text, fast)
            .map_err(io::Error::other)?;
        let mut file =
            File::create_new(self.folder.path().join(format!("{:05}.png", self.frames)))?;
        self.frames += 1;
        file.write_all(&bytes)?;
        file.sync_all()
    }

    fn finish(self: Box<Self>) -> io::Result<Written> {
        Ok(Written::Folder(self.folder))
    }
}

/// Whether all that is in `folder` are frames by their names.
pub(crate) fn are_all(folder: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".png"));
        let is_frame =
            |number: &str| number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit());
        if !number.is_some_and(is_frame) {
            return Ok(false);
        }
    }
    Ok(true)
}
