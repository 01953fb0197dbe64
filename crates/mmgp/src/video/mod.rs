//! Videos on disk: a [`Video`] takes frames one at a time and leaves a complete file, or none.
//!
//! What is written depends on the name's ending ([`VideoFormat`]). Frames are encoded as they come, by
//! one thread, so that memory does not grow with their number (a few bytes each for MP4's index) and
//! the same frames make the same bytes. The text that says how the video was made goes into the file
//! as far as its format holds it.

use std::{
    io,
    path::{Path, PathBuf},
};

use tempfile::{NamedTempFile, TempDir};

use crate::{
    Error, Result,
    names::{Place, unfit},
};

pub(crate) mod frames;
mod gif;
mod mp4;
mod webp;
mod yuv;

/// What a video is written as, by the ending of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VideoFormat {
    /// `.mp4`: H.264, 4:2:0, BT.709 in limited range, near what the eye can tell, a key frame every two
    /// seconds, the index first. Odd sizes gain a copy of their last column or row. At least 16
    /// pixels a side, and at most 3840 by 2160 or 2160 by 3840. Text goes into keyed metadata under its keywords, and joined into
    /// the iTunes comment that players show.
    Mp4,
    /// `.gif`: 256 colours a frame, looping. Times are hundredths of a second: at 8 frames a second,
    /// frames last 12 and 13 of them in turn, so that no time is lost. At most 50 frames a second, since
    /// viewers slow down what is faster. Text goes into a comment.
    Gif,
    /// `.webp`: lossy, a still for each frame, looping. At most 16383 pixels a side. Text goes into an
    /// XMP description.
    Webp,
    /// `.png`: a folder of the name without the ending, with `00000.png`, `00001.png` and so on, each
    /// with the text and the rate (`fps`) in text chunks. A folder of that name is replaced if it
    /// holds nothing but such frames.
    Frames,
}

impl VideoFormat {
    const ALL: [Self; 4] = [Self::Mp4, Self::Gif, Self::Webp, Self::Frames];

    /// The format that the ending of `path` stands for.
    ///
    /// # Errors
    /// No ending, or another.
    pub fn of(path: &Path) -> Result<Self> {
        let ending = path.extension().unwrap_or_default();
        let known = |format: &&Self| ending.eq_ignore_ascii_case(format.named_by());
        Self::ALL.iter().find(known).copied().ok_or_else(|| {
            unfit(
                path,
                "expected a name that ends in .mp4, .gif, .webp or .png (for a folder of that name \
                 with a PNG file for each frame), or a folder",
            )
        })
    }

    /// The ending of what is written, with its dot; empty for a folder.
    pub fn ending(self) -> &'static str {
        match self {
            Self::Mp4 => ".mp4",
            Self::Gif => ".gif",
            Self::Webp => ".webp",
            Self::Frames => "",
        }
    }

    /// What the user writes behind the dot.
    fn named_by(self) -> &'static str {
        match self {
            Self::Mp4 => "mp4",
            Self::Gif => "gif",
            Self::Webp => "webp",
            Self::Frames => "png",
        }
    }

    /// Where a video goes that the user named `path`.
    pub(crate) fn place(self, path: &Path) -> PathBuf {
        match self {
            Self::Frames => path.with_extension(""),
            _ => path.into(),
        }
    }
}

/// A video that is being written. Until [`finish`](Video::finish), what was at its path is untouched; a
/// video that is dropped leaves nothing behind.
pub struct Video {
    place: Place,
    frame_bytes: usize,
    frames: usize,
    encoder: Box<dyn Encoder>,
}

/// What becomes of frames in one format.
trait Encoder {
    /// The next frame, `[height, width, 3]` bytes of RGB, already checked for its length.
    fn frame(&mut self, rgb: &[u8]) -> io::Result<()>;

    /// Completes and syncs what was written, at least one frame.
    fn finish(self: Box<Self>) -> io::Result<Written>;
}

/// A complete video under a temporary name.
enum Written {
    File(NamedTempFile),
    Folder(TempDir),
}

/// What is known of a video up front. Its sizes and its rate are in the format's limits.
struct Head<'a> {
    /// Where it goes; temporary files are made beside it.
    path: &'a Path,
    width: usize,
    height: usize,
    fps: f64,
    text: &'a [(&'a str, String)],
}

