//! Areas: stretches of memory with a ledger, a state per page, and a memory of what was done.

use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::seam::env::Mutex;
use gpusvm_live::{Huge, LiveEnv};

use crate::torture::ledger::{Known, PAGES, SLOTS, STRIDE, Tag, Word};
use crate::torture::op::Op;
use crate::torture::random::Stream;
use crate::workload::index;

/// Operations that an area remembers.
const REMEMBERED: usize = 48;

/// One look at a word: where, and what was known before.
#[derive(Clone, Copy)]
pub(super) struct Look {
    pub(super) tag: Tag,
    pub(super) flux: Flux,
    pub(super) known: Known,
    pub(super) address: u64,
}

/// Who writes the words of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owners {
    /// All writers, slot by slot.
    All(u32),
    /// This writer alone.
    One(u32),
}

impl Owners {
    /// The writer of a slot.
    pub(super) const fn of(self, slot: u32) -> u32 {
        match self {
            Self::All(writers) => slot % writers,
            Self::One(writer) => writer,
        }
    }
}

/// What an area is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) huge: Huge,
    pub(super) pages: u32,
    pub(super) owners: Owners,
}

impl Plan {
    pub(super) const fn bytes(&self) -> u64 {
        self.pages as u64 * PAGE
    }
}

/// Areas of about `size` bytes in all: huge ones, ones of small pages, ragged ones.
pub(super) fn plan(size: u64, writers: u32, random: &mut Stream) -> Vec<Plan> {
    let mut plans: Vec<Plan> = Vec::new();
    let mut left = size / PAGE;
    // Larger sizes have larger areas, so that their number stays small.
    let scale = u32::try_from((size >> 26).max(1)).unwrap_or(u32::MAX);
    while left > 0 && plans.len() < super::ledger::AREAS {
        let n = u32::try_from(plans.len()).unwrap_or(0);
        let (huge, pages) = match n % 4 {
            0 => (Huge::Advise, 512 * random.between(1, 4)),
            1 => (Huge::Never, random.between(200, 1200)),
            2 => (Huge::Never, random.between(8, 200) * 2 + 1),
            _ => (Huge::Advise, random.between(2, 700) * 2 + 1),
        };
        let pages = pages.saturating_mul(scale).min(PAGES);
        let pages = pages.min(u32::try_from(left).unwrap_or(u32::MAX)).max(1);
        let owners = match n % 5 {
            3 | 4 => Owners::One(random.between(0, writers - 1)),
            _ => Owners::All(writers),
        };
        plans.push(Plan {
            huge,
            pages,
            owners,
        });
        left -= u64::from(pages);
    }
    plans
}

/// Bytes of address space for one home of every area.
pub(super) fn room(plans: &[Plan]) -> u64 {
    place(plans, HostVa::new(0))
        .last()
        .map_or(0, |span| span.end().get().next_multiple_of(PAGE_2M))
}

/// Places for all areas from `start` on: huge areas aligned, the others end to end, so that the
/// system joins their mappings.
pub(super) fn place(plans: &[Plan], start: HostVa) -> Vec<HostSpan> {
    let mut at = start;
    let mut next = |plan: &Plan| {
        let aligned = plan.huge == Huge::Advise && plan.pages.is_multiple_of(512);
        if aligned {
            at = HostVa::new(at.get().next_multiple_of(PAGE_2M));
        }
        let span = HostSpan::at(at, plan.bytes());
        at = span.end();
        span
    };
    plans.iter().map(&mut next).collect()
}

/// What is happening to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing: content stays, accesses succeed.
    Stable,
    /// Content stays, accesses may be refused.
    Deny,
    /// Content goes, accesses may be refused.
    Destroy,
    /// Nobody accesses it.
    Closed,
}

/// A page's state at one moment: its kind, and how often it has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flux(u32);

impl Flux {
    pub(super) const fn kind(self) -> Kind {
        match self.0 & 3 {
            0 => Kind::Stable,
            1 => Kind::Deny,
            2 => Kind::Destroy,
            _ => Kind::Closed,
        }
    }

    const fn next(self, kind: Kind) -> Self {
        Self(((self.0 >> 2).wrapping_add(1) << 2) | kind as u32)
    }
}

/// One operation, as an area remembers it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Past {
    pub(super) op: Op,
    pub(super) first: u32,
    pub(super) pages: u32,
    pub(super) by: usize,
    pub(super) began_us: u64,
    pub(super) took_us: u64,
    /// The system's answer, 0 for success.
    pub(super) errno: i32,
}

/// How the system sees an area. It joins mappings only if their pages have one root, which the first
/// write makes: what is cut before that stays in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joint {
    /// Mapped in one call, and not cut since.
    Whole,
    /// As above, and written to: whatever is cut is joined again.
    Rooted,
    /// Mapped in several calls, or cut too early.
    Pieces,
}

/// One area.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) id: u8,
    pub(super) plan: Plan,
    pub(super) homes: [HostVa; 2],
    base: AtomicU64,
    words: Vec<Word>,
    flux: Vec<AtomicU32>,
    /// Whether the system treats it as one mapping, by [`Joint`].
    joint: AtomicU32,
    /// Held by whoever changes the area; one at a time.
    pub(super) change: Mutex<LiveEnv, ()>,
    past: Mutex<LiveEnv, Vec<Past>>,
}

impl Area {
    /// An area without content, to be mapped at its first home.
    pub(super) fn new(id: u8, plan: Plan, homes: [HostVa; 2]) -> Self {
        Self {
            id,
            plan,
            homes,
            base: AtomicU64::new(homes[0].get()),
            words: (0..plan.pages * SLOTS).map(|_| Word::default()).collect(),
            flux: (0..plan.pages).map(|_| AtomicU32::new(0)).collect(),
            joint: AtomicU32::new(Joint::Whole as u32),
            change: Mutex::<LiveEnv, _>::new(()),
            past: Mutex::<LiveEnv, _>::new(Vec::with_capacity(REMEMBERED)),
        }
    }

