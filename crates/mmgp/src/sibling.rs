//! `mmgp-cuda`: the same command, built for NVIDIA GPUs, beside this one.
//!
//! A build that uses CUDA is linked against CUDA's libraries and does not even start where one is missing. So
//! the command that users start is the CPU build, and where a GPU is wanted it becomes its sibling, if that
//! starts. Whether it does is found out by starting it for its version: the loader that will load it knows
//! which libraries it needs and where they are looked for, and nothing else does for certain.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use mmgp::DeviceChoice;

/// What the sibling answers to `--version`: that of this source, built for CUDA.
const ANSWER: &str = concat!("mmgp ", env!("CARGO_PKG_VERSION"), " (CUDA)");

/// Becomes `mmgp-cuda`, with this process' arguments, where `device` asks for a GPU; returns where the run is
/// to go on here, on the CPU. `tell` hears why, unless there is nothing to wonder about.
///
/// # Errors
/// A GPU was asked for by name, and there is no sibling that starts.
pub(crate) fn hand_over(device: DeviceChoice, tell: impl FnOnce(&str)) -> anyhow::Result<()> {
    if device == DeviceChoice::Cpu {
        return Ok(());
    }
    match (find().and_then(Sibling::ready), device) {
        (Ok(sibling), _) => sibling.become_it(),
        (Err(why), DeviceChoice::Cuda(_)) => anyhow::bail!("--device {device}: {why}"),
        (Err(why @ Trouble::Absent { .. }), _) => {
            tracing::info!("running on the CPU: {why}");
            Ok(())
        }
        (Err(why), _) => {
            tell(&format!("running on the CPU: {why}"));
            Ok(())
        }
    }
}

/// Why there is no sibling to hand over to.
#[derive(Debug)]
enum Trouble {
    /// It is in none of these places.
    Absent { places: Vec<PathBuf> },
    /// Libraries that it needs are found nowhere.
    Libraries { sibling: PathBuf, missing: Vec<String> },
    /// It does not start for another reason, which it, or the loader, gave.
    Fails { sibling: PathBuf, said: String },
    /// It starts and is something else.
    Other { sibling: PathBuf, answer: String },
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { places } => {
                let places: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
                write!(
                    f,
                    "this build of mmgp has no GPU support, and there is no {}; build mmgp with \
                     `--features cuda` and put it there under that name",
                    places.join(" or ")
                )
            }
            Self::Libraries { sibling, missing } => {
                let names = missing.join(", ");
                write!(f, "{} does not start without {names}: ", sibling.display())?;
                write!(f, "{}", remedy(missing))
            }
            Self::Fails { sibling, said } => {
                write!(f, "{} does not start: {said}", sibling.display())?;
                if said.contains("undefined symbol: cu") {
                    f.write_str(
                        "; CUDA 13 needs an NVIDIA driver from 580 on and its own libraries",
                    )?;
                }
                Ok(())
            }
            Self::Other { sibling, answer } => write!(
                f,
                "{} is `{answer}`, expected `{ANSWER}`: build both from one source",
                sibling.display()
            ),
        }
    }
}

/// Where what is missing comes from.
fn remedy(missing: &[String]) -> String {
    let mut wheels = Vec::new();
    let mut ways = Vec::new();
    for library in missing {
        let wheel = match library.split('.').next().unwrap_or_default() {
            "libcuda" => {
                ways.push("libcuda comes with NVIDIA's driver (580 or newer)".to_string());
                continue;
            }
            "libcudart" => "nvidia-cuda-runtime",
            "libcublas" | "libcublasLt" => "nvidia-cublas",
            "libcurand" => "nvidia-curand",
            "libnvrtc" => "nvidia-cuda-nvrtc",
            _ => continue,
        };
        if !wheels.contains(&wheel) {
            wheels.push(wheel);
        }
    }
    if !wheels.is_empty() {
        ways.push(format!(
            "install the libraries of the CUDA 13 toolkit, or their wheels (`pip install {}`), and name \
             the folder in CUDA_HOME or LD_LIBRARY_PATH if they are not found then",
            wheels.join(" ")
        ));
    }
    if ways.is_empty() {
        ways.push("install it, or name its folder in LD_LIBRARY_PATH".to_string());
    }
    ways.join("; ")
}

/// A sibling that was found.
struct Sibling {
    path: PathBuf,
    /// `LD_LIBRARY_PATH`, where it starts with another one only.
    libraries: Option<OsString>,
}

/// The sibling in this executable's folder, or in `../lib/mmgp`.
fn find() -> Result<Sibling, Trouble> {
    let name = format!("mmgp-cuda{}", env::consts::EXE_SUFFIX);
    let folder = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
    let folder = folder.unwrap_or_default();
    let mut places = vec![folder.join(&name)];
    places.extend(folder.parent().map(|up| up.join("lib/mmgp").join(&name)));
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(Sibling { path: path.clone(), libraries: None }),
        None => Err(Trouble::Absent { places }),
    }
}

