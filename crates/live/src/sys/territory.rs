//! A stretch of address space as an owned value, in which mappings come, go, move and change while
//! any thread accesses them.
//!
//! [`AnonMapping`](super::mapping::AnonMapping) lends its memory as slices, so its owner has to
//! stop every access before a change. A [`Territory`] lends nothing: its memory is reached by
//! copies that survive a fault ([`LiveBus`](super::fault_copy::LiveBus)) and by devices, and an
//! access that comes in the middle of a change is an answer, not undefined.
//!
//! All calls go through the C library, as a program's own do, so brackets see them. The stretch
//! lies where the system never puts a mapping by itself, so that holes in it stay holes.

use core::ffi::c_void;
use core::ptr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use rustix::process::PidfdFlags;

use crate::sys::mapping::{Huge, Protect, check};

/// Where the search for a free stretch begins, and its steps: far below where the system maps.
const FIRST: u64 = 1 << 44;
const STEP: u64 = 1 << 40;
const TRIES: u64 = 64;

/// What is asked of memory (madvise(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advise {
    /// Drop the content: zeros from now on.
    Discard,
    /// The content may be dropped at any time until it is written again.
    Free,
    /// Reclaim the pages, to swap if they have content.
    PageOut,
    /// Reclaim the pages before others.
    Cold,
    /// Make the pages present and writable.
    Populate,
    /// Join the pages to huge ones.
    Collapse,
    /// Drop the content, and refuse every access from now on.
    GuardInstall,
    /// Allow access again.
    GuardRemove,
    /// As [`Discard`](Self::Discard), also where pages are locked.
    DiscardLocked,
    /// Use huge pages.
    Huge,
    /// Use no huge pages.
    Small,
    /// Let identical pages become one (KSM).
    Merge,
    /// Leave the mapping out of children.
    DontFork,
    /// Give children zeros.
    WipeOnFork,
    /// Drop the content, also in the object behind a shared mapping.
    Remove,
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory shared with children.
    SharedAnonymous,
    /// A memory file, shared.
    SharedFile,
    /// A memory file, private.
    PrivateFile,
    /// Huge pages that were set aside.
    HugeTlb,
    /// Memory that the kernel itself cannot read (`memfd_secret`).
    Secret,
}

impl Advise {
    const fn number(self) -> i32 {
        match self {
            Self::Discard => libc::MADV_DONTNEED,
            Self::Free => libc::MADV_FREE,
            Self::PageOut => libc::MADV_PAGEOUT,
            Self::Cold => libc::MADV_COLD,
            Self::Populate => libc::MADV_POPULATE_WRITE,
            Self::Collapse => 25,
            Self::GuardInstall => 102,
            Self::GuardRemove => 103,
            Self::DiscardLocked => 24,
            Self::Huge => libc::MADV_HUGEPAGE,
            Self::Small => libc::MADV_NOHUGEPAGE,
            Self::Merge => libc::MADV_MERGEABLE,
            Self::DontFork => libc::MADV_DONTFORK,
            Self::WipeOnFork => libc::MADV_WIPEONFORK,
            Self::Remove => libc::MADV_REMOVE,
        }
    }
}

/// What a move leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Nothing is mapped there.
    Hole,
    /// A mapping without content (`MREMAP_DONTUNMAP`).
    Empty,
}

/// The stretch. Spans that are given to it must lie inside; holes and mappings in it are the
/// owner's business.
#[derive(Debug)]
pub struct Territory {
    span: HostSpan,
    /// With the page that keeps others away.
    whole: HostSpan,
    /// This process, for advice that names one.
    process: Option<OwnedFd>,
}

impl Territory {
    /// Sets `bytes` bytes aside, rounded up and aligned to 2 MiB, with nothing mapped in them.
    ///
    /// # Errors
    /// `OutOfMemory` where no stretch is free, and the system's.
    pub fn reserve(bytes: u64) -> io::Result<Self> {
        let bytes = bytes
            .checked_next_multiple_of(PAGE_2M)
            .and_then(|bytes| bytes.checked_add(2 * PAGE_2M))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let free = (0..TRIES).find_map(|n| try_at(FIRST + n * STEP, bytes));
        let whole = free.ok_or(io::ErrorKind::OutOfMemory)?;
        let inner = HostSpan::at(whole.start().plus(PAGE_2M), bytes - 2 * PAGE_2M);
        let behind_the_mark = HostSpan::new(whole.start().plus(PAGE), whole.end());
        // SAFETY: mapped just now, and nobody knows it.
        check(unsafe { libc::munmap(pointer(behind_the_mark), length(behind_the_mark)) })?;
        Ok(Self {
            span: inner,
            whole,
            process: this_process(),
        })
    }

