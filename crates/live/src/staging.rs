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
    /// Slots without pages.
    pools: [Mutex<LiveEnv, Vec<HostVa>>; 2],
    /// Bumped when a slot comes back; what those who found none sleep on.
    returned: AtomicU32,
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
    /// Pages that were the program's, or parts of ones.
    Pages,
    /// No page.
    Nothing,
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
        let pools = [slots(&arenas[0]), slots(&arenas[1])].map(Mutex::<LiveEnv, _>::new);
        Ok(Self {
            uffd,
            arenas,
            pools,
            returned: AtomicU32::new(0),
        })
    }

    /// A slot without pages. Waits for one to come back where all are in use.
    pub(crate) fn take(&self, kind: Kind) -> Slot {
        loop {
            let seen = self.returned.load(Ordering::Acquire);
            if let Some(at) = self.pools[kind as usize].lock().pop() {
                return Slot { at, kind };
            }
            futex::wait(&self.returned, seen, None, Reason::Staging);
        }
    }

    /// Gives a slot back. Pages that are left in it go back to the system, and are never used for
    /// other content: they were the program's, and the system may still refer to them, from a pipe
    /// (`vmsplice`) or a network card (`MSG_ZEROCOPY`). Such references do not keep pages from
    /// moving, and user space cannot see them.
    pub(crate) fn put(&self, slot: Slot, left: Left) {
        debug_assert!(
            self.arenas[slot.kind as usize].span().contains(slot.at),
            "foreign slot"
        );
        if left == Left::Pages {
            advise::drop_pages(HostSpan::at(slot.at, PAGE_2M));
        }
        self.pools[slot.kind as usize].lock().push(slot.at);
        self.returned.fetch_add(1, Ordering::Release);
        futex::wake(&self.returned);
    }
}

/// All slots of an arena.
fn slots(arena: &RuntimeMapping) -> Vec<HostVa> {
    let start = arena.span().start();
    (0..SLOTS).map(|n| start.plus(n * PAGE_2M)).collect()
}
