//! RAM as the operating system counts it: what there is, and what a plan may count on.
//!
//! A container's limit is smaller than the machine, so the control groups of this process, its own
//! and those around it, are read too. File pages in a group's usage are counted as free, as the
//! kernel counts them for the machine: weights read from files would otherwise make memory scarce.

use std::{fs, path::Path};

use crate::Bytes;

/// The RAM of this machine, or of the control group that this process runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All there is, used or not.
    pub total: Bytes,
    /// What can be taken now without swapping.
    pub available: Bytes,
}

impl HostMemory {
    /// Reads it now; `None` where the operating system does not tell (no `/proc`).
    pub fn read() -> Option<Self> {
        Self::read_below(Path::new("/"))
    }

    /// As [`read`](Self::read), with the files below `root`.
    fn read_below(root: &Path) -> Option<Self> {
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let machine = text(&root.join("proc/meminfo"));
        let kib = |key| field(&machine, key)?.checked_mul(1024);
        let mut memory =
            Self { total: Bytes(kib("MemTotal:")?), available: Bytes(kib("MemAvailable:")?) };

        let groups = text(&root.join("proc/self/cgroup"));
        let cgroup = root.join("sys/fs/cgroup");
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let (base, files) = match controllers {
                "" => (cgroup.clone(), &V2),
                c if c.split(',').any(|c| c == "memory") => (cgroup.join("memory"), &V1),
                _ => continue,
            };
            // A group may be limited by any that it lies in. In a container its path may not exist
            // below the mount; the mount is then the group.
            for group in Path::new(path.trim_start_matches('/')).ancestors() {
                memory.limit(&base.join(group), files);
            }
        }
        Some(memory)
    }

    fn limit(&mut self, group: &Path, files: &GroupFiles) {
        let text = |name| fs::read_to_string(group.join(name)).unwrap_or_default();
        let number = |name| text(name).trim().parse::<u64>().ok();
        // "max" where there is no limit.
        let Some(limit) = number(files.limit) else { return };
        self.total.0 = self.total.0.min(limit);
        let stat = text("memory.stat");
        let pages: u64 = files.pages.iter().filter_map(|key| field(&stat, key)).sum();
        let used = number(files.used).unwrap_or(0).saturating_sub(pages);
        self.available.0 = self.available.0.min(limit.saturating_sub(used));
    }
}

/// What the files of a control group are called.
struct GroupFiles {
    limit: &'static str,
    used: &'static str,
    /// Keys of file pages in `memory.stat`, descendants included.
    pages: [&'static str; 2],
}

const V2: GroupFiles = GroupFiles {
    limit: "memory.max",
    used: "memory.current",
    pages: ["inactive_file", "active_file"],
};

const V1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    pages: ["total_inactive_file", "total_active_file"],
};

/// The number behind `key` in lines of `key number`.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(key)).then(|| words.next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> Option<HostMemory> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        HostMemory::read_below(root.path())
    }

    fn memory(total: u64, available: u64) -> Option<HostMemory> {
        Some(HostMemory { total: Bytes(total), available: Bytes(available) })
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 1000 kB\nMemFree: 3 kB\nMemAvailable: 600 kB\n");

    #[test]
    fn without_a_group_it_is_the_machine() {
        assert_eq!(machine(&[]), None);
        assert_eq!(machine(&[MEMINFO]), memory(1000 << 10, 600 << 10));
        let unlimited = [
            MEMINFO,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
            ("sys/fs/cgroup/memory.current", "5\n"),
        ];
        assert_eq!(machine(&unlimited), memory(1000 << 10, 600 << 10));
    }

    #[test]
    fn the_narrowest_group_counts_and_its_file_pages_are_free() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/user/shell\n"),
            ("sys/fs/cgroup/user/shell/memory.max", "max\n"),
            ("sys/fs/cgroup/user/memory.max", "90000\n"),
            ("sys/fs/cgroup/user/memory.current", "60000\n"),
            ("sys/fs/cgroup/user/memory.stat", "anon 30000\ninactive_file 20000\nactive_file 5\n"),
        ];
        assert_eq!(machine(&files), memory(90_000, 50_005));
    }

    #[test]
    fn a_path_of_outside_the_container_means_the_mount() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/0123\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "70000"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "80000"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 30000\n"),
        ];
        assert_eq!(machine(&files), memory(70_000, 20_000));
    }
}