    /// All of it.
    #[must_use]
    pub const fn span(&self) -> HostSpan {
        self.span
    }

    /// Maps zeros into a hole.
    ///
    /// # Errors
    /// `EEXIST` where something is mapped, and the system's.
    pub fn map(&self, span: HostSpan, huge: Huge) -> io::Result<()> {
        self.map_with(span, libc::MAP_FIXED_NOREPLACE, huge)
    }

    /// Maps zeros in place of what is there.
    ///
    /// # Errors
    /// The system's.
    pub fn map_over(&self, span: HostSpan, huge: Huge) -> io::Result<()> {
        self.map_with(span, libc::MAP_FIXED, huge)
    }

    /// Maps memory of another kind into a hole.
    ///
    /// # Errors
    /// The system's, which may not have that kind.
    pub fn map_backed(&self, span: HostSpan, backing: Backing) -> io::Result<()> {
        let at = self.inside(span);
        let file = match backing {
            Backing::SharedFile | Backing::PrivateFile => Some(memory_file(span.bytes())?),
            Backing::Secret => Some(secret_file(span.bytes())?),
            Backing::SharedAnonymous | Backing::HugeTlb => None,
        };
        let flags = libc::MAP_FIXED_NOREPLACE
            | match backing {
                Backing::SharedAnonymous => libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                Backing::SharedFile | Backing::Secret => libc::MAP_SHARED,
                Backing::PrivateFile => libc::MAP_PRIVATE,
                Backing::HugeTlb => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let raw = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a hole of our own stretch.
        mapped(unsafe { libc::mmap(at, length(span), access, flags, raw, 0) })
    }

    /// Maps zeros that grow downwards into the hole before them, as a stack does.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub fn map_growing(&self, span: HostSpan) -> io::Result<()> {
        self.map_with(
            span,
            libc::MAP_FIXED_NOREPLACE | libc::MAP_GROWSDOWN,
            Huge::Never,
        )
    }

    /// Seals a mapping: until the process ends it stays as it is. So it stays when this value is
    /// dropped, too.
    ///
    /// # Errors
    /// The system's; `ENOSYS` before Linux 6.10.
    pub fn seal(&self, span: HostSpan) -> io::Result<()> {
        /// Number of `mseal`.
        const MSEAL: libc::c_long = 462;
        let at = self.inside(span);
        // SAFETY: sealing changes no content.
        let sealed = unsafe { libc::syscall(MSEAL, at, length(span), 0_u64) };
        check(i32::try_from(sealed).unwrap_or(-1))
    }

