//! Legs: how up to 2 MiB of pages leave a mapping and come back.
//!
//! ```text
//!   mapping  ── leave ──▶  parked: device memory, or a staging slot  ── come in ──▶  mapping
//!   view     ── close ──▶  parked: the alias of the same pages       ── open ──────▶  view
//! ```
//!
//! The first kind goes by `UFFDIO_MOVE`; the second one is for the [`heap`], without userfaultfd.
//!
//! Nothing in here knows what a leg is for. The page tables decide what has moved, not the system's
//! answers: see `LiveSpace::stayed`.

use core::sync::atomic::Ordering;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M, PageCount};
use gpusvm::event::Event;
use rustix::io::Errno;

use crate::level::Holes;
use crate::pool::Fate;
use crate::shard::ShardId;
use crate::space::LiveSpace;
use crate::staging::{Kind, Left, Purpose, Slot};
use crate::sys::advise;
use crate::sys::fault_copy;
use crate::sys::heap;
use crate::sys::uffd::{Moved, Uffd};

/// Why pages did not leave.
pub(crate) enum Refused {
    /// Shared after a fork, or pinned: worth one try to make them exclusive.
    NotExclusive,
    /// The mapping is of a kind that does not let pages go.
    Mapping,
    /// News has to be read first.
    News,
}

/// How often a MOVE is tried that gets nowhere. The system says "try again" for what is over in a
/// moment, and for what may last: another holder of a huge page that is to be split.
struct Patience {
    at: HostVa,
    tries: u32,
}

impl Patience {
    const TRIES: u32 = 500;

    const fn new() -> Self {
        Self {
            at: HostVa::new(0),
            tries: 0,
        }
    }

    /// Notes that the page at `at` did not move; whether that was once too often.
    fn is_over(&mut self, at: HostVa) -> bool {
        if at != self.at {
            *self = Self { at, tries: 0 };
        }
        self.tries += 1;
        self.tries > Self::TRIES
    }
}

/// Pages that found no place to come home to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Lost {
    /// Their places have other content.
    conflicts: u64,
    /// Their places are gone.
    gone: u64,
}

/// The mapping that pages left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Who watches it.
    pub(crate) shard: ShardId,
    /// How many events the shard had read when the pages left.
    pub(crate) left_at: u64,
}

/// By which way pages leave and return.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Road {
    /// A MOVE into memory that is the device's.
    Straight,
    /// A MOVE into a slot, from which they are copied.
    Through(Slot),
    /// They stay where they are and are copied; their view is closed meanwhile.
    Closed,
}

/// Up to 2 MiB of user memory and the place outside of it where its pages stay meanwhile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leg {
    pub(crate) user: HostSpan,
    pub(crate) parked: HostVa,
    /// Where the pages are from.
    pub(crate) from: Mapping,
    pub(crate) road: Road,
    /// What the slot holds when the leg is over.
    pub(crate) left: Left,
}

impl Leg {
    /// A leg into or out of memory that is the device's.
    pub(crate) const fn straight(user: HostSpan, from: Mapping, parked: HostVa) -> Self {
        Self {
            user,
            parked,
            from,
            road: Road::Straight,
            left: Left::Nothing,
        }
    }

    /// A leg of memory of the heap.
    pub(crate) fn closed(user: HostSpan, from: Mapping) -> Self {
        Self {
            user,
            from,
            parked: heap::alias_of(user.start()),
            road: Road::Closed,
            left: Left::Nothing,
        }
    }

    /// The slot that it passes through.
    pub(crate) const fn slot(&self) -> Option<Slot> {
        match self.road {
            Road::Through(slot) => Some(slot),
            Road::Straight | Road::Closed => None,
        }
    }

    /// Where its pages stay while they are on the device, if that is in this process.
    pub(crate) const fn parked_for_good(&self) -> Option<HostVa> {
        match self.road {
            Road::Straight => Some(self.parked),
            Road::Through(_) | Road::Closed => None,
        }
    }

    fn parked_span(&self) -> HostSpan {
        HostSpan::at(self.parked, self.user.bytes())
    }

    /// Where the page at `user` stays while it is out.
    fn parked_at(&self, user: HostVa) -> HostVa {
        self.parked.plus(user.offset_from(self.user.start()))
    }

