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

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PageCount, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::mm::{AllocationRef, InvalidateReason, MigrateTo, MigrationSet, VmaKind};

use crate::leg::{Leg, Refused, blocks};
use crate::residency::{Busy, DevicePage, Piece};
use crate::space::LiveSpace;
use crate::staging::Left;
use crate::sys::advise;
use crate::watch::CannotArm;

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
        if vma.kind != VmaKind::Anonymous {
            return Err(Failed::NotMigratable(span.start()).into());
        }
        self.watch_mapping(&vma);
        if !self.between_guards(vma, span.start()).span.covers(span) {
            return Err(Failed::NotMigratable(span.start()).into());
        }
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
                    Leg::straight(user, parked)
                }
                None => Leg::through(user, self.staging.take(Leg::kind(user))),
            })
            .collect()
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
                legs.push(Leg::straight(user, home.start().plus(offset)));
                continue;
            }
            let leg = Leg::through(user, self.staging.take(Leg::kind(user)));
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

    /// Ends the travel of `span`: what waits for it goes on.
    pub(crate) fn arrived(&self, span: HostSpan) {
        self.announce_change();
        // An error means that the mapping is gone, and with it everybody who waited.
        let _nobody_waits = self.watch.uffd.wake(span);
    }
}

fn moves_out(legs: &[Leg], allocation: &AllocationRef) -> Vec<CopyMove> {
    let vram = allocation.vram();
    let first = legs.first().map_or(HostVa::new(0), |leg| leg.user.start());
    legs.iter()
        .map(|leg| {
            let at = vram.start().plus(leg.user.start().offset_from(first));
            CopyMove {
                vram: VramSpan::at(at, leg.user.bytes()),
                with: CopyWith::From(BusAddr::new(leg.parked.get())),
            }
        })
        .collect()
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
                for leg in &mut self.legs {
                    if leg.slot.is_some() && self.space.come_in_whole(leg) {
                        leg.left = Left::Nothing;
                    } else {
                        self.space.come_in(leg);
                    }
                }
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
        for leg in &self.legs {
            if let Some(slot) = leg.slot {
                self.space.staging.put(slot, leg.left);
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
