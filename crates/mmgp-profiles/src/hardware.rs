//! What this machine has: cores and RAM, within the limits of the container around the process.

use std::fmt;

use mmgp_residency::{Bytes, HostMemory};

/// The machine that models run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hardware {
    /// Cores that this process may use.
    pub cores: usize,
    /// RAM in total and what is available; `None` where the operating system does not tell.
    pub ram: Option<HostMemory>,
    /// The memory of the GPU that this build can use. This build can use none.
    pub vram: Option<Bytes>,
}

impl Hardware {
    /// Looks at the machine. Limits of control groups on cores and RAM count as the machine's.
    pub fn detect() -> Self {
        Self {
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            ram: HostMemory::read(),
            vram: None,
        }
    }
}

impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} core{}, ", self.cores, if self.cores == 1 { "" } else { "s" })?;
        match self.ram {
            Some(ram) => write!(f, "{} of RAM, {} available, ", ram.total, ram.available)?,
            None => f.write_str("unknown RAM, ")?,
        }
        match self.vram {
            Some(vram) => write!(f, "a GPU with {vram}"),
            None => f.write_str("no GPU in this build"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_prints_what_it_found() {
        let ram = HostMemory { total: Bytes(24_000_000_000), available: Bytes(9_500_000_000) };
        let found = Hardware { cores: 2, ram: Some(ram), vram: None };
        assert_eq!(
            found.to_string(),
            "2 cores, 24.00 GB of RAM, 9.50 GB available, no GPU in this build"
        );
        let found = Hardware { cores: 1, ram: None, vram: Some(Bytes(8_000_000_000)) };
        assert_eq!(found.to_string(), "1 core, unknown RAM, a GPU with 8.00 GB");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn it_finds_this_machine() {
        let found = Hardware::detect();
        let ram = found.ram.unwrap();
        assert!(found.cores >= 1 && ram.total >= ram.available && ram.available.0 > 1 << 20);
    }
}