    /// Where the page that stays at `parked` belongs.
    fn user_at(&self, parked: HostVa) -> HostVa {
        self.user.start().plus(parked.offset_from(self.parked))
    }

    /// A leg through a slot. The offset inside the slot equals the offset inside the 2 MiB block, so
    /// that huge pages stay huge.
    pub(crate) fn through(user: HostSpan, from: Mapping, slot: Slot, purpose: Purpose) -> Self {
        let inside = user.start().get() & (PAGE_2M - 1);
        let parked = slot.at.plus(inside);
        // A fresh slot may have pages anywhere.
        let pages = match purpose {
            Purpose::Out => HostSpan::at(parked, user.bytes()),
            Purpose::Home => HostSpan::at(slot.at, PAGE_2M),
        };
        Self {
            user,
            parked,
            from,
            road: Road::Through(slot),
            left: Left::Pages(pages),
        }
    }

    /// Device memory that pages were to become is empty again, and can be tried once more: what was
    /// dropped or copied on the way back is still there, and would pass for the content of holes.
    pub(crate) fn empty(&self) {
        match self.road {
            Road::Straight => advise::drop_pages(self.parked_span()),
            // Slots are emptied between two uses, and the heap's pages stay where they are.
            Road::Through(_) | Road::Closed => {}
        }
    }

    /// What is left of the leg once its first `bytes` bytes are through.
    fn after(self, bytes: u64) -> Self {
        Self {
            user: HostSpan::new(self.user.start().plus(bytes), self.user.end()),
            parked: self.parked.plus(bytes),
            ..self
        }
    }

    /// The kind of slot that `user` passes through.
    pub(crate) fn kind(user: HostSpan) -> Kind {
        if user.bytes() == PAGE_2M {
            Kind::Huge
        } else {
            Kind::Small
        }
    }
}

/// `span` cut at 2 MiB borders.
pub(crate) fn blocks(span: HostSpan) -> impl Iterator<Item = HostSpan> {
    let mut rest = span;
    core::iter::from_fn(move || {
        let border = rest
            .start()
            .align_down(PAGE_2M)
            .plus(PAGE_2M)
            .min(rest.end());
        let block = HostSpan::new(rest.start(), border);
        rest = HostSpan::new(border, rest.end());
        (!block.is_empty()).then_some(block)
    })
}

impl LiveSpace {
    /// Moves the pages of a leg out of the mapping. Its place outside is empty at first, so on
    /// refusal whatever is there has to come back.
    pub(crate) fn leave(&self, leg: &Leg) -> Result<(), Refused> {
        if matches!(leg.road, Road::Closed) {
            return heap::close(leg.user).map_err(|_too_many_mappings| Refused::Mapping);
        }
        if self.skip_freeze.load(Ordering::Relaxed) {
            return self.leave_unfrozen(leg);
        }
        self.move_out(leg)
    }

    /// The planted bug: what is written between the copy and the move is lost.
    #[cold]
    fn leave_unfrozen(&self, leg: &Leg) -> Result<(), Refused> {
        // A touch of a hole would wait for the end of this very travel.
        let taken = fault_copy::snapshot(leg.user, |page| self.pagemap.populated(page));
        rustix::thread::sched_yield();
        self.move_out(leg)?;
        fault_copy::restore(leg.parked_span(), &taken);
        Ok(())
    }

    fn move_out(&self, leg: &Leg) -> Result<(), Refused> {
        let mut rest = leg.user;
        let mut patience = Patience::new();
        loop {
            self.step();
            let to = leg.parked_at(rest.start());
            let moved = self.staging.uffd.move_pages(to, rest);
            let Some((stayed, errno)) = self.stayed(rest, moved.error) else {
                return Ok(());
            };
            match errno {
                Errno::AGAIN if self.staging.uffd.is_changing() => return Err(Refused::News),
                // Something holds a huge page that would have to be split: it stays where it is.
                Errno::AGAIN | Errno::NOENT if patience.is_over(stayed) => {
                    return Err(Refused::Mapping);
                }
                Errno::NOENT => {}
                Errno::AGAIN => rustix::thread::sched_yield(),
                Errno::BUSY => return Err(Refused::NotExclusive),
                _ if stayed > rest.start() => {}
                _ => return Err(Refused::Mapping),
            }
            rest = HostSpan::new(stayed, rest.end());
        }
    }

