//! Memory that a program lends to the system: pages in a pipe, buffers of asynchronous reads and
//! writes, and the end of the heap.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use gpusvm::addr::{HostSpan, HostVa, PAGE};

/// Pages of this process in a pipe, by reference (`vmsplice`): until they are read, the system holds
/// the pages themselves and not their content.
#[derive(Debug)]
pub struct PipedPages {
    reader: PipeReader,
    bytes: usize,
}

impl PipedPages {
    /// Puts them there, at most what a pipe holds: 16 pages.
    ///
    /// # Errors
    /// The system's; `EFAULT` where it cannot reach the memory, `WriteZero` for more than 16 pages.
    pub fn lend(span: HostSpan) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let part = libc::iovec {
            iov_base: pointer(span),
            iov_len: length(span),
        };
        let flags = libc::SPLICE_F_NONBLOCK;
        // SAFETY: the system reads the memory, now or later, or refuses.
        let lent = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const part, 1, flags) };
        let lent = usize::try_from(lent).map_err(|_negative| io::Error::last_os_error())?;
        if lent < part.iov_len {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(Self {
            reader,
            bytes: lent,
        })
    }

    /// Reads what is in the pages, and lets them go.
    ///
    /// # Errors
    /// The system's.
    pub fn read(mut self) -> io::Result<Vec<u8>> {
        let mut content = vec![0; self.bytes];
        self.reader.read_exact(&mut content)?;
        Ok(content)
    }
}

/// What a [`Ring`] does with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From a descriptor into memory.
    Read,
    /// From memory to a descriptor.
    Write,
}

/// An io_uring of a program.
#[derive(Debug)]
pub struct Ring {
    descriptor: OwnedFd,
    /// Heads, tails and completions.
    rings: Shared,
    /// Submissions.
    entries: Shared,
    places: Places,
    pinned: Option<HostSpan>,
}

/// Where things are in the page that [`Ring::rings`] is (io_uring_setup(2)).
#[derive(Clone, Copy, Debug)]
struct Places {
    submission_tail: usize,
    submission_mask: usize,
    submissions: usize,
    completion_head: usize,
    completion_tail: usize,
    completion_mask: usize,
    completions: usize,
}

/// A page shared with the system.
#[derive(Debug)]
struct Shared(*mut u8);

const PAGE_BYTES: usize = 4096;
/// Submissions that fit in a ring; all of it fits in a page then.
const ENTRIES: u32 = 4;
const READ_FIXED: u64 = 4;
const WRITE_FIXED: u64 = 5;
const READ: u64 = 22;
const WRITE: u64 = 23;
const REGISTER_BUFFERS: u32 = 0;
const ENTER_GETEVENTS: u32 = 1;

