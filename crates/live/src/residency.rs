//! Where the pages of the process are: the live host's page tables for everything that is not
//! plain host memory (the kernel's device-private and migration entries).
//!
//! A span is in one of four states; what the table does not name is **host**.
//!
//! ```text
//!           claim              depart              settle
//!   host ─────────▶ claimed ─────────▶ transit ─────────▶ resident
//!    ▲  ◀─release──┘      ◀──release──┘ │   ▲               │
//!    └──────────────────── release ─────┘   └───recall──────┘
//! ```
//!
//! *Claimed*: no other operation may take the span, but CPU and device still use it as host memory.
//! *Transit*: CPU accesses wait; whoever ends the transit wakes them. *Resident*: the content is in
//! device memory. *Changes* are spans that a bracket is about to alter: no claim may begin there.
//!
//! Plain data under the `mm` lock; nothing in here calls out, and dropped allocations are handed
//! to the caller, who lets go of them without the lock.

use std::collections::BTreeMap;

use gpusvm::addr::{HostSpan, HostVa, VramAddr, VramSpan};
use gpusvm::seam::mm::{AllocationId, AllocationRef};

use crate::shard::ShardId;

/// A page of device memory: where in which allocation.
#[derive(Clone, Debug)]
pub(crate) struct DevicePage {
    /// The allocation; this is a counted reference.
    pub(crate) allocation: AllocationRef,
    /// Bytes from the allocation's start.
    pub(crate) offset: u64,
    /// Events that its mapping's shard had read when the page left, see [`shard`](crate::shard).
    pub(crate) left_at: u64,
    /// Where the page lies in this process, if device memory does.
    pub(crate) parked: Option<HostVa>,
}

impl DevicePage {
    /// The page `bytes` further on.
    pub(crate) fn plus(&self, bytes: u64) -> Self {
        Self {
            allocation: self.allocation.clone(),
            offset: self.offset + bytes,
            left_at: self.left_at,
            parked: self.parked.map(|at| at.plus(bytes)),
        }
    }

    /// Where it is in device memory.
    pub(crate) fn vram(&self) -> VramAddr {
        self.allocation.vram().start().plus(self.offset)
    }
}

/// What a span is doing; see the module's picture.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// Taken, still host memory.
    Claimed,
    /// On the way to a device, or (with a page) on the way home or away.
    Transit(Option<DevicePage>),
    /// In device memory.
    Resident(DevicePage),
}

