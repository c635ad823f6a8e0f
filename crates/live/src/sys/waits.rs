//! Who waits for what: a fixed table that sleepers write, for reports about a process that no
//! longer moves.
//!
//! A thread enters itself when it is about to sleep and leaves when it wakes; nothing is written on
//! a path that does not sleep. Entries are plain atomics in the runtime's own memory: entering
//! allocates nothing and takes no lock. A reader may see an entry that is just changing hands: this
//! is for people to look at, nothing is decided by it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::sys::futex;
use crate::sys::thread;

/// Threads that can be told apart at one time; more sleep unseen.
const PLACES: usize = 256;
/// Thread of a place that nobody uses.
const NOBODY: u32 = 0;

#[unsafe(link_section = ".data")] // See `owned`.
static TABLE: [Place; PLACES] = [const { Place::new() }; PLACES];

/// What a thread sleeps for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A lock that another thread holds.
    Lock,
    /// Pages to end their travel, or a change of the address space to end.
    Travel,
    /// A staging slot to come back.
    Staging,
    /// The framework: an invalidation to end, or device memory to come free.
    Framework,
    /// The device: an answer to a fault, a TLB acknowledgement, or work.
    Device,
    /// Time to pass.
    Clock,
    /// Work to be asked for.
    Work,
    /// Another thread to start.
    Start,
}

impl Reason {
    const ALL: [Self; 8] = [
        Self::Lock,
        Self::Travel,
        Self::Staging,
        Self::Framework,
        Self::Device,
        Self::Clock,
        Self::Work,
        Self::Start,
    ];

    /// In words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lock => "lock",
            Self::Travel => "pages to settle",
            Self::Staging => "staging slot",
            Self::Framework => "invalidation or device memory",
            Self::Device => "device",
            Self::Clock => "time",
            Self::Work => "work",
            Self::Start => "thread start",
        }
    }
}

/// One sleeping thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleeper {
    /// Kernel id of the thread.
    pub(crate) thread: u32,
    /// Why it sleeps.
    pub(crate) reason: Reason,
    /// Address of what it sleeps on.
    pub(crate) word: u64,
    /// When it began, in nanoseconds of the monotonic clock.
    pub(crate) since_ns: u64,
}

struct Place {
    thread: AtomicU32,
    reason: AtomicU32,
    word: AtomicU64,
    since: AtomicU64,
}

/// The calling thread's entry, until it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting(Option<usize>);

impl Waiting {
    /// Enters the calling thread, which is about to sleep on the word at `word`.
    pub(crate) fn enter(reason: Reason, word: usize) -> Self {
        let id = thread::current_id();
        let index = TABLE.iter().position(|place| place.take(id));
        if let Some(place) = index.map(|index| &TABLE[index]) {
            place.reason.store(reason as u32, Ordering::Relaxed);
            let word = u64::try_from(word).unwrap_or(0);
            place.word.store(word, Ordering::Relaxed);
            // Last: a place without a time is not complete.
            place.since.store(futex::now_ns(), Ordering::Release);
        }
        Self(index)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(place) = self.0.map(|index| &TABLE[index]) {
            place.since.store(0, Ordering::Relaxed);
            place.thread.store(NOBODY, Ordering::Release);
        }
    }
}

impl Place {
    const fn new() -> Self {
        Self {
            thread: AtomicU32::new(NOBODY),
            reason: AtomicU32::new(0),
            word: AtomicU64::new(0),
            since: AtomicU64::new(0),
        }
    }

    fn take(&self, id: u32) -> bool {
        self.thread.load(Ordering::Relaxed) == NOBODY
            && self
                .thread
                .compare_exchange(NOBODY, id, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    fn sleeper(&self) -> Option<Sleeper> {
        let since_ns = self.since.load(Ordering::Acquire);
        let thread = self.thread.load(Ordering::Relaxed);
        let reason = usize::try_from(self.reason.load(Ordering::Relaxed)).ok()?;
        (thread != NOBODY && since_ns != 0).then_some(Sleeper {
            thread,
            reason: *Reason::ALL.get(reason)?,
            word: self.word.load(Ordering::Relaxed),
            since_ns,
        })
    }
}

/// Everybody who sleeps right now.
pub(crate) fn sleepers() -> Vec<Sleeper> {
    TABLE.iter().filter_map(Place::sleeper).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mine() -> Option<Sleeper> {
        let id = thread::current_id();
        sleepers().into_iter().find(|sleeper| sleeper.thread == id)
    }

    #[test]
    fn sleeper_is_seen_from_entering_to_leaving() {
        assert!(mine().is_none());
        let waiting = Waiting::enter(Reason::Travel, 0x1234);
        let seen = mine().expect("there are places");
        assert_eq!((seen.reason, seen.word), (Reason::Travel, 0x1234));
        drop(waiting);
        assert!(mine().is_none());
    }

    #[test]
    fn reasons_are_read_back_as_they_were_written() {
        for (n, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, n);
        }
    }
}
