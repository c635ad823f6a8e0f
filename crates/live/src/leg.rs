//! Legs: how up to 2 MiB of pages leave a mapping and come back, by `UFFDIO_MOVE`.
//!
//! ```text
//!   mapping  ── leave ──▶  parked: device memory, or a staging slot  ── come in ──▶  mapping
//! ```
//!
//! Nothing in here knows what a leg is for. The page tables decide what has moved, not the system's
//! answers: see `LiveSpace::stayed`.

use core::sync::atomic::Ordering;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M, PageCount};
use gpusvm::event::Event;
use rustix::io::Errno;

use crate::space::LiveSpace;
use crate::staging::{Kind, Left, Slot};
use crate::sys::fault_copy;
use crate::sys::uffd::Uffd;

/// Why pages did not leave.
pub(crate) enum Refused {
    /// Shared after a fork, or pinned: worth one try to make them exclusive.
    NotExclusive,
    /// The mapping is of a kind that does not let pages go.
    Mapping,
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

/// Up to 2 MiB of user memory and the place outside of it where its pages stay meanwhile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leg {
    pub(crate) user: HostSpan,
    pub(crate) parked: HostVa,
    pub(crate) slot: Option<Slot>,
    /// What the slot holds when the leg is over.
    pub(crate) left: Left,
}

impl Leg {
    /// A leg into or out of memory that is the device's.
    pub(crate) const fn straight(user: HostSpan, parked: HostVa) -> Self {
        Self {
            user,
            parked,
            slot: None,
            left: Left::Nothing,
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
    pub(crate) fn through(user: HostSpan, slot: Slot) -> Self {
        let inside = user.start().get() & (PAGE_2M - 1);
        Self {
            user,
            parked: slot.at.plus(inside),
            slot: Some(slot),
            left: Left::Pages,
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
            let to = leg.parked_at(rest.start());
            let moved = self.staging.uffd.move_pages(to, rest);
            let Some(stayed) = self.stayed(rest, moved.error) else {
                return Ok(());
            };
            match moved.error {
                // Something holds a huge page that would have to be split: it stays where it is.
                None | Some(Errno::AGAIN | Errno::NOENT) if patience.is_over(stayed) => {
                    return Err(Refused::Mapping);
                }
                None | Some(Errno::NOENT) => {}
                Some(Errno::AGAIN) => rustix::thread::sched_yield(),
                Some(Errno::BUSY) => return Err(Refused::NotExclusive),
                Some(_) if stayed > rest.start() => {}
                Some(_) => return Err(Refused::Mapping),
            }
            rest = HostSpan::new(stayed, rest.end());
        }
    }

    /// The first page that a MOVE from `from` has left behind. The page tables decide, not the
    /// call's answer: MOVE ends at a hole, and may report `EEXIST` and nothing moved after it has
    /// moved all (see [`Uffd::move_pages`]). Nothing else can put pages there or take them away.
    /// Wrong answers are counted.
    fn stayed(&self, from: HostSpan, error: Option<Errno>) -> Option<HostVa> {
        let stayed = self.first_populated(from);
        match (stayed, error) {
            (Some(span), None) => self.emit(&Event::MoveMisreported { span }),
            (None, Some(errno)) if !matches!(errno, Errno::AGAIN | Errno::NOENT) => {
                self.emit(&Event::MoveMisreported { span: from });
            }
            _ => {}
        }
        stayed.map(HostSpan::start)
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

    /// Moves all pages of a leg out of a slot that a copy has filled, into the mapping. Success says
    /// that there was no hole, so that it can be believed. False where something is in the way.
    pub(crate) fn come_in_whole(&self, leg: &Leg) -> bool {
        let parked = leg.parked_span();
        let moved = self.watch.uffd.move_pages(leg.user.start(), parked);
        moved.error.is_none()
    }

    /// Moves parked pages of one leg into the mapping. What no longer fits there is dropped, as
    /// the kernel drops a device page whose mapping is gone.
    pub(crate) fn come_in(&self, leg: &Leg) {
        let mut lost = Lost::default();
        let mut rest = leg.parked_span();
        let mut patience = Patience::new();
        while !rest.is_empty() {
            let to = leg.user_at(rest.start());
            let moved = self.watch.uffd.move_pages(to, rest);
            let Some(stayed) = self.stayed(rest, moved.error) else {
                break;
            };
            let next = match moved.error {
                // Something holds a huge page that would have to be split: it is copied.
                None | Some(Errno::AGAIN | Errno::NOENT) if patience.is_over(stayed) => {
                    self.settle_page(leg.user_at(stayed), stayed, Errno::AGAIN, &mut lost)
                }
                None | Some(Errno::NOENT) => stayed,
                // There are unread events: another thread reads them.
                Some(Errno::AGAIN) => {
                    rustix::thread::sched_yield();
                    stayed
                }
                // What is wrong with the rest shows when it is the first.
                Some(_) if stayed > rest.start() => stayed,
                Some(errno) => self.settle_page(leg.user_at(stayed), stayed, errno, &mut lost),
            };
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

    /// Deals with one parked page that MOVE refuses; returns where to go on. A read-only mapping
    /// takes no moved pages, but it takes copies. Other content or a guard at the page's place is
    /// newer, and stays.
    fn settle_page(&self, to: HostVa, from: HostVa, errno: Errno, lost: &mut Lost) -> HostVa {
        let copied = match errno {
            Errno::EXIST => Err(errno),
            _ => copy_in(&self.watch.uffd, to, from),
        };
        match copied {
            Ok(()) => {}
            Err(Errno::AGAIN) => {
                rustix::thread::sched_yield();
                return from;
            }
            Err(Errno::EXIST) => lost.conflicts += 1,
            Err(_no_mapping) => lost.gone += 1,
        }
        from.plus(PAGE)
    }
}

fn copy_in(uffd: &Uffd, to: HostVa, from: HostVa) -> Result<(), Errno> {
    uffd.copy(to, HostSpan::at(from, PAGE))
        .error
        .map_or(Ok(()), Err)
}
