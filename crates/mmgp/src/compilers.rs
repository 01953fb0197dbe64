//! Processes of a program that have the driver compile kernels, side by side.

use std::{
    io::Read as _,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// What processes that compile have in their environment, so that a program which is no compiler does not start further ones.
const COMPILING: &str = "MMGP_COMPILES_KERNELS";
/// How long one may take: several times what the longest takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Starts `program compile-kernels NAME ORDINAL` for each of `names`, at most so many `at_once`, and waits for all.
///
/// # Errors
/// The first that does not start, fails, or takes longer than `patience`, in words; those that run then are waited for.
pub(crate) fn run(
    program: &Path,
    names: &[&str],
    ordinal: usize,
    at_once: usize,
    patience: Duration,
) -> Result<(), String> {
    if std::env::var_os(COMPILING).is_some() {
        return Err(format!("{} is no compiler of kernels", program.display()));
    }
    let called = |name: &str| format!("{} compile-kernels {name}", program.display());
    let mut waiting = names.iter();
    let mut running: Vec<(&str, Child, Instant)> = Vec::new();
    let mut failed = None;
    loop {
        while running.len() < at_once.max(1)
            && failed.is_none()
            && let Some(name) = waiting.next()
        {
            let mut command = Command::new(program);
            command.args(["compile-kernels", name, &ordinal.to_string()]).env(COMPILING, "1");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            match command.spawn() {
                Ok(child) => running.push((name, child, Instant::now())),
                Err(why) => failed = Some(format!("{}: {why}", called(name))),
            }
        }
        // All that were started are waited for, so that none is left behind.
        let mut left = Vec::new();
        for (name, mut child, begun) in running {
            match child.try_wait() {
                Ok(None) if begun.elapsed() < patience => left.push((name, child, begun)),
                Ok(Some(status)) if status.success() => {}
                Ok(Some(status)) => {
                    let mut said = String::new();
                    let read = child.stderr.take().map(|mut from| from.read_to_string(&mut said));
                    drop(read);
                    let said = said.lines().last().unwrap_or_default();
                    failed = failed.or(Some(format!("{}: {status}: {said}", called(name))));
                }
                Ok(None) | Err(_) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    failed = failed.or(Some(format!("{}: it does not end", called(name))));
                }
            }
        }
        running = left;
        if running.is_empty() && (failed.is_some() || waiting.as_slice().is_empty()) {
            return failed.map_or(Ok(()), Err);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

    use super::{PATIENCE, thread};

    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn program(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let text = format!("#!/bin/sh\n[ \"$1\" = compile-kernels ] || exit 0\n{text}\n");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        // A process that another test starts may hold the file open for a moment, and then it does not start.
        while std::process::Command::new(&path).status().is_err() {
            thread::sleep(Duration::from_millis(5));
        }
        (dir, path)
    }

    fn run(path: &Path, at_once: usize, patience: Duration) -> Result<(), String> {
        super::run(path, &NAMES, 2, at_once, patience)
    }

    #[test]
    fn each_is_compiled_once_and_what_fails_says_why() {
        let (dir, path) = program("echo \"$1 $2 $3\" >> \"$(dirname \"$0\")/log\"");
        for at_once in [0, 1, 2, 9] {
            run(&path, at_once, PATIENCE).unwrap();
            let log = fs::read_to_string(dir.path().join("log")).unwrap();
            let mut lines: Vec<&str> = log.lines().collect();
            lines.sort_unstable();
            assert_eq!(lines, NAMES.map(|name| format!("compile-kernels {name} 2")));
            fs::remove_file(dir.path().join("log")).unwrap();
        }
        let (_dir, path) = program("echo first >&2; echo no memory >&2; exit 3");
        let why = run(&path, 1, PATIENCE).unwrap_err();
        assert!(why.contains("program compile-kernels a: exit status: 3: no memory"), "{why}");
        let why = run(Path::new("/nowhere/at all"), 2, PATIENCE).unwrap_err();
        assert!(why.contains("/nowhere/at all compile-kernels a: "), "{why}");
        let (_dir, path) = program("exec sleep 60");
        let why = run(&path, 3, Duration::from_millis(50)).unwrap_err();
        assert!(why.contains("does not end"), "{why}");
    }
}
