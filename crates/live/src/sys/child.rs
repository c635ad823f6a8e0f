//! Children of this process as values: made by the C library, past it, or in shared memory.
//!
//! A program makes children in ways that code without `unsafe` cannot. Scenarios and torture need
//! all of them.

use core::ffi::{CStr, c_void};
use core::mem::ManuallyDrop;
use std::io;

/// Stack of a child that shares the parent's memory.
const STACK_BYTES: usize = 256 << 10;

/// How a child is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// `fork()`.
    Fork,
    /// A system call that the C library does not see.
    RawClone,
    /// As `vfork()` does: the child uses the parent's memory, and the calling thread waits until it
    /// is gone or runs a program.
    Vfork,
}

/// A child that runs one closure.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    /// Takes a byte when it may begin. Closing would not do: other children may have a copy.
    gate: Option<i32>,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With an exit code: 0 where the closure was content.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl Child {
    /// Makes one. It begins to work when [`passed`](Self::passed) or [`ended`](Self::ended) is
    /// called; by [`Vfork`](By::Vfork) it has ended when this returns. A child ends with its parent.
    ///
    /// `work` runs in a copy of a process with threads that the copy does not have: it must not
    /// allocate, lock or print, or it may wait for ever.
    ///
    /// # Errors
    /// The system's, where there is no child.
    pub fn make(by: By, work: impl FnOnce() -> bool) -> io::Result<Self> {
        if by == By::Vfork {
            return share(work);
        }
        let mut ends = [0; 2];
        // SAFETY: makes two descriptors.
        let made = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        let [wait, gate] = ends;
        let pid = split(by);
        if pid == 0 {
            close(gate);
            await_byte(wait);
            let content = work();
            // SAFETY: ends the child without running anything else of it.
            unsafe { libc::_exit(i32::from(!content)) };
        }
        let refused = io::Error::last_os_error();
        close(wait);
        if pid < 0 {
            close(gate);
            return Err(refused);
        }
        Ok(Self {
            pid,
            gate: Some(gate),
        })
    }

    /// Makes one that runs a program without arguments, as [`make`](Self::make).
    ///
    /// # Errors
    /// The system's, where there is no child.
    pub fn exec(by: By, program: &CStr) -> io::Result<Self> {
        let arguments = [program.as_ptr(), core::ptr::null()];
        Self::make(by, || {
            // SAFETY: strings that live as long as the call; it returns only where it fails.
            let _refused = unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
            false
        })
    }

    /// Lets it begin, and waits for it to end. Whether `work` was content, or the program.
    ///
    /// # Errors
    /// As [`ended`](Self::ended).
    pub fn passed(self) -> io::Result<bool> {
        Ok(self.ended()? == Ended::Code(0))
    }

    /// Lets it begin, and waits for it to end.
    ///
    /// # Errors
    /// `ECHILD` where somebody else has waited for it.
    pub fn ended(self) -> io::Result<Ended> {
        // It needs no end any more.
        let mut this = ManuallyDrop::new(self);
        this.open_gate();
        let pid = this.pid;
        let mut status = 0;
        loop {
            // SAFETY: our child; the status is a place of ours.
            let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
            if ended == pid {
                break;
            }
            let why = io::Error::last_os_error();
            if why.kind() != io::ErrorKind::Interrupted {
                return Err(why);
            }
        }
        Ok(if libc::WIFSIGNALED(status) {
            Ended::Signal(libc::WTERMSIG(status))
        } else {
            Ended::Code(libc::WEXITSTATUS(status))
        })
    }

    fn open_gate(&mut self) {
        if let Some(gate) = self.gate.take() {
            // SAFETY: writes a byte of ours to a descriptor of ours. A child that is gone leaves
            // nobody to read it: the C library's default would be to end us, Rust's is an error.
            let _told = unsafe { libc::write(gate, c"".as_ptr().cast(), 1) };
            close(gate);
        }
    }
}

