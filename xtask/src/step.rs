//! Running one command, told as it begins and as it ends.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

/// The workspace's root: chores run there, wherever they were called.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    let dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    root().join(dir)
}

/// The commit that is checked out, marked if files differ from it; `None` outside a checkout.
pub(crate) fn commit() -> Option<String> {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]);
    let told = git.current_dir(root()).output().ok().filter(|told| told.status.success())?;
    Some(String::from_utf8(told.stdout).ok()?.trim().to_string())
}

/// Cargo with these arguments, in the workspace's root.
pub(crate) fn cargo(args: &[&str]) -> Command {
    // The cargo that runs us, so that `cargo +nightly xtask` means what it says.
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Runs `command` with its output let through; how long it took.
///
/// # Errors
/// A command that cannot be started, or fails.
pub(crate) fn run(name: &str, command: &mut Command) -> Result<Duration> {
    eprintln!("\n==> {name}: {}", shown(command));
    let begun = Instant::now();
    let status = command.status().with_context(|| format!("cannot run {}", shown(command)))?;
    let took = begun.elapsed();
    ensure!(status.success(), "{name} failed after {:.1} s ({status})", took.as_secs_f64());
    eprintln!("==> {name}: {:.1} s", took.as_secs_f64());
    Ok(took)
}

/// The command as it would be typed.
fn shown(command: &Command) -> String {
    let envs = command.get_envs().filter_map(|(key, value)| {
        Some(format!("{}='{}' ", key.to_string_lossy(), value?.to_string_lossy()))
    });
    let args = command.get_args().map(|arg| format!(" {}", arg.to_string_lossy()));
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    envs.chain([program.to_string_lossy().into_owned()]).chain(args).collect()
}
