//! What tests do to a userfaultfd: a place where a thread waits, to meet another one there, and mistakes
//! of the system.

use core::sync::atomic::{AtomicU8, Ordering};

use super::Uffd;
use crate::sys::futex::now_ns;

impl Uffd {
    /// From now on every MOVE that moves all reports that it moved nothing, as Linux 6.18 does at
    /// times.
    pub(crate) fn misreport_moves(&self) {
        self.misreports.store(true, Ordering::Relaxed);
    }

    /// Whether a copy finds no memory.
    pub(super) fn is_starved(&self) -> bool {
        let (order, fewer) = (Ordering::Relaxed, |left: u32| left.checked_sub(1));
        self.starved.fetch_update(order, order, fewer).is_ok()
    }
}

/// Open unless a test closes it, and again after the first thread.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU8);

const CLOSED: u8 = 1;
const REACHED: u8 = 2;
const OPEN: u8 = 0;
/// Longest wait: who would open the gate may itself wait for the thread at it.
const LONGEST_NS: u64 = 300_000_000;

impl Gate {
    /// The next thread that comes here waits.
    pub(crate) fn close(&self) {
        self.0.store(CLOSED, Ordering::SeqCst);
    }

    /// Waits until a thread is here.
    pub(crate) fn meet(&self) {
        while self.0.load(Ordering::SeqCst) == CLOSED {
            rustix::thread::sched_yield();
        }
    }

    /// Lets the thread go on.
    pub(crate) fn open(&self) {
        self.0.store(OPEN, Ordering::SeqCst);
    }

    pub(super) fn pass(&self) {
        let (order, first) = (Ordering::SeqCst, (CLOSED, REACHED));
        if self
            .0
            .compare_exchange(first.0, first.1, order, order)
            .is_err()
        {
            return;
        }
        let longest = now_ns() + LONGEST_NS;
        while self.0.load(Ordering::SeqCst) == REACHED && now_ns() < longest {
            rustix::thread::sched_yield();
        }
    }
}