impl State {
    /// The same for what lies `bytes` further on.
    fn plus(&self, bytes: u64) -> Self {
        match self {
            Self::Resident(page) => Self::Resident(page.plus(bytes)),
            Self::Transit(Some(page)) => Self::Transit(Some(page.plus(bytes))),
            other @ (Self::Claimed | Self::Transit(None)) => other.clone(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    end: HostVa,
    /// Where those wait who touch the span.
    shard: ShardId,
    state: State,
}

impl Entry {
    /// Sends a resident span travelling.
    fn recall(&mut self, span: HostSpan, page: DevicePage) -> Piece {
        self.state = State::Transit(Some(page.clone()));
        Piece {
            span,
            page,
            shard: self.shard,
        }
    }
}

/// A span of one allocation's pages.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Host addresses.
    pub(crate) span: HostSpan,
    /// Device page of the first address.
    pub(crate) page: DevicePage,
    /// Where those wait who touch the span.
    pub(crate) shard: ShardId,
}

/// Another operation holds part of the span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Busy;

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Residency {
    entries: BTreeMap<HostVa, Entry>,
    changes: Vec<HostSpan>,
    holds: Vec<HostSpan>,
    /// What children of raw clones have not got yet.
    debts: Vec<HostSpan>,
    /// Some mapping was moved with its pages: allocations are no longer found by their origin.
    moved: bool,
}

impl Residency {
    /// Takes a span of host memory, whose mapping is watched by `shard`.
    pub(crate) fn claim(&mut self, span: HostSpan, shard: ShardId) -> Result<(), Busy> {
        let held = self.holds.iter().any(|hold| hold.overlaps(span));
        let free = self.overlapping(span).next().is_none() && !self.is_changing(span) && !held;
        if !free {
            return Err(Busy);
        }
        self.entries.insert(
            span.start(),
            Entry {
                end: span.end(),
                shard,
                state: State::Claimed,
            },
        );
        Ok(())
    }

    /// A claimed span starts to travel: CPU accesses wait from now on.
    pub(crate) fn depart(&mut self, span: HostSpan) {
        if let Some(entry) = self.entries.get_mut(&span.start()) {
            entry.state = State::Transit(None);
        }
    }

    /// A travelling span has arrived in device memory.
    pub(crate) fn settle(&mut self, span: HostSpan, page: DevicePage) {
        if let Some(entry) = self.entries.get_mut(&span.start()) {
            entry.state = State::Resident(page);
        }
    }

    /// The span is host memory again; returns the reference it held, for the caller to drop.
    #[must_use = "the reference must be dropped without the lock"]
    pub(crate) fn release(&mut self, span: HostSpan) -> Option<State> {
        self.entries.remove(&span.start()).map(|entry| entry.state)
    }

    /// Sends every resident span of an allocation travelling whose pages lie in `part` of its memory,
    /// and returns them.
    pub(crate) fn recall(
        &mut self,
        id: AllocationId,
        origin: HostSpan,
        part: VramSpan,
    ) -> Vec<Piece> {
        let search = if self.moved { everything() } else { origin };
        for (from, to) in self.borders(id, search, part) {
            self.cut(from);
            self.cut(to);
        }
        let mut pieces = Vec::new();
        for (span, entry) in self.overlapping_mut(search) {
            match &entry.state {
                State::Resident(page)
                    if page.allocation.id() == id && part.contains(page.vram()) =>
                {
                    pieces.push(entry.recall(span, page.clone()));
                }
                State::Resident(_) | State::Claimed | State::Transit(_) => {}
            }
        }
        pieces
    }

    /// Where entries of an allocation reach into `part` of its memory: from and to.
    fn borders(&self, id: AllocationId, search: HostSpan, part: VramSpan) -> Vec<(HostVa, HostVa)> {
        let reach = |(span, state): (HostSpan, &State)| {
            let State::Resident(page) = state else {
                return None;
            };
            let memory = VramSpan::at(page.vram(), span.bytes());
            let both = memory
                .intersect(part)
                .filter(|_| page.allocation.id() == id)?;
            let from = span.start().plus(both.start().offset_from(memory.start()));
            Some((from, from.plus(both.bytes())))
        };
        self.overlapping(search).filter_map(reach).collect()
    }

    /// Sends every resident span inside `span` travelling that left before the event was read whose
    /// number in each shard `event` tells, cutting at the borders of `span`.
    pub(crate) fn recall_older(
        &mut self,
        span: HostSpan,
        event: impl Fn(ShardId) -> Option<u64>,
    ) -> Result<Vec<Piece>, Busy> {
        if self.is_travelling(span) {
            return Err(Busy);
        }
        self.cut(span.start());
        self.cut(span.end());
        let mut pieces = Vec::new();
        for (piece, entry) in self.overlapping_mut(span) {
            if let State::Resident(page) = &entry.state
                && event(entry.shard).is_some_and(|number| page.left_at < number)
            {
                pieces.push(entry.recall(piece, page.clone()));
            }
        }
        Ok(pieces)
    }

    /// The resident span that holds the page at `vram` of an allocation, and its first page.
    pub(crate) fn find(&self, id: AllocationId, vram: VramAddr) -> Option<(HostSpan, DevicePage)> {
        self.overlapping(everything())
            .find_map(|(span, state)| match state {
                State::Resident(page) if page.allocation.id() == id => {
                    let memory = VramSpan::at(page.vram(), span.bytes());
                    memory.contains(vram).then(|| (span, page.clone()))
                }
                State::Resident(_) | State::Claimed | State::Transit(_) => None,
            })
    }

    /// A recalled piece stays in device memory after all.
    pub(crate) fn put_back(&mut self, piece: &Piece) {
        self.settle(piece.span, piece.page.clone());
    }

    /// Whether some operation holds part of `span`.
    pub(crate) fn is_travelling(&self, span: HostSpan) -> bool {
        self.overlapping(span)
            .any(|(_, state)| !matches!(state, State::Resident(_)))
    }

    /// Whether part of `span` is travelling or in device memory: its pages may be missing.
    pub(crate) fn has_departed(&self, span: HostSpan) -> bool {
        self.overlapping(span)
            .any(|(_, state)| !matches!(state, State::Claimed))
    }

    /// All spans of mappings of `shard` that are travelling or in device memory.
    pub(crate) fn departed_from(&self, shard: ShardId) -> Vec<HostSpan> {
        self.entries(everything())
            .filter(|(_, entry)| entry.shard == shard && !matches!(entry.state, State::Claimed))
            .map(|(span, _)| span)
            .collect()
    }

    /// What is travelling or in device memory inside `span`, clipped to it.
    pub(crate) fn departed_in(&self, span: HostSpan) -> Vec<HostSpan> {
        self.overlapping(span)
            .filter(|(_, state)| !matches!(state, State::Claimed))
            .filter_map(|(piece, _)| piece.intersect(span))
            .collect()
    }

    /// An allocation that has resident pages in `span`, and is none of `but`.
    pub(crate) fn any_resident(
        &self,
        span: HostSpan,
        but: &[AllocationId],
    ) -> Option<AllocationRef> {
        self.overlapping(span).find_map(|(_, state)| match state {
            State::Resident(page) => {
                let other = !but.contains(&page.allocation.id());
                other.then(|| page.allocation.clone())
            }
            State::Claimed | State::Transit(_) => None,
        })
    }

    /// What the table says about the page at `at`, and where those wait who touch it.
    pub(crate) fn at(&self, at: HostVa) -> Option<(ShardId, State)> {
        let (span, entry) = self.entries(HostSpan::at(at, 1)).next()?;
        let into = at.offset_from(span.start());
        Some((entry.shard, entry.state.plus(into)))
    }

    /// Named spans that overlap `span`, in order.
    pub(crate) fn overlapping(&self, span: HostSpan) -> impl Iterator<Item = (HostSpan, &State)> {
        self.entries(span).map(|(span, entry)| (span, &entry.state))
    }

    fn entries(&self, span: HostSpan) -> impl Iterator<Item = (HostSpan, &Entry)> {
        let from = self.first_key(span);
        self.entries
            .range(from..span.end().max(from))
            .map(|(start, entry)| (HostSpan::new(*start, entry.end), entry))
    }

    fn overlapping_mut(&mut self, span: HostSpan) -> impl Iterator<Item = (HostSpan, &mut Entry)> {
        let from = self.first_key(span);
        self.entries
            .range_mut(from..span.end().max(from))
            .map(|(start, entry)| (HostSpan::new(*start, entry.end), entry))
    }

    fn first_key(&self, span: HostSpan) -> HostVa {
        self.entries
            .range(..=span.start())
            .next_back()
            .filter(|(_, entry)| entry.end > span.start())
            .map_or(span.start(), |(start, _)| *start)
    }

    /// Makes `at` a border between entries.
    fn cut(&mut self, at: HostVa) {
        let Some((&start, entry)) = self.entries.range_mut(..at).next_back() else {
            return;
        };
        if entry.end <= at {
            return;
        }
        let offset = at.offset_from(start);
        let state = entry.state.plus(offset);
        let tail = Entry {
            end: entry.end,
            shard: entry.shard,
            state,
        };
        entry.end = at;
        self.entries.insert(at, tail);
    }

    /// The process moved a mapping of `shard` together with its entries, but not with those that left
    /// at event number `event` or later: they are of another mapping. Nothing travels in `from`.
    pub(crate) fn rebase(&mut self, from: HostSpan, to: HostVa, shard: ShardId, event: u64) {
        self.moved = true;
        self.cut(from.start());
        self.cut(from.end());
        let older = |entry: &Entry| match &entry.state {
            State::Resident(page) => entry.shard == shard && page.left_at < event,
            State::Claimed | State::Transit(_) => false,
        };
        let keys: Vec<_> = self
            .entries(from)
            .filter(|(_, entry)| older(entry))
            .map(|(span, _)| span)
            .collect();
        for span in keys {
            if let Some(mut entry) = self.entries.remove(&span.start()) {
                let start = to.plus(span.start().offset_from(from.start()));
                entry.end = start.plus(span.bytes());
                if let State::Resident(page) = &mut entry.state {
                    page.left_at = event;
                }
                self.entries.insert(start, entry);
            }
        }
    }

    /// Changes of all of `spans` begin: no claim may begin in them, nor another change, until
    /// [`unchange`](Self::unchange).
    ///
    /// Two at a time would undo each other's registrations. All spans of one call come together, so
    /// that no two calls wait for each other.
    pub(crate) fn change(&mut self, spans: &[HostSpan]) -> Result<(), Busy> {
        if spans.iter().any(|span| self.is_changing(*span)) {
            return Err(Busy);
        }
        self.changes.extend(spans);
        Ok(())
    }

    /// The changes of `spans` end.
    pub(crate) fn unchange(&mut self, spans: &[HostSpan]) {
        for span in spans {
            if let Some(index) = self.changes.iter().position(|change| change == span) {
                self.changes.swap_remove(index);
            }
        }
    }

    /// Pages of `span` stay home until [`release_hold`](Self::release_hold). Changes may go on.
    pub(crate) fn hold(&mut self, span: HostSpan) {
        self.holds.push(span);
    }

    /// One hold of `span` ends.
    pub(crate) fn release_hold(&mut self, span: HostSpan) {
        if let Some(index) = self.holds.iter().position(|hold| *hold == span) {
            self.holds.swap_remove(index);
        }
    }

    /// A child has been made without the pages of `spans`, which were away: until
    /// [`settle_debt`](Self::settle_debt), the process must not change what they come home to.
    pub(crate) fn owe(&mut self, spans: &[HostSpan]) {
        self.debts.extend(spans);
    }

    /// One child has got the pages of `span`.
    pub(crate) fn settle_debt(&mut self, span: HostSpan) {
        if let Some(index) = self.debts.iter().position(|debt| *debt == span) {
            self.debts.swap_remove(index);
        }
    }

    /// Whether some child waits for part of `span`.
    pub(crate) fn is_owed(&self, span: HostSpan) -> bool {
        self.debts.iter().any(|debt| debt.overlaps(span))
    }

    /// Whether part of `span` is being changed.
    pub(crate) fn is_changing(&self, span: HostSpan) -> bool {
        self.changes.iter().any(|change| change.overlaps(span))
    }
}

/// The whole address space.
pub(crate) fn everything() -> HostSpan {
    HostSpan::new(HostVa::new(0), HostVa::new(u64::MAX))
}

#[cfg(test)]
mod tests;
