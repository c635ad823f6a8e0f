//! Staging: a few 2 MiB slots of the runtime's own through which pages pass when their content
//! must be copied (`livehost.md` section 5).
//!
//! Pages leave a mapping by `UFFDIO_MOVE` into a slot, which freezes them: no thread can touch them
//! any more. The copy reads the slot, not the mapping. On the way home the copy writes into a slot.
//! A huge page then moves into the mapping. Small pages are copied once more, by `UFFDIO_COPY`: that
//! takes half as long as to move them and to make new ones for the slot.
//!
//! The arena is registered with a userfaultfd of its own that has no event features, because an
//! unread event makes every MOVE *into* memory of its descriptor fail (measured: 4x slower under
//! churn). Device memory that adopts pages is registered with the same descriptor.
//!
//! # Slots between two uses
//!
//! ```text
//!            ┌──────── put, small pages that were copied ───────┐
//!            │    ┌─────────── take, home ─────────────────┐    │
//!   fresh ◀──┘ ───┘                                        ▼    │
//!     ▲    (attendant)                                       in use
//!     └─ populate ─ empty ── take, out (and home) ────────────▶ │
//!                    ▲ ▲ └──── put, its pages are home ─────────┤
//!       (attendant) drop  └─── used ◀── put, with pages ────────┘
//! ```
//!
//! The way out wants a slot without pages, the way home one with fresh ones: the copy would wait for
//! the system to clear them. The [`attendant`](crate::attendant) makes both, off the migrations'
//! path, and a few at a time: a wake-up costs as much as dropping many pages. A few pages `put` drops
//! itself. Where the attendant is late, or a child of fork has none, `take` does what is needed.
//!
//! Lock rank: leaf. Whoever has the [turn](Staging::turn) waits for slots, which come back without it.

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::seam::env::{Mutex, MutexGuard};
use gpusvm_abi::bus::SystemBus;

use crate::env::LiveEnv;
use crate::sys::advise;
use crate::sys::fault_copy::LiveBus;
use crate::sys::futex::Changes;
use crate::sys::last_wish;
use crate::sys::mapping::RuntimeMapping;
use crate::sys::uffd::{Features, RegisterMode, Uffd};
use crate::sys::waits::Reason;

/// Slots of each kind; each migration in flight needs one per 2 MiB.
const SLOTS: usize = 16;
/// Slots that are kept with fresh pages, once anything has come home, and fewer than as many keep
/// used ones: what an idle process pays.
const FRESH: usize = 4;
/// As many bytes of used pages are dropped at once rather than by the attendant.
const FEW: u64 = 16 * PAGE;

/// The slots and the descriptor.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(crate) uffd: Uffd,
    arenas: [RuntimeMapping; 2],
    shelves: [Mutex<LiveEnv, Shelf>; 2],
    /// A slot has come back: what those who found none sleep on.
    returned: Changes,
    turn: Mutex<LiveEnv, ()>,
}

/// The slots of one kind that are not in use.
#[derive(Debug)]
struct Shelf {
    /// Without pages.
    empty: Vec<HostVa>,
    /// With pages that are the runtime's alone.
    fresh: Vec<HostVa>,
    /// With pages that were the program's.
    used: Vec<HostVa>,
    /// How many fresh ones there should be.
    goal: usize,
}

/// A slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// What happens in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Pages move in: it must have none.
    Out,
    /// A copy writes into it: pages are welcome.
    Home,
}

/// What a slot holds when it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Pages of which some may be, or may have been, the program's; all of them in this part.
    Pages(HostSpan),
    /// Pages that are the runtime's alone.
    Fresh,
    /// No page.
    Nothing,
}

impl Left {
    /// What is left of two that shared a slot.
    pub(crate) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Pages(one), Self::Pages(other)) => Self::Pages(one.join(other)),
            (Self::Pages(part), Self::Fresh | Self::Nothing)
            | (Self::Fresh | Self::Nothing, Self::Pages(part)) => Self::Pages(part),
            (Self::Fresh, _) | (_, Self::Fresh) => Self::Fresh,
            (Self::Nothing, Self::Nothing) => Self::Nothing,
        }
    }
}