    /// The first page that a MOVE from `from` has left behind, and why. Success says that all pages
    /// moved and that there was no hole. A failure says little: MOVE ends at a hole, and may report
    /// `EEXIST` and nothing moved after it has moved all (see [`Uffd::move_pages`]), so the page tables
    /// decide. Nothing else can put pages there or take them away. Wrong answers are counted.
    fn stayed(&self, from: HostSpan, error: Option<Errno>) -> Option<(HostVa, Errno)> {
        let errno = error?;
        let stayed = self.first_populated(from);
        if stayed.is_none() && !matches!(errno, Errno::AGAIN | Errno::NOENT) {
            self.emit(&Event::MoveMisreported { span: from });
        }
        stayed.map(|span| (span.start(), errno))
    }

    /// The first stretch of `span` whose pages have content. Asks until it is told: a scan that
    /// failed, for want of memory, must not pass for "there is none".
    pub(crate) fn first_populated(&self, span: HostSpan) -> Option<HostSpan> {
        loop {
            match self.pagemap.first_populated(span) {
                Ok(found) => return found,
                Err(_no_answer) => rustix::thread::sched_yield(),
            }
        }
    }

    /// Brings home what a copy has put into a slot; says what the slot holds then.
    pub(crate) fn come_in_copied(&self, leg: &Leg) -> Left {
        let done = self.come_in_at_once(leg);
        if done == leg.user.bytes() {
            return match Leg::kind(leg.user) {
                Kind::Huge => Left::Nothing,
                Kind::Small => Left::Fresh,
            };
        }
        self.come_in(&leg.after(done));
        leg.left
    }

    /// The first try of [`come_in_copied`](Self::come_in_copied), which is enough unless something is
    /// in the way. Returns how many bytes are home. There is no hole in the slot, so that a MOVE that
    /// reports success can be believed; from one that does not all has to be looked for again.
    fn come_in_at_once(&self, leg: &Leg) -> u64 {
        let Mapping { shard, left_at } = leg.from;
        let _unread = self.watch.shards.hold(shard);
        if self.pool.fate(leg.user, shard, left_at) != Fate::home(leg.user) {
            return 0;
        }
        let to = leg.user.start();
        match Leg::kind(leg.user) {
            Kind::Huge => {
                let moved = self.move_in(leg.from, to, leg.parked_span());
                moved.error.map_or(leg.user.bytes(), |_errno| 0)
            }
            // The system copies over guards, of which it tells nobody. It moves nothing over them.
            Kind::Small if self.has_guards(leg.user) => 0,
            Kind::Small => {
                self.watch
                    .shards
                    .uffd(shard)
                    .copy(to, leg.parked_span())
                    .bytes
            }
        }
    }

    /// Moves parked pages of one leg into the mapping. What no longer fits there is dropped, as
    /// the kernel drops a device page whose mapping is gone.
    pub(crate) fn come_in(&self, leg: &Leg) {
        if matches!(leg.road, Road::Closed) {
            return self.reopen(leg);
        }
        let mut lost = Lost::default();
        let mut rest = leg.parked_span();
        let mut patience = Patience::new();
        while !rest.is_empty() {
            let next = self.come_in_some(leg, rest, &mut patience, &mut lost);
            if next == rest.start() {
                // There is news to be read, or something is over in a moment.
                rustix::thread::sched_yield();
            }
            rest = HostSpan::new(next, rest.end());
        }
        let span = leg.user;
        if lost.conflicts > 0 {
            self.emit(&Event::HostConflict {
                span,
                pages: PageCount::new(lost.conflicts),
            });
        }
        if lost.gone > 0 {
            self.emit(&Event::HostGone {
                span,
                pages: PageCount::new(lost.gone),
            });
        }
    }

