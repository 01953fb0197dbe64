//! The CPU build hands over to `mmgp-cuda` where a GPU is wanted and that one starts, and says why where not.
//! Siblings here are scripts, and a program that is really linked against a library.
#![cfg(all(unix, not(feature = "cuda")))]
#![allow(clippy::unwrap_used)] // helpers of tests may panic

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard},
};

use tempfile::TempDir;

/// A command with room for a sibling. One at a time: an executable that is being written cannot be started, and
/// a process that another test forks meanwhile holds it open for a moment.
struct Place {
    dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::hard_link(env!("CARGO_BIN_EXE_mmgp"), dir.path().join("bin/mmgp")).unwrap();
        Self { dir, _alone }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn script(&self, name: &str, body: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs `mmgp generate` of one step with `args`, in a world without CUDA but for `env`.
    fn generate(&self, args: &[&str], env: &[(&str, &Path)]) -> Run {
        let mut command = Command::new(self.path("bin/mmgp"));
        command.args(["generate", "red heart", "--steps", "1", "--out", "x.png"]).args(args);
        for name in ["CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "RUST_LOG"] {
            command.env_remove(name);
        }
        command.env("HOME", self.dir.path()).envs(env.iter().copied());
        let out = command.current_dir(self.dir.path()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Run { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
    }

    fn drew(&self) -> bool {
        self.path("x.png").is_file()
    }
}

/// A sibling that says what it was called with.
fn speaking() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "if [ \"$1\" = --version ]; then echo 'mmgp {version} (CUDA)'; exit; fi\n\
         echo \"sibling of $PPID: $*\"; exit 7"
    )
}

#[test]
fn hands_over_with_arguments_and_exit_code() {
    for name in ["bin/mmgp-cuda", "lib/mmgp/mmgp-cuda"] {
        let place = Place::new();
        place.script(name, &speaking());
        for device in [&[][..], &["--device", "auto"], &["--device", "cuda:1"]] {
            let run = place.generate(device, &[]);
            assert_eq!(run.code, Some(7), "{name} {device:?}: {}", run.stderr);
            let words = format!("generate red heart --steps 1 --out x.png {}", device.join(" "));
            // The same process: its parent is this test.
            let said = format!("sibling of {}: {}", std::process::id(), words.trim());
            assert_eq!((run.stdout.trim(), run.stderr.as_str()), (said.as_str(), ""));
        }
        assert!(!place.drew());
        assert_eq!(place.generate(&["--device", "cpu"], &[]).code, Some(0));
        assert!(place.drew());
    }
}

#[test]
fn without_a_sibling_auto_is_silent_and_cuda_fails() {
    let place = Place::new();
    let run = place.generate(&["--device", "cuda"], &[]);
    assert_eq!(run.code, Some(1));
    for text in ["bin/mmgp-cuda", "lib/mmgp/mmgp-cuda", "--features cuda"] {
        assert!(run.stderr.contains(text), "no {text} in: {}", run.stderr);
    }
    assert!(!place.drew());
    let run = place.generate(&[], &[]);
    assert!(run.code == Some(0) && place.drew(), "{}", run.stderr);
    assert!(!run.stderr.contains("CPU"), "{}", run.stderr);
}

/// What the loader says of libraries, and of functions that an older driver lacks.
const SYMBOL: &str =
    "echo \"$0: symbol lookup error: $0: undefined symbol: cuNew_v2\" >&2; exit 127";

#[test]
fn a_sibling_that_does_not_start_is_named() {
    let place = Place::new();
    let cases = [
        (SYMBOL.to_string(), &["undefined symbol: cuNew_v2", "580"][..]),
        ("kill -9 $$".to_string(), &["does not start", "signal: 9"]),
        ("echo mmgp 0.0.0 '(CUDA)'".to_string(), &["`mmgp 0.0.0 (CUDA)`", "expected `mmgp "]),
        // The CPU build under the sibling's name would start itself for ever.
        (
            format!("echo mmgp {}", env!("CARGO_PKG_VERSION")),
            &["(CUDA)`: build both from one source"],
        ),
    ];
    for (body, expected) in cases {
        place.script("bin/mmgp-cuda", &body);
        let run = place.generate(&["--device", "cuda"], &[]);
        assert_eq!((run.code, place.drew()), (Some(1), false), "{body}");
        for text in expected {
            assert!(run.stderr.contains(text), "no {text:?} in: {}", run.stderr);
        }
        let run = place.generate(&[], &[]);
        assert_eq!((run.code, place.drew()), (Some(0), true), "{body}: {}", run.stderr);
        let line = run.stderr.lines().find(|line| line.starts_with("running on the CPU: "));
        assert!(line.is_some_and(|line| line.contains(expected[0])), "{}", run.stderr);
        let run = place.generate(&["--quiet"], &[]);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        fs::remove_file(place.path("x.png")).unwrap();
    }
}

#[test]
fn libraries_are_named_and_found_in_a_toolkit_or_wheels() {
    let place = Place::new();
    let (lib, source) = (place.path("toolkit/lib64"), place.path("program.c"));
    fs::create_dir_all(&lib).unwrap();
    let cc = |args: &[&str]| {
        let status = Command::new("cc").args(args).current_dir(place.dir.path()).status().unwrap();
        assert!(status.success(), "cc {args:?}");
    };
    // Two libraries that no machine has, and a program that needs both.
    let names = ["libmmgp-one.so.13", "libmmgp-two.so.10"];
    for (name, function) in names.into_iter().zip(["one", "two"]) {
        fs::write(&source, format!("int {function}(void) {{ return 1; }}")).unwrap();
        let soname = format!("-Wl,-soname,{name}");
        let out = format!("toolkit/lib64/{name}");
        cc(&["-shared", "-fPIC", &soname, "-o", &out, "program.c"]);
    }
    let version = env!("CARGO_PKG_VERSION");
    let program = format!(
        "#include <stdio.h>\n int one(void); int two(void);\n\
         int main(int n, char **v) {{ puts(n == 2 ? \"mmgp {version} (CUDA)\" : v[1]); \
         return one() + two() + (n == 2 ? -2 : 5); }}"
    );
    fs::write(&source, program).unwrap();
    let libraries = names.map(|name| format!("toolkit/lib64/{name}"));
    cc(&["-o", "bin/mmgp-cuda", "program.c", &libraries[0], &libraries[1]]);

    let run = place.generate(&["--device", "cuda"], &[]);
    assert_eq!(run.code, Some(1));
    let both = "without libmmgp-one.so.13, libmmgp-two.so.10: ";
    assert!(run.stderr.contains(both), "{}", run.stderr);
    let run = place.generate(&[], &[]);
    assert_eq!((run.code, place.drew()), (Some(0), true), "{}", run.stderr);
    assert!(run.stderr.starts_with("running on the CPU: "), "{}", run.stderr);

    let started = |env: &[(&str, &Path)]| {
        let run = place.generate(&["--device", "cuda"], env);
        assert_eq!((run.code, run.stdout.trim()), (Some(7), "generate"), "{}", run.stderr);
    };
    started(&[("LD_LIBRARY_PATH", &lib)]);
    started(&[("CUDA_HOME", &place.path("toolkit"))]);
    started(&[("CUDA_HOME", &place.path("toolkit")), ("LD_LIBRARY_PATH", Path::new("/nowhere"))]);
    // One of them missing everywhere is the one that is named.
    let wheels = place.path("venv/lib/python3.12/site-packages/nvidia/cu13/lib");
    fs::create_dir_all(&wheels).unwrap();
    fs::rename(lib.join(names[0]), wheels.join(names[0])).unwrap();
    let run = place.generate(&["--device", "cuda"], &[("VIRTUAL_ENV", &place.path("venv"))]);
    assert!(run.stderr.contains("without libmmgp-two.so.10: "), "{}", run.stderr);
    fs::rename(lib.join(names[1]), wheels.join(names[1])).unwrap();
    started(&[("VIRTUAL_ENV", &place.path("venv"))]);
}
