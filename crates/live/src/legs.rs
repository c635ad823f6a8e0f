//! The legs of one migration: how its pages are cut, which slots they pass through, and what is to be
//! copied.

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE, PAGE_2M, VramAddr, VramSpan};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::mm::{AllocationRef, Folios};

use crate::leg::{Leg, Mapping, Road, blocks};
use crate::migrate::Goal;
use crate::residency::Piece;
use crate::space::LiveSpace;
use crate::staging::Purpose;
use crate::sys::heap;

/// `span` cut at 2 MiB borders, and so that no huge page goes whole where they are to be split: a MOVE
/// of its first page cuts it.
fn parts(span: HostSpan, folios: Folios) -> impl Iterator<Item = HostSpan> {
    blocks(span).flat_map(move |block| {
        let first = match folios {
            Folios::Keep => 0,
            Folios::Split => PAGE.min(block.bytes()),
        };
        let border = block.start().plus(first);
        let both = [
            HostSpan::new(block.start(), border),
            HostSpan::new(border, block.end()),
        ];
        both.into_iter().filter(|part| !part.is_empty())
    })
}

impl LiveSpace {
    /// The legs by which `span` leaves.
    pub(crate) fn legs_out(&self, span: HostSpan, from: Mapping, goal: &Goal) -> Vec<Leg> {
        let _turn = self.staging.turn();
        let mut legs = Vec::new();
        for user in parts(span, goal.folios) {
            legs.push(match goal.aperture {
                Some(home) => {
                    let parked = home.start().plus(user.start().offset_from(span.start()));
                    Leg::straight(user, from, parked)
                }
                None if heap::contains(user.start()) => Leg::closed(user, from),
                None => self.leg_through(user, from, Purpose::Out, &legs),
            });
        }
        legs
    }

    /// A leg through the slot of the last one, where that is of the same block, or through one more. The
    /// pieces of an allocation may be far more than there are slots.
    fn leg_through(&self, user: HostSpan, from: Mapping, purpose: Purpose, before: &[Leg]) -> Leg {
        let block = |leg: &Leg| leg.user.start().align_down(PAGE_2M);
        let same = |leg: &&Leg| block(leg) == user.start().align_down(PAGE_2M);
        let shared = before.last().filter(same).and_then(Leg::slot);
        let slot = shared.unwrap_or_else(|| self.staging.take(Leg::kind(user), purpose));
        Leg::through(user, from, slot, purpose)
    }

    /// The legs by which a piece comes home, and what has to be copied for them.
    pub(crate) fn legs_home(
        &self,
        piece: &Piece,
        goal: &Goal,
        legs: &mut Vec<Leg>,
        moves: &mut Vec<CopyMove>,
    ) {
        let from = Mapping {
            shard: piece.shard,
            left_at: piece.page.left_at,
        };
        for user in parts(piece.span, goal.folios) {
            let offset = piece.page.offset + user.start().offset_from(piece.span.start());
            if let Some(home) = goal.aperture {
                legs.push(Leg::straight(user, from, home.start().plus(offset)));
                continue;
            }
            let leg = if heap::contains(user.start()) {
                heap::occupy(user);
                Leg::closed(user, from)
            } else {
                self.leg_through(user, from, Purpose::Home, legs)
            };
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
}

/// What has to be copied into device memory.
pub(crate) fn moves_out(legs: &[Leg], allocation: &AllocationRef) -> Vec<CopyMove> {
    let vram = allocation.vram();
    let first = legs.first().map_or(HostVa::new(0), |leg| leg.user.start());
    let mut moves = Vec::new();
    for leg in legs {
        let at = vram.start().plus(leg.user.start().offset_from(first));
        match leg.road {
            Road::Closed => moves_closed(leg, at, &mut moves),
            Road::Straight | Road::Through(_) => moves.push(CopyMove {
                vram: VramSpan::at(at, leg.user.bytes()),
                with: CopyWith::From(BusAddr::new(leg.parked.get())),
            }),
        }
    }
    moves
}

/// As the pages of the heap are: reading a hole would make a page there.
fn moves_closed(leg: &Leg, vram: VramAddr, moves: &mut Vec<CopyMove>) {
    let mut push = |part: HostSpan, with| {
        if !part.is_empty() {
            let at = vram.plus(part.start().offset_from(leg.user.start()));
            moves.push(CopyMove {
                vram: VramSpan::at(at, part.bytes()),
                with,
            });
        }
    };
    let mut rest = leg.user;
    while let Some(data) = heap::first_data(rest) {
        push(HostSpan::new(rest.start(), data.start()), CopyWith::Hole);
        let from = BusAddr::new(heap::alias_of(data.start()).get());
        push(data, CopyWith::From(from));
        rest = HostSpan::new(data.end(), rest.end());
    }
    push(rest, CopyWith::Hole);
}
