//! Pictures from disk: what a video begins with.

use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageReader, imageops::FilterType};
use mmgp_models::Picture;

use crate::{Error, Result};

/// Reads a PNG, JPEG or WebP file, turns it upright, cuts it to the shape of `width` by `height` pixels around
/// its middle and scales it to that size. One that has it already is taken as it is.
///
/// # Errors
/// A file that cannot be read or is no picture; one without pixels.
pub fn read_picture(path: &Path, width: usize, height: usize) -> Result<Picture> {
    let fail = |why: image::ImageError| Error::Picture { path: path.into(), why: why.to_string() };
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let mut reader = reader.map_err(|e| fail(e.into()))?;
    reader.limits(image::Limits::default()); // of hostile files
    let mut decoder = reader.into_decoder().map_err(fail)?;
    let orientation = decoder.orientation().map_err(fail)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(fail)?;
    image.apply_orientation(orientation);
    let (width, height) = (width as u32, height as u32);
    let image = match (image.width(), image.height()) == (width, height) {
        true => image,
        false => image.resize_to_fill(width, height, FilterType::Lanczos3),
    };
    let rgb = image.into_rgb8();
    Ok(Picture { width: rgb.width() as usize, height: rgb.height() as usize, rgb: rgb.into_raw() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_cut_around_their_middle() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        // Red, green and blue fields of 8 by 8 pixels, side by side.
        let colour = |x: u32| image::Rgb([[255, 0, 0], [0, 255, 0], [0, 0, 255]][x as usize / 8]);
        image::RgbImage::from_fn(24, 8, |x, _| colour(x)).save(&path).unwrap();
        let whole = read_picture(&path, 24, 8)?;
        assert_eq!((whole.width, whole.height, &whole.rgb[..3]), (24, 8, &[255, 0, 0][..]));
        let middle = read_picture(&path, 16, 16)?;
        assert_eq!((middle.width, middle.height), (16, 16));
        assert_eq!(middle.rgb[3 * (8 * 16 + 8)..][..3], [0, 255, 0]);
        Ok(())
    }

    #[test]
    fn what_is_no_picture_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        for content in [&b""[..], b"\x89PNG\r\n\x1a\n rest", b"hello"] {
            std::fs::write(&path, content).unwrap();
            let error = read_picture(&path, 8, 8).unwrap_err().to_string();
            assert!(error.contains("a.png"), "{error}");
        }
        assert!(read_picture(&dir.path().join("none.jpg"), 8, 8).is_err());
    }
}
