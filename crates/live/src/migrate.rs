//! Migrations of the live host: pages leave a mapping by `UFFDIO_MOVE` and return by it.
//!
//! ```text
//!  to a device:  claim ─ invalidate ─ depart ─ arm ─ MOVE out ─┬─ [copy] ─ settle ─ wake
//!  home:         recall ─ invalidate ──────────── [copy] ──────┴─ MOVE in ─ release ─ wake
//! ```
//!
//! Pages move either straight into memory that *is* the device's (adopt: nothing is copied) or into
//! a staging slot from which a copy engine takes them. A span is marked as travelling only after
//! the invalidation has ended every device access to it: a device unit may be waiting for the
//! reader at a hole in host memory, and the reader serves that while the span is merely claimed.

mod leg;

use core::sync::atomic::Ordering;

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE, PAGE_2M, PageCount, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::Event;
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::mm::{AllocationRef, InvalidateReason, MigrateTo, MigrationSet, VmaKind};
use rustix::io::Errno;

use crate::migrate::leg::{Leg, blocks, kind_of, moves_out};
use crate::residency::{Busy, DevicePage, Piece};
use crate::space::LiveSpace;
use crate::staging::{Left, Slot};
use crate::sys::advise;
use crate::sys::fault_copy;
use crate::sys::uffd::Uffd;
use crate::watch::CannotArm;

/// Why pages did not leave.
enum Refused {
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

/// Isolated pages of a live migration.
#[derive(Debug)]
pub struct LiveMigration<'a> {
    space: &'a LiveSpace,
    way: Way,
    legs: Vec<Leg>,
    moves: Vec<CopyMove>,
    adopted: PageCount,
    /// Finalized: dropping has nothing to undo.
    done: bool,
}

#[derive(Debug)]
enum Way {
    Out {
        span: HostSpan,
        allocation: AllocationRef,
        left_at: u64,
    },
    Home {
        pieces: Vec<Piece>,
    },
}

impl LiveSpace {
    /// The migration entry of the seam.
    pub(crate) fn begin(
        &self,
        span: HostSpan,
        to: MigrateTo,
    ) -> Result<LiveMigration<'_>, Interrupted> {
        match to {
            MigrateTo::Device {
                allocation,
                aperture,
            } => self.begin_out(span, allocation, aperture),
            MigrateTo::System {
                allocation,
                aperture,
            } => Ok(self.begin_home(&allocation, aperture)),
        }
    }

    fn begin_out(
        &self,
        span: HostSpan,
        allocation: AllocationRef,
        aperture: Option<HostSpan>,
    ) -> Result<LiveMigration<'_>, Interrupted> {
        let vma = self
            .vma_around(span.start())
            .ok_or(Failed::NoVma(span.start()))?;
        if !vma.span.covers(span) || vma.kind != VmaKind::Anonymous {
            return Err(Failed::NotMigratable(span.start()).into());
        }
        self.watch_mapping(&vma);
        match self.try_out(span, &allocation, aperture)? {
            Ok(set) => return Ok(set),
            Err(Refused::Mapping) => return Err(Stale::PagesRefused.into()),
            Err(Refused::NotExclusive) => {}
        }
        // A write fault makes fork-shared pages exclusive; pinned ones stay refused.
        if advise::populate_write(span).is_err() {
            return Err(Stale::PagesRefused.into());
        }
        self.try_out(span, &allocation, aperture)?
            .map_err(|_still| Stale::PagesRefused.into())
    }

    /// One attempt: either all pages of the span left, or everything is as before.
    fn try_out(
        &self,
        span: HostSpan,
        allocation: &AllocationRef,
        aperture: Option<HostSpan>,
    ) -> Result<Result<LiveMigration<'_>, Refused>, Interrupted> {
        self.residency
            .lock()
            .claim(span)
            .map_err(|Busy| Stale::PagesBusy)?;
        let invalidation = self.notifiers.start(span, InvalidateReason::Migrate);
        self.residency.lock().depart(span);
        let legs = self.legs_out(span, aperture);
        let departure = self.departures.begin();
        let left = match self.watch.arm(span) {
            Ok(()) => legs.iter().try_for_each(|leg| self.leave(leg)),
            Err(CannotArm) => Err(Refused::Mapping),
        };
        let left_at = *departure;
        drop(departure);
        self.notifiers.end(&self.env, invalidation);
        let set = LiveMigration {
            space: self,
            moves: if aperture.is_some() {
                Vec::new()
            } else {
                moves_out(&legs, allocation)
            },
            adopted: if aperture.is_some() {
                span.pages()
            } else {
                PageCount::ZERO
            },
            way: Way::Out {
                span,
                allocation: allocation.clone(),
                left_at,
            },
            legs,
            done: false,
        };
        // On refusal the set is dropped here, which moves back what had left.
        Ok(left.map(|()| set))
    }

    fn legs_out(&self, span: HostSpan, aperture: Option<HostSpan>) -> Vec<Leg> {
        blocks(span)
            .map(|user| match aperture {
                Some(home) => {
                    let parked = home.start().plus(user.start().offset_from(span.start()));
                    Leg {
                        user,
                        parked,
                        slot: None,
                    }
                }
                None => self.slot_leg(user, self.staging.take_empty(kind_of(user))),
            })
            .collect()
    }

    /// A leg through a slot. The offset inside the slot equals the offset inside the 2 MiB block,
    /// so that huge pages stay huge.
    fn slot_leg(&self, user: HostSpan, slot: Slot) -> Leg {
        let inside = user.start().get() & (PAGE_2M - 1);
        Leg {
            user,
            parked: slot.at.plus(inside),
            slot: Some(slot),
        }
    }

    /// Moves the pages of a leg out of the mapping. Its place outside is empty at first, so on
    /// refusal whatever is there has to come back.
    fn leave(&self, leg: &Leg) -> Result<(), Refused> {
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
        let stayed = self.pagemap.first_populated(from);
        match (stayed, error) {
            (Some(span), None) => self.emit(&Event::MoveMisreported { span }),
            (None, Some(errno)) if !matches!(errno, Errno::AGAIN | Errno::NOENT) => {
                self.emit(&Event::MoveMisreported { span: from });
            }
            _ => {}
        }
        stayed.map(HostSpan::start)
    }

    fn begin_home(
        &self,
        allocation: &AllocationRef,
        aperture: Option<HostSpan>,
    ) -> LiveMigration<'_> {
        let pieces = self
            .residency
            .lock()
            .recall(allocation.id(), allocation.origin());
        let mut legs = Vec::new();
        let mut moves = Vec::new();
        for piece in &pieces {
            let invalidation = self.notifiers.start(piece.span, InvalidateReason::Migrate);
            self.notifiers.end(&self.env, invalidation);
            self.legs_home(piece, aperture, &mut legs, &mut moves);
        }
        let adopted = match aperture {
            Some(_) => pieces.iter().map(|piece| piece.span.pages()).sum(),
            None => PageCount::ZERO,
        };
        LiveMigration {
            space: self,
            way: Way::Home { pieces },
            legs,
            moves,
            adopted,
            done: false,
        }
    }

    fn legs_home(
        &self,
        piece: &Piece,
        aperture: Option<HostSpan>,
        legs: &mut Vec<Leg>,
        moves: &mut Vec<CopyMove>,
    ) {
        for user in blocks(piece.span) {
            let offset = piece.page.offset + user.start().offset_from(piece.span.start());
            if let Some(home) = aperture {
                legs.push(Leg {
                    user,
                    parked: home.start().plus(offset),
                    slot: None,
                });
                continue;
            }
            let leg = self.slot_leg(user, self.staging.take_full(kind_of(user)));
            let vram = VramSpan::at(
                piece.page.allocation.vram().start().plus(offset),
                user.bytes(),
            );
            moves.push(CopyMove {
                vram,
                with: CopyWith::To(BusAddr::new(leg.parked.get())),
            });
            legs.push(leg);
        }
    }

    /// Moves parked pages of one leg into the mapping. What no longer fits there is dropped, as
    /// the kernel drops a device page whose mapping is gone.
    fn come_in(&self, leg: &Leg) {
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

    /// Ends the travel of `span`: what waits for it goes on.
    pub(crate) fn arrived(&self, span: HostSpan) {
        self.announce_change();
        // An error means that the mapping is gone, and with it everybody who waited.
        let _nobody_waits = self.watch.uffd.wake(span);
    }
}

