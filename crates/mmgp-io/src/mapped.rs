//! One open file: mapped read-only and shared, and still open for positioned reads.
//!
//! Both ways to its bytes have their use. The map costs nothing and is what gets registered for direct copies; but a page of it that
//! vanished, because another program truncated the file, kills the process. A positioned read of such a page is an error.
//! This is the only file of the crate with `unsafe`. The map is never private and never writable, and the type offers no way to
//! make it so.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::{Mmap, MmapOptions};

use crate::error::{Error, Fault, Result};

/// A file that weights lie in, open and mapped as long as anything refers to it.
pub struct SourceFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    identity: FileIdentity,
}

/// What tells one state of one file from another: a cache key that survives renames and notices rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device and inode; zeros where the system has none.
    node: (u64, u64),
    len: u64,
    modified: Option<SystemTime>,
}

impl SourceFile {
    /// Opens and maps a regular file; an empty one is allowed.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped, [`Error::Malformed`] if it is a folder, a pipe or a device.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        let path = path.as_ref();
        let file = open_regular(path)?;
        let metadata = file.metadata().map_err(|e| Error::io(path, "inspect", e))?;
        let len = usize::try_from(metadata.len())
            .map_err(|_| Error::io(path, "map", io::Error::from(io::ErrorKind::FileTooLarge)))?;
        // SAFETY: the map is read-only and shared, and lives no longer than `file` beside it. That nobody writes to or truncates a
        // weight file in use is what the user of a model file upholds, as with every program that maps one; our own `Writer` never
        // touches an existing file, it renames a new one over it, which leaves this map on the old one.
        let map = unsafe { MmapOptions::new().len(len).map(&file) }
            .map_err(|e| Error::io(path, "map", e))?;
        Ok(Arc::new(Self {
            path: path.to_path_buf(),
            file,
            map,
            identity: FileIdentity::of(&metadata),
        }))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.identity.len
    }

    /// Whether it had no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Which file in which state this is.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Fills `buf` from byte `offset` of the file; does not move any cursor and may run on many threads at once.
    ///
    /// # Errors
    /// [`Error::Read`] with file and offset, also when the file has meanwhile become shorter.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, buf, offset).map_err(|source| Error::Read {
            path: self.path.clone(),
            offset,
            wanted: buf.len() as u64,
            source,
        })
    }

    /// The whole file as mapped memory: read from disk as it is touched, and shared with every process that maps it.
    pub fn mapped(&self) -> &[u8] {
        &self.map
    }
}

impl fmt::Debug for SourceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceFile")
            .field("path", &self.path)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl FileIdentity {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let node = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino())
        };
        #[cfg(not(unix))]
        let node = (0, 0);
        Self { node, len: metadata.len(), modified: metadata.modified().ok() }
    }
}

/// Opens a file for reading, but nothing that could block or has no length (a pipe, a device).
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a folder" } else { "a pipe, a socket or a device" };
        return Err(Fault::new(path, "a file", found, "give the path of the file itself").into());
    }
    File::open(path).map_err(|e| Error::io(path, "open", e))
}

#[cfg(unix)]
fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buf.is_empty() {
        match file.seek_read(buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_truncated_file_is_an_error_to_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        fs::write(&path, [7u8; 9000]).unwrap();
        let source = SourceFile::open(&path).unwrap();
        let mut buf = [0u8; 4];
        source.read_exact_at(&mut buf, 8996).unwrap();
        assert_eq!(buf, [7; 4]);

        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let message = source.read_exact_at(&mut buf, 8996).unwrap_err().to_string();
        assert!(message.contains("weights: cannot read 4 bytes at byte 8996"), "{message}");
        assert_ne!(SourceFile::open(&path).unwrap().identity(), source.identity());
    }

    #[test]
    fn folders_and_empty_files() {
        let dir = tempfile::tempdir().unwrap();
        assert!(SourceFile::open(dir.path()).unwrap_err().to_string().contains("found a folder"));
        let path = dir.path().join("empty");
        fs::write(&path, []).unwrap();
        let source = SourceFile::open(&path).unwrap();
        assert!(source.is_empty() && source.mapped().is_empty());
    }
}
