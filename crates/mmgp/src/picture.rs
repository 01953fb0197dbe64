//! Pictures on disk: PNG files that say how they were made, never half-written, never over another.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use mmgp_models::Picture;
use tempfile::NamedTempFile;

use crate::{Error, Result};

/// Writes `picture` to `path`, replacing what is there, with `(keyword, text)` pairs in text chunks.
///
/// # Errors
/// A folder that cannot be written to. Nothing is left half-written.
pub fn write_png(path: &Path, picture: &Picture, text: &[(&str, String)]) -> Result<()> {
    let file = temporary(path, picture, text)?;
    file.persist(path).map_err(|e| Error::Write { path: path.into(), source: e.error })?;
    Ok(())
}

/// Where pictures go: a name of their own, or the next free number.
#[derive(Clone, Debug)]
pub struct Names {
    folder: PathBuf,
    stem: String,
    /// The one name that may be written over, because the user named it.
    named: Option<PathBuf>,
}

impl Names {
    /// Names made from the prompt, in the current folder.
    pub fn of_prompt(prompt: &str) -> Self {
        Self { folder: PathBuf::new(), stem: slug(prompt), named: None }
    }

    /// `out` itself for the first picture, then its name with numbers; below `out`, if it is a
    /// folder, names made from the prompt.
    ///
    /// # Errors
    /// A file name that does not end in `.png`, a folder that does not exist.
    pub fn at(out: &Path, prompt: &str) -> Result<Self> {
        let fail = |path: &Path, message: String| Error::Write {
            path: path.into(),
            source: io::Error::new(io::ErrorKind::InvalidInput, message),
        };
        if out.is_dir() {
            return Ok(Self { folder: out.into(), ..Self::of_prompt(prompt) });
        }
        if out.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")) {
            return Err(fail(out, "expected a name that ends in .png, or a folder".into()));
        }
        let folder = out.parent().map(Path::to_path_buf).unwrap_or_default();
        if !folder.as_os_str().is_empty() && !folder.is_dir() {
            return Err(fail(out, format!("there is no folder {}", folder.display())));
        }
        let stem = out.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { folder, stem, named: Some(out.into()) })
    }

    /// Writes the next picture and returns its path. A file that exists is left alone, unless it is
    /// the one that the user named.
    ///
    /// # Errors
    /// A folder that cannot be written to. Nothing is left half-written.
    pub fn write(&mut self, picture: &Picture, text: &[(&str, String)]) -> Result<PathBuf> {
        if let Some(path) = self.named.take() {
            write_png(&path, picture, text)?;
            return Ok(path);
        }
        let first = self.folder.join(format!("{}.png", self.stem));
        let mut file = temporary(&first, picture, text)?;
        for number in 1u64.. {
            let name = match number {
                1 => format!("{}.png", self.stem),
                n => format!("{}-{n}.png", self.stem),
            };
            let path = self.folder.join(name);
            match file.persist_noclobber(&path) {
                Ok(_) => return Ok(path),
                Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => file = e.file,
                Err(e) => return Err(Error::Write { path, source: e.error }),
            }
        }
        unreachable!("there are more numbers than files")
    }
}

/// A complete, synced file beside `path`, removed unless it is persisted.
fn temporary(path: &Path, picture: &Picture, text: &[(&str, String)]) -> Result<NamedTempFile> {
    let fail = |source: io::Error| Error::Write { path: path.into(), source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".mmgp-")
        .suffix(".png.tmp")
        .permissions(permissions())
        .tempfile_in(folder)
        .map_err(fail)?;
    file.write_all(&encode(picture, text).map_err(|e| fail(io::Error::other(e)))?).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    Ok(file)
}

/// As any program's new file, less the umask (temporary files are private by default).
fn permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o666)
}

fn encode(picture: &Picture, text: &[(&str, String)]) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, picture.width as u32, picture.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in text {
        encoder.add_itxt_chunk((*keyword).to_string(), text.clone())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()?;
    Ok(bytes)
}

/// A prompt as a file name: letters and digits, everything else a hyphen, not too long.
fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    for c in prompt.chars().flat_map(char::to_lowercase) {
        match c.is_alphanumeric() {
            true => slug.push(c),
            false if slug.is_empty() || slug.ends_with('-') => {}
            false => slug.push('-'),
        }
        if slug.len() >= 60 {
            break;
        }
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { "picture".into() } else { slug.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        Picture { width: 2, height: 1, rgb: vec![255, 0, 0, 0, 0, 255], latents: vec![] }
    }

    #[test]
    fn names_come_from_the_prompt() {
        assert_eq!(slug("red heart"), "red-heart");
        assert_eq!(slug("  A/B: ..Ünïcode? \n"), "a-b-ünïcode");
        assert_eq!(slug("../../etc/passwd"), "etc-passwd");
        assert_eq!(slug("!!!"), "picture");
        assert!(slug(&"word ".repeat(100)).len() <= 64);
    }

    #[test]
    fn files_are_numbered_not_overwritten_and_say_how_they_were_made() {
        let dir = tempfile::tempdir().unwrap();
        let mut names = Names::at(dir.path(), "red heart").unwrap();
        let text = [("prompt", "red ♥".to_string())];
        let paths: Vec<_> = (0..3).map(|_| names.write(&picture(), &text).unwrap()).collect();
        let name = |i: usize| paths[i].file_name().unwrap().to_str().unwrap();
        assert_eq!(
            (name(0), name(1), name(2)),
            ("red-heart.png", "red-heart-2.png", "red-heart-3.png")
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "no temporary file is left");

        let decoder =
            png::Decoder::new(io::BufReader::new(std::fs::File::open(&paths[0]).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut rgb = vec![0; 6];
        reader.next_frame(&mut rgb).unwrap();
        assert_eq!(rgb, picture().rgb);
        let chunk = &reader.info().utf8_text[0];
        assert_eq!(
            (chunk.keyword.as_str(), chunk.get_text().unwrap().as_str()),
            ("prompt", "red ♥")
        );
    }

    #[test]
    fn a_name_that_was_given_is_written_over_once() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("mine.png");
        std::fs::write(&out, "old").unwrap();
        let mut names = Names::at(&out, "x").unwrap();
        assert_eq!(names.write(&picture(), &[]).unwrap(), out);
        assert_eq!(names.write(&picture(), &[]).unwrap(), dir.path().join("mine-2.png"));
        assert!(Names::at(&dir.path().join("mine.jpg"), "x").is_err());
        assert!(Names::at(&dir.path().join("none/mine.png"), "x").is_err());
    }
}
