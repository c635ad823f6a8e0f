//! Waiting: a futex, a mutex on it, and the clock.
//!
//! Why not a mutex from a library: parking_lot keeps per-thread data in thread-local storage and on
//! the heap, and both may be memory that has migrated; a lock that faults while it is being taken
//! can wait for a thread that waits for the lock. This one touches its own word and nothing else.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;

use lock_api::GuardSend;
use rustix::thread::futex as sys;
use rustix::time::{ClockId, Timespec, clock_gettime};

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody sleeps on it.
const WANTED: u32 = 2;
/// Looks at a held lock before sleeping; critical sections are a few hundred instructions.
const SPINS: u32 = 64;

/// A mutex that touches nothing but its own word: no thread-local, no heap, no libc.
#[derive(Debug)]
pub struct RawFutexMutex(AtomicU32);

// SAFETY: `lock` returns only after this thread has changed the word from FREE to HELD or WANTED,
// which one thread at a time can do until `unlock` stores FREE; acquire and release order what the
// lock protects.
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
        if self.0.swap(FREE, Ordering::Release) == WANTED {
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
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
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
        while self.0.swap(WANTED, Ordering::Acquire) != FREE {
            wait(&self.0, WANTED, None);
        }
    }
}

/// Sleeps while `*word == seen`, at most `timeout` where given. May return early.
pub(crate) fn wait(word: &AtomicU32, seen: u32, timeout: Option<Duration>) {
    let timeout = timeout.map(|time| Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    // Any error means "look again", which is what the caller does anyway.
    let _looked = sys::wait(word, sys::Flags::PRIVATE, seen, timeout.as_ref());
}

/// Wakes every sleeper on `word`.
pub(crate) fn wake(word: &AtomicU32) {
    // Fails only for an invalid address, which a reference is not.
    let _woken = sys::wake(word, sys::Flags::PRIVATE, i32::MAX.unsigned_abs());
}

fn wake_one(word: &AtomicU32) {
    // As in `wake`.
    let _woken = sys::wake(word, sys::Flags::PRIVATE, 1);
}

/// Monotonic time in nanoseconds.
#[must_use]
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn counter_under_contention_loses_nothing() {
        let total = lock_api::Mutex::<RawFutexMutex, u64>::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|_| *total.lock() += 1));
            }
        });
        assert_eq!(*total.lock(), 80_000);
    }

    #[test]
    fn wait_returns_at_once_for_another_value_and_after_the_timeout() {
        let word = AtomicU32::new(1);
        wait(&word, 0, None);
        wait(&word, 1, Some(Duration::from_millis(1)));
    }
}
