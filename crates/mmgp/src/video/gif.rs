//! GIF: up to 256 colours for each frame, chosen by NeuQuant where it has more.

use std::io::{self, BufWriter};

use ::gif::{AnyExtension, Encoder as Writer, EncodingError, Extension, Frame, Repeat};
use tempfile::NamedTempFile;

use super::{Encoder, Head, Written, joined, outside, ticks_of_frame};
use crate::names::temporary_file;

/// Pixels of a frame that NeuQuant looks at, about, unless that is fewer than one in ten. (All of 720 by
/// 480 take five times as long for half a decibel.)
const SAMPLES: usize = 32_768;

pub(super) struct Gif {
    writer: Writer<BufWriter<NamedTempFile>>,
    width: u16,
    height: u16,
    fps: f64,
    sampling: i32,
    frames: u64,
}

impl Gif {
    pub(super) fn begin(head: &Head<'_>) -> io::Result<Box<dyn Encoder>> {
        let &Head { path, fps, text, .. } = head;
        let (Ok(width), Ok(height)) = (u16::try_from(head.width), u16::try_from(head.height))
        else {
            return Err(outside("GIF", head, "at most 65535 a side"));
        };
        if fps > 50. {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("GIF cannot hold {fps} frames a second; at most 50"),
            ));
        }
        let file = BufWriter::new(temporary_file(path)?);
        let mut writer = Writer::new(file, width, height, &[]).map_err(error)?;
        writer.set_repeat(Repeat::Infinite).map_err(error)?;
        if !text.is_empty() {
            let comment = AnyExtension(Extension::Comment as u8);
            writer.write_raw_extension(comment, &[joined(text).as_bytes()]).map_err(error)?;
        }
        let sampling = (head.width * head.height / SAMPLES).clamp(1, 10) as i32;
        Ok(Box::new(Self { writer, width, height, fps, sampling, frames: 0 }))
    }
}

impl Encoder for Gif {
    fn frame(&mut self, rgb: &[u8]) -> io::Result<()> {
        let mut frame = Frame::from_rgb_speed(self.width, self.height, rgb, self.sampling);
        let delay = ticks_of_frame(self.frames, self.fps, 100.);
        frame.delay = u16::try_from(delay).unwrap_or(u16::MAX);
        self.frames += 1;
        self.writer.write_frame(&frame).map_err(error)
    }

    fn finish(self: Box<Self>) -> io::Result<Written> {
        let file = self.writer.into_inner().map_err(error)?.into_inner()?;
        file.as_file().sync_all()?;
        Ok(Written::File(file))
    }
}

fn error(error: EncodingError) -> io::Error {
    match error {
        EncodingError::Io(error) => error,
        error => io::Error::other(error),
    }
}