    /// Unmaps.
    ///
    /// # Errors
    /// The system's.
    pub fn unmap(&self, span: HostSpan) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: our own stretch, of which nothing is borrowed.
        check(unsafe { libc::munmap(at, length(span)) })
    }

    /// As [`unmap`](Self::unmap), past the C library.
    ///
    /// # Errors
    /// The system's.
    pub fn unmap_raw(&self, span: HostSpan) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: as for `unmap`.
        Ok(unsafe { rustix::mm::munmap(at, length(span)) }?)
    }

    /// Drops the content, past the C library.
    ///
    /// # Errors
    /// The system's.
    pub fn discard_raw(&self, span: HostSpan) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: as for `unmap`.
        Ok(unsafe { rustix::mm::madvise(at, length(span), rustix::mm::Advice::LinuxDontNeed) }?)
    }

    /// Copies memory out as the system reads it: through a pipe. At most what a pipe holds, 64 KiB.
    ///
    /// # Errors
    /// The system's; `EFAULT` where it cannot read the memory.
    pub fn through_pipe(&self, span: HostSpan, out: &mut [u8]) -> io::Result<()> {
        let at = self.inside(span);
        let (mut reader, writer) = io::pipe()?;
        let len = length(span).min(out.len());
        // SAFETY: the system reads the memory, or refuses.
        let written = unsafe { libc::write(writer.as_raw_fd(), at, len) };
        let written = usize::try_from(written).map_err(|_negative| io::Error::last_os_error())?;
        reader.read_exact(&mut out[..written])?;
        if written < len {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        Ok(())
    }

    /// Gives advice.
    ///
    /// # Errors
    /// The system's; `EINVAL` for advice that it does not know.
    pub fn advise(&self, span: HostSpan, advice: Advise) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: as for `unmap`.
        check(unsafe { libc::madvise(at, length(span), advice.number()) })
    }

    /// Gives advice about several spans in one call (`process_madvise`); returns the bytes that
    /// were advised.
    ///
    /// # Errors
    /// The system's; `Unsupported` where the C library has no such call.
    pub fn advise_all(&self, spans: &[HostSpan], advice: Advise) -> io::Result<u64> {
        type ProcessMadvise =
            unsafe extern "C" fn(i32, *const libc::iovec, usize, i32, u32) -> isize;
        // SAFETY: looks a name up.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"process_madvise".as_ptr()) };
        let process = self.process.as_ref().filter(|_| !found.is_null());
        let process = process.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the C library's function of this name has this signature.
        let call: ProcessMadvise = unsafe { core::mem::transmute(found) };
        let parts: Vec<libc::iovec> = spans
            .iter()
            .map(|span| libc::iovec {
                iov_base: self.inside(*span),
                iov_len: length(*span),
            })
            .collect();
        let fd = process.as_raw_fd();
        // SAFETY: as for `unmap`; `parts` outlives the call.
        let done = unsafe { call(fd, parts.as_ptr(), parts.len(), advice.number(), 0) };
        u64::try_from(done).map_err(|_negative| io::Error::last_os_error())
    }

    /// Changes rights.
    ///
    /// # Errors
    /// The system's.
    pub fn protect(&self, span: HostSpan, rights: Protect) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: as for `unmap`.
        check(unsafe { libc::mprotect(at, length(span), rights.bits()) })
    }

    /// Keeps the pages in memory.
    ///
    /// # Errors
    /// The system's.
    pub fn lock(&self, span: HostSpan) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: locking changes no content.
        check(unsafe { libc::mlock(at, length(span)) })
    }

    /// Ends [`lock`](Self::lock).
    ///
    /// # Errors
    /// The system's.
    pub fn unlock(&self, span: HostSpan) -> io::Result<()> {
        let at = self.inside(span);
        // SAFETY: as for `lock`.
        check(unsafe { libc::munlock(at, length(span)) })
    }

    /// Moves a mapping, in place of what is at `to`.
    ///
    /// # Errors
    /// The system's.
    pub fn relocate(&self, from: HostSpan, to: HostVa, leave: Leave) -> io::Result<()> {
        let old = self.inside(from);
        let new = self.inside(HostSpan::at(to, from.bytes()));
        let flags = libc::MREMAP_MAYMOVE
            | libc::MREMAP_FIXED
            | match leave {
                Leave::Hole => 0,
                Leave::Empty => libc::MREMAP_DONTUNMAP,
            };
        let len = length(from);
        // SAFETY: both places are inside our own stretch, of which nothing is borrowed.
        mapped(unsafe { libc::mremap(old, len, len, flags, new) })
    }

    /// Grows or shrinks a mapping where it is.
    ///
    /// # Errors
    /// The system's; `ENOMEM` where something is in the way.
    pub fn resize(&self, from: HostSpan, bytes: u64) -> io::Result<()> {
        let at = self.inside(from);
        let to = HostSpan::at(from.start(), bytes);
        let _inside = self.inside(to);
        // SAFETY: as for `relocate`.
        mapped(unsafe { libc::mremap(at, length(from), length(to), 0) })
    }

    fn map_with(&self, span: HostSpan, fixed: i32, huge: Huge) -> io::Result<()> {
        let at = self.inside(span);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: our own stretch: what is replaced is ours, and nothing of it is borrowed.
        mapped(unsafe { libc::mmap(at, length(span), access, flags, -1, 0) })?;
        let advice = match huge {
            Huge::Advise => libc::MADV_HUGEPAGE,
            Huge::Never => libc::MADV_NOHUGEPAGE,
        };
        // A kernel without huge pages refuses the advice and needs none.
        // SAFETY: advice changes no content.
        let _advised = unsafe { libc::madvise(at, length(span), advice) };
        Ok(())
    }

    /// The span's start, if all of it lies inside.
    fn inside(&self, span: HostSpan) -> *mut c_void {
        assert!(self.span.covers(span), "{span} is no part of the territory");
        pointer(span)
    }
}

impl Drop for Territory {
    fn drop(&mut self) {
        // SAFETY: our own stretch, of which nothing is borrowed.
        let _unmapped = unsafe { libc::munmap(pointer(self.whole), length(self.whole)) };
    }
}

/// An empty file in memory, of `bytes` bytes.
fn memory_file(bytes: u64) -> io::Result<File> {
    // SAFETY: makes a descriptor.
    let raw = unsafe { libc::memfd_create(c"gpusvm".as_ptr(), libc::MFD_CLOEXEC) };
    owned(raw, bytes)
}