    /// Where it is.
    pub(super) fn span(&self) -> HostSpan {
        let base = HostVa::new(self.base.load(Ordering::SeqCst));
        HostSpan::at(base, self.plan.bytes())
    }

    /// It has moved.
    pub(super) fn moved(&self, to: HostVa) {
        self.base.store(to.get(), Ordering::SeqCst);
    }

    /// Whether the system must treat it as one mapping.
    pub(super) fn is_in_one(&self) -> bool {
        self.joint.load(Ordering::Relaxed) != Joint::Pieces as u32
    }

    /// Some pages were mapped anew.
    pub(super) fn mapped(&self, pages: &Range<u32>) {
        let all = *pages == (0..self.plan.pages);
        let joint = if all { Joint::Whole } else { Joint::Pieces };
        self.joint.store(joint as u32, Ordering::Relaxed);
    }

    /// Somebody has written to it while it was whole.
    pub(super) fn rooted(&self) {
        let (whole, rooted) = (Joint::Whole as u32, Joint::Rooted as u32);
        let order = Ordering::Relaxed;
        // Pieces stay pieces.
        let _changed = self.joint.compare_exchange(whole, rooted, order, order);
    }

    /// A part is about to be cut out and joined again.
    pub(super) fn cut(&self) {
        let (whole, pieces) = (Joint::Whole as u32, Joint::Pieces as u32);
        let order = Ordering::Relaxed;
        // What has a root is joined again.
        let _changed = self.joint.compare_exchange(whole, pieces, order, order);
    }

    /// Where some of its pages are.
    pub(super) fn part(&self, pages: &Range<u32>) -> HostSpan {
        let start = self.span().start().plus(u64::from(pages.start) * PAGE);
        HostSpan::at(start, u64::from(pages.end - pages.start) * PAGE)
    }

    /// Where a word is.
    pub(super) fn address(&self, tag: Tag) -> u64 {
        let page = self.span().start().plus(u64::from(tag.page) * PAGE);
        page.plus(u64::from(tag.slot) * STRIDE).get()
    }

    pub(super) fn tag(&self, page: u32, slot: u32) -> Tag {
        Tag {
            area: self.id,
            page,
            slot,
        }
    }

    pub(super) fn word(&self, page: u32, slot: u32) -> &Word {
        &self.words[index(u64::from(page * SLOTS + slot))]
    }

    /// A look at the word at `tag`, whose page is said to be in `flux`.
    pub(super) fn look(&self, tag: Tag, flux: Flux) -> Look {
        Look {
            tag,
            flux,
            known: self.word(tag.page, tag.slot).known(),
            address: self.address(tag),
        }
    }

    /// All words of some pages.
    pub(super) fn words(&self, pages: &Range<u32>) -> &[Word] {
        let at = |page: u32| index(u64::from(page * SLOTS));
        &self.words[at(pages.start)..at(pages.end)]
    }

    pub(super) fn flux(&self, page: u32) -> Flux {
        Flux(self.flux[index(page.into())].load(Ordering::SeqCst))
    }

    /// Says what happens to some pages from now on. The caller holds `change`.
    pub(super) fn turn(&self, pages: &Range<u32>, kind: Kind) {
        for page in pages.clone() {
            let next = self.flux(page).next(kind);
            self.flux[index(page.into())].store(next.0, Ordering::SeqCst);
        }
    }

    /// Remembers an operation.
    pub(super) fn remember(&self, past: Past) {
        let mut all = self.past.lock();
        if all.len() == REMEMBERED {
            all.remove(0);
        }
        all.push(past);
    }

    /// Operations of the last time, the latest last.
    pub(super) fn past(&self) -> Vec<Past> {
        self.past.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fill_the_size_and_follow_from_the_seed() {
        for size in [4 << 20, 64 << 20, 1 << 30] {
            let plans = plan(size, 4, &mut Stream::named(7, "areas", 0));
            let total: u64 = plans.iter().map(Plan::bytes).sum();
            assert_eq!(total, size);
            let again = plan(size, 4, &mut Stream::named(7, "areas", 0));
            let shape = |plans: &[Plan]| plans.iter().map(|p| p.pages).collect::<Vec<_>>();
            assert_eq!(shape(&plans), shape(&again));
        }
    }

    #[test]
    fn homes_do_not_overlap_and_some_touch() {
        let plans = plan(32 << 20, 4, &mut Stream::named(7, "areas", 0));
        let places = place(&plans, HostVa::new(1 << 44));
        let pairs = || places.windows(2);
        assert!(pairs().all(|pair| pair[0].end() <= pair[1].start()));
        assert!(pairs().any(|pair| pair[0].end() == pair[1].start()));
        let end = places.last().map_or(0, |last| last.end().get());
        assert!(end - (1 << 44) <= room(&plans));
    }

    #[test]
    fn every_turn_is_told_apart_from_the_ones_before() {
        let plan = Plan {
            huge: Huge::Never,
            pages: 4,
            owners: Owners::All(2),
        };
        let area = Area::new(0, plan, [HostVa::new(0), HostVa::new(0)]);
        let before = area.flux(2);
        area.turn(&(1..3), Kind::Destroy);
        assert_eq!(area.flux(2).kind(), Kind::Destroy);
        assert_eq!(area.flux(3), before);
        area.turn(&(1..3), Kind::Stable);
        assert_eq!(area.flux(2).kind(), Kind::Stable);
        assert_ne!(area.flux(2), before);
    }
}
