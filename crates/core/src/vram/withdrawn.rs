//! Memory that is not to be had: blocks that were taken offline, pages with errors, and what somebody
//! else has taken (a *balloon*).

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::VramSpan;
use crate::seam::env::Environment;
use crate::vram::bo::Bo;
use crate::vram::buddy::Buddy;
use crate::vram::manager::Manager;

/// What nobody gets any more, and what of it nobody has.
#[derive(Default)]
pub(super) struct Withdrawn {
    offline: Vec<VramSpan>,
    bad: Vec<VramSpan>,
    /// Neither free nor in an object; disjoint.
    out: Vec<VramSpan>,
}

impl Withdrawn {
    /// Nobody gets memory of `span` until it is [`online`](Self::online) again.
    pub(super) fn take_offline(&mut self, buddy: &mut Buddy, span: VramSpan) {
        self.offline.push(span);
        self.out.extend(buddy.claim(span));
    }

    /// Nobody ever gets memory of `span` again.
    pub(super) fn lose(&mut self, buddy: &mut Buddy, span: VramSpan) {
        self.bad.push(span);
        self.out.extend(buddy.claim(span));
    }

    /// Undoes one [`take_offline`](Self::take_offline).
    pub(super) fn online(&mut self, buddy: &mut Buddy, span: VramSpan) {
        if let Some(at) = self.offline.iter().position(|other| *other == span) {
            self.offline.swap_remove(at);
        }
        for piece in core::mem::take(&mut self.out) {
            self.out.extend(without(piece, &[span]));
            if let Some(inside) = piece.intersect(span) {
                self.give(buddy, inside);
            }
        }
    }

    /// Takes memory back that was in an object: what is withdrawn of it is out from now on.
    pub(super) fn give(&mut self, buddy: &mut Buddy, span: VramSpan) {
        let withdrawn = self.offline.iter().chain(&self.bad);
        let withdrawn: Vec<_> = withdrawn.copied().collect();
        let free = without(span, &withdrawn);
        free.iter().for_each(|part| buddy.free(*part));
        self.out.extend(without(span, &free));
    }

    /// Bytes of `span` that nobody has.
    pub(super) fn out_of(&self, span: VramSpan) -> u64 {
        let parts = self.out.iter().filter_map(|piece| piece.intersect(span));
        parts.map(VramSpan::bytes).sum()
    }

    /// All bytes that nobody has.
    pub(super) fn bytes(&self) -> u64 {
        self.out.iter().map(|piece| piece.bytes()).sum()
    }
}

/// What is left of `span` without `holes`.
fn without(span: VramSpan, holes: &[VramSpan]) -> Vec<VramSpan> {
    let mut parts = vec![span];
    for hole in holes {
        let cut = |part: VramSpan| {
            let sides = match part.intersect(*hole) {
                None => [Some(part), None],
                Some(gone) => [
                    Some(VramSpan::new(part.start(), gone.start())),
                    Some(VramSpan::new(gone.end(), part.end())),
                ],
            };
            sides.into_iter().flatten().filter(|side| !side.is_empty())
        };
        parts = parts.into_iter().flat_map(cut).collect();
    }
    parts
}

/// How device memory is in use, in bytes; the sum of all is its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Free.
    pub free: u64,
    /// In objects.
    pub used: u64,
    /// In balloons.
    pub balloon: u64,
    /// Offline, or lost to errors.
    pub withdrawn: u64,
}

/// A block that is offline. Dropping it brings the block online again.
#[must_use = "dropping it brings the block online again"]
pub struct Offline<E: Environment> {
    pub(super) manager: Arc<Manager<E>>,
    pub(super) span: VramSpan,
}

impl<E: Environment> Offline<E> {
    /// Where the block lies.
    #[must_use]
    pub const fn span(&self) -> VramSpan {
        self.span
    }
}

impl<E: Environment> fmt::Debug for Offline<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Offline({})", self.span)
    }
}

