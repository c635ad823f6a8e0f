//! What has changed since somebody looked, so that a look need not be at everything.
//!
//! Whatever may change a frame, an entry, a slot or the mappings of a process marks it, whether or
//! not it then changes anything. Marks are no part of a machine's state: machines that differ in
//! their marks alone are equal.

use core::hash::{Hash, Hasher};

use crate::mm::memory::FrameId;
use crate::mm::rmap::Level;
use crate::mm::{Machine, Pid};

/// A set of small numbers.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// One bit for each of the first numbers, the only ones where a machine is small.
    near: [u64; NEAR],
    /// The bits behind.
    far: Vec<u64>,
    any: bool,
}

const BITS: u32 = u64::BITS;
/// Words of bits that take no allocation.
const NEAR: usize = 2;

impl Marks {
    /// Adds a number.
    #[inline]
    pub(crate) fn add(&mut self, n: u32) {
        let (at, bit) = ((n / BITS) as usize, 1 << (n % BITS));
        match self.near.get_mut(at) {
            Some(word) => *word |= bit,
            None => self.add_far(at - NEAR, bit),
        }
        self.any = true;
    }

    fn add_far(&mut self, at: usize, bits: u64) {
        if at >= self.far.len() {
            self.far.resize(at + 1, 0);
        }
        self.far[at] |= bits;
    }

    /// Moves all numbers of `other` here.
    #[inline]
    pub(crate) fn take_from(&mut self, other: &mut Self) {
        if !other.any {
            return;
        }
        for (word, more) in self.near.iter_mut().zip(&other.near) {
            *word |= more;
        }
        for (at, more) in other.far.iter().enumerate() {
            self.add_far(at, *more);
        }
        self.any = true;
        other.clear();
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        if self.any {
            self.near = [0; NEAR];
            self.far.iter_mut().for_each(|word| *word = 0);
            self.any = false;
        }
    }

    /// Whether there is no number.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        !self.any
    }

    /// The numbers, ascending.
    #[must_use]
    pub const fn iter(&self) -> Numbers<'_> {
        Numbers {
            marks: self,
            at: 0,
            rest: self.near[0],
        }
    }
}

/// The numbers of a set, ascending.
#[derive(Clone, Debug)]
pub struct Numbers<'a> {
    marks: &'a Marks,
    /// The word that `rest` is of.
    at: usize,
    rest: u64,
}

impl Iterator for Numbers<'_> {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        while self.rest == 0 {
            self.at += 1;
            let near = self.marks.near.get(self.at);
            self.rest = *near.or_else(|| self.marks.far.get(self.at - NEAR))?;
        }
        let bit = self.rest.trailing_zeros();
        self.rest &= self.rest - 1;
        Some(u32::try_from(self.at).unwrap_or(u32::MAX) * BITS + bit)
    }
}

impl PartialEq for Marks {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for Marks {}

impl Hash for Marks {
    fn hash<H: Hasher>(&self, _state: &mut H) {}
}

/// What has changed on a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Changes {
    /// Pages whose entry, or the block entry above, has changed, for each process.
    pub(crate) pages: Vec<Marks>,
    /// Processes whose mappings have changed.
    pub(crate) mappings: Marks,
    /// Frames.
    pub(crate) frames: Marks,
    /// Swap slots.
    pub(crate) slots: Marks,
    /// Places of device allocations.
    pub(crate) places: Marks,
}

impl Changes {
    pub(crate) fn new(processes: u8) -> Self {
        Self {
            pages: vec![Marks::default(); usize::from(processes)],
            ..Self::default()
        }
    }

    #[inline]
    pub(crate) fn page(&mut self, pid: Pid, page: u32) {
        self.pages[usize::from(pid.0)].add(page);
    }

    /// Moves what `other` has here.
    pub(crate) fn take_from(&mut self, other: &mut Self) {
        if self.is_empty() {
            core::mem::swap(self, other);
            return;
        }
        for (pages, more) in self.pages.iter_mut().zip(&mut other.pages) {
            pages.take_from(more);
        }
        self.mappings.take_from(&mut other.mappings);
        self.frames.take_from(&mut other.frames);
        self.slots.take_from(&mut other.slots);
        self.places.take_from(&mut other.places);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pages.iter_mut().for_each(Marks::clear);
        self.mappings.clear();
        self.frames.clear();
        self.slots.clear();
        self.places.clear();
    }

    /// Whether nothing has changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let rest = [&self.frames, &self.mappings, &self.slots, &self.places];
        self.pages.iter().chain(rest).all(Marks::is_empty)
    }

    /// Pages of a process whose entries have changed, or lead to frames that have.
    #[must_use]
    pub fn pages(&self, pid: Pid) -> &Marks {
        &self.pages[usize::from(pid.0)]
    }
}

impl Machine {
    /// Whether something has changed since it was last taken.
    #[inline]
    #[must_use]
    pub fn has_changes(&self) -> bool {
        !self.memory.changed.is_empty() || !self.swap.changed.is_empty() || !self.changes.is_empty()
    }

    /// Moves what has changed since the last call into `changes`, and adds the pages that lead to
    /// frames that have.
    pub fn take_changes(&mut self, changes: &mut Changes) {
        if !self.has_changes() {
            return;
        }
        let own = &mut self.changes;
        if changes.pages.len() < own.pages.len() {
            changes.pages.resize(own.pages.len(), Marks::default());
        }
        for (pages, more) in changes.pages.iter_mut().zip(&mut own.pages) {
            pages.take_from(more);
        }
        changes.mappings.take_from(&mut own.mappings);
        changes.places.take_from(&mut own.places);
        changes.frames.take_from(&mut self.memory.changed);
        changes.slots.take_from(&mut self.swap.changed);
        if changes.frames.is_empty() {
            return;
        }
        let Changes { pages, frames, .. } = changes;
        for frame in frames.iter().map(FrameId) {
            self.pages_at(frame, |pid, page| pages[usize::from(pid.0)].add(page));
        }
    }

    /// Tells the pages of processes that lead to a frame.
    fn pages_at(&self, frame: FrameId, mut tell: impl FnMut(Pid, u32)) {
        for mapping in self.rmaps.of(&self.memory, frame) {
            let pages = match mapping.level {
                Level::Page => mapping.page..mapping.page + 1,
                Level::Block => self.shape.block_around(mapping.page).iter(),
            };
            pages.for_each(|page| tell(mapping.pid, page));
        }
    }
}
