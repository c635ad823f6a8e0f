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
    near: u128,
    /// The bits behind.
    far: Vec<u64>,
    any: bool,
}

const BITS: u32 = u64::BITS;
const NEAR: u32 = u128::BITS;

impl Marks {
    /// Adds a number.
    #[inline]
    pub(crate) fn add(&mut self, n: u32) {
        match n.checked_sub(NEAR) {
            None => self.near |= 1 << n,
            Some(n) => self.add_far((n / BITS) as usize, 1 << (n % BITS)),
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
        self.near |= other.near;
        for (at, more) in other.far.iter().enumerate() {
            self.add_far(at, *more);
        }
        self.any = true;
        other.clear();
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        if self.any {
            self.near = 0;
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
    pub fn iter(&self) -> Numbers<'_> {
        Numbers {
            near: self.near,
            word: 0,
            behind: NEAR,
            far: &self.far,
        }
    }
}

/// The numbers of a set, ascending.
#[derive(Clone, Debug)]
pub struct Numbers<'a> {
    near: u128,
    /// Bits of the word behind which `far` begins.
    word: u64,
    /// The first number behind it.
    behind: u32,
    far: &'a [u64],
}

impl Iterator for Numbers<'_> {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        if self.near != 0 {
            let n = self.near.trailing_zeros();
            self.near &= self.near - 1;
            return Some(n);
        }
        while self.word == 0 {
            let (first, rest) = self.far.split_first()?;
            (self.word, self.far) = (*first, rest);
            self.behind += BITS;
        }
        let bit = self.word.trailing_zeros();
        self.word &= self.word - 1;
        Some(self.behind - BITS + bit)
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
        self.frames.is_empty()
            && self.mappings.is_empty()
            && self.slots.is_empty()
            && self.places.is_empty()
            && self.pages.iter().all(Marks::is_empty)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(numbers: &[u32]) -> Marks {
        let mut marks = Marks::default();
        numbers.iter().for_each(|n| marks.add(*n));
        marks
    }

    #[test]
    fn numbers_come_back_in_order_near_and_far() {
        let all = [0, 63, 64, 127, 128, 191, 192, 700];
        let mut given = all;
        given.reverse();
        let marks = marked(&given);
        assert!(marks.iter().eq(all));
        assert!(marked(&[]).iter().eq([]), "an empty set has none");
        assert!(marked(&[300]).iter().eq([300]), "only far away");
    }

    #[test]
    fn what_is_taken_is_here_and_not_there() {
        let (mut here, mut there) = (marked(&[5, 130]), marked(&[4, 131, 600]));
        here.take_from(&mut there);
        assert!(here.iter().eq([4, 5, 130, 131, 600]));
        assert!(there.is_empty() && there.iter().next().is_none());
        here.clear();
        assert!(here.is_empty() && here.iter().next().is_none());
    }
}