impl<E: Environment> Drop for Offline<E> {
    fn drop(&mut self) {
        self.manager.bring_online(self.span);
    }
}

/// Memory that somebody else has taken, as a hypervisor's balloon does. Dropping it gives the memory
/// back.
#[must_use = "dropping it gives the memory back"]
pub struct Balloon<E: Environment> {
    pub(super) manager: Arc<Manager<E>>,
    pub(super) objects: Vec<Arc<Bo<E>>>,
}

impl<E: Environment> Balloon<E> {
    /// Bytes in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|bo| bo.span().bytes()).sum()
    }
}

impl<E: Environment> fmt::Debug for Balloon<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Balloon({} bytes)", self.bytes())
    }
}

impl<E: Environment> Drop for Balloon<E> {
    fn drop(&mut self) {
        self.manager.deflated(self.bytes());
        self.objects.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{PAGE, VramAddr};
    use crate::vram::buddy::From;
    use proptest::prelude::*;

    const PAGES: u64 = 64;

    fn pages(first: u64, count: u64) -> VramSpan {
        VramSpan::at(VramAddr::new(first * PAGE), count * PAGE)
    }

    /// The same, page by page.
    #[derive(Default)]
    struct Flat {
        taken: Vec<VramSpan>,
        offline: Vec<VramSpan>,
        bad: Vec<VramSpan>,
    }

    impl Flat {
        /// Bytes that are free, and bytes that nobody has.
        fn count(&self) -> (u64, u64) {
            let within = |spans: &[VramSpan], page| spans.iter().any(|span| span.covers(page));
            let mut found = (0, 0);
            for page in (0..PAGES).map(|page| pages(page, 1)) {
                let gone = within(&self.offline, page) || within(&self.bad, page);
                match (within(&self.taken, page), gone) {
                    (true, _) => {}
                    (false, false) => found.0 += PAGE,
                    (false, true) => found.1 += PAGE,
                }
            }
            found
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Take(u64),
        Give(usize),
        Offline(u64, u64),
        Online(usize),
        Lose(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (1_u64..9).prop_map(Op::Take),
            3 => any::<usize>().prop_map(Op::Give),
            2 => (0..PAGES, 1_u64..20).prop_map(|(at, n)| Op::Offline(at, n.min(PAGES - at))),
            2 => any::<usize>().prop_map(Op::Online),
            1 => (0..PAGES).prop_map(Op::Lose),
        ]
    }

    proptest! {
        #[test]
        fn what_is_withdrawn_agrees_with_a_bitmap(ops in prop::collection::vec(op(), 1..80)) {
            let (mut buddy, mut withdrawn) = (Buddy::new(PAGES * PAGE), Withdrawn::default());
            let mut flat = Flat::default();
            for op in ops {
                match op {
                    Op::Take(count) => {
                        let Some(span) = buddy.alloc(count * PAGE, From::Bottom) else { continue };
                        prop_assert!(!flat.offline.iter().chain(&flat.bad).any(|gone| gone.overlaps(span)));
                        flat.taken.push(span);
                    }
                    Op::Give(n) if !flat.taken.is_empty() => {
                        let span = flat.taken.swap_remove(n % flat.taken.len());
                        withdrawn.give(&mut buddy, span);
                    }
                    Op::Offline(at, count) => {
                        flat.offline.push(pages(at, count));
                        withdrawn.take_offline(&mut buddy, pages(at, count));
                    }
                    Op::Online(n) if !flat.offline.is_empty() => {
                        let span = flat.offline.swap_remove(n % flat.offline.len());
                        withdrawn.online(&mut buddy, span);
                    }
                    Op::Lose(page) => {
                        flat.bad.push(pages(page, 1));
                        withdrawn.lose(&mut buddy, pages(page, 1));
                    }
                    Op::Give(_) | Op::Online(_) => {}
                }
                prop_assert_eq!((buddy.free_bytes(), withdrawn.bytes()), flat.count());
            }
        }
    }
}
