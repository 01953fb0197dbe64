//! Where results go: the name that the user gave, or one made from the prompt; never over a file
//! that the user did not name, and never half-written.
//!
//! A result is made in a hidden file (or folder) beside its place and renamed when it is complete, so
//! that a process that is killed leaves what was there before.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use mmgp_models::Picture;
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    Error, Result, picture,
    video::{Video, VideoFormat, frames},
};

/// What is made, which decides the endings that a name can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A picture: `.png`.
    Picture,
    /// A video: an ending of [`VideoFormat`], `.mp4` where none is given.
    Video,
}

impl Medium {
    fn default_ending(self) -> Ending {
        match self {
            Medium::Picture => Ending::Png,
            Medium::Video => Ending::Video(VideoFormat::Mp4),
        }
    }

    fn ending_of(self, path: &Path) -> Result<Ending> {
        match self {
            Medium::Video => VideoFormat::of(path).map(Ending::Video),
            Medium::Picture => match path.extension() {
                Some(e) if e.eq_ignore_ascii_case("png") => Ok(Ending::Png),
                _ => Err(unfit(path, "expected a name that ends in .png, or a folder")),
            },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Png,
    Video(VideoFormat),
}

impl Ending {
    /// With its dot; empty for a folder.
    fn as_str(self) -> &'static str {
        match self {
            Ending::Png => ".png",
            Ending::Video(format) => format.ending(),
        }
    }
}

/// Where pictures or videos go: a name of their own, or the next free number.
#[derive(Clone, Debug)]
pub struct Names {
    folder: PathBuf,
    stem: String,
    ending: Ending,
    /// The one name that may be written over, because the user named it.
    named: Option<PathBuf>,
}

impl Names {
    /// Names made from the prompt, in the current folder.
    pub fn of_prompt(prompt: &str, medium: Medium) -> Self {
        let ending = medium.default_ending();
        Self { folder: PathBuf::new(), stem: slug(prompt, medium), ending, named: None }
    }

    /// `out` itself for the first result, then its name with numbers; below `out`, if it is a
    /// folder, names made from the prompt.
    ///
    /// # Errors
    /// A file name whose ending is not one of the medium's, a folder that does not exist.
    pub fn at(out: &Path, prompt: &str, medium: Medium) -> Result<Self> {
        if out.is_dir() {
            return Ok(Self { folder: out.into(), ..Self::of_prompt(prompt, medium) });
        }
        if out.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(unfit(out, "there is no such folder"));
        }
        let ending = medium.ending_of(out)?;
        let folder = out.parent().map(Path::to_path_buf).unwrap_or_default();
        if !folder.as_os_str().is_empty() && !folder.is_dir() {
            return Err(unfit(out, format!("there is no folder {}", folder.display())));
        }
        let stem = out.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let named = match ending {
            Ending::Video(format) => format.place(out),
            Ending::Png => out.into(),
        };
        Ok(Self { folder, stem, ending, named: Some(named) })
    }

    /// Writes the next picture and returns its path. A file that exists is left alone, unless it is
    /// the one that the user named.
    ///
    /// # Errors
    /// A folder that cannot be written to, names of videos. Nothing is left half-written.
    pub fn write(&mut self, picture: &Picture, text: &[(&str, String)]) -> Result<PathBuf> {
        let place = self.next();
        if self.ending != Ending::Png {
            return Err(unfit(&place.path(), "a picture cannot have a video's name"));
        }
        place.put(picture::temporary(&place.path(), picture, text)?)
    }

    /// Begins the next video, of frames of `width` by `height` pixels, `fps` of them a second.
    /// What exists is left alone, unless it is what the user named.
    ///
    /// # Errors
    /// Sizes and rates that the format cannot hold, a folder that cannot be written to, names of
    /// pictures.
    pub fn video(
        &mut self,
        width: usize,
        height: usize,
        fps: f64,
        text: &[(&str, String)],
    ) -> Result<Video> {
        let place = self.next();
        match self.ending {
            Ending::Video(format) => Video::begin(place, format, width, height, fps, text),
            Ending::Png => Err(unfit(&place.path(), "a video cannot have a picture's name")),
        }
    }

    fn next(&mut self) -> Place {
        Place {
            folder: self.folder.clone(),
            stem: self.stem.clone(),
            ending: self.ending.as_str(),
            named: self.named.take(),
        }
    }
}