impl Ring {
    /// Makes one.
    ///
    /// # Errors
    /// The system's, which may have no rings or forbid them.
    pub fn new() -> io::Result<Self> {
        // `struct io_uring_params`, and some more.
        let mut parameters = [0_u32; 64];
        // SAFETY: the system fills the parameters and makes a descriptor.
        let raw = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut parameters) };
        let raw = i32::try_from(raw).unwrap_or(-1);
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call made it, and nobody else knows it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
        let place = |n: usize| usize::try_from(parameters[n]).unwrap_or(0);
        let places = Places {
            submission_tail: place(11),
            submission_mask: place(12),
            submissions: place(16),
            completion_head: place(20),
            completion_tail: place(21),
            completion_mask: place(22),
            completions: place(25),
        };
        let rings = Shared::map(&descriptor, 0)?;
        let entries = Shared::map(&descriptor, 0x1000_0000)?;
        Ok(Self {
            descriptor,
            rings,
            entries,
            places,
            pinned: None,
        })
    }

    /// Registers a buffer: its pages stay where they are until the ring is dropped.
    ///
    /// # Errors
    /// The system's.
    pub fn pin(&mut self, buffer: HostSpan) -> io::Result<()> {
        let part = libc::iovec {
            iov_base: pointer(buffer),
            iov_len: length(buffer),
        };
        let raw = self.descriptor.as_raw_fd();
        let call = libc::SYS_io_uring_register;
        // SAFETY: the system takes references to the pages, or refuses.
        let done = unsafe { libc::syscall(call, raw, REGISTER_BUFFERS, &raw const part, 1) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        self.pinned = Some(buffer);
        Ok(())
    }

    /// Transfers between `file` and `memory`, and waits for the end; returns the bytes. Memory
    /// inside the pinned buffer is used by way of it. Who owns the memory accepts the access.
    ///
    /// # Errors
    /// The system's; `EFAULT` where it cannot reach the memory.
    pub fn transfer(
        &mut self,
        what: Transfer,
        file: BorrowedFd<'_>,
        memory: HostSpan,
    ) -> io::Result<usize> {
        let pinned = self.pinned.is_some_and(|buffer| buffer.covers(memory));
        let operation = match (what, pinned) {
            (Transfer::Read, true) => READ_FIXED,
            (Transfer::Read, false) => READ,
            (Transfer::Write, true) => WRITE_FIXED,
            (Transfer::Write, false) => WRITE,
        };
        let descriptor = u64::try_from(file.as_raw_fd()).unwrap_or(0);
        let here = u64::MAX;
        let entry = [
            operation | descriptor << 32,
            here,
            memory.start().get(),
            memory.bytes(),
            0,
            0,
            0,
            0,
        ];
        let tail = self.rings.word(self.places.submission_tail);
        let number = tail.load(Ordering::Relaxed);
        let slot = number
            & self
                .rings
                .word(self.places.submission_mask)
                .load(Ordering::Relaxed);
        let index = usize::try_from(slot).unwrap_or(0);
        self.entries.put(index * 64, entry);
        self.rings
            .word(self.places.submissions + index * 4)
            .store(slot, Ordering::Relaxed);
        // The system looks at the entry after the tail.
        tail.store(number.wrapping_add(1), Ordering::Release);
        self.enter()?;
        self.complete()
    }

    /// Submits one entry and waits for one completion.
    fn enter(&self) -> io::Result<()> {
        let raw = self.descriptor.as_raw_fd();
        let call = libc::SYS_io_uring_enter;
        // SAFETY: what was submitted is the callers' business; no signal mask is given.
        let done = unsafe { libc::syscall(call, raw, 1, 1, ENTER_GETEVENTS, 0, 0) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn complete(&self) -> io::Result<usize> {
        let Places {
            completion_head,
            completion_tail,
            completion_mask,
            completions,
            ..
        } = self.places;
        let head = self.rings.word(completion_head);
        let number = head.load(Ordering::Relaxed);
        while self.rings.word(completion_tail).load(Ordering::Acquire) == number {
            self.enter_again()?;
        }
        let slot = number & self.rings.word(completion_mask).load(Ordering::Relaxed);
        let at = completions + usize::try_from(slot).unwrap_or(0) * 16;
        // The result is behind eight bytes of user data.
        let result = self
            .rings
            .word(at + 8)
            .load(Ordering::Relaxed)
            .cast_signed();
        head.store(number.wrapping_add(1), Ordering::Release);
        usize::try_from(result).map_err(|_negative| io::Error::from_raw_os_error(-result))
    }

    /// Waits for a completion that is not there yet.
    fn enter_again(&self) -> io::Result<()> {
        let raw = self.descriptor.as_raw_fd();
        let call = libc::SYS_io_uring_enter;
        // SAFETY: submits nothing.
        let done = unsafe { libc::syscall(call, raw, 0, 1, ENTER_GETEVENTS, 0, 0) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Shared {
    fn map(ring: &OwnedFd, offset: libc::off_t) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let raw = ring.as_raw_fd();
        let none = ptr::null_mut();
        // SAFETY: a fresh mapping, which overlaps nothing.
        let at = unsafe { libc::mmap(none, PAGE_BYTES, access, libc::MAP_SHARED, raw, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(at.cast()))
    }

    /// The 32-bit word at `offset`.
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(
            offset.is_multiple_of(4) && offset < PAGE_BYTES,
            "a ring fits in a page"
        );
        // SAFETY: inside the page, which is mapped as long as `self`, and aligned; the system
        // accesses such words atomically, too.
        unsafe { AtomicU32::from_ptr(self.0.wrapping_add(offset).cast()) }
    }

    /// Writes a submission to `offset`. The system reads it only after the tail has moved past it.
    fn put(&self, offset: usize, entry: [u64; 8]) {
        assert!(
            offset.is_multiple_of(64) && offset < PAGE_BYTES,
            "a ring fits in a page"
        );
        // SAFETY: inside the page and aligned, and nobody else accesses it now.
        unsafe { self.0.wrapping_add(offset).cast::<[u64; 8]>().write(entry) };
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing borrows it.
        let _unmapped = unsafe { libc::munmap(self.0.cast(), PAGE_BYTES) };
    }
}

/// Memory at the end of the heap, taken by moving the program break.
#[derive(Debug)]
pub struct Break {
    start: *mut c_void,
    bytes: usize,
}

impl Break {
    /// Moves the break up by `bytes`, and at most a page more.
    ///
    /// # Errors
    /// `OutOfMemory` where it cannot be moved.
    pub fn grow(bytes: usize) -> io::Result<Self> {
        let bytes = bytes
            .checked_next_multiple_of(PAGE_BYTES)
            .and_then(|bytes| bytes.checked_add(PAGE_BYTES))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let step = isize::try_from(bytes).map_err(|_large| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the memory is new; allocators expect that others move the break, too.
        let start = unsafe { libc::sbrk(step) };
        if start.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, bytes })
    }

    /// The whole pages in it.
    #[must_use]
    pub fn span(&self) -> HostSpan {
        let first = self.start.expose_provenance().next_multiple_of(PAGE_BYTES);
        let start = HostVa::new(u64::try_from(first).unwrap_or(0));
        let bytes = u64::try_from(self.bytes).unwrap_or(0);
        HostSpan::at(start, bytes - PAGE)
    }

    /// Moves the break back down, unless somebody else has moved it since; whether it did.
    #[must_use]
    pub fn shrink(self) -> bool {
        // SAFETY: asks only.
        let now = unsafe { libc::sbrk(0) };
        let end = self.start.addr() + self.bytes;
        if now.addr() != end {
            return false;
        }
        // SAFETY: gives back what `grow` took, of which nothing is borrowed.
        unsafe { libc::brk(self.start) == 0 }
    }
}

fn pointer(span: HostSpan) -> *mut c_void {
    ptr::with_exposed_provenance_mut(usize::try_from(span.start().get()).unwrap_or(0))
}

fn length(span: HostSpan) -> usize {
    usize::try_from(span.bytes()).unwrap_or(usize::MAX)
}
