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
    words: Vec<u64>,
    any: bool,
}

const BITS: u32 = u64::BITS;

impl Marks {
    /// Adds a number.
    #[inline]
    pub(crate) fn add(&mut self, n: u32) {
        let at = (n / BITS) as usize;
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        self.words[at] |= 1 << (n % BITS);
        self.any = true;
    }

    /// Moves all numbers of `other` here.
    #[inline]
    pub(crate) fn take_from(&mut self, other: &mut Self) {
        if other.any {
            self.add_all(other);
            other.clear();
        }
    }

    /// Adds all numbers of `other`.
    fn add_all(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        self.any |= other.any;
    }

    pub(crate) fn clear(&mut self) {
        if self.any {
            self.words.iter_mut().for_each(|word| *word = 0);
            self.any = false;
        }
    }

    /// Whether there is no number.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        !self.any
    }

    /// The numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.words).flat_map(|(at, word)| {
            let mut rest = *word;
            core::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(at * BITS + bit)
            })
        })
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