impl Staging {
    /// Maps and registers the slots.
    ///
    /// # Errors
    /// The system's, from mapping or registering.
    pub(crate) fn new(uffd: Uffd) -> Result<Self, rustix::io::Errno> {
        let arenas = [arena()?, arena()?];
        advise::no_huge_pages(arenas[Kind::Small as usize].span());
        // Without userfaultfd nothing passes through here.
        for arena in arenas.iter().filter(|_| uffd.features() != Features::NONE) {
            uffd.register(arena.span(), RegisterMode::WriteProtect)?;
        }
        let shelves = [Shelf::of(&arenas[0]), Shelf::of(&arenas[1])];
        Ok(Self {
            uffd,
            arenas,
            shelves: shelves.map(Mutex::<LiveEnv, _>::new),
            returned: Changes::new(),
            turn: Mutex::<LiveEnv, _>::new(()),
        })
    }

    /// The right to take slots, which a migration has until it has all that it needs: were several at
    /// it, each could wait for slots that the others have taken so far.
    pub(crate) fn turn(&self) -> MutexGuard<'_, LiveEnv, ()> {
        self.turn.lock()
    }

    /// A slot that is ready for `purpose`. Waits for one to come back where all are in use.
    pub(crate) fn take(&self, kind: Kind, purpose: Purpose) -> Slot {
        loop {
            let seen = self.returned.seen();
            let found = self.shelf(kind).lock().take(kind, purpose);
            match found {
                Some(Found::Ready(at)) => return Slot { at, kind },
                Some(Found::WithPages(at)) => {
                    drop_all(at);
                    return Slot { at, kind };
                }
                None => self.returned.wait(seen, Reason::Staging),
            }
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
        if let Left::Pages(part) = left
            && part.bytes() <= FEW
        {
            advise::drop_pages(part);
        }
        let mut shelf = self.shelf(slot.kind).lock();
        match left {
            Left::Pages(part) if part.bytes() > FEW => shelf.used.push(slot.at),
            Left::Fresh if shelf.fresh.len() < FRESH => shelf.fresh.push(slot.at),
            Left::Fresh => shelf.used.push(slot.at),
            Left::Pages(_) | Left::Nothing => shelf.empty.push(slot.at),
        }
        let due = shelf.is_due();
        drop(shelf);
        self.returned.tell();
        if due {
            last_wish::call();
        }
    }

    /// Makes one slot ready for its next use; false where there is nothing to do. For the attendant.
    pub(crate) fn tend(&self) -> bool {
        self.drop_used(Kind::Huge) || self.drop_used(Kind::Small) || self.refresh()
    }

    fn drop_used(&self, kind: Kind) -> bool {
        let Some(at) = self.shelf(kind).lock().used.pop() else {
            return false;
        };
        drop_all(at);
        self.shelf(kind).lock().empty.push(at);
        self.returned.tell();
        true
    }

    /// Gives an empty slot fresh pages, where there should be more such slots.
    fn refresh(&self) -> bool {
        let Some(at) = self.shelf(Kind::Huge).lock().next_to_refresh() else {
            return false;
        };
        // A touch, not `MADV_POPULATE_WRITE`: that holds the lock of the address space while the page is
        // cleared, and whoever registers memory would wait for it.
        let populated = LiveBus.write(at.get(), &[0]);
        if populated.is_err() {
            drop_all(at);
        }
        let mut shelf = self.shelf(Kind::Huge).lock();
        if populated.is_ok() {
            shelf.fresh.push(at);
        } else {
            // The next one that comes home asks again.
            shelf.goal = 0;
            shelf.empty.push(at);
        }
        drop(shelf);
        self.returned.tell();
        true
    }

    const fn shelf(&self, kind: Kind) -> &Mutex<LiveEnv, Shelf> {
        &self.shelves[kind as usize]
    }
}

/// A slot that was found.
enum Found {
    Ready(HostVa),
    /// Its pages have to go first.
    WithPages(HostVa),
}

impl Shelf {
    /// All slots of an arena.
    fn of(arena: &RuntimeMapping) -> Self {
        let start = arena.span().start();
        let mut empty = Vec::with_capacity(SLOTS);
        empty.extend((0..).map(|n| start.plus(n * PAGE_2M)).take(SLOTS));
        Self {
            empty,
            fresh: Vec::with_capacity(SLOTS),
            used: Vec::with_capacity(SLOTS),
            goal: 0,
        }
    }

    fn take(&mut self, kind: Kind, purpose: Purpose) -> Option<Found> {
        if purpose == Purpose::Home {
            if kind == Kind::Huge {
                self.goal = FRESH;
            }
            if let Some(at) = self.fresh.pop() {
                return Some(Found::Ready(at));
            }
        }
        let empty = self.empty.pop().map(Found::Ready);
        empty.or_else(|| {
            let full = self.used.pop().or_else(|| self.fresh.pop());
            full.map(Found::WithPages)
        })
    }