fn copy_in(uffd: &Uffd, to: HostVa, from: HostVa) -> Result<(), Errno> {
    uffd.copy(to, HostSpan::at(from, PAGE))
        .error
        .map_or(Ok(()), Err)
}

impl MigrationSet for LiveMigration<'_> {
    fn moves(&self) -> &[CopyMove] {
        &self.moves
    }

    fn adopted(&self) -> PageCount {
        self.adopted
    }

    fn finalize(mut self) -> PageCount {
        self.done = true;
        match &self.way {
            Way::Out {
                span,
                allocation,
                left_at,
            } => {
                let page = DevicePage {
                    allocation: allocation.clone(),
                    offset: 0,
                    left_at: *left_at,
                };
                self.space.residency.lock().settle(*span, page);
                self.space.arrived(*span);
                span.pages()
            }
            Way::Home { pieces } => {
                self.legs.iter().for_each(|leg| self.space.come_in(leg));
                for piece in pieces {
                    let released = self.space.residency.lock().release(piece.span);
                    self.space.arrived(piece.span);
                    drop(released);
                }
                pieces.iter().map(|piece| piece.span.pages()).sum()
            }
        }
    }
}

impl Drop for LiveMigration<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.undo();
        }
        let left = match self.way {
            Way::Out { .. } if self.done => Left::Pages,
            Way::Out { .. } | Way::Home { .. } => Left::Little,
        };
        for leg in &self.legs {
            if let Some(slot) = leg.slot {
                let whole = leg.user.bytes() == PAGE_2M;
                self.space
                    .staging
                    .put(slot, if whole { left } else { Left::Little });
            }
        }
    }
}

impl LiveMigration<'_> {
    /// Puts everything back where it was.
    fn undo(&self) {
        match &self.way {
            Way::Out { span, .. } => {
                self.legs.iter().for_each(|leg| self.space.come_in(leg));
                let released = self.space.residency.lock().release(*span);
                self.space.arrived(*span);
                drop(released);
            }
            Way::Home { pieces } => {
                for piece in pieces {
                    self.space.residency.lock().put_back(piece);
                    self.space.arrived(piece.span);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
