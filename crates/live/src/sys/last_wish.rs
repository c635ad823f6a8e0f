//! The last wish of a process that is about to die of a signal: that its data comes home.
//!
//! A thread in a signal handler can do little. It asks the space's attendant, and waits for a
//! while: the dying thread may hold the very lock that the attendant needs.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::time::Duration;

use crate::sys::atfork;
use crate::sys::futex::{self, Changes};
use crate::sys::waits::Reason;

/// Longest wait for the data.
const PATIENCE_NS: u64 = 2_000_000_000;

// In `.data`: see `owned`.
/// Somebody attends.
#[unsafe(link_section = ".data")]
static ATTENDED: AtomicBool = AtomicBool::new(false);
/// Calls of [`call`]: what the attendant sleeps on.
#[unsafe(link_section = ".data")]
static CALLED: Changes = Changes::new();
/// Some thread is dying.
#[unsafe(link_section = ".data")]
static DYING: AtomicBool = AtomicBool::new(false);
/// 1 when everything is home.
#[unsafe(link_section = ".data")]
static GRANTED: AtomicU32 = AtomicU32::new(0);

/// Asks for all data, and waits until it is home or patience ends. Async-signal-safe.
pub(crate) fn make() {
    if !ATTENDED.load(Ordering::Acquire) || atfork::is_child() {
        return;
    }
    DYING.store(true, Ordering::Release);
    call();
    let deadline = futex::now_ns().saturating_add(PATIENCE_NS);
    while GRANTED.load(Ordering::Acquire) == 0 {
        let left = deadline.saturating_sub(futex::now_ns());
        if left == 0 {
            return;
        }
        let left = Some(Duration::from_nanos(left));
        futex::wait(&GRANTED, 0, left, Reason::Travel);
    }
}

/// Somebody attends from now on.
pub(crate) fn attend() {
    ATTENDED.store(true, Ordering::Release);
}

/// Nobody attends any more.
pub(crate) fn leave() {
    ATTENDED.store(false, Ordering::Release);
}

/// Whether a wish waits to be granted.
pub(crate) fn is_made() -> bool {
    DYING.load(Ordering::Acquire) && GRANTED.load(Ordering::Acquire) == 0
}

/// Everything is home.
pub(crate) fn grant() {
    GRANTED.store(1, Ordering::Release);
    futex::wake(&GRANTED);
}

/// Wakes the attendant, where it sleeps.
pub(crate) fn call() {
    CALLED.tell();
}

/// The number of calls so far, for [`wait_called`].
pub(crate) fn calls() -> u32 {
    CALLED.seen()
}

/// Sleeps until there is a call beyond the first `seen`.
pub(crate) fn wait_called(seen: u32) {
    CALLED.wait(seen, Reason::Work);
}
