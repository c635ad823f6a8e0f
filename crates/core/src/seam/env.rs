//! Environment: time, randomness, locks, waiting, deferred work. Nothing else in the framework
//! reads a clock, sleeps or spawns.

use core::sync::atomic::AtomicU32;

use crate::mutant::Mutant;

/// A point in time, or a length of time, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ns(pub u64);

impl Ns {
    /// This many milliseconds.
    #[must_use]
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }

    /// The time `by` later.
    #[must_use]
    pub const fn after(self, by: Self) -> Self {
        Self(self.0.saturating_add(by.0))
    }

    /// Time from `earlier` to here, zero if it lies ahead.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

/// Work that an invalidation may ask for but may not do itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Ranges of the VM with this id were unmapped: run its garbage collector.
    CollectGarbage {
        /// Which VM.
        vm: u32,
    },
}

/// A place where another actor may run: a switch point of a seeded scheduler, nothing in
/// production.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Between reading the CPU page tables and taking the notifier lock.
    AfterFaultIn,
    /// Between planning and committing page-table entries.
    BeforeCommit,
    /// After collecting pages for a migration, before the copy.
    AfterCollect,
    /// After the copy, before the host's tables change.
    BeforeFinalize,
    /// A retry loop starts over.
    Retry,
    /// Inside a host that is written in steps: between two changes of a CPU page table.
    PteWrite,
    /// Inside a host that is written in steps: a lock of its own is about to be taken.
    HostLock,
}

/// Clock, randomness, locks, waiting and deferred work of one instance.
pub trait Environment: Send + Sync + 'static {
    /// The mutex under every lock of the framework. Locking it must neither allocate nor touch
    /// memory that can migrate, because invalidations lock it on the threads of the process.
    type RawMutex: lock_api::RawMutex + Send + Sync;

    /// Monotonic time. Never sleeps; any lock may be held.
    fn now(&self) -> Ns;

    /// A random number. Never sleeps; any lock may be held.
    fn random(&self) -> u64;

    /// Sleeps while `*word == seen`, until [`wake`](Self::wake); may return early. No lock may be
    /// held.
    fn wait(&self, word: &AtomicU32, seen: u32);

    /// Wakes every sleeper on `word`. Never sleeps; any lock may be held.
    fn wake(&self, word: &AtomicU32);

    /// Sleeps until `deadline`. No lock may be held but `vm`.
    fn sleep_until(&self, deadline: Ns);

    /// Asks for `work` to be done soon, elsewhere. Called inside invalidations: it must not
    /// allocate, sleep or call back. Asking again before it ran is one request.
    fn defer(&self, work: Work);

    /// Lets another actor run. Called with no lock held but `vm`, and at [`Point::PteWrite`] such
    /// locks of the host as are waited for by [`wait`](Self::wait).
    fn yield_point(&self, _at: Point) {}

    /// Whether a known bug is re-introduced. Only test worlds answer yes.
    #[doc(hidden)]
    fn mutant(&self, _which: Mutant) -> bool {
        false
    }
}

/// A framework mutex over the environment's raw lock.
pub type Mutex<E, T> = lock_api::Mutex<<E as Environment>::RawMutex, T>;
/// Proof that a [`Mutex`] is held.
pub type MutexGuard<'a, E, T> = lock_api::MutexGuard<'a, <E as Environment>::RawMutex, T>;