/// As [`memory_file`], secret.
fn secret_file(bytes: u64) -> io::Result<File> {
    // SAFETY: makes a descriptor.
    let raw = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    owned(i32::try_from(raw).unwrap_or(-1), bytes)
}

fn owned(raw: i32, bytes: u64) -> io::Result<File> {
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made by our caller, and nobody else knows it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(raw) });
    file.set_len(bytes)?;
    Ok(file)
}

/// Maps a stretch without access at `at`, if it is free.
fn try_at(at: u64, bytes: u64) -> Option<HostSpan> {
    let span = HostSpan::at(HostVa::new(at), bytes);
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let none = libc::PROT_NONE;
    // SAFETY: a fresh mapping, which replaces nothing.
    let got = unsafe { libc::mmap(pointer(span), length(span), none, flags, -1, 0) };
    (got == pointer(span)).then_some(span)
}

fn this_process() -> Option<OwnedFd> {
    rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).ok()
}

fn mapped(result: *mut c_void) -> io::Result<()> {
    if result == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn pointer(span: HostSpan) -> *mut c_void {
    ptr::with_exposed_provenance_mut(usize::try_from(span.start().get()).unwrap_or(0))
}

fn length(span: HostSpan) -> usize {
    usize::try_from(span.bytes()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fault_copy::LiveBus;
    use gpusvm_abi::bus::SystemBus;

    fn word(bus: LiveBus, at: HostVa) -> Option<u64> {
        let mut word = [0; 8];
        bus.read(at.get(), &mut word).ok()?;
        Some(u64::from_ne_bytes(word))
    }

    fn put(bus: LiveBus, at: HostVa, value: u64) {
        bus.write(at.get(), &value.to_ne_bytes()).expect("mapped");
    }

    #[test]
    fn mappings_come_go_and_move_and_accesses_in_between_are_answers() {
        let bus = LiveBus::new();
        let land = Territory::reserve(8 << 20).expect("there is room");
        let here = HostSpan::at(land.span().start(), 4 << 20);
        let there = here.end();
        assert_eq!(word(bus, here.start()), None);
        land.map(here, Huge::Advise).expect("a hole");
        assert!(land.map(here, Huge::Advise).is_err(), "no hole any more");
        put(bus, here.start().plus(4096), 5);
        land.relocate(here, there, Leave::Hole).expect("moves");
        assert_eq!(word(bus, here.start().plus(4096)), None);
        assert_eq!(word(bus, there.plus(4096)), Some(5));
        let there = HostSpan::at(there, 4 << 20);
        land.relocate(there, here.start(), Leave::Empty)
            .expect("moves");
        assert_eq!(word(bus, there.start().plus(4096)), Some(0));
        land.resize(here, 4096).expect("shrinks");
        assert_eq!(word(bus, here.start().plus(4096)), None);
        let rest = HostSpan::at(here.start(), 4096);
        land.resize(rest, 4 << 20).expect("grows");
        assert_eq!(word(bus, here.start().plus(4096)), Some(0));
        land.unmap(land.span()).expect("goes");
        assert_eq!(word(bus, there.start()), None);
    }

    #[test]
    fn advice_by_process_reaches_every_span() {
        let bus = LiveBus::new();
        let land = Territory::reserve(2 << 20).expect("there is room");
        land.map(land.span(), Huge::Never).expect("a hole");
        let at = |page: u64| land.span().start().plus(page * PAGE);
        (0..4).for_each(|page| put(bus, at(page), 9));
        let mut page = [0; 4096];
        let one = HostSpan::at(at(3), PAGE);
        land.through_pipe(one, &mut page).expect("mapped");
        assert_eq!(page[..9], [9, 0, 0, 0, 0, 0, 0, 0, 0]);
        let spans = [HostSpan::at(at(0), PAGE), HostSpan::at(at(2), PAGE)];
        match land.advise_all(&spans, Advise::Discard) {
            Ok(bytes) => assert_eq!(bytes, 2 * PAGE),
            // Older kernels discard for no process, and older libraries have no such call.
            Err(_refused) => return,
        }
        let left: Vec<_> = (0..4).map(|page| word(bus, at(page))).collect();
        assert_eq!(left, [Some(0), Some(9), Some(0), Some(9)]);
    }

    #[test]
    fn two_territories_do_not_meet() {
        let one = Territory::reserve(2 << 20).expect("there is room");
        let other = Territory::reserve(2 << 20).expect("there is room");
        assert!(!one.span().overlaps(other.span()));
    }
}