/// Where one result goes.
#[derive(Debug)]
pub(crate) struct Place {
    folder: PathBuf,
    stem: String,
    ending: &'static str,
    named: Option<PathBuf>,
}

impl Place {
    /// `path` itself, written over if it exists.
    pub(crate) fn named(path: PathBuf) -> Self {
        Self { folder: PathBuf::new(), stem: String::new(), ending: "", named: Some(path) }
    }

    /// The name in question; a result may end up under the next free number.
    pub(crate) fn path(&self) -> PathBuf {
        self.named.clone().unwrap_or_else(|| self.numbered(1))
    }

    fn numbered(&self, number: u64) -> PathBuf {
        self.folder.join(match number {
            1 => format!("{}{}", self.stem, self.ending),
            n => format!("{}-{n}{}", self.stem, self.ending),
        })
    }

    /// Whether a folder that is put here would replace what is not ours.
    pub(crate) fn check_folder(&self) -> Result<()> {
        let Some(path) = self.named.as_deref().filter(|path| path.symlink_metadata().is_ok())
        else {
            return Ok(());
        };
        match frames::are_all(path) {
            Ok(true) => Ok(()),
            Ok(false) => Err(unfit(
                path,
                "it holds other things than frames, which would be lost; give another name",
            )),
            Err(source) => Err(Error::Write { path: path.into(), source }),
        }
    }

    /// Moves a complete file here and returns its path.
    pub(crate) fn put(&self, mut file: NamedTempFile) -> Result<PathBuf> {
        let fail = |path: &Path, source| Error::Write { path: path.into(), source };
        if let Some(path) = &self.named {
            file.persist(path).map_err(|e| fail(path, e.error))?;
            return Ok(path.clone());
        }
        for number in 1u64.. {
            let path = self.numbered(number);
            match file.persist_noclobber(&path) {
                Ok(_) => return Ok(path),
                Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => file = e.file,
                Err(e) => return Err(fail(&path, e.error)),
            }
        }
        unreachable!("there are more numbers than files")
    }

    /// Moves a complete folder here and returns its path.
    pub(crate) fn put_folder(&self, folder: TempDir) -> Result<PathBuf> {
        let fail = |path: &Path, source| Error::Write { path: path.into(), source };
        if let Some(path) = &self.named {
            self.check_folder()?;
            replace(&folder, path).map_err(|e| fail(path, e))?;
            return Ok(path.clone());
        }
        for number in 1u64.. {
            let path = self.numbered(number);
            // An empty folder holds the name until the complete one is renamed over it.
            match fs::create_dir(&path) {
                Ok(()) => {
                    return match fs::rename(folder.path(), &path) {
                        Ok(()) => Ok(path),
                        Err(e) => {
                            let _ = fs::remove_dir(&path);
                            Err(fail(&path, e))
                        }
                    };
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(fail(&path, e)),
            }
        }
        unreachable!("there are more numbers than files")
    }
}

/// Renames `new` to `path` and removes the folder that was there, if any.
fn replace(new: &TempDir, path: &Path) -> io::Result<()> {
    match renameat_with(CWD, new.path(), CWD, path, RenameFlags::EXCHANGE) {
        // The old folder has the temporary name now, and goes with it.
        Ok(()) => Ok(()),
        Err(Errno::NOENT) => fs::rename(new.path(), path),
        // A file system that cannot exchange: there is nothing at `path` for a moment.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) if path.exists() => {
            let old = temporary_folder(path)?;
            fs::rename(path, old.path())?;
            fs::rename(new.path(), path).inspect_err(|_| {
                let _ = fs::rename(old.keep(), path);
            })
        }
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => fs::rename(new.path(), path),
        Err(e) => Err(e.into()),
    }
}

/// A new file beside `path`, removed unless it is persisted.
pub(crate) fn temporary_file(path: &Path) -> io::Result<NamedTempFile> {
    // As any program's new file, less the umask (temporary files are private by default).
    tempfile::Builder::new()
        .prefix(".mmgp-")
        .suffix(".tmp")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder_of(path))
}

/// A new folder beside `path`, removed with all that is in it unless it is renamed.
pub(crate) fn temporary_folder(path: &Path) -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix(".mmgp-")
        .suffix(".tmp")
        .permissions(Permissions::from_mode(0o777))
        .tempdir_in(folder_of(path))
}

