//! Migrations of the live host: pages leave a mapping by `UFFDIO_MOVE` and return by it; without
//! userfaultfd they are copied out of the migratable heap and back (see [`leg`](crate::leg)).
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

use gpusvm::addr::{HostSpan, PageCount, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::copy::CopyMove;
use gpusvm::seam::mm::{
    AllocationRef, Folios, InvalidateReason, MigrateTo, MigrationSet, Vma, VmaKind,
};

use crate::leg::{Leg, Mapping, Refused, Road};
use crate::legs::moves_out;
use crate::residency::{Busy, DevicePage, Piece};
use crate::shard::ShardId;
use crate::space::LiveSpace;
use crate::staging::Left;
use crate::sys::advise;
use crate::sys::heap;
use crate::watch::CannotArm;

/// How often a migration is tried whose reason for refusal can be removed.
const ATTEMPTS: usize = 4;

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

/// Where pages go, and how.
pub(crate) struct Goal {
    pub(crate) allocation: AllocationRef,
    pub(crate) aperture: Option<HostSpan>,
    pub(crate) folios: Folios,
    /// What devices are told.
    pub(crate) reason: InvalidateReason,
}

/// Whether the mapping that pages leave may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stores {
    Allowed,
    Forbidden,
}

#[derive(Debug)]
enum Way {
    Out {
        span: HostSpan,
        allocation: AllocationRef,
        from: Mapping,
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
                folios,
            } => {
                let goal = Goal {
                    allocation,
                    aperture,
                    folios,
                    reason: InvalidateReason::Migrate,
                };
                self.begin_out(span, &goal)
            }
            MigrateTo::System {
                allocation,
                part,
                aperture,
                folios,
            } => {
                let goal = Goal {
                    allocation,
                    aperture,
                    folios,
                    reason: InvalidateReason::Migrate,
                };
                Ok(self.begin_home(&goal, part))
            }
        }
    }

    /// Pages leave their mapping for where `goal` says.
    pub(crate) fn begin_out(
        &self,
        span: HostSpan,
        goal: &Goal,
    ) -> Result<LiveMigration<'_>, Interrupted> {
        let vma = self
            .vma_around(span.start())
            .filter(|vma| vma.span.contains(span.start()))
            .ok_or(Failed::NoVma(span.start()))?;
        // What a device has for itself it writes to.
        let writes = matches!(goal.reason, InvalidateReason::Exclusive(_));
        let read_only = !writes && self.is_read_only(&vma, span);
        let leaves = |vma: &Vma| vma.kind == VmaKind::Anonymous || read_only;
        if !leaves(&vma) {
            return Err(Failed::NotMigratable(span.start()).into());
        }
        self.watch_mapping(&vma);
        let piece = self.piece_at(vma, span.start());
        if !leaves(&piece) || !piece.span.covers(span) {
            return Err(Failed::NotMigratable(span.start()).into());
        }
        let stores = if read_only {
            Stores::Forbidden
        } else {
            Stores::Allowed
        };
        for _attempt in 0..ATTEMPTS {
            match self.try_out(span, goal, stores)? {
                Ok(set) => return Ok(set),
                Err(Refused::Mapping) => return Err(Stale::PagesRefused.into()),
                Err(Refused::News) => return Err(Stale::PagesBusy.into()),
                // A write fault makes fork-shared pages exclusive; pinned ones stay refused.
                Err(Refused::NotExclusive) => {
                    self.step();
                    advise::populate_write(span).map_err(|_errno| Stale::PagesRefused)?;
                }
            }
        }
        Err(Stale::PagesRefused.into())
    }

    /// One attempt: either all pages of the span left, or everything is as before.
    fn try_out(
        &self,
        span: HostSpan,
        goal: &Goal,
        stores: Stores,
    ) -> Result<Result<LiveMigration<'_>, Refused>, Interrupted> {
        let Some(shard) = self.shard_of(span) else {
            return Ok(Err(Refused::Mapping));
        };
        self.residency
            .lock()
            .claim(span, shard)
            .map_err(|Busy| Stale::PagesBusy)?;
        self.step();
        let invalidation = self.notifiers.start(span, goal.reason);
        self.residency.lock().depart(span);
        self.step();
        let mut from = Mapping { shard, left_at: 0 };
        let aperture = goal.aperture;
        let mut legs = self.legs_out(span, from, goal);
        // Threads that are made from now on touch their memory, and wait for this travel.
        let free = self.stays.check(&self.procmap, span);
        let unread = self.watch.shards.hold_settled(shard);
        from.left_at = *unread;
        legs.iter_mut().for_each(|leg| leg.from = from);
        let left = free
            .and_then(|()| self.expect_no_news(span))
            .and_then(|()| self.arm(span, shard).map_err(|CannotArm| Refused::Mapping))
            .and_then(|()| {
                let leave = || legs.iter().try_for_each(|leg| self.leave(leg));
                match stores {
                    Stores::Allowed => leave(),
                    Stores::Forbidden => self.with_stores(span, shard, leave),
                }
            });
        drop(unread);
        if stores == Stores::Forbidden {
            self.unprotect(span, shard);
        }
        if left.is_ok() {
            self.mark(span, shard);
        }
        self.notifiers.end(&self.env, invalidation);
        let set = LiveMigration {
            space: self,
            moves: if aperture.is_some() {
                Vec::new()
            } else {
                moves_out(&legs, &goal.allocation)
            },
            adopted: if aperture.is_some() {
                span.pages()
            } else {
                PageCount::ZERO
            },
            way: Way::Out {
                span,
                allocation: goal.allocation.clone(),
                from,
            },
            legs,
            done: false,
        };
        // On refusal the set is dropped here, which moves back what had left.
        Ok(left.map(|()| set))
    }

    /// What has been read of `span` has been handled, and no more is read meanwhile. Were it not, part of
    /// `span` might be mapped to nothing, pass for a hole in the content, and be mapped anew: with pages
    /// that are here and away.
    fn expect_no_news(&self, span: HostSpan) -> Result<(), Refused> {
        if self.pool.has_news_of(span) {
            Err(Refused::News)
        } else {
            Ok(())
        }
    }

    /// Where those wait who touch `span` while it is away. The heap has no shard, and needs none.
    fn shard_of(&self, span: HostSpan) -> Option<ShardId> {
        if heap::contains(span.start()) {
            Some(ShardId::FIRST)
        } else {
            self.watch.shard_of(span)
        }
    }

    /// Lets touches of `span` be noticed while its pages are away. Those of the heap are by the
    /// closed view itself.
    fn arm(&self, span: HostSpan, shard: ShardId) -> Result<(), CannotArm> {
        if heap::contains(span.start()) {
            Ok(())
        } else {
            self.watch.arm(span, shard)
        }
    }

    fn begin_home(&self, goal: &Goal, part: VramSpan) -> LiveMigration<'_> {
        let (allocation, aperture) = (&goal.allocation, goal.aperture);
        let part = match goal.folios {
            Folios::Keep => self.whole_part(allocation, part),
            Folios::Split => part,
        };
        let pieces = self
            .residency
            .lock()
            .recall(allocation.id(), allocation.origin(), part);
        let mut legs = Vec::new();
        let mut moves = Vec::new();
        for piece in &pieces {
            let invalidation = self.notifiers.start(piece.span, goal.reason);
            self.notifiers.end(&self.env, invalidation);
        }
        let turn = self.staging.turn();
        for piece in &pieces {
            self.legs_home(piece, goal, &mut legs, &mut moves);
        }
        drop(turn);
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

    /// Ends the travel of `span`: what waits for it goes on.
    pub(crate) fn arrived(&self, span: HostSpan, shard: ShardId) {
        self.announce_change();
        let in_thread = self.watch.shards.compute_only() == Some(shard);
        if !in_thread {
            // An error means that the mapping is gone, and with it everybody who waited.
            let _nobody_waits = self.watch.shards.uffd(shard).wake(span);
        }
    }
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
                from,
            } => {
                let page = DevicePage {
                    allocation: allocation.clone(),
                    offset: 0,
                    left_at: from.left_at,
                    parked: self.legs.first().and_then(Leg::parked_for_good),
                };
                let closed = |leg: &&Leg| matches!(leg.road, Road::Closed);
                for leg in self.legs.iter().filter(closed) {
                    heap::vacate(leg.user);
                }
                self.space.residency.lock().settle(*span, page);
                self.space.arrived(*span, from.shard);
                span.pages()
            }
            Way::Home { pieces } => {
                for leg in &mut self.legs {
                    if leg.slot().is_some() {
                        leg.left = self.space.come_in_copied(leg);
                    } else {
                        self.space.come_in(leg);
                    }
                }
                for piece in pieces {
                    self.space.step();
                    let released = self.space.residency.lock().release(piece.span);
                    self.space.arrived(piece.span, piece.shard);
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
        // Legs of one block share a slot, and follow each other.
        for legs in self.legs.chunk_by(|one, next| one.slot() == next.slot()) {
            let left = legs.iter().map(|leg| leg.left).reduce(Left::and);
            if let (Some(slot), Some(left)) = (legs[0].slot(), left) {
                self.space.staging.put(slot, left);
            }
        }
    }
}

impl LiveMigration<'_> {
    /// Puts everything back where it was.
    fn undo(&self) {
        match &self.way {
            Way::Out { span, from, .. } => {
                for leg in &self.legs {
                    self.space.come_in(leg);
                    leg.empty();
                }
                let released = self.space.residency.lock().release(*span);
                self.space.arrived(*span, from.shard);
                drop(released);
            }
            Way::Home { pieces } => {
                let closed = |leg: &&Leg| matches!(leg.road, Road::Closed);
                for leg in self.legs.iter().filter(closed) {
                    heap::vacate(leg.user);
                }
                for piece in pieces {
                    self.space.residency.lock().put_back(piece);
                    self.space.arrived(piece.span, piece.shard);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
