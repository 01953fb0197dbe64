//! Animated WebP: each frame a lossy still by libwebp, in the container that the WebP container
//! specification describes. (libwebp's own animation encoder keeps the whole file in memory.)

use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use ::webp::{PixelLayout, WebPConfig};
use tempfile::NamedTempFile;

use super::{Encoder, Head, Written, joined, outside, ticks_of_frame};
use crate::names::temporary_file;

/// Of libwebp's 0 to 100: about 42 dB on what models draw.
const QUALITY: f32 = 90.;
const FLAG_XMP: u8 = 0x04;
const FLAG_ANIMATION: u8 = 0x02;
/// A frame replaces what is below it.
const DO_NOT_BLEND: u8 = 0x02;

pub(super) struct Webp {
    file: BufWriter<NamedTempFile>,
    config: WebPConfig,
    width: u32,
    height: u32,
    fps: f64,
    frames: u64,
    xmp: Option<String>,
}

impl Webp {
    pub(super) fn begin(head: &Head<'_>) -> io::Result<Box<dyn Encoder>> {
        let &Head { path, width, height, fps, text } = head;
        if width > 16383 || height > 16383 {
            return Err(outside("WebP", head, "at most 16383 a side"));
        }
        let mut config = WebPConfig::new()
            .map_err(|()| io::Error::other("libwebp is of another version than its header"))?;
        config.quality = QUALITY;
        let (width, height) = (width as u32, height as u32);
        let xmp = (!text.is_empty()).then(|| xmp(&joined(text)));
        let mut file = BufWriter::new(temporary_file(path)?);
        // The length is known at the end.
        file.write_all(b"RIFF\0\0\0\0WEBP")?;
        let flags = FLAG_ANIMATION | if xmp.is_some() { FLAG_XMP } else { 0 };
        let canvas = [&[flags, 0, 0, 0][..], &u24(width - 1), &u24(height - 1)].concat();
        chunk(&mut file, b"VP8X", &canvas)?;
        let (background, forever) = ([0; 4], [0; 2]);
        chunk(&mut file, b"ANIM", &[&background[..], &forever].concat())?;
        Ok(Box::new(Self { file, config, width, height, fps, frames: 0, xmp }))
    }
}

impl Encoder for Webp {
    fn frame(&mut self, rgb: &[u8]) -> io::Result<()> {
        let still = ::webp::Encoder::new(rgb, PixelLayout::Rgb, self.width, self.height)
            .encode_advanced(&self.config)
            .map_err(|e| io::Error::other(format!("libwebp: {e:?}")))?;
        // Without RIFF's own header: one chunk, `VP8 `.
        let image = still.get(12..).unwrap_or_default();
        let millis = ticks_of_frame(self.frames, self.fps, 1000.);
        self.frames += 1;
        let place = [
            u24(0),
            u24(0),
            u24(self.width - 1),
            u24(self.height - 1),
            u24(u32::try_from(millis).unwrap_or(u32::MAX)),
        ]
        .concat();
        chunk(&mut self.file, b"ANMF", &[&place[..], &[DO_NOT_BLEND], image].concat())
    }

    fn finish(mut self: Box<Self>) -> io::Result<Written> {
        if let Some(xmp) = &self.xmp {
            chunk(&mut self.file, b"XMP ", xmp.as_bytes())?;
        }
        let end = self.file.stream_position()?;
        let length = u32::try_from(end - 8)
            .map_err(|_| io::Error::other("WebP cannot hold more than 4 GiB"))?;
        self.file.seek(SeekFrom::Start(4))?;
        self.file.write_all(&length.to_le_bytes())?;
        let file = self.file.into_inner()?;
        file.as_file().sync_all()?;
        Ok(Written::File(file))
    }
}

/// A chunk of RIFF: padded to an even length.
fn chunk(file: &mut impl Write, kind: &[u8; 4], bytes: &[u8]) -> io::Result<()> {
    file.write_all(kind)?;
    file.write_all(&(bytes.len() as u32).to_le_bytes())?;
    file.write_all(bytes)?;
    file.write_all(&[0][..bytes.len() % 2])
}

fn u24(value: u32) -> [u8; 3] {
    let [a, b, c, _] = value.min(0xff_ffff).to_le_bytes();
    [a, b, c]
}

fn xmp(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            // A line's end would be made one of another kind, or a space.
            '\n' | '\t' | '\r' => escaped.push_str(&format!("&#{};", u32::from(c))),
            // XML has no way to write these.
            '\0'..' ' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    format!(
        "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\
         <rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\
         <rdf:Description rdf:about=\"\" xmlns:dc=\"http://purl.org/dc/elements/1.1/\">\
         <dc:description><rdf:Alt><rdf:li xml:lang=\"x-default\">{escaped}</rdf:li></rdf:Alt>\
         </dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
}
