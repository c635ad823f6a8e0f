//! The memory that the processes of a window share with who asks them: a program, what came of
//! it, and whose turn it is. Whoever has the turn has all of the board.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use crate::sys::scratch::call::{
    AREAS, Answer, Area, Call, Look, PAGES, PROCESSES, STEPS, Seen, Step,
};

/// The turn of who asks.
pub(super) const KEEPER: u32 = u32::MAX;

/// What came of a step.
#[derive(Clone, Copy)]
pub(super) struct Record {
    pub(super) answer: Option<Answer>,
    pub(super) looked: bool,
    /// An error number where looking failed.
    pub(super) trouble: i32,
    pub(super) area_count: usize,
    pub(super) areas: [Area; AREAS],
    pub(super) pages: [u32; PAGES],
}

/// The board. It lives in zeroed shared memory, and all-zero is a board without steps.
#[repr(C)]
pub(super) struct Board {
    turn: AtomicU32,
    next: AtomicU32,
    count: AtomicU32,
    /// One more than the number of the process that is about to end.
    exiting: AtomicU32,
    pids: [AtomicI32; PROCESSES],
    steps: [UnsafeCell<Step>; STEPS],
    records: [UnsafeCell<Record>; STEPS],
}

impl Board {
    pub(super) fn pass_turn(&self, to: u32) {
        self.turn.store(to, Ordering::Release);
        let turn = self.turn.as_ptr();
        // SAFETY: wakes who waits on a word of ours.
        let _woken = unsafe { libc::syscall(libc::SYS_futex, turn, libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Waits for the turn of `me`.
    pub(super) fn await_turn(&self, me: u32) {
        while !self.await_briefly(me) {}
    }

    /// Waits for the turn of `me`, or a moment. Returns whether it is.
    pub(super) fn await_briefly(&self, me: u32) -> bool {
        let now = self.turn.load(Ordering::Acquire);
        if now == me {
            return true;
        }
        let moment = libc::timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let (turn, moment) = (self.turn.as_ptr(), &raw const moment);
        // SAFETY: waits on a word of ours while it has that value.
        let _woken = unsafe { libc::syscall(libc::SYS_futex, turn, libc::FUTEX_WAIT, now, moment) };
        self.turn.load(Ordering::Acquire) == me
    }

    /// The next step and its number; the caller has the turn.
    pub(super) fn next_step(&self) -> Option<(usize, Step)> {
        let at = self.next.load(Ordering::Relaxed);
        if at >= self.count.load(Ordering::Relaxed) {
            return None;
        }
        let at = usize::try_from(at).ok()?;
        // SAFETY: who has the turn has the board.
        Some((at, unsafe { *self.steps.get(at)?.get() }))
    }

    /// The step's record is complete.
    pub(super) fn done_with(&self, at: usize) {
        let next = u32::try_from(at + 1).unwrap_or(u32::MAX);
        self.next.store(next, Ordering::Relaxed);
    }

    pub(super) fn record(&self, at: usize, write: impl FnOnce(&mut Record)) {
        if let Some(record) = self.records.get(at) {
            // SAFETY: who has the turn has the board.
            write(unsafe { &mut *record.get() });
        }
    }

    pub(super) fn born(&self, child: u8, pid: i32) {
        if let Some(place) = self.pids.get(usize::from(child)) {
            place.store(pid, Ordering::Relaxed);
        }
    }

    pub(super) fn exits(&self, who: u8) {
        self.exiting.store(u32::from(who) + 1, Ordering::Relaxed);
    }

    /// The system's number of the process that is about to end, once.
    pub(super) fn take_exiting(&self) -> Option<i32> {
        let who = self.exiting.swap(0, Ordering::Relaxed).checked_sub(1)?;
        Some(self.take_pid(usize::try_from(who).ok()?)).filter(|pid| *pid > 0)
    }

    /// The system's number of process `who`, which has none any more.
    pub(super) fn take_pid(&self, who: usize) -> i32 {
        self.pids
            .get(who)
            .map_or(0, |place| place.swap(0, Ordering::Relaxed))
    }

    /// Puts a program up; the caller has the turn. Steps beyond [`STEPS`] are left out.
    pub(super) fn put_up(&self, steps: impl Iterator<Item = Step>) {
        let mut count = 0;
        for (step, place) in steps.zip(&self.steps) {
            // SAFETY: who has the turn has the board.
            unsafe { *place.get() = step };
            count += 1;
        }
        self.next.store(0, Ordering::Relaxed);
        self.count.store(count, Ordering::Relaxed);
    }

    /// Whether all steps are done; the caller has the turn.
    pub(super) fn is_done(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.count.load(Ordering::Relaxed)
    }

    /// What came of step `at` in a window of `pages` pages, or the error number of a look that
    /// failed; the caller has the turn.
    pub(super) fn seen(&self, at: usize, pages: usize) -> Result<Seen, i32> {
        let Some(record) = self.records.get(at) else {
            return Err(libc::EINVAL);
        };
        // SAFETY: who has the turn has the board.
        let record = unsafe { &*record.get() };
        if !record.looked {
            return Ok(Seen {
                answer: record.answer,
                ..Seen::default()
            });
        }
        if record.trouble != 0 {
            return Err(record.trouble);
        }
        Ok(Seen {
            answer: record.answer,
            areas: record.areas[..record.area_count].to_vec(),
            pages: record.pages[..pages.min(PAGES)].to_vec(),
        })
    }
}

/// The step that empties a window.
pub(super) const fn empty(bytes: u64) -> Step {
    Step {
        who: 0,
        call: Call::Unmap { at: 0, len: bytes },
        look: Look::No,
    }
}
