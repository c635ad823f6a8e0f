//! Mappings as owned values, for code that forbids `unsafe`.

use core::alloc::Layout;
use core::ffi::c_void;
use core::mem::ManuallyDrop;
use core::ptr;
use std::io;

use gpusvm::addr::{HostSpan, HostVa};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::sys::heap;
use crate::sys::owned::OwnedSpan;

const HUGE: usize = 2 << 20;
const PAGE: usize = 4 << 10;

/// Whether huge pages are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Huge {
    /// Aligned to 2 MiB and advised.
    Advise,
    /// Forbidden.
    Never,
}

/// Anonymous memory that the owner reads and writes like a slice.
///
/// It is mapped and unmapped through the C library, as a program's own memory is, so brackets see
/// it go; or it is a block of the migratable heap, where the level in use asks for that
/// (see [`allocate_for`](crate::allocate_for)).
#[derive(Debug)]
pub struct AnonMapping {
    start: *mut u8,
    bytes: usize,
    /// What was mapped, for unmapping: alignment may have left room at both ends.
    whole: (*mut u8, usize),
}

// SAFETY: the mapping belongs to the value alone; access follows its borrows.
unsafe impl Send for AnonMapping {}
// SAFETY: as above; shared borrows only read.
unsafe impl Sync for AnonMapping {}

/// Bytes on each side of a mapping that may only be read. The system would join the mapping with a
/// neighbour, a stack for instance, of which parts stay; and what lies above memory that nobody may
/// access is taken for a stack.
const ASIDE: usize = 4 << 10;

impl AnonMapping {
    /// Maps `bytes` bytes of zeros.
    ///
    /// # Errors
    /// The system's; `OutOfMemory` for more than there are addresses.
    pub fn new(bytes: usize, huge: Huge) -> io::Result<Self> {
        if let Some(block) = Self::in_heap(bytes) {
            return Ok(block);
        }
        // A range of 2 MiB fits where the data begins.
        let align = HUGE;
        let length = bytes.checked_next_multiple_of(PAGE);
        let length = length.ok_or(io::ErrorKind::OutOfMemory)?;
        let most = length.checked_add(align + 2 * ASIDE);
        let most = most.ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping, which overlaps nothing.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), most, libc::PROT_READ, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let whole = (mapped.cast::<u8>(), most);
        let skip = (mapped.addr() + ASIDE).next_multiple_of(align) - mapped.addr();
        // SAFETY: `skip` is at most `align + ASIDE`, so the start stays inside.
        let start = unsafe { whole.0.add(skip) };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a part of the new mapping, which nobody uses yet.
        if unsafe { libc::mprotect(start.cast(), length, access) } != 0 {
            let error = io::Error::last_os_error();
            // SAFETY: the new mapping, which nobody uses.
            let _given_back = unsafe { libc::munmap(mapped, most) };
            return Err(error);
        }
        let advice = if huge == Huge::Advise {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        // A kernel without huge pages refuses the advice and needs none.
        // SAFETY: advice changes no content.
        let _advised = unsafe { libc::madvise(start.cast(), bytes, advice) };
        Ok(Self {
            start,
            bytes,
            whole,
        })
    }

