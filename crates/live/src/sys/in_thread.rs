//! Faults served on the very thread that faulted, by a signal handler.
//!
//! ```text
//!  access ── SIGSEGV or SIGBUS ──▶ handler: may it be ours?  no: on to the next (`signals`)
//!     ▲                                │ yes: signals blocked, a stack of the runtime
//!     │                                ▼
//!     │                            hook: serve ──┬─ served ─────────────┐
//!     │                                          ├─ later: stack back,  │
//!     │                                          │  sleep until a change├─▶ return
//!     └────────────── made again ────────────────┴──────────────────────┘
//! ```
//!
//! The faulting thread holds nothing of the runtime's: its threads do not fault at such memory while
//! they hold a lock, and a bracket touches memory of the program before it takes one. What the
//! program's thread holds, its allocator's locks for instance, the hook must not want.
//!
//! A sleep takes place on the thread's own (or alternate) stack, so that threads which wait do not
//! use up the runtime's stacks.

use core::time::Duration;
use std::sync::OnceLock;

use gpusvm::addr::HostVa;
use gpusvm::seam::mm::Access;
use rustix::io::Errno;

use crate::sys::atfork;
use crate::sys::futex::{self, Changes};
use crate::sys::signals;
use crate::sys::stack;
use crate::sys::waits::Reason;

/// An access that failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// Address.
    pub(crate) at: HostVa,
    /// What it wanted.
    pub(crate) access: Access,
    /// The page is missing (SIGBUS); otherwise it may not be accessed (SIGSEGV).
    pub(crate) missing: bool,
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// The access would fail without the runtime, too: the program's handler gets the signal.
    NotOurs,
    /// The access can be made again.
    Retry,
    /// The access is made again after the next [`announce`], or at this time on the host's clock in
    /// nanoseconds where there is one.
    Later(Option<u64>),
}

/// Who serves faults in the thread.
pub(crate) trait FaultHook: Sync {
    /// Whether a fault at `at` may be this hook's. Runs in a signal handler, on any stack: it takes no
    /// lock and allocates nothing.
    fn may_serve(&self, at: HostVa) -> bool;

    /// Serves a fault. Runs on a stack of the runtime, with all signals but faults blocked. It may
    /// take locks of the runtime and wait for migrations, must not touch memory that can migrate, and
    /// must not panic. Threads that have to wait for another one's migration are answered
    /// [`Served::Later`].
    fn serve(&self, fault: &Fault) -> Served;
}

/// Who serves; each looks after memory of its own.
const HOOKS: usize = 2;
// In `.data`, as all that fault service reads: see `owned`.
#[unsafe(link_section = ".data")]
static HOOK: [OnceLock<&'static dyn FaultHook>; HOOKS] = [const { OnceLock::new() }; HOOKS];
/// What threads sleep on that are to try again later.
#[unsafe(link_section = ".data")]
static CHANGES: Changes = Changes::new();

/// From now on `hook` is asked, for the life of the process. A second call with the same hook
/// changes nothing.
///
/// # Errors
/// No memory for stacks; `EUSERS` where there are too many hooks.
pub(crate) fn install(hook: &'static dyn FaultHook) -> Result<(), Errno> {
    stack::prepare()?;
    signals::install();
    let same = |known: &&'static dyn FaultHook| core::ptr::addr_eq(*known, hook);
    let known = |place: &OnceLock<&'static dyn FaultHook>| place.get().is_some_and(same);
    if HOOK.iter().any(known) || HOOK.iter().any(|place| place.set(hook).is_ok()) {
        Ok(())
    } else {
        Err(Errno::USERS)
    }
}

/// Lets threads try again that were answered [`Served::Later`].
pub(crate) fn announce() {
    CHANGES.tell();
}

/// Serves a fault. True: the access is to be made again. Called by the signal handler, with all signals
/// blocked but those of faults.
pub(super) fn serve(fault: &Fault) -> bool {
    let hooks = HOOK.iter().filter_map(OnceLock::get);
    let Some(hook) = hooks.into_iter().find(|hook| hook.may_serve(fault.at)) else {
        return false;
    };
    // A child has neither the threads nor the memory.
    if atfork::is_child() {
        return false;
    }
    let errno = Preserved::errno();
    let seen = CHANGES.seen();
    let served = stack::run(|| hook.serve(fault)).unwrap_or(Served::NotOurs);
    if let Served::Later(until) = served {
        let left = until.map(|until| until.saturating_sub(futex::now_ns()));
        if left != Some(0) {
            CHANGES.wait_for(seen, left.map(Duration::from_nanos), Reason::Travel);
        }
    }
    drop(errno);
    served != Served::NotOurs
}

/// The interrupted code's `errno`, put back when this is dropped.
struct Preserved {
    place: *mut i32,
    value: i32,
}

impl Preserved {
    fn errno() -> Self {
        // SAFETY: always valid; the address is this thread's for its life.
        let place = unsafe { libc::__errno_location() };
        Self {
            place,
            // SAFETY: as above.
            value: unsafe { place.read() },
        }
    }
}

impl Drop for Preserved {
    fn drop(&mut self) {
        // SAFETY: the place is this thread's, which is the one that made the value.
        unsafe { self.place.write(self.value) };
    }
}

#[cfg(test)]
mod tests;