impl Video {
    /// Begins a video at `path`, in the format of its ending, with frames of `width` by `height`
    /// pixels, `fps` of them a second, and `(keyword, text)` pairs that say how it was made. What is at
    /// `path` is replaced when the video is complete.
    ///
    /// # Errors
    /// An unknown ending, a size or rate that the format cannot hold, a folder that cannot be written
    /// to, or a folder in the place of [`VideoFormat::Frames`] that holds other things.
    pub fn create(
        path: &Path,
        width: usize,
        height: usize,
        fps: f64,
        text: &[(&str, String)],
    ) -> Result<Self> {
        let format = VideoFormat::of(path)?;
        Self::begin(Place::named(format.place(path)), format, width, height, fps, text)
    }

    pub(crate) fn begin(
        place: Place,
        format: VideoFormat,
        width: usize,
        height: usize,
        fps: f64,
        text: &[(&str, String)],
    ) -> Result<Self> {
        let path = &place.path();
        if !(0.1..=1000.).contains(&fps) {
            return Err(unfit(path, format!("{fps} frames a second; expected 0.1 to 1000")));
        }
        if width == 0 || height == 0 {
            return Err(unfit(path, format!("frames of {width} by {height} pixels are empty")));
        }
        let head = Head { path, width, height, fps, text };
        let encoder = match format {
            VideoFormat::Mp4 => mp4::Mp4::begin(&head),
            VideoFormat::Gif => gif::Gif::begin(&head),
            VideoFormat::Webp => webp::Webp::begin(&head),
            VideoFormat::Frames => {
                place.check_folder()?;
                frames::Frames::begin(&head)
            }
        }
        .map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(Self { place, frame_bytes: width * height * 3, frames: 0, encoder })
    }

    /// Writes the next frame, `[height, width, 3]` bytes of RGB.
    ///
    /// # Errors
    /// Another number of bytes, a full disk.
    pub fn frame(&mut self, rgb: &[u8]) -> Result<()> {
        if rgb.len() != self.frame_bytes {
            let (found, expected) = (rgb.len(), self.frame_bytes);
            let number = self.frames;
            return Err(unfit(
                &self.place.path(),
                format!("frame {number} has {found} bytes of RGB; expected {expected}"),
            ));
        }
        self.encoder
            .frame(rgb)
            .map_err(|source| Error::Write { path: self.place.path(), source })?;
        self.frames += 1;
        Ok(())
    }

    /// Completes the video, moves it to its place and returns its path.
    ///
    /// # Errors
    /// No frames, a full disk, a place that cannot be written to (any more). Nothing is left
    /// half-written.
    pub fn finish(self) -> Result<PathBuf> {
        let path = self.place.path();
        if self.frames == 0 {
            return Err(unfit(&path, "a video without frames"));
        }
        match self.encoder.finish().map_err(|source| Error::Write { path, source })? {
            Written::File(file) => self.place.put(file),
            Written::Folder(folder) => self.place.put_folder(folder),
        }
    }
}

impl std::fmt::Debug for Video {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { place, frame_bytes, frames, encoder: _ } = self;
        f.debug_struct("Video")
            .field("place", place)
            .field("frame_bytes", frame_bytes)
            .field("frames", frames)
            .finish_non_exhaustive()
    }
}

/// All of `text` in one, a line for each keyword, for formats that have one place for it.
fn joined(text: &[(&str, String)]) -> String {
    let lines: Vec<_> = text.iter().map(|(keyword, text)| format!("{keyword}: {text}")).collect();
    lines.join("\n")
}

/// How many of `ticks` a second frame `index` lasts at `fps` frames a second: the differences of
/// rounded times, so that roundings never add up.
fn ticks_of_frame(index: u64, fps: f64, ticks: f64) -> u64 {
    let begin = |index: u64| (index as f64 * ticks / fps).round() as u64;
    begin(index + 1) - begin(index)
}

fn outside(format: &str, head: &Head<'_>, limit: &str) -> io::Error {
    let Head { width, height, .. } = head;
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{format} cannot hold frames of {width} by {height} pixels; {limit}"),
    )
}

#[cfg(test)]
mod tests;