    /// A block of the heap, where one is wanted.
    fn in_heap(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes, PAGE).ok()?;
        let wanted = bytes >= heap::LEAST && heap::is_wanted();
        let start = wanted.then(|| heap::take(layout)).flatten()?;
        Some(Self {
            start,
            bytes,
            whole: (start, bytes),
        })
    }

    /// The mapping at `address` of the parent, in a child that never unmaps it.
    #[cfg(test)]
    pub(crate) fn borrowed(address: u64, bytes: u64) -> ManuallyDrop<Self> {
        let start = ptr::with_exposed_provenance_mut(usize::try_from(address).expect("64-bit"));
        let bytes = usize::try_from(bytes).expect("64-bit");
        ManuallyDrop::new(Self {
            start,
            bytes,
            whole: (start, bytes),
        })
    }

    /// First address.
    #[must_use]
    pub fn address(&self) -> u64 {
        u64::try_from(self.start.expose_provenance()).unwrap_or(0)
    }

    /// The bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable for `bytes` bytes and lives as long as the borrow.
        unsafe { core::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// The bytes, to change them.
    pub const fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// The bytes as words.
    #[must_use]
    pub const fn words(&self) -> &[u64] {
        // SAFETY: mappings are page aligned, and every bit pattern is a word.
        unsafe { core::slice::from_raw_parts(self.start.cast(), self.bytes / 8) }
    }

    /// The bytes as words, to change them.
    pub const fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as for `words`, and the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.start.cast(), self.bytes / 8) }
    }

    /// Unmaps everything from `keep` bytes on, a multiple of the page size.
    ///
    /// # Panics
    /// Where `keep` is no multiple of the page size or more than there is.
    pub fn unmap_tail(&mut self, keep: usize) {
        assert!(
            keep.is_multiple_of(4096) && keep <= self.bytes,
            "cannot keep {keep} bytes"
        );
        let end = self.whole.0.addr() + self.whole.1;
        let from = self.start.wrapping_add(keep);
        let len = end - from.addr();
        self.whole.1 -= len;
        self.bytes = keep;
        if heap::holds(self.start) {
            if len > 0 {
                heap::give(from, len);
            }
            return;
        }
        // SAFETY: this part of the mapping is ours, and no borrow of it can live now.
        let _unmapped = unsafe { libc::munmap(from.cast(), len) };
    }

    /// Drops the content of a part: it reads as zeros afterwards (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// The system's.
    ///
    /// # Panics
    /// Where the part is not inside.
    pub fn discard(&mut self, from: usize, len: usize) -> io::Result<()> {
        let at = self.part(from, len);
        // Pages of the heap are a file's, and stay there unless they are removed.
        let advice = if heap::holds(self.start) {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        };
        // SAFETY: the borrow is exclusive; zeros are valid bytes.
        check(unsafe { libc::madvise(at.cast(), len, advice) })
    }

    /// Changes the rights of a part. A part without the right to read or write must not be
    /// accessed by the owner until it is given back.
    ///
    /// # Errors
    /// The system's.
    ///
    /// # Panics
    /// Where the part is not inside.
    pub fn protect(&mut self, from: usize, len: usize, rights: Protect) -> io::Result<()> {
        let at = self.part(from, len);
        // SAFETY: the borrow is exclusive; an access without the right is a fault, not undefined.
        check(unsafe { libc::mprotect(at.cast(), len, rights.bits()) })
    }

    /// Moves the whole mapping to another place (`mremap`).
    ///
    /// # Errors
    /// The system's; the mapping is where it was then.
    pub fn relocate(&mut self) -> io::Result<()> {
        let mut fresh = Self::new(self.bytes, Huge::Advise)?;
        if heap::holds(self.start) {
            // Blocks of the heap have their places in its file.
            fresh.bytes_mut().copy_from_slice(self.bytes());
            *self = fresh;
            return Ok(());
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both mappings are ours and of this size; the target's former pages are given up.
        let moved = unsafe {
            libc::mremap(
                self.start.cast(),
                self.bytes,
                self.bytes,
                flags,
                fresh.start,
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let old = ManuallyDrop::new(core::mem::replace(self, fresh));
        old.unmap_margins();
        Ok(())
    }

    /// Unmaps the room that alignment left around memory that has moved away. Not what lay in
    /// between: another thread may have mapped something there by now.
    fn unmap_margins(&self) {
        let behind = self.start.addr() + self.bytes.next_multiple_of(PAGE);
        let margins = [
            (self.whole.0, self.start.addr() - self.whole.0.addr()),
            (
                self.start.with_addr(behind),
                (self.whole.0.addr() + self.whole.1).saturating_sub(behind),
            ),
        ];
        for (at, len) in margins.into_iter().filter(|(_, len)| *len > 0) {
            // SAFETY: this part of the mapping did not move and is ours; nothing borrows it.
            let _unmapped = unsafe { libc::munmap(at.cast(), len) };
        }
    }

    /// Pins the page at offset `from` until the descriptor is dropped, as a network card or a disk
    /// would. `None` where the system has no io_uring.
    #[cfg(test)]
    pub(crate) fn pin_page(&self, from: usize) -> Option<std::os::fd::OwnedFd> {
        use std::os::fd::{FromRawFd, OwnedFd};
        const REGISTER_BUFFERS: i32 = 0;
        /// Larger than `struct io_uring_params`.
        const PARAMETERS: usize = 256;
        let mut parameters = [0_u64; PARAMETERS / 8];
        // SAFETY: the system fills the parameters and makes a descriptor.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut parameters) };
        let ring = i32::try_from(ring).ok().filter(|ring| *ring >= 0)?;
        let page = libc::iovec {
            iov_base: self.part(from, PAGE).cast(),
            iov_len: PAGE,
        };
        let register = libc::SYS_io_uring_register;
        // SAFETY: the page is mapped, and nothing is ever asked of the ring.
        let done = unsafe { libc::syscall(register, ring, REGISTER_BUFFERS, &raw const page, 1) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        // SAFETY: the call made it, and nobody else knows it.
        Some(unsafe { OwnedFd::from_raw_fd(ring) })
    }

    fn part(&self, from: usize, len: usize) -> *mut u8 {
        assert!(
            from.checked_add(len).is_some_and(|end| end <= self.bytes),
            "part outside"
        );
        self.start.wrapping_add(from)
    }
}

impl Drop for AnonMapping {
    fn drop(&mut self) {
        if heap::holds(self.whole.0) {
            return heap::give(self.whole.0, self.whole.1);
        }
        // SAFETY: the mapping is ours, and no borrow lives.
        let _unmapped = unsafe { libc::munmap(self.whole.0.cast(), self.whole.1) };
    }
}

/// Rights of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protect {
    /// No access.
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

impl Protect {
    /// As the system calls have it.
    pub(super) const fn bits(self) -> i32 {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// What a call of the C library answered.
pub(super) fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Memory that the runtime maps for itself, huge where possible, by raw system calls. Children do
/// not inherit it, and no device can map it.
#[derive(Debug)]
pub(crate) struct RuntimeMapping {
    span: HostSpan,
    whole: (*mut u8, usize),
    /// Given up after the memory is unmapped.
    _owned: OwnedSpan,
}

// SAFETY: the mapping belongs to the value alone; it is only handed out as addresses.
unsafe impl Send for RuntimeMapping {}
// SAFETY: as above.
unsafe impl Sync for RuntimeMapping {}

impl RuntimeMapping {
    /// Maps `bytes` bytes, aligned to 2 MiB.
    ///
    /// # Errors
    /// The system's; `ENOMEM` also where no more memory can be declared the runtime's own, and for
    /// 0 bytes.
    pub(crate) fn new(bytes: u64) -> Result<Self, Errno> {
        let len = usize::try_from(bytes).map_err(|_wide| Errno::NOMEM)?;
        let room = len.checked_add(HUGE).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping, which overlaps nothing.
        let mapped = unsafe { mmap_anonymous(ptr::null_mut(), room, access, flags) }?;
        let start = mapped.expose_provenance().next_multiple_of(HUGE);
        let at: *mut c_void = ptr::with_exposed_provenance_mut(start);
        let span = HostSpan::at(HostVa::new(u64::try_from(start).unwrap_or(0)), bytes);
        let Some(owned) = OwnedSpan::declare(span) else {
            // SAFETY: the mapping is ours, and nobody knows it yet.
            let _unmapped = unsafe { munmap(mapped, room) };
            return Err(Errno::NOMEM);
        };
        // From here on dropping it unmaps it.
        let mapping = Self {
            span,
            whole: (mapped.cast(), room),
            _owned: owned,
        };
        // A kernel without huge pages refuses this and works all the same.
        // SAFETY: advice changes no content.
        let _advised = unsafe { madvise(at, len, Advice::LinuxHugepage) };
        // SAFETY: as above.
        unsafe { madvise(at, len, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// Where it is.
    pub(crate) const fn span(&self) -> HostSpan {
        self.span
    }

    /// The byte at `offset`.
    pub(crate) fn pointer(&self, offset: u64) -> *mut u8 {
        let at = self.span.start().plus(offset).get();
        ptr::with_exposed_provenance_mut(usize::try_from(at).unwrap_or(0))
    }
}

impl Drop for RuntimeMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        let _unmapped = unsafe { munmap(self.whole.0.cast(), self.whole.1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fault_copy;
    use crate::sys::owned;
    use core::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn relocation_keeps_the_content_and_changes_the_address() {
        let mut map = AnonMapping::new(4 << 20, Huge::Advise).expect("4M can be mapped");
        map.words_mut()[5] = 99;
        let before = map.address();
        map.relocate().expect("the system moves it");
        assert_ne!(map.address(), before);
        assert_eq!(map.words()[5], 99);
    }

    #[test]
    fn threads_that_map_are_not_disturbed_by_relocations() {
        fault_copy::install();
        let stop = AtomicBool::new(false);
        let lost = std::thread::scope(|scope| {
            let mapper = scope.spawn(|| {
                let mut lost = 0;
                while !stop.load(Ordering::Relaxed) {
                    let mine = AnonMapping::new(2 << 20, Huge::Never).expect("memory");
                    let at = mine.start;
                    let five = 5_u64.to_ne_bytes();
                    // SAFETY: `five` is ours, and so is the mapping, or else the copy is refused.
                    let stored = unsafe { fault_copy::copy(at, five.as_ptr(), 8) };
                    std::thread::yield_now();
                    let mut back = [0; 8];
                    // SAFETY: as above.
                    let loaded = unsafe { fault_copy::copy(back.as_mut_ptr(), at, 8) };
                    lost += u32::from(stored.is_err() || loaded.is_err() || back != five);
                }
                lost
            });
            let mut moving = AnonMapping::new(4 << 20, Huge::Advise).expect("4M can be mapped");
            for _ in 0..10_000 {
                moving.relocate().expect("the system moves it");
            }
            stop.store(true, Ordering::Relaxed);
            mapper.join().expect("it ends")
        });
        assert_eq!(lost, 0);
    }

    #[test]
    fn sizes_beyond_the_address_space_are_refused() {
        for bytes in [
            usize::MAX,
            usize::MAX - HUGE + 1,
            usize::MAX - HUGE,
            1 << 60,
        ] {
            assert!(AnonMapping::new(bytes, Huge::Advise).is_err(), "{bytes:#x}");
        }
        assert!(RuntimeMapping::new(u64::MAX).is_err());
        assert!(RuntimeMapping::new(0).is_err());
    }

    #[test]
    fn runtime_mapping_is_the_runtimes_own_while_it_lives() {
        let mapping = RuntimeMapping::new(2 << 20).expect("2M can be mapped");
        let span = mapping.span();
        assert!(owned::owns(span));
        drop(mapping);
        assert!(!owned::owns(span));
    }
}
