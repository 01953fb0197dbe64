//! Runs the command, and makes copies of the demo to damage.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The demo pipeline beside the source.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-flux").canonicalize().unwrap()
}

/// A run of the command in `dir`.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

pub fn mmgp(dir: &Path, args: &[&str]) -> Run {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_mmgp"))
        .current_dir(dir)
        .args(args)
        .env("XDG_CACHE_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"))
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

impl Run {
    /// The hash of the latents that the run printed.
    pub fn latents(&self) -> &str {
        let (_, rest) = self.stdout.split_once("(latents ").expect("a hash");
        rest.split(')').next().unwrap()
    }
}

/// A copy of the demo whose files are links, so that one of them can be replaced.
pub fn copy_of_demo(to: &Path) -> PathBuf {
    let root = to.join("pipeline");
    link_folder(&demo(), &root);
    root
}

fn link_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            link_folder(&entry.path(), &target);
        } else {
            std::os::unix::fs::symlink(entry.path(), target).unwrap();
        }
    }
}

/// Replaces a file of a copy.
pub fn replace(file: &Path, content: impl AsRef<[u8]>) {
    fs::remove_file(file).unwrap();
    fs::write(file, content).unwrap();
}

/// Replaces one text by another in a JSON file of a copy.
pub fn edit(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{} has no {from}", file.display());
    replace(file, text.replacen(from, to, 1));
}

/// The pictures in a folder.
pub fn pictures(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut list: Vec<_> = files.filter(|p| p.is_file()).collect();
    list.sort();
    list
}

/// RGB pixels of a PNG.
pub fn pixels(path: &Path) -> Vec<u8> {
    let decoder = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut rgb).unwrap();
    rgb
}
