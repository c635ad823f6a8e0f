//! Waiting: a futex, a mutex on it, and the clock.
//!
//! Why not a mutex from a library: parking_lot keeps per-thread data in thread-local storage and on
//! the heap, and both may be memory that has migrated; a lock that faults while it is being taken
//! can wait for a thread that waits for the lock. This one touches its own word and nothing else.

use core::time::Duration;

use lock_api::GuardSend;
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::sys::waits::{Reason, Waiting};
use crate::sys::word::{self, AtomicU32, Ordering, fence};

const FREE: u32 = 0;
/// Somebody holds it. The bits above [`MARK_SHIFT`] say who: they cost nothing to write, as the
/// word is written anyway.
const HELD: u32 = 1;
/// Somebody sleeps on it.
const WANTED: u32 = 2;
/// Lowest bit of the holder's mark.
const MARK_SHIFT: u32 = 2;
/// log2 of the bytes of a page.
const PAGE_SHIFT: u32 = 12;
/// Looks at a held lock before sleeping; critical sections are a few hundred instructions.
const SPINS: u32 = 64;

/// A mutex that touches nothing but its own word: no thread-local, no heap, no libc.
#[derive(Debug)]
pub struct RawFutexMutex(AtomicU32);

// SAFETY: `lock` returns only after this thread has changed the word from FREE to one with HELD in
// it, which one thread at a time can do until `unlock` stores FREE; acquire and release order what
// the lock protects.
unsafe impl lock_api::RawMutex for RawFutexMutex {
    const INIT: Self = Self(AtomicU32::new(FREE));
    type Guard = GuardSend;

    fn lock(&self) -> GuardSend {
        if !self.try_take() {
            self.lock_slow();
        }
        GuardSend::new()
    }

    fn try_lock(&self) -> Option<GuardSend> {
        self.try_take().then(GuardSend::new)
    }

    unsafe fn unlock(&self, _guard: GuardSend) {
        if self.0.swap(FREE, Ordering::Release) & WANTED != 0 {
            wake_one(&self.0);
        }
    }

    fn is_locked(&self) -> bool {
        self.0.load(Ordering::Relaxed) != FREE
    }
}

impl RawFutexMutex {
    fn try_take(&self) -> bool {
        self.0
            .compare_exchange(FREE, taken(), Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    #[cold]
    fn lock_slow(&self) {
        for _spin in 0..SPINS {
            core::hint::spin_loop();
            if self.0.load(Ordering::Relaxed) == FREE && self.try_take() {
                return;
            }
        }
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let next = match now {
                // Others may be asleep: whoever has slept wakes one more.
                FREE => taken() | WANTED,
                held => held | WANTED,
            };
            if let Err(other) = self.change(now, next) {
                now = other;
                continue;
            }
            if now == FREE {
                return;
            }
            wait(&self.0, next, None, Reason::Lock);
            now = self.0.load(Ordering::Relaxed);
        }
    }

    fn change(&self, from: u32, to: u32) -> Result<u32, u32> {
        self.0
            .compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed)
    }
}

/// The word of a lock that the calling thread holds.
fn taken() -> u32 {
    let here = 0_u8;
    HELD | mark_of((&raw const here).addr()) << MARK_SHIFT
}

/// The mark of a thread, from any address on its stack: the low bits of the page's number. A
/// thread-local would name the thread itself, but must not be touched here.
pub(super) fn mark_of(address: usize) -> u32 {
    let page = (address >> PAGE_SHIFT) & (usize::MAX >> (usize::BITS - MARK_BITS));
    u32::try_from(page).unwrap_or(0)
}

/// The mark in the word of a lock.
pub(crate) const fn mark_in(word: u32) -> u32 {
    word >> MARK_SHIFT
}

/// Bits of a mark.
const MARK_BITS: u32 = u32::BITS - MARK_SHIFT;

/// Whether a thread whose stack is `stack` may be the one with this mark. Marks leave out the upper
/// address bits, so distant stacks can look alike.
pub(crate) fn is_marked(mark: u32, stack: core::ops::Range<usize>) -> bool {
    let pages = stack.len() >> PAGE_SHIFT;
    let offset = mark.wrapping_sub(mark_of(stack.start)) & (u32::MAX >> MARK_SHIFT);
    usize::try_from(offset).is_ok_and(|offset| offset < pages)
}

/// Sleeps while `*word == seen`, at most `timeout` where given. May return early.
pub(crate) fn wait(word: &AtomicU32, seen: u32, timeout: Option<Duration>, reason: Reason) {
    let _seen_by_reports = Waiting::enter(reason, core::ptr::from_ref(word).addr());
    let timeout = timeout.map(|time| Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    // Any error means "look again", which is what the caller does anyway.
    let _looked = word::wait(word, word::Flags::PRIVATE, seen, timeout.as_ref());
}

/// Wakes every sleeper on `word`.
pub(crate) fn wake(word: &AtomicU32) {
    // Fails only for an invalid address, which a reference is not.
    let _woken = word::wake(word, word::Flags::PRIVATE, i32::MAX.unsigned_abs());
}

/// Wakes one sleeper on `word`.
pub(crate) fn wake_one(word: &AtomicU32) {
    // As in `wake`.
    let _woken = word::wake(word, word::Flags::PRIVATE, 1);
}

/// Counts the threads that sleep on some words, so that waking is a system call only where somebody
/// does.
///
/// Who sleeps counts itself before the system looks at the word; who wakes looks for sleepers after
/// it has changed the word. One sees the other.
#[derive(Debug)]
pub(crate) struct Sleepers(AtomicU32);

impl Sleepers {
    /// None.
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Counts the caller while it is in `wait`.
    pub(crate) fn sleep(&self, wait: impl FnOnce()) {
        self.0.fetch_add(1, Ordering::SeqCst);
        wait();
        self.0.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether somebody may sleep on a word that the caller has changed.
    pub(crate) fn are_there(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::SeqCst) > 0
    }
}

/// Counts changes, for those who wait for the next one.
#[derive(Debug)]
pub(crate) struct Changes {
    count: AtomicU32,
    sleepers: Sleepers,
}

impl Changes {
    /// None so far.
    pub(crate) const fn new() -> Self {
        Self {
            count: AtomicU32::new(0),
            sleepers: Sleepers::new(),
        }
    }

    /// How many so far. Asked before the look at what may have changed.
    pub(crate) fn seen(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }

    /// Sleeps until there are others than the first `seen`. May return early.
    pub(crate) fn wait(&self, seen: u32, reason: Reason) {
        self.wait_for(seen, None, reason);
    }

    /// The same, for at most `timeout` where there is one.
    pub(crate) fn wait_for(&self, seen: u32, timeout: Option<Duration>, reason: Reason) {
        self.sleepers
            .sleep(|| wait(&self.count, seen, timeout, reason));
    }

    /// Something has changed: all who sleep look again.
    pub(crate) fn tell(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.are_there() {
            wake(&self.count);
        }
    }
}

impl Default for Changes {
    fn default() -> Self {
        Self::new()
    }
}

/// Monotonic time in nanoseconds.
#[must_use]
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