impl Sibling {
    /// The sibling if it starts, if need be with libraries that the loader does not find by itself.
    fn ready(mut self) -> Result<Self, Trouble> {
        let first = match self.ask() {
            Err(Trouble::Libraries { missing, .. }) => missing,
            Err(other) => return Err(other),
            Ok(()) => return Ok(self),
        };
        let before = env::var_os("LD_LIBRARY_PATH").filter(|path| !path.is_empty());
        let mut folders: Vec<PathBuf> = before.iter().flat_map(env::split_paths).collect();
        let known = folders.len();
        folders.extend(folders_of_cuda().filter(|f| first.iter().any(|l| f.join(l).is_file())));
        if folders.len() > known {
            self.libraries = env::join_paths(folders).ok();
        }
        self.ask()?;
        Ok(self)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }

    /// Whether it starts, and is what it should be.
    fn ask(&self) -> Result<(), Trouble> {
        let sibling = || self.path.clone();
        let fails = |said: String| Trouble::Fails { sibling: sibling(), said };
        let out = self.command().arg("--version").output();
        let out = out.map_err(|error| fails(error.to_string()))?;
        if out.status.success() {
            let answer = String::from_utf8_lossy(&out.stdout).trim().to_string();
            let same = answer == ANSWER;
            return same.then_some(()).ok_or(Trouble::Other { sibling: sibling(), answer });
        }
        let said = String::from_utf8_lossy(&out.stderr);
        let Some(first) = missing_first(&said) else {
            let line = said.lines().find(|line| !line.trim().is_empty());
            return Err(fails(line.map_or_else(|| out.status.to_string(), |l| l.trim().into())));
        };
        let mut missing = self.missing();
        if missing.is_empty() {
            missing.push(first.to_string());
        }
        Err(Trouble::Libraries { sibling: sibling(), missing })
    }

    /// All libraries that are missing, where the loader is glibc's: it can list what it would load. What runs
    /// instead under another loader was just seen to fail.
    fn missing(&self) -> Vec<String> {
        let mut command = self.command();
        let listed = command.arg("--version").env("LD_TRACE_LOADED_OBJECTS", "1").output();
        let listed = listed.map(|out| out.stdout).unwrap_or_default();
        let lines = String::from_utf8_lossy(&listed);
        let gone = lines.lines().filter_map(|line| line.trim().strip_suffix(" => not found"));
        gone.map(String::from).collect()
    }

    /// Replaces this process; where a process cannot be replaced, waits for the sibling and ends as it did.
    fn become_it(&self) -> anyhow::Result<()> {
        let mut command = self.command();
        command.args(env::args_os().skip(1));
        tracing::info!("continuing as {}", self.path.display());
        let failed = || format!("{} cannot be started", self.path.display());
        #[cfg(unix)]
        {
            use std::os::unix::process::CommandExt as _;
            Err(command.exec()).with_context(failed)
        }
        #[cfg(not(unix))]
        {
            let status = command.status().with_context(failed)?;
            std::process::exit(status.code().unwrap_or(1))
        }
    }
}

/// The library that the loader's complaint is about.
fn missing_first(said: &str) -> Option<&str> {
    let (_, rest) = said.split_once("error while loading shared libraries: ")?;
    let (library, why) = rest.split_once(": ")?;
    why.starts_with("cannot open shared object file").then_some(library)
}

/// Folders that may hold CUDA's libraries though the loader does not look there: toolkits, then wheels.
fn folders_of_cuda() -> impl Iterator<Item = PathBuf> {
    let var = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let usual = ["/usr/local/cuda-13", "/usr/local/cuda"].map(PathBuf::from);
    let homes = [var("CUDA_HOME"), var("CUDA_PATH")].into_iter().flatten().chain(usual);
    let toolkits = homes.flat_map(|home| {
        ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| home.join(lib))
    });
    let prefixes = [
        var("VIRTUAL_ENV"),
        var("CONDA_PREFIX"),
        var("HOME").map(|home| home.join(".local")),
        Some("/usr/local".into()),
        Some("/usr".into()),
    ];
    let pythons = prefixes.into_iter().flatten().flat_map(|prefix| {
        let inside = fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
        inside.map(|entry| entry.path()).filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"))
        })
    });
    let wheels = pythons.flat_map(|python: PathBuf| {
        ["site-packages", "dist-packages"].map(|p| python.join(p).join("nvidia/cu13/lib"))
    });
    let driver_of_wsl = Path::new("/usr/lib/wsl/lib").to_path_buf();
    toolkits.chain(wheels).chain([driver_of_wsl])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_complaint_names_a_library() {
        let said = "mmgp-cuda: error while loading shared libraries: libcublas.so.13: cannot open \
                    shared object file: No such file or directory\n";
        assert_eq!(missing_first(said), Some("libcublas.so.13"));
        // There, but unusable: saying that it is missing would mislead.
        let said =
            "mmgp-cuda: error while loading shared libraries: libcuda.so.1: file too short\n";
        assert_eq!(missing_first(said), None);
        assert_eq!(missing_first("error: no GPU"), None);
    }

    #[test]
    fn remedies_fit_what_is_missing() {
        let remedy =
            |all: &[&str]| remedy(&all.iter().map(ToString::to_string).collect::<Vec<_>>());
        let driver = remedy(&["libcuda.so.1"]);
        assert!(driver.contains("580") && !driver.contains("pip"), "{driver}");
        let blas = remedy(&["libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"]);
        assert!(blas.contains("`pip install nvidia-cublas nvidia-curand`"), "{blas}");
        assert!(!blas.contains("driver"), "{blas}");
        assert!(remedy(&["libstdc++.so.6"]).contains("LD_LIBRARY_PATH"));
    }
}