    /// One MOVE of the first pages of `rest`, to where they belong now; returns where to go on.
    ///
    /// No news is read meanwhile, and where some waits to be read, MOVE refuses. So pages never land
    /// in a mapping that came after theirs.
    fn come_in_some(
        &self,
        leg: &Leg,
        rest: HostSpan,
        patience: &mut Patience,
        lost: &mut Lost,
    ) -> HostVa {
        let Mapping { shard, left_at } = leg.from;
        let _unread = self.watch.shards.hold(shard);
        let user = HostSpan::at(leg.user_at(rest.start()), rest.bytes());
        let fate = self.pool.fate(user, shard, left_at);
        let part = HostSpan::at(rest.start(), fate.bytes);
        let Some(to) = fate.place else {
            return part.end();
        };
        let moved = self.move_in(leg.from, to, part);
        let Some((stayed, errno)) = self.stayed(part, moved.error) else {
            return part.end();
        };
        let at = to.plus(stayed.offset_from(part.start()));
        match errno {
            // Something holds a huge page that would have to be split: it is copied.
            Errno::AGAIN | Errno::NOENT if patience.is_over(stayed) => {
                self.settle_page(leg.from, at, stayed, Errno::AGAIN, lost)
            }
            Errno::AGAIN | Errno::NOENT => stayed,
            // What is wrong with the rest shows when it is the first.
            _ if stayed > part.start() => stayed,
            errno => self.settle_page(leg.from, at, stayed, errno, lost),
        }
    }

    fn move_in(&self, from: Mapping, to: HostVa, parked: HostSpan) -> Moved {
        self.step();
        let uffd = self.watch.shards.uffd(from.shard);
        if self.holes == Holes::Marked
            && let Err(errno) = uffd.unprotect(HostSpan::at(to, parked.bytes()))
        {
            return Moved {
                bytes: 0,
                error: Some(errno),
            };
        }
        uffd.move_pages(to, parked)
    }

    /// Gives the view of a leg back. Refused for want of mappings, which another thread may give
    /// back, and for good where the block is gone.
    fn reopen(&self, leg: &Leg) {
        let mut patience = Patience::new();
        while heap::open(leg.user).is_err() {
            if patience.is_over(leg.user.start()) {
                self.emit(&Event::HostGone {
                    span: leg.user,
                    pages: leg.user.pages(),
                });
                return;
            }
            rustix::thread::sched_yield();
        }
    }

    /// Deals with one parked page that MOVE refuses; returns where to go on. A read-only mapping
    /// takes no moved pages, but it takes copies. Other content or a guard at the page's place is
    /// newer, and stays.
    fn settle_page(
        &self,
        mapping: Mapping,
        to: HostVa,
        from: HostVa,
        errno: Errno,
        lost: &mut Lost,
    ) -> HostVa {
        let copied = match errno {
            Errno::EXIST => Err(errno),
            _ if self.has_guards(HostSpan::at(to, PAGE)) => Err(Errno::EXIST),
            _ => copy_in(self.watch.shards.uffd(mapping.shard), to, from),
        };
        match copied {
            Ok(()) => {}
            // No memory is no answer either: the data has to go somewhere.
            Err(Errno::AGAIN | Errno::NOMEM) => return from,
            Err(Errno::EXIST) => lost.conflicts += 1,
            Err(_no_mapping) => lost.gone += 1,
        }
        from.plus(PAGE)
    }
}

impl LiveSpace {
    /// Lets a span that is away show as not empty. Where the system refuses, for unread news, it shows
    /// as empty.
    pub(crate) fn mark(&self, span: HostSpan, shard: ShardId) {
        if self.holes == Holes::Marked {
            let _shows = self.watch.shards.uffd(shard).protect(span);
        }
    }

    /// The span is empty, and shows as that. A touch would find a marker, and wait for a reader that
    /// knows nothing of it.
    pub(crate) fn unmark(&self, span: HostSpan, shard: ShardId) {
        if self.holes == Holes::Marked {
            self.unprotect(span, shard);
        }
    }

    /// Takes write protection and markers back. The system wants its news read before: nothing may be
    /// held that keeps it from being read.
    pub(crate) fn unprotect(&self, span: HostSpan, shard: ShardId) {
        let uffd = self.watch.shards.uffd(shard);
        while uffd.unprotect(span) == Err(Errno::AGAIN) {
            rustix::thread::sched_yield();
        }
    }
}

fn copy_in(uffd: &Uffd, to: HostVa, from: HostVa) -> Result<(), Errno> {
    uffd.copy(to, HostSpan::at(from, PAGE))
        .error
        .map_or(Ok(()), Err)
}
