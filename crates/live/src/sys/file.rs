//! A file in memory, for code that forbids `unsafe`.

use core::ptr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::sys::fault_copy;

/// A file, mapped read-only. Another process may shorten it, so it is read by copies that survive
/// a fault, never as a slice.
#[derive(Debug)]
pub struct FileMapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the value alone, and is only read.
unsafe impl Send for FileMapping {}
// SAFETY: as above.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps all of a regular file.
    ///
    /// # Errors
    /// The system's; `InvalidInput` for what is no regular file or is empty.
    pub fn open(path: &Path) -> io::Result<Self> {
        // A pipe that nobody writes to would be waited for, before it is known to be one.
        let mut options = File::options();
        let file = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let facts = file.metadata()?;
        if !facts.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        let len = usize::try_from(facts.len()).map_err(io::Error::other)?;
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the file is empty",
            ));
        }
        fault_copy::install();
        let flags = libc::MAP_PRIVATE;
        // SAFETY: a fresh mapping, which overlaps nothing.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: mapped.cast(),
            len,
        })
    }

    /// First address.
    #[must_use]
    pub fn address(&self) -> u64 {
        u64::try_from(self.start.expose_provenance()).unwrap_or(0)
    }

    /// Bytes of the file when it was mapped.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty file cannot be mapped.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end, also where the file was shortened meanwhile.
    pub fn read(&self, from: usize, out: &mut [u8]) -> io::Result<()> {
        let inside = from
            .checked_add(out.len())
            .is_some_and(|end| end <= self.len);
        let end = || io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter");
        if !inside {
            return Err(end());
        }
        // SAFETY: `out` is ours; a fault in the mapping is an answer.
        unsafe { fault_copy::copy(out.as_mut_ptr(), self.start.wrapping_add(from), out.len()) }
            .map_err(|_left| end())
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        let _unmapped = unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_with_bounds_and_odd_ones_are_refused() {
        let map = FileMapping::open(Path::new("/proc/self/exe")).expect("a program is a file");
        let mut magic = [0; 4];
        map.read(0, &mut magic).expect("it has a head");
        assert_eq!(&magic, b"\x7fELF");
        assert!(map.read(map.len() - 2, &mut magic).is_err());
        assert!(FileMapping::open(Path::new("/proc")).is_err());
        assert!(
            FileMapping::open(Path::new("/proc/version")).is_err(),
            "empty by its size"
        );
        assert!(FileMapping::open(Path::new("/nowhere")).is_err());
    }
}
