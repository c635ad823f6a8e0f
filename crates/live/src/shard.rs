//! Shards: the userfaultfds among which watched mappings are divided.
//!
//! While an event is unread, no page can move into memory of its userfaultfd (`livehost.md` section
//! 5). So mappings are spread over several, by where they start, or as what they touch: calls that
//! make events in one arena do not stall migrations in the others. One thread still reads them all.
//!
//! ```text
//!   mapping at A ──┐            ┌── shard 0 ──┐
//!   mapping at B ──┼─ register ─┼── shard 1 ──┼── reader: one order of events
//!   mapping at C ──┘            └── …       ──┘
//! ```
//!
//! **Whose pages an event takes.** An event is read some time after the change, and handled later
//! still, when something may be mapped there again whose pages have left, too. So an event takes
//! pages that left from mappings of its own shard only: had they been of another, that mapping's end
//! would be news of that shard. Within a shard, events are numbered as they are read, and pages
//! remember how many had been read when they left. The system lets a thread that changed the address
//! space go on when the event is read, therefore pages leave between two reads, while no event is
//! waiting: what leaves before is of the old mapping, and what leaves afterwards is not.

use core::mem::MaybeUninit;
use core::time::Duration;
use std::os::fd::OwnedFd;

use gpusvm::addr::HostVa;
use gpusvm::seam::env::Mutex;
use lock_api::MutexGuard;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;

use crate::env::LiveEnv;
use crate::residency::Residency;
use crate::sys::futex::RawFutexMutex;
use crate::sys::uffd::{Message, Uffd};

/// Messages per read.
pub(crate) const BATCH: usize = 16;

/// Mappings that start in the same piece of address space share a shard; an arena of the C library
/// is one.
const ARENA: u32 = 26;

/// Most shards that there can be.
pub(crate) const MOST: usize = 16;

/// Who rings, among the numbers of shards.
const BELL: u64 = u64::MAX;

/// Names a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ShardId(u8);

impl ShardId {
    /// There always is a first one.
    pub(crate) const FIRST: Self = Self(0);
}

/// All shards of a process.
#[derive(Debug)]
pub(crate) struct Shards {
    all: Box<[Shard]>,
    /// The last one is for compute-only memory: no thread waits there.
    compute_only: Option<ShardId>,
    waiting: OwnedFd,
    /// Ends a wait.
    bell: OwnedFd,
}

#[derive(Debug)]
struct Shard {
    uffd: Uffd,
    /// Events read so far. Held while they are read, and while they must not be.
    events: lock_api::Mutex<RawFutexMutex, u64>,
}

/// While it lives, no event of one shard is read; it is the number of those that were.
///
/// Pages are armed and moved under it. Lock rank: host mm, outside the watch's. Its holders wait
/// for nobody: a MOVE raises no event, and where it meets one it fails.
pub(crate) type Unread<'a> = MutexGuard<'a, RawFutexMutex, u64>;

impl Shards {
    /// One shard per descriptor, at most [`MOST`] in all. Faults in the shard of `compute_only` are
    /// signals.
    ///
    /// # Errors
    /// The system's, from preparing to wait for them all.
    pub(crate) fn new(mut uffds: Vec<Uffd>, compute_only: Option<Uffd>) -> Result<Self, Errno> {
        let last = compute_only.is_some();
        uffds.extend(compute_only);
        debug_assert!(uffds.len() <= MOST, "too many shards");
        let count = u8::try_from(uffds.len()).unwrap_or(u8::MAX);
        let waiting = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let readable = epoll::EventFlags::IN;
        epoll::add(&waiting, &bell, epoll::EventData::new_u64(BELL), readable)?;
        for (n, uffd) in (0..).zip(&uffds) {
            epoll::add(&waiting, uffd, epoll::EventData::new_u64(n), readable)?;
        }
        let all = uffds.into_iter().map(|uffd| Shard {
            uffd,
            events: lock_api::Mutex::new(0),
        });
        Ok(Self {
            all: all.collect(),
            compute_only: last.then_some(ShardId(count - 1)),
            waiting,
            bell,
        })
    }

    /// All of them.
    pub(crate) fn ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..u8::try_from(self.all.len()).unwrap_or(u8::MAX)).map(ShardId)
    }

    /// The one for compute-only memory, if the system has that.
    pub(crate) const fn compute_only(&self) -> Option<ShardId> {
        self.compute_only
    }

    /// Where a new mapping that starts at `start` belongs.
    pub(crate) fn of(&self, start: HostVa) -> ShardId {
        let count = self.all.len() - usize::from(self.compute_only.is_some());
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        let shard = (start.get() >> ARENA) % count;
        ShardId(u8::try_from(shard).unwrap_or(0))
    }

    /// The shard's descriptor.
    pub(crate) fn uffd(&self, id: ShardId) -> &Uffd {
        &self.shard(id).uffd
    }

    /// Keeps the shard's events unread.
    pub(crate) fn hold(&self, id: ShardId) -> Unread<'_> {
        self.shard(id).events.lock()
    }

    /// As [`hold`](Self::hold), at a moment when no event is waiting to be read: waits for that.
    pub(crate) fn hold_settled(&self, id: ShardId) -> Unread<'_> {
        loop {
            let unread = self.hold(id);
            if !self.uffd(id).is_changing() {
                return unread;
            }
            drop(unread);
            rustix::thread::sched_yield();
        }
    }

    /// Reads what one shard has, and passes each message on with the number of the last event, and
    /// the residency table as it is at that moment.
    pub(crate) fn read(
        &self,
        id: ShardId,
        table: &Mutex<LiveEnv, Residency>,
        mut each: impl FnMut(&mut Residency, u64, Message),
    ) {
        let mut messages = [const { Message::None }; BATCH];
        let shard = self.shard(id);
        let mut number = shard.events.lock();
        let mut table = table.lock();
        let count = shard.uffd.read(&mut messages).unwrap_or(0);
        for message in messages.into_iter().take(count) {
            *number += u64::from(message.is_event());
            each(&mut table, *number, message);
        }
    }

    /// Waits until some shard has messages, somebody rings, or the timeout is over. Returns which
    /// shards have some.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> impl Iterator<Item = ShardId> + use<> {
        let timeout = timeout.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        let mut places = [const { MaybeUninit::uninit() }; MOST + 1];
        let mut ready = 0_u64;
        // An error is an interruption: nothing is ready.
        if let Ok((events, _unused)) = epoll::wait(&self.waiting, &mut places, timeout.as_ref()) {
            for event in events {
                let which = { event.data }.u64();
                if which == BELL {
                    // Empty means that another wait has taken the ring.
                    let _rang = rustix::io::read(&self.bell, &mut [0; 8]);
                } else {
                    ready |= 1 << which;
                }
            }
        }
        self.ids().filter(move |id| ready >> id.0 & 1 == 1)
    }

    /// Ends a [`wait`](Self::wait), also the next one.
    pub(crate) fn ring(&self) {
        // Full means that it rings already.
        let _written = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Whether the lock at `word` is one of these.
    pub(crate) fn owns_lock(&self, word: u64) -> bool {
        self.all
            .iter()
            .any(|shard| crate::stall::lies_in(shard, word))
    }

    fn shard(&self, id: ShardId) -> &Shard {
        &self.all[usize::from(id.0)]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const SECOND: ShardId = ShardId(1);
}
