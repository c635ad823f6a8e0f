//! Children of this process, for tests: made by the C library and past it.

use core::ffi::c_void;
use std::io;

/// How a child is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// `fork()`.
    Fork,
    /// A system call that the C library does not see.
    RawClone,
}

/// A child that runs one closure.
#[derive(Debug)]
pub(crate) struct Child {
    pid: i32,
    /// Closed when it may begin.
    gate: i32,
}

impl Child {
    /// Makes one. It begins to work when [`passed`](Self::passed) is called. `work` runs in a copy of
    /// a process with threads: it must not allocate, lock or print.
    pub(crate) fn make(by: By, work: impl FnOnce() -> bool) -> Self {
        let mut ends = [0; 2];
        // SAFETY: makes two descriptors.
        let made = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
        assert_eq!(made, 0);
        let [wait, gate] = ends;
        let pid = match by {
            // SAFETY: the child only runs `work`, as its contract says, and ends.
            By::Fork => unsafe { libc::fork() },
            By::RawClone => {
                let flags = i64::from(libc::SIGCHLD);
                // SAFETY: as above; without CLONE_VM and a stack this is a fork.
                let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
                i32::try_from(pid).expect("a process id")
            }
        };
        assert!(pid >= 0, "{}", io::Error::last_os_error());
        if pid == 0 {
            let mut none = 0_u8;
            // SAFETY: the child's own copies of the descriptors.
            let _closed = unsafe { libc::close(gate) };
            let place: *mut c_void = (&raw mut none).cast();
            // SAFETY: waits until the parent has closed the other end.
            let _end = unsafe { libc::read(wait, place, 1) };
            // SAFETY: ends the child without running anything else of it.
            unsafe { libc::_exit(i32::from(!work())) };
        }
        // SAFETY: the parent's end is not used again.
        let _closed = unsafe { libc::close(wait) };
        Self { pid, gate }
    }

    /// Lets it begin, and waits for it to end. Whether `work` was content.
    pub(crate) fn passed(self) -> bool {
        // SAFETY: ours, and not used again.
        let _closed = unsafe { libc::close(self.gate) };
        let mut status = 0;
        // SAFETY: our child, which nobody else waits for.
        let ended = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(ended, self.pid, "{}", io::Error::last_os_error());
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}

/// From now on the system refuses userfaultfd to this thread and to those it starts, as the profile of
/// a container does.
pub(crate) fn forbid_userfaultfd() {
    const LOAD: u16 = 0x20;
    /// Offsets into `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const SECOND_ARGUMENT: u32 = 24;
    /// What makes a descriptor from `/dev/userfaultfd`.
    const NEW: u32 = 0xAA00;
    const IF_EQUAL: u16 = 0x15;
    const ANSWER: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = |call: i64| u32::try_from(call).expect("a small number");
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let mut steps = [
        step(LOAD, 0, 0, NUMBER),
        step(IF_EQUAL, 3, 0, number(libc::SYS_userfaultfd)),
        step(IF_EQUAL, 0, 3, number(libc::SYS_ioctl)),
        step(LOAD, 0, 0, SECOND_ARGUMENT),
        step(IF_EQUAL, 0, 1, NEW),
        step(ANSWER, 0, 0, refuse),
        step(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: 7,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: only takes rights away.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the filter is a valid program of seven steps, which the system copies.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