impl Drop for Child {
    /// A child that nobody waited for must not outlive the value: it is killed.
    fn drop(&mut self) {
        // SAFETY: our own child, which nobody has waited for.
        let _killed = unsafe { libc::kill(self.pid, libc::SIGKILL) };
        self.open_gate();
        // SAFETY: as above; the status is not asked for.
        let _reaped = unsafe { libc::waitpid(self.pid, core::ptr::null_mut(), 0) };
    }
}

/// Splits the process in two: 0 in the child, its number in the parent, or -1.
fn split(by: By) -> i32 {
    let pid = match by {
        // SAFETY: the child runs the caller's closure, as its contract says, and ends.
        By::Fork | By::Vfork => unsafe { libc::fork() },
        By::RawClone => {
            let flags = i64::from(libc::SIGCHLD);
            // SAFETY: as above; without CLONE_VM and a stack this is a fork.
            let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
            i32::try_from(pid).unwrap_or(-1)
        }
    };
    if pid == 0 {
        // SAFETY: asks for a signal when the parent is gone.
        let _asked = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    }
    pid
}

/// Runs `work` in a child that shares the parent's memory, and waits until the child is gone.
fn share<W: FnOnce() -> bool>(work: W) -> io::Result<Child> {
    extern "C" fn run<W: FnOnce() -> bool>(work: *mut c_void) -> i32 {
        // SAFETY: the parent's own place, which waits for this child; taken out once, here.
        let taken = unsafe { (*work.cast::<Option<W>>()).take() };
        i32::from(!taken.is_some_and(|work| work()))
    }
    let mut work = Some(work);
    let mut stack = vec![0_u128; STACK_BYTES / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let place = (&raw mut work).cast::<c_void>();
    // SAFETY: `top` is the aligned end of a stack that nobody else uses. CLONE_VFORK keeps this
    // thread, and so the stack and the closure, until the child has ended or runs a program.
    let pid = unsafe { libc::clone(run::<W>, top, flags, place) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Child { pid, gate: None })
}

fn close(descriptor: i32) {
    // SAFETY: ours, and not used again.
    let _closed = unsafe { libc::close(descriptor) };
}

/// Waits for the byte that opens the gate.
fn await_byte(descriptor: i32) {
    let mut none = 0_u8;
    let place: *mut c_void = (&raw mut none).cast();
    // SAFETY: reads at most one byte into a place of that size.
    let _end = unsafe { libc::read(descriptor, place, 1) };
}

/// From now on the system refuses userfaultfd to this thread and to those it starts, as the profile of
/// a container does.
#[cfg(test)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_of_every_kind_tell_whether_they_were_content() {
        for by in [By::Fork, By::RawClone, By::Vfork] {
            for content in [true, false] {
                let child = Child::make(by, || content).expect("one more process");
                assert_eq!(child.passed().expect("ours"), content, "{by:?}");
            }
            let child = Child::exec(by, c"/proc/self/nothing").expect("one more process");
            let ended = child.ended().expect("ours");
            assert_eq!(ended, Ended::Code(1), "{by:?}: no such program");
        }
    }

    #[test]
    fn child_by_vfork_uses_the_parents_memory() {
        let mut word = 1;
        let child = Child::make(By::Vfork, || {
            word = 2;
            true
        });
        assert!(child.expect("one more process").passed().expect("ours"));
        assert_eq!(word, 2);
    }

    #[test]
    fn children_made_at_the_same_time_begin_one_by_one() {
        let [first, second] = [true, false]
            .map(|content| Child::make(By::Fork, || content).expect("one more process"));
        assert!(first.passed().expect("ours"));
        assert!(!second.passed().expect("ours"));
    }

    #[test]
    fn child_that_nobody_waits_for_is_killed() {
        let pid = {
            let child = Child::make(By::Fork, || {
                loop {
                    core::hint::spin_loop();
                }
            });
            child.expect("one more process").pid
        };
        // SAFETY: signal 0 only asks.
        let there = unsafe { libc::kill(pid, 0) };
        assert_eq!(there, -1, "it is gone");
    }
}
