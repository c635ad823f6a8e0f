//! Staging: a few 2 MiB slots of the runtime's own through which pages pass when their content
//! must be copied (`livehost.md` section 5).
//!
//! Pages leave a mapping by `UFFDIO_MOVE` into a slot, which freezes them: no thread can touch them
//! any more. The copy reads the slot, not the mapping. On the way home the copy writes into a slot
//! whose pages then move into the mapping.
//!
//! The arena is registered with a userfaultfd of its own that has no event features, because an
//! unread event makes every MOVE *into* memory of its descriptor fail (measured: 4x slower under
//! churn). Device memory that adopts pages is registered with the same descriptor.
//!
//! Lock rank: leaf.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm::addr::{HostSpan, HostVa, PAGE_2M};
use gpusvm::seam::env::Mutex;

use crate::env::LiveEnv;
use crate::sys::advise;
use crate::sys::futex;
use crate::sys::mapping::RuntimeMapping;
use crate::sys::uffd::{Features, RegisterMode, Uffd};
use crate::sys::waits::Reason;

/// Slots of each kind; each migration in flight needs one per 2 MiB.
const SLOTS: u64 = 16;

/// The slots and the descriptor.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(crate) uffd: Uffd,
    arenas: [RuntimeMapping; 2],
    pools: [Mutex<LiveEnv, Pool>; 2],
    /// Bumped when a slot comes back; what those who found none sleep on.
    returned: AtomicU32,
}

#[derive(Debug)]
struct Pool {
    /// Slots without pages: pages can move in.
    empty: Vec<HostVa>,
    /// Slots with pages left from a copy: content can be written without faults.
    full: Vec<HostVa>,
}

/// A slot in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    /// Start of its 2 MiB.
    pub(crate) at: HostVa,
    kind: Kind,
}

/// What passes through a slot. Taking small pages out of a huge one would split it, which costs a
/// hundred times the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Whole blocks of 2 MiB: the slot has huge pages.
    Huge,
    /// Less: the slot has small pages.
    Small,
}

/// What a slot holds when it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Pages all over: worth keeping for a way home.
    Pages,
    /// Pages here and there, not worth keeping.
    Little,
    /// No page.
    Nothing,
}

impl Pool {
    fn of(arena: &RuntimeMapping) -> Self {
        let start = arena.span().start();
        let empty = (0..SLOTS).map(|n| start.plus(n * PAGE_2M)).collect();
        Self {
            empty,
            full: Vec::new(),
        }
    }
}

impl Staging {
    /// Maps and registers the slots.
    ///
    /// # Errors
    /// The system's, from mapping or registering.
    pub(crate) fn new(uffd: Uffd) -> Result<Self, rustix::io::Errno> {
        let arenas = [
            RuntimeMapping::new(SLOTS * PAGE_2M)?,
            RuntimeMapping::new(SLOTS * PAGE_2M)?,
        ];
        advise::no_huge_pages(arenas[Kind::Small as usize].span());
        // Without userfaultfd nothing passes through here.
        for arena in arenas.iter().filter(|_| uffd.features() != Features::NONE) {
            uffd.register(arena.span(), RegisterMode::WriteProtect)?;
        }
        let pools = [Pool::of(&arenas[0]), Pool::of(&arenas[1])].map(Mutex::<LiveEnv, _>::new);
        Ok(Self {
            uffd,
            arenas,
            pools,
            returned: AtomicU32::new(0),
        })
    }

    /// A slot without pages. Waits for one to come back where all are in use.
    pub(crate) fn take_empty(&self, kind: Kind) -> Slot {
        self.take(kind, |pool| {
            pool.empty.pop().or_else(|| {
                let at = pool.full.pop()?;
                advise::drop_pages(HostSpan::at(at, PAGE_2M));
                Some(at)
            })
        })
    }

    /// A slot to write into, with pages if there is one. Waits as
    /// [`take_empty`](Self::take_empty).
    pub(crate) fn take_full(&self, kind: Kind) -> Slot {
        self.take(kind, |pool| pool.full.pop().or_else(|| pool.empty.pop()))
    }

    fn take(&self, kind: Kind, mut pick: impl FnMut(&mut Pool) -> Option<HostVa>) -> Slot {
        loop {
            let seen = self.returned.load(Ordering::Acquire);
            if let Some(at) = pick(&mut self.pools[kind as usize].lock()) {
                return Slot { at, kind };
            }
            futex::wait(&self.returned, seen, None, Reason::Staging);
        }
    }

    /// Gives a slot back.
    pub(crate) fn put(&self, slot: Slot, left: Left) {
        debug_assert!(
            self.arenas[slot.kind as usize].span().contains(slot.at),
            "foreign slot"
        );
        if left == Left::Little {
            advise::drop_pages(HostSpan::at(slot.at, PAGE_2M));
        }
        let mut pool = self.pools[slot.kind as usize].lock();
        match left {
            Left::Pages => pool.full.push(slot.at),
            Left::Little | Left::Nothing => pool.empty.push(slot.at),
        }
        drop(pool);
        self.returned.fetch_add(1, Ordering::Release);
        futex::wake(&self.returned);
    }
}
