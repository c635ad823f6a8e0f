//! What this machine and kernel allow. Reads only, and never fails as a whole.

use std::fs;

use rustix::io::Errno;

use crate::sys::pagemap::PageMap;
use crate::sys::procmap::ProcMap;
use crate::sys::uffd::{Features, OpenMode, Uffd};

/// Facts about the machine.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Kernel release.
    pub kernel: String,
    /// userfaultfd for faults in user and kernel mode, or why not.
    pub uffd_full: Result<(), String>,
    /// userfaultfd for faults in user mode, or why not.
    pub uffd_user: Result<(), String>,
    /// Names of userfaultfd's features.
    pub uffd_features: Vec<&'static str>,
    /// `UFFDIO_MOVE` is there.
    pub uffd_move: bool,
    /// `PROCMAP_QUERY` works, or why not.
    pub procmap_query: Result<(), String>,
    /// `PAGEMAP_SCAN` works, or why not.
    pub pagemap_scan: Result<(), String>,
    /// Mode of transparent huge pages: `always`, `madvise`, `never`, or `unknown`.
    pub thp: String,
    /// Mappings that a process may have.
    pub max_map_count: Option<u64>,
    /// Processors.
    pub cpus: usize,
    /// Bytes of memory that can be used without swapping.
    pub memory_available: Option<u64>,
}

/// Looks at the machine.
#[must_use]
pub fn probe() -> Facts {
    let full = Uffd::open(OpenMode::Full, Features::NONE);
    let user = Uffd::open(OpenMode::UserModeOnly, Features::NONE);
    let features = full
        .as_ref()
        .or(user.as_ref())
        .map_or(Features::NONE, |uffd| uffd.features());
    Facts {
        kernel: text("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
        uffd_full: why(full),
        uffd_user: why(user),
        uffd_features: features.names(),
        uffd_move: features.contains(Features::MOVE),
        procmap_query: why(ProcMap::open()),
        pagemap_scan: why(PageMap::open()),
        thp: text("/sys/kernel/mm/transparent_hugepage/enabled")
            .and_then(|modes| Some(modes.split_once('[')?.1.split_once(']')?.0.to_owned()))
            .unwrap_or_else(|| "unknown".into()),
        max_map_count: text("/proc/sys/vm/max_map_count").and_then(|n| n.parse().ok()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_available: memory_available(),
    }
}

/// Bytes of memory that can be used without swapping (`MemAvailable`).
#[must_use]
pub fn memory_available() -> Option<u64> {
    let table = fs::read_to_string("/proc/meminfo").ok()?;
    let line = table
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn why<T>(result: Result<T, Errno>) -> Result<(), String> {
    result.map(|_works| ()).map_err(|errno| errno.to_string())
}

fn text(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_plausible_on_any_linux() {
        let facts = probe();
        assert!(facts.kernel.contains('.'), "{}", facts.kernel);
        assert!(facts.cpus >= 1);
        assert!(facts.memory_available.is_some_and(|bytes| bytes > 1 << 20));
        assert!(facts.uffd_features.contains(&"move") == facts.uffd_move);
    }
}
