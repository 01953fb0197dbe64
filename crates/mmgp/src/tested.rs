//! What was tested on this machine already: the self-test of a GPU's kernels runs once for each card, driver
//! and build, and a note in the user's cache folder says that it passed.
//!
//! The note is on all that the result depends on. Where that is not known, or no note can be written, the test runs
//! at each start.

use serde::{Deserialize, Serialize};

use crate::notes::Notes;

/// What a self-test's result depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Subject {
    /// The card's name and compute capability.
    pub(crate) card: String,
    /// The driver.
    pub(crate) driver: String,
    /// This crate's version.
    pub(crate) version: String,
    /// The hash of the kernels' binary image, and of versions of libraries that were tested with them.
    pub(crate) kernels: String,
}

/// Runs `test`, unless one of `notes` says that `subject` passed it; writes the note when it passes.
///
/// # Errors
/// Those of `test`.
pub(crate) fn once<E>(
    notes: Option<&Notes>,
    subject: Option<&Subject>,
    test: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let note = notes.zip(subject);
    if note.is_some_and(|(notes, subject)| notes.read::<_, Passed>(subject).is_some()) {
        return Ok(());
    }
    test()?;
    if let Some((notes, subject)) = note
        && let Err(why) = notes.write(subject, &Passed::Passed)
    {
        tracing::info!("the self-test of the GPU's kernels will run again: {why}");
    }
    Ok(())
}

/// All that a note says.
#[derive(Serialize, Deserialize)]
enum Passed {
    Passed,
}

/// The driver's library that this process runs on, by what is mapped into it (`maps` is Linux'
/// `/proc/self/maps`): its path, whose end is the driver's version on most machines, and its size and date,
/// which differ between versions where it is not.
pub(crate) fn driver_in(maps: &str) -> Option<String> {
    // Address, rights, offset, device and inode come before the path.
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let path = paths.find(|path| {
        let name = path.rsplit('/').next().unwrap_or_default();
        name == "libcuda.so" || name.starts_with("libcuda.so.")
    })?;
    let about = std::fs::metadata(path).ok()?;
    let date = about.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(format!("{path}, {} bytes of {}", about.len(), date.as_secs()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{cell::Cell, fs, path::Path};

    use super::*;

    fn subject(driver: &str) -> Subject {
        let [card, version, kernels] = ["H100 (sm_90)", "0.1.0", "0123"].map(String::from);
        Subject { card, driver: driver.into(), version, kernels }
    }

    /// How often the test ran, and whether all passed.
    fn run(folder: Option<&Path>, subjects: &[Option<Subject>], passes: bool) -> (usize, bool) {
        let ran = Cell::new(0);
        let test = || {
            ran.set(ran.get() + 1);
            passes.then_some(()).ok_or("wrong")
        };
        let notes = folder.map(Notes::at);
        let passed =
            subjects.iter().all(|subject| once(notes.as_ref(), subject.as_ref(), test).is_ok());
        (ran.get(), passed)
    }

    #[test]
    fn what_passed_is_not_tested_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("cache/self-test");
        let (old, new) = (Some(subject("580.65")), Some(subject("580.95")));
        let all = [old.clone(), old.clone(), new.clone(), old, new];
        assert_eq!(run(Some(&folder), &all, true), (2, true));
    }

    #[test]
    fn each_part_of_a_subject_counts() {
        let dir = tempfile::tempdir().unwrap();
        let one = subject("580");
        let other = |change: fn(&mut Subject)| {
            let mut other = one.clone();
            change(&mut other);
            Some(other)
        };
        let all = [
            Some(one.clone()),
            other(|s| s.card.push('x')),
            other(|s| s.driver.push('x')),
            other(|s| s.version.push('x')),
            other(|s| s.kernels.push('x')),
        ];
        assert_eq!(run(Some(dir.path()), &all, true), (5, true));
        assert_eq!(run(Some(dir.path()), &all, true), (0, true));
    }

    #[test]
    fn without_a_note_it_runs_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let one = Some(subject("580"));
        let twice = [one.clone(), one.clone()];
        assert_eq!(run(Some(dir.path()), std::slice::from_ref(&one), false), (1, false));
        assert_eq!(run(None, &twice, true), (2, true));
        assert_eq!(run(Some(dir.path()), &[None, None], true), (2, true));
        // A folder that cannot be made, since a file is there.
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(run(Some(&file.join("self-test")), &twice, true), (2, true));
        // The failure above left no note; a damaged one is none.
        assert_eq!(run(Some(dir.path()), &twice, true), (1, true));
        fs::write(Notes::at(dir.path()).place(&subject("580")), "{").unwrap();
        assert_eq!(run(Some(dir.path()), &twice, true), (1, true));
    }

    #[test]
    fn the_driver_is_what_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libcuda.so.580.95.05");
        let maps = format!(
            "55d0-55d1 r-xp 00000000 08:01 12   /usr/bin/mmgp\n\
             7f00-7f01 r--p 00000000 08:01 34   /usr/lib/libcudart.so.13\n\
             7f02-7f03 r--p 00000000 08:01 56   {}\n\
             7ffe-7fff rw-p 00000000 00:00 0    [stack]\n",
            path.display()
        );
        assert_eq!(driver_in(&maps), None, "a library that is gone tells nothing");
        fs::write(&path, "12345").unwrap();
        let driver = driver_in(&maps).unwrap();
        assert!(driver.contains("libcuda.so.580.95.05, 5 bytes of "), "{driver}");
        fs::write(&path, "123456").unwrap();
        assert_ne!(driver_in(&maps).unwrap(), driver);
        assert_eq!(driver_in(&maps.replace("libcuda.so", "libnocuda.so")), None);
        assert_eq!(driver_in(""), None);
    }
}
