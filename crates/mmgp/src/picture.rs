//! Pictures on disk: PNG files that say how they were made.

use std::{
    io::{self, Write},
    path::Path,
};

use mmgp_models::Picture;
use tempfile::NamedTempFile;

use crate::{
    Error, Result,
    names::{Place, temporary_file},
};

/// Writes `picture` to `path`, replacing what is there, with `(keyword, text)` pairs in text chunks.
///
/// # Errors
/// A folder that cannot be written to. Nothing is left half-written.
pub fn write_png(path: &Path, picture: &Picture, text: &[(&str, String)]) -> Result<()> {
    Place::named(path.into()).put(temporary(path, picture, text)?)?;
    Ok(())
}

/// A complete, synced file beside `path`, removed unless it is persisted.
pub(crate) fn temporary(
    path: &Path,
    picture: &Picture,
    text: &[(&str, String)],
) -> Result<NamedTempFile> {
    let fail = |source: io::Error| Error::Write { path: path.into(), source };
    let mut file = temporary_file(path).map_err(fail)?;
    let &Picture { width, height, ref rgb, .. } = picture;
    let bytes = encode(width, height, rgb, text, png::Compression::default())
        .map_err(|e| fail(io::Error::other(e)))?;
    file.write_all(&bytes).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    Ok(file)
}

/// A PNG file of `[height, width, 3]` bytes of RGB.
pub(crate) fn encode<K: AsRef<str>>(
    width: usize,
    height: usize,
    rgb: &[u8],
    text: &[(K, String)],
    compression: png::Compression,
) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(compression);
    for (keyword, text) in text {
        encoder.add_itxt_chunk(keyword.as_ref().to_string(), text.clone())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(rgb)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_say_how_they_were_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heart.png");
        let rgb = vec![255, 0, 0, 0, 0, 255];
        let picture = Picture { width: 2, height: 1, rgb: rgb.clone(), latents: vec![] };
        write_png(&path, &picture, &[("prompt", "red ♥".to_string())]).unwrap();

        let file = std::fs::File::open(&path).unwrap();
        let mut reader = png::Decoder::new(io::BufReader::new(file)).read_info().unwrap();
        let mut pixels = vec![0; 6];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, rgb);
        let chunk = &reader.info().utf8_text[0];
        assert_eq!(
            (chunk.keyword.as_str(), chunk.get_text().unwrap().as_str()),
            ("prompt", "red ♥")
        );
    }
}
