//! TLB invalidations: published by anyone, applied by each unit, waited for by the publisher.
//!
//! A unit is *quiescent* unless it is inside an access: translating and copying one piece. An
//! invalidation is complete for a unit once the unit has seen it, or was quiescent after it was
//! published; for a unit looks at what was published each time it enters an access.
//!
//! ```text
//!   publisher:  write slot n ─ published = n ─ inside? seen < n? wait : done
//!   unit:       inside = yes ─ published > seen? apply : ─ access ─ inside = no
//! ```
//!
//! Both sides write before they read. All four are sequentially consistent, so that one side sees the
//! other without a fence of its own.
//! The last [`SLOTS`] invalidations are kept; a unit that is further behind drops everything.

use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};
use crate::tlb::Tlb;
use alloc::vec::Vec;

/// Invalidations that are kept for units that are behind.
const SLOTS: u64 = 64;
/// The same, as a length.
const SLOT_COUNT: usize = 64;
/// Sequence numbers run from 1 to this, and then from 1 again.
pub(crate) const SEQNO_MAX: u64 = 0xF_FFFF;

/// One published invalidation.
#[derive(Debug, Default)]
struct Slot {
    asid: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

/// What was published.
#[derive(Debug)]
pub(crate) struct Shootdown {
    slots: Vec<Slot>,
    published: AtomicU64,
}

/// One unit's side.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    inside: AtomicBool,
    seen: AtomicU64,
}

impl Shootdown {
    pub(crate) fn new() -> Self {
        let slots = (0..SLOTS).map(|_| Slot::default()).collect();
        Self {
            slots,
            published: AtomicU64::new(0),
        }
    }

    /// Publishes an invalidation and returns its number. The caller holds the publishers' lock.
    pub(crate) fn publish(&self, asid: u32, start: u64, end: u64) -> u64 {
        let n = self.published.load(Ordering::Relaxed) + 1;
        let slot = self.slot(n);
        // Whoever reads what is written here sees that all before it was published, and so that the slot
        // was written again.
        slot.asid.store(u64::from(asid), Ordering::Release);
        slot.start.store(start, Ordering::Release);
        slot.end.store(end, Ordering::Release);
        self.published.store(n, Ordering::SeqCst);
        n
    }

    /// Number of the latest invalidation.
    pub(crate) fn latest(&self) -> u64 {
        self.published.load(Ordering::SeqCst)
    }

    fn slot(&self, n: u64) -> &Slot {
        &self.slots[usize::try_from(n % SLOTS).unwrap_or(0)]
    }

    /// Applies to `tlb` what was published since the unit last looked.
    fn apply(&self, gate: &Gate, tlb: &mut Tlb, latest: u64) {
        let seen = gate.seen.load(Ordering::Relaxed);
        let mut ends = [(0, 0, 0); SLOT_COUNT];
        let behind = latest - seen;
        if behind < SLOTS {
            for (n, copy) in (seen + 1..=latest).zip(&mut ends) {
                let slot = self.slot(n);
                let (asid, start) = (
                    slot.asid.load(Ordering::Acquire),
                    slot.start.load(Ordering::Acquire),
                );
                *copy = (asid, start, slot.end.load(Ordering::Acquire));
            }
        }
        // A slot may have been written again while it was read: then everything goes.
        fence(Ordering::SeqCst);
        if self.latest() - seen >= SLOTS {
            tlb.clear();
        } else {
            for (asid, start, end) in &ends[..usize::try_from(behind).unwrap_or(0)] {
                tlb.invalidate(u32::try_from(*asid).unwrap_or(0), *start, *end);
            }
        }
        gate.seen.store(latest, Ordering::SeqCst);
    }
}

impl Gate {
    /// Begins an access: from here to [`leave`](Self::leave) the unit may use translations.
    pub(crate) fn enter(&self, shootdown: &Shootdown, tlb: &mut Tlb) {
        self.inside.store(true, Ordering::SeqCst);
        let latest = shootdown.latest();
        if latest != self.seen.load(Ordering::Relaxed) {
            shootdown.apply(self, tlb, latest);
        }
    }

    /// Ends the access: its reads and writes are done.
    pub(crate) fn leave(&self) {
        self.inside.store(false, Ordering::Release);
    }

    /// As [`enter`](Self::enter), acknowledging without applying: the planted fault.
    pub(crate) fn enter_ignoring(&self, shootdown: &Shootdown) {
        self.inside.store(true, Ordering::SeqCst);
        self.seen.store(shootdown.latest(), Ordering::SeqCst);
    }

    /// Whether the unit is inside an access.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::Relaxed)
    }

    /// Whether no access of this unit can still use what invalidation `n` removed.
    pub(crate) fn has_acknowledged(&self, n: u64) -> bool {
        !self.inside.load(Ordering::SeqCst) || self.seen.load(Ordering::SeqCst) >= n
    }
}

/// The sequence number that the driver gets for invalidation `n`.
pub(crate) fn seqno_of(n: u64) -> u32 {
    u32::try_from((n - 1) % SEQNO_MAX + 1).unwrap_or(1)
}

/// The latest invalidation with this sequence number, given the latest of all.
pub(crate) fn number_of(seqno: u32, latest: u64) -> u64 {
    if latest == 0 {
        return 0;
    }
    let back = (u64::from(seqno_of(latest)) + SEQNO_MAX - u64::from(seqno)) % SEQNO_MAX;
    latest.saturating_sub(back)
}
