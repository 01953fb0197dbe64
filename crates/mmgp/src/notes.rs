//! Small JSON files in a cache folder, each a note on one subject, for the next start.
//!
//! A note is named after a hash of its subject and holds it too: one that is damaged or on another subject is none.
//! A folder holds so many notes at most; the oldest make room.

use std::{
    fmt::Debug,
    fs,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Error, Result};

/// What a folder holds at most.
const MOST: usize = 256;
/// Digits of a hash in a name.
const DIGITS: usize = 24;

/// A folder of notes.
#[derive(Clone, Debug)]
pub(crate) struct Notes {
    folder: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Note<S, T> {
    subject: S,
    says: T,
}

impl Notes {
    /// Those in `folder`, which need not exist.
    pub(crate) fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// What the note on `subject` says, if there is one.
    pub(crate) fn read<S, T>(&self, subject: &S) -> Option<T>
    where
        S: Debug + PartialEq + DeserializeOwned,
        T: DeserializeOwned,
    {
        let note: Note<S, T> = mmgp_io::read_json(self.place(subject)).ok()?;
        (note.subject == *subject).then_some(note.says)
    }

    /// Writes the note on `subject` in place of the one there was.
    ///
    /// # Errors
    /// A folder that cannot be made or written to.
    pub(crate) fn write<S, T>(&self, subject: &S, says: &T) -> Result<()>
    where
        S: Debug + Serialize,
        T: Serialize,
    {
        fs::create_dir_all(&self.folder)
            .map_err(|source| Error::Write { path: self.folder.clone(), source })?;
        mmgp_io::write_json(self.place(subject), &Note { subject, says })?;
        let mut files = self.files();
        files.sort();
        for (_, oldest) in files.iter().take(files.len().saturating_sub(MOST)) {
            let _ = fs::remove_file(oldest);
        }
        Ok(())
    }

    /// Removes all notes, and the folder if nothing else is in it.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub(crate) fn clear(&self) -> Result<()> {
        for (_, path) in self.files() {
            fs::remove_file(&path).map_err(|source| Error::Write { path, source })?;
        }
        let _ = fs::remove_dir(&self.folder);
        Ok(())
    }

    pub(crate) fn place(&self, subject: &impl Debug) -> PathBuf {
        let key = blake3::hash(format!("{subject:?}").as_bytes());
        self.folder.join(format!("{}.json", &key.to_hex()[..DIGITS]))
    }

    /// The notes, and what was left of writing some, with their dates.
    fn files(&self) -> Vec<(SystemTime, PathBuf)> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let ours = files.filter(|file| {
            let name = file.file_name();
            let name = name.to_string_lossy();
            let hash = name.trim_start_matches('.').split_once(".json").map(|(hash, _)| hash);
            hash.is_some_and(|h| h.len() == DIGITS && h.bytes().all(|b| b.is_ascii_hexdigit()))
        });
        let date = |path: &PathBuf| fs::metadata(path).and_then(|m| m.modified());
        ours.map(|file| file.path()).map(|p| (date(&p).unwrap_or(UNIX_EPOCH), p)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_note_is_on_its_subject_alone() {
        let dir = tempfile::tempdir().unwrap();
        let notes = Notes::at(dir.path().join("cache/notes"));
        let (one, other) = ("one".to_string(), "other".to_string());
        let read = |subject: &String| notes.read::<String, u32>(subject);
        assert_eq!(read(&one), None);
        notes.write(&one, &1).unwrap();
        notes.write(&one, &2).unwrap();
        assert_eq!((read(&one), read(&other)), (Some(2), None));
        // Under the name of another.
        fs::copy(notes.place(&one), notes.place(&other)).unwrap();
        assert_eq!(read(&other), None);
        for damage in ["", "{", "[]", "{\"subject\":\"one\"}", "{\"subject\":\"one\",\"says\":-1}"]
        {
            fs::write(notes.place(&one), damage).unwrap();
            assert_eq!(read(&one), None, "{damage}");
        }
        notes.write(&one, &3).unwrap();
        assert_eq!(read(&one), Some(3));
    }

    #[test]
    fn the_oldest_make_room_and_what_is_none_stays() {
        let dir = tempfile::tempdir().unwrap();
        let notes = Notes::at(dir.path());
        fs::write(dir.path().join("thesis.json"), "{}").unwrap();
        let age = |at: usize, days: u64| {
            let file = fs::File::options().append(true).open(notes.place(&at)).unwrap();
            let date = UNIX_EPOCH + std::time::Duration::from_secs(86_400 * days);
            file.set_modified(date).unwrap();
        };
        for at in 0..MOST {
            notes.write(&at, &at).unwrap();
            age(at, 100 + at as u64);
        }
        age(7, 1);
        age(9, 2);
        let there = |at: usize| notes.read::<usize, usize>(&at) == Some(at);
        assert!((0..MOST).all(there));
        notes.write(&MOST, &MOST).unwrap();
        notes.write(&(MOST + 1), &(MOST + 1)).unwrap();
        let gone: Vec<usize> = (0..MOST + 2).filter(|&at| !there(at)).collect();
        assert_eq!(gone, [7, 9]);
        notes.clear().unwrap();
        let left = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name());
        assert_eq!(left.collect::<Vec<_>>(), ["thesis.json"]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let notes = Notes::at(dir.path().join("file/notes"));
        notes.write(&1, &1).unwrap_err();
        assert_eq!(notes.read::<u8, u8>(&1), None);
        notes.clear().unwrap();
    }
}