    /// Whether waking the attendant is worth its price: a few slots at a time.
    fn is_due(&self) -> bool {
        self.used.len() >= FRESH || (self.fresh.len() <= self.goal / 2 && self.goal > 0)
    }

    /// An empty slot that should be fresh.
    fn next_to_refresh(&mut self) -> Option<HostVa> {
        (self.fresh.len() < self.goal).then(|| self.empty.pop())?
    }
}

fn arena() -> Result<RuntimeMapping, rustix::io::Errno> {
    RuntimeMapping::new((0..SLOTS).map(|_| PAGE_2M).sum())
}

fn drop_all(at: HostVa) {
    advise::drop_pages(HostSpan::at(at, PAGE_2M));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging() -> Staging {
        // At levels without userfaultfd the slots are plain memory, which is enough here.
        let uffd = Uffd::none().expect("one more descriptor");
        Staging::new(uffd).expect("staging can be mapped")
    }

    fn full(slot: Slot) -> Left {
        Left::Pages(HostSpan::at(slot.at, PAGE_2M))
    }

    fn counts(staging: &Staging) -> [usize; 3] {
        let shelf = staging.shelf(Kind::Huge).lock();
        [shelf.empty.len(), shelf.fresh.len(), shelf.used.len()]
    }

    fn tend_all(staging: &Staging) {
        while staging.tend() {}
    }

    #[test]
    fn nothing_is_done_before_anything_has_come_home() {
        let staging = staging();
        assert!(!staging.tend());
        let slot = staging.take(Kind::Huge, Purpose::Out);
        staging.put(slot, full(slot));
        assert_eq!(counts(&staging), [SLOTS - 1, 0, 1]);
        assert!(staging.tend());
        assert!(!staging.tend(), "dropped, and that is all");
        assert_eq!(counts(&staging), [SLOTS, 0, 0]);
    }

    #[test]
    fn way_home_finds_fresh_slots_and_way_out_empty_ones() {
        let staging = staging();
        let first = staging.take(Kind::Huge, Purpose::Home);
        staging.put(first, Left::Nothing);
        tend_all(&staging);
        assert_eq!(counts(&staging), [SLOTS - FRESH, FRESH, 0]);
        let out = staging.take(Kind::Huge, Purpose::Out);
        let home = staging.take(Kind::Huge, Purpose::Home);
        assert_eq!(counts(&staging), [SLOTS - FRESH - 1, FRESH - 1, 0]);
        staging.put(out, full(out));
        staging.put(home, Left::Nothing);
        tend_all(&staging);
        assert_eq!(counts(&staging), [SLOTS - FRESH, FRESH, 0]);
    }

    #[test]
    fn late_attendant_keeps_nobody_waiting() {
        let staging = staging();
        let home = staging.take(Kind::Huge, Purpose::Home);
        staging.put(home, Left::Nothing);
        tend_all(&staging);
        let all: Vec<_> = (0..SLOTS)
            .map(|_| staging.take(Kind::Huge, Purpose::Out))
            .collect();
        assert_eq!(counts(&staging), [0, 0, 0], "fresh ones were emptied");
        all.into_iter()
            .for_each(|slot| staging.put(slot, full(slot)));
        for purpose in [Purpose::Out, Purpose::Home] {
            let slot = staging.take(Kind::Huge, purpose);
            staging.put(slot, Left::Nothing);
        }
        assert_eq!(counts(&staging), [1, 0, SLOTS - 1]);
    }

    #[test]
    fn few_pages_are_dropped_at_once_and_copied_ones_kept() {
        let staging = staging();
        let small = |staging: &Staging| {
            let shelf = staging.shelf(Kind::Small).lock();
            [shelf.empty.len(), shelf.fresh.len(), shelf.used.len()]
        };
        let slot = staging.take(Kind::Small, Purpose::Out);
        staging.put(slot, Left::Pages(HostSpan::at(slot.at, FEW)));
        assert_eq!(small(&staging), [SLOTS, 0, 0]);
        let home: Vec<_> = (0..=FRESH)
            .map(|_| staging.take(Kind::Small, Purpose::Home))
            .collect();
        home.into_iter()
            .for_each(|slot| staging.put(slot, Left::Fresh));
        assert_eq!(small(&staging), [SLOTS - FRESH - 1, FRESH, 1]);
        assert!(staging.tend());
        assert_eq!(small(&staging), [SLOTS - FRESH, FRESH, 0]);
    }
}
