//! userfaultfd: the ioctl layer.
//!
//! Written by hand because results matter that wrappers lose: COPY and MOVE report how far they
//! came in a signed field that is valid *also when the call fails*, and `EAGAIN` means either
//! "some of it is done" or "an event is unread" (`livehost.md` sections 2 and 7).

use core::mem::size_of;
use core::time::Duration;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::atfork::NotForChildren;
use gpusvm::addr::{HostSpan, HostVa, PAGE};
use message::{RawMessage, decode};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

pub(crate) use message::Message;

const TYPE: u8 = 0xAA;
/// Value of the handshake's `api` field.
const API: u64 = 0xAA;

/// `struct uffdio_api`.
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RawRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: RawRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy` and `struct uffdio_move`.
#[repr(C)]
struct Transfer {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    range: RawRange,
    mode: u64,
    done: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    range: RawRange,
    mode: u64,
}

const OP_API: Opcode = opcode::read_write::<Handshake>(TYPE, 0x3F);
const OP_REGISTER: Opcode = opcode::read_write::<Register>(TYPE, 0);
const OP_UNREGISTER: Opcode = opcode::read::<RawRange>(TYPE, 1);
const OP_WAKE: Opcode = opcode::read::<RawRange>(TYPE, 2);
const OP_COPY: Opcode = opcode::read_write::<Transfer>(TYPE, 3);
const OP_ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(TYPE, 4);
const OP_WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(TYPE, 6);
const OP_MOVE: Opcode = opcode::read_write::<Transfer>(TYPE, 5);

const REGISTER_MISSING: u64 = 1;
const REGISTER_WP: u64 = 2;
const DONTWAKE: u64 = 1;

/// Whose faults are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenMode {
    /// Faults in user and kernel mode. Needs a privilege.
    Full,
    /// Faults in user mode only.
    UserModeOnly,
}

/// Feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features(u64);

impl Features {
    /// None.
    pub(crate) const NONE: Self = Self(0);
    /// Faults become SIGBUS at the faulting thread instead of messages.
    pub(crate) const SIGBUS: Self = Self(1 << 7);
    /// News of mremap, of content that is dropped, and of munmap.
    pub(crate) const EVENTS: Self = Self(1 << 2 | 1 << 3 | 1 << 6);
    /// News of clones, with a descriptor of the child's memory.
    pub(crate) const FORK: Self = Self(1 << 1);
    /// Write protection also of what is missing: as markers.
    pub(crate) const MARKERS: Self = Self(1 << 13);
    /// `UFFDIO_MOVE`.
    pub(crate) const MOVE: Self = Self(1 << 16);

    /// Names of all features, by bit.
    const NAMES: [&'static str; 18] = [
        "pagefault-flag-wp",
        "event-fork",
        "event-remap",
        "event-remove",
        "missing-hugetlbfs",
        "missing-shmem",
        "event-unmap",
        "sigbus",
        "thread-id",
        "minor-hugetlbfs",
        "minor-shmem",
        "exact-address",
        "wp-hugetlbfs-shmem",
        "wp-unpopulated",
        "poison",
        "wp-async",
        "move",
        "rwp",
    ];

    /// Both.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is here.
    pub(crate) const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Names of the features that are here.
    pub(crate) fn names(self) -> Vec<&'static str> {
        let bits = Self::NAMES.into_iter().enumerate();
        bits.filter(|(bit, _)| self.0 >> bit & 1 == 1)
            .map(|(_, name)| name)
            .collect()
    }
}

/// How a span is registered. Modes only accumulate: to take MISSING back, unregister.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegisterMode {
    /// First touches are the kernel's own; events arrive.
    WriteProtect,
    /// Missing pages raise faults, too.
    MissingAndWriteProtect,
}

/// How far a COPY or MOVE came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Bytes done, from the start.
    pub(crate) bytes: u64,
    /// Why not further. `EAGAIN` asks to go on, or to let an event be read first.
    pub(crate) error: Option<Errno>,
}

/// A userfaultfd descriptor.
#[derive(Debug)]
pub(crate) struct Uffd {
    /// Children of this process give the descriptor up. Dropped before the descriptor.
    _ours: NotForChildren,
    fd: OwnedFd,
    available: Features,
    /// See [`misreport_moves`](Self::misreport_moves).
    #[cfg(test)]
    misreports: core::sync::atomic::AtomicBool,
    #[cfg(test)]
    pub(crate) starved: core::sync::atomic::AtomicU32,
    /// Who fills a page waits here.
    #[cfg(test)]
    pub(crate) gate: gate::Gate,
}

impl Uffd {
    /// Opens a descriptor with the features of `wanted` that there are.
    ///
    /// # Errors
    /// `EPERM` where the mode needs a privilege, `ENOSYS` or `EPERM` where the call is forbidden.
    pub(crate) fn open(mode: OpenMode, wanted: Features) -> Result<Self, Errno> {
        // The handshake fixes the features, so one descriptor asks and another one is used.
        let available = Features(handshake(&open_raw(mode)?, 0)?);
        let fd = open_raw(mode)?;
        handshake(&fd, available.0 & wanted.0)?;
        Ok(Self::over(fd, available))
    }

    /// A descriptor that never has a message and refuses every request, for levels without
    /// userfaultfd.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub(crate) fn none() -> Result<Self, Errno> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self::over(fd, Features::NONE))
    }

    fn over(fd: OwnedFd, available: Features) -> Self {
        Self {
            _ours: NotForChildren::declare(fd.as_fd()),
            fd,
            available,
            #[cfg(test)]
            misreports: false.into(),
            #[cfg(test)]
            starved: 0.into(),
            #[cfg(test)]
            gate: gate::Gate::default(),
        }
    }

    /// Another descriptor of the same userfaultfd.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub(crate) fn another(&self) -> Result<Self, Errno> {
        let fd = rustix::io::fcntl_dupfd_cloexec(&self.fd, 0)?;
        Ok(Self::over(fd, self.available))
    }

    /// Everything that the kernel offers.
    pub(crate) const fn features(&self) -> Features {
        self.available
    }

    /// Registers a span of mappings.
    pub(crate) fn register(&self, span: HostSpan, mode: RegisterMode) -> Result<(), Errno> {
        let mode = match mode {
            RegisterMode::WriteProtect => REGISTER_WP,
            RegisterMode::MissingAndWriteProtect => REGISTER_WP | REGISTER_MISSING,
        };
        let mut arg = Register {
            range: raw(span),
            mode,
            ioctls: 0,
        };
        // SAFETY: the opcode is UFFDIO_REGISTER, which reads and writes `struct uffdio_register`,
        // whose layout `Register` has.
        let call = unsafe { Updater::<OP_REGISTER, _>::new(&mut arg) };
        // SAFETY: registering changes who serves faults of the span, not its content.
        unsafe { ioctl(&self.fd, call) }
    }

    /// Takes a span out, and wakes those who wait in it.
    pub(crate) fn unregister(&self, span: HostSpan) -> Result<(), Errno> {
        // SAFETY: UFFDIO_UNREGISTER reads `struct uffdio_range`, whose layout `RawRange` has.
        let call = unsafe { Setter::<OP_UNREGISTER, _>::new(raw(span)) };
        // SAFETY: as for `register`.
        unsafe { ioctl(&self.fd, call) }
    }

    /// Wakes those who wait in a span.
    pub(crate) fn wake(&self, span: HostSpan) -> Result<(), Errno> {
        // SAFETY: UFFDIO_WAKE reads `struct uffdio_range`, whose layout `RawRange` has.
        let call = unsafe { Setter::<OP_WAKE, _>::new(raw(span)) };
        // SAFETY: a woken thread repeats its access; memory is unchanged.
        unsafe { ioctl(&self.fd, call) }
    }

    /// Write-protects a span; with [`Features::MARKERS`] its missing pages, too, which from then on show
    /// as not empty in the page map.
    pub(crate) fn protect(&self, span: HostSpan) -> Result<(), Errno> {
        self.write_protect(span, 1)
    }

    /// Takes write protection and markers back. Nobody is woken.
    pub(crate) fn unprotect(&self, span: HostSpan) -> Result<(), Errno> {
        self.write_protect(span, 2)
    }

    fn write_protect(&self, span: HostSpan, mode: u64) -> Result<(), Errno> {
        let range = raw(span);
        let mut arg = WriteProtect { range, mode };
        // SAFETY: UFFDIO_WRITEPROTECT reads and writes `struct uffdio_writeprotect`, whose layout
        // `WriteProtect` has.
        let call = unsafe { Updater::<OP_WRITEPROTECT, _>::new(&mut arg) };
        // SAFETY: stores to the span wait or go on; its content is unchanged.
        unsafe { ioctl(&self.fd, call) }
    }

    /// Moves the pages of `from` to `to`, which must be registered here and empty, up to the first
    /// hole: `ENOENT` where that is at the start. Nobody is woken.
    ///
    /// The system could skip holes, but must not be asked to: Linux 6.18 remembers that it has to
    /// look at a page again, and does not forget it when it has. It goes over a page that it has
    /// moved once more and reports `EEXIST`; over a page that became a hole it goes without end,
    /// inside the call.
    pub(crate) fn move_pages(&self, to: HostVa, from: HostSpan) -> Moved {
        let mut arg = transfer(to, from, DONTWAKE);
        // SAFETY: UFFDIO_MOVE reads and writes `struct uffdio_move`, whose layout `Transfer` has.
        let call = unsafe { Updater::<OP_MOVE, _>::new(&mut arg) };
        // SAFETY: the pages keep their content; accesses to `from` are the callers' to order, who
        // has marked the span as travelling.
        let result = unsafe { ioctl(&self.fd, call) };
        #[cfg(test)]
        if result.is_ok() && self.misreports.load(core::sync::atomic::Ordering::Relaxed) {
            return outcome(0, Err(Errno::EXIST));
        }
        outcome(arg.done, result)
    }

    /// Copies one span of this process into missing pages at `to`. Nobody is woken.
    pub(crate) fn copy(&self, to: HostVa, from: HostSpan) -> Moved {
        #[cfg(test)]
        if self.is_starved() {
            return outcome(0, Err(Errno::NOMEM));
        }
        let mut arg = transfer(to, from, DONTWAKE);
        // SAFETY: UFFDIO_COPY reads and writes `struct uffdio_copy`, whose layout `Transfer` has.
        let call = unsafe { Updater::<OP_COPY, _>::new(&mut arg) };
        // SAFETY: only missing pages are filled, which nobody has read yet.
        let result = unsafe { ioctl(&self.fd, call) };
        outcome(arg.done, result)
    }

    /// Fills the missing page at `at` with zeros. Nobody is woken.
    pub(crate) fn zero_page(&self, at: HostVa) -> Result<(), Errno> {
        #[cfg(test)]
        self.gate.pass();
        self.fill(HostSpan::at(at, PAGE))
    }

    fn fill(&self, span: HostSpan) -> Result<(), Errno> {
        let mut arg = ZeroPage {
            range: raw(span),
            mode: DONTWAKE,
            done: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes `struct uffdio_zeropage`, whose layout
        // `ZeroPage` has.
        let call = unsafe { Updater::<OP_ZEROPAGE, _>::new(&mut arg) };
        // SAFETY: as for `copy`.
        unsafe { ioctl(&self.fd, call) }
    }

    /// Whether some change of registered memory has begun of which the news has not been read. Until
    /// it is read, nothing can be put into registered memory.
    pub(crate) fn is_changing(&self) -> bool {
        let nothing = HostSpan::at(HostVa::new(0), 0);
        // Of all that is wrong with filling no page, this is looked at first.
        self.fill(nothing) == Err(Errno::AGAIN)
    }

    /// Waits for a message, for `stop` to become readable, or for the timeout. Returns whether
    /// there is a message.
    pub(crate) fn wait_readable(&self, stop: BorrowedFd<'_>, timeout: Option<Duration>) -> bool {
        let mut fds = [
            PollFd::new(&self.fd, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        let timeout = timeout.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => fds[0].revents().contains(PollFlags::IN),
            Err(_interrupted) => false,
        }
    }

    /// Reads the messages that are there, at most as many as `out` has places; 0 where none is.
    ///
    /// # Errors
    /// The system's, but not `EAGAIN`.
    pub(crate) fn read(&self, out: &mut [Message]) -> Result<usize, Errno> {
        const BATCH: usize = 16;
        let mut buffer = [0_u8; BATCH * size_of::<RawMessage>()];
        let room = out.len().min(BATCH) * size_of::<RawMessage>();
        let bytes = match rustix::io::read(&self.fd, &mut buffer[..room]) {
            Ok(bytes) => bytes,
            Err(Errno::AGAIN) => 0,
            Err(error) => return Err(error),
        };
        let messages = buffer[..bytes].chunks_exact(size_of::<RawMessage>());
        let count = messages.len();
        for (place, message) in out.iter_mut().zip(messages) {
            *place = decode(message);
        }
        Ok(count)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open_raw(mode: OpenMode) -> Result<OwnedFd, Errno> {
    /// `UFFD_USER_MODE_ONLY`, which rustix does not name.
    const USER_MODE_ONLY: u32 = 1;
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if mode == OpenMode::UserModeOnly {
        flags |= UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    }
    // SAFETY: a new descriptor serves no faults before something is registered.
    match unsafe { userfaultfd(flags) } {
        Err(Errno::PERM) if mode == OpenMode::Full => open_device(),
        other => other,
    }
}

/// The device node gives the full mode to whoever may open it.
fn open_device() -> Result<OwnedFd, Errno> {
    use rustix::fs::{Mode, OFlags, open};
    let node = open(
        "/dev/userfaultfd",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits();
    // SAFETY: the call makes a descriptor and changes nothing else.
    unsafe { ioctl(&node, NewDescriptor(flags)) }
}

/// `USERFAULTFD_IOC_NEW`: flags by value, a new descriptor as the result.
struct NewDescriptor(u32);

// SAFETY: the opcode takes its argument by value and mutates nothing, and its result is a
// descriptor that the caller owns.
unsafe impl Ioctl for NewDescriptor {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(TYPE, 0)
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::without_provenance_mut(usize::try_from(self.0).unwrap_or(0))
    }

    unsafe fn output_from_ptr(
        result: IoctlOutput,
        _argument: *mut core::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the call succeeded, so its result is a new descriptor, ours alone.
        Ok(unsafe { OwnedFd::from_raw_fd(result) })
    }
}

fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut arg = Handshake {
        api: API,
        features,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API reads and writes `struct uffdio_api`, whose layout `Handshake` has.
    let call = unsafe { Updater::<OP_API, _>::new(&mut arg) };
    // SAFETY: the handshake concerns the descriptor only.
    unsafe { ioctl(fd, call) }?;
    Ok(arg.features)
}

fn raw(span: HostSpan) -> RawRange {
    RawRange {
        start: span.start().get(),
        len: span.bytes(),
    }
}

fn transfer(to: HostVa, from: HostSpan, mode: u64) -> Transfer {
    let (from, len) = (from.start().get(), from.bytes());
    Transfer {
        to: to.get(),
        from,
        len,
        mode,
        done: 0,
    }
}

/// What a transfer's two results say. A failure before anything was done leaves a negative errno
/// in `done`.
fn outcome(done: i64, result: Result<(), Errno>) -> Moved {
    Moved {
        bytes: u64::try_from(done).unwrap_or(0),
        error: result.err(),
    }
}

#[cfg(test)]
mod gate;
mod message;
#[cfg(test)]
mod tests;