/// A file beside `path` that has no name.
pub(crate) fn nameless_file(path: &Path) -> io::Result<File> {
    tempfile::tempfile_in(folder_of(path))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An error of a name, size or rate that cannot be.
pub(crate) fn unfit(path: &Path, message: impl Into<String>) -> Error {
    Error::Write {
        path: path.into(),
        source: io::Error::new(io::ErrorKind::InvalidInput, message.into()),
    }
}

/// A prompt as a file name: letters and digits, everything else a hyphen, not too long.
fn slug(prompt: &str, medium: Medium) -> String {
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
    match (slug.trim_end_matches('-'), medium) {
        ("", Medium::Picture) => "picture".into(),
        ("", Medium::Video) => "video".into(),
        (slug, _) => slug.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        Picture { width: 2, height: 1, rgb: vec![255, 0, 0, 0, 0, 255], latents: vec![] }
    }

    #[test]
    fn names_come_from_the_prompt() {
        let slug = |prompt| slug(prompt, Medium::Picture);
        assert_eq!(slug("red heart"), "red-heart");
        assert_eq!(slug("  A/B: ..Ünïcode? \n"), "a-b-ünïcode");
        assert_eq!(slug("../../etc/passwd"), "etc-passwd");
        assert_eq!(slug("!!!"), "picture");
        assert_eq!(super::slug("!!!", Medium::Video), "video");
        assert!(slug(&"word ".repeat(100)).len() <= 64);
    }

    #[test]
    fn files_are_numbered_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let mut names = Names::at(dir.path(), "red heart", Medium::Picture).unwrap();
        let paths: Vec<_> = (0..3).map(|_| names.write(&picture(), &[]).unwrap()).collect();
        let name = |i: usize| paths[i].file_name().unwrap().to_str().unwrap();
        assert_eq!(
            (name(0), name(1), name(2)),
            ("red-heart.png", "red-heart-2.png", "red-heart-3.png")
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "no temporary file is left");
    }

    #[test]
    fn a_name_that_was_given_is_written_over_once() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("mine.png");
        fs::write(&out, "old").unwrap();
        let mut names = Names::at(&out, "x", Medium::Picture).unwrap();
        assert_eq!(names.write(&picture(), &[]).unwrap(), out);
        assert_eq!(names.write(&picture(), &[]).unwrap(), dir.path().join("mine-2.png"));
    }

    #[test]
    fn unknown_endings_and_folders_are_errors_that_name_what_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let fail = |name: &str, medium| {
            let out = dir.path().join(name);
            let message = Names::at(&out, "x", medium).unwrap_err().to_string();
            assert!(message.starts_with(out.to_str().unwrap()), "{message}");
            message
        };
        assert!(fail("mine.jpg", Medium::Picture).contains(".png"));
        assert!(fail("mine.mp4", Medium::Picture).contains(".png"));
        for name in ["mine.avi", "mine", ".mp4"] {
            let message = fail(name, Medium::Video);
            for ending in [".mp4", ".gif", ".webp", ".png"] {
                assert!(message.contains(ending), "{message}");
            }
        }
        for medium in [Medium::Picture, Medium::Video] {
            assert!(fail("none/mine.png", medium).contains("there is no folder"));
            assert!(fail("none.png/", medium).contains("there is no such folder"));
        }
    }

    #[test]
    fn a_medium_has_its_own_endings() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str, medium| {
            let out = dir.path().join(name);
            Names::at(&out, "a dog", medium).unwrap().next().path()
        };
        assert_eq!(path("", Medium::Picture), dir.path().join("a-dog.png"));
        assert_eq!(path("", Medium::Video), dir.path().join("a-dog.mp4"));
        assert_eq!(path("walk.WebP", Medium::Video), dir.path().join("walk.WebP"));
        assert_eq!(path("walk.png", Medium::Video), dir.path().join("walk"), "a folder of frames");
        assert_eq!(path("walk.png", Medium::Picture), dir.path().join("walk.png"));
    }

    #[test]
    fn names_of_one_medium_are_not_of_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let names = |medium| Names::at(dir.path(), "x", medium).unwrap();
        assert!(names(Medium::Video).write(&picture(), &[]).is_err());
        assert!(names(Medium::Picture).video(16, 16, 8., &[]).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
