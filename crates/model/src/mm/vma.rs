//! Mappings of one process: found, split, and merged by the rules of 6.18.
//!
//! Two neighbours become one where flags (but soft-dirty and maybe-guard), backing and offsets fit and their
//! anonymous memory does: it is the same, or one side has none and the other's was not inherited
//! from a parent. With both neighbours of a changed piece compatible, all three become one only if
//! the outer two are compatible with each other; otherwise the left one wins.

use crate::mm::Pages;
use crate::mm::file::FileId;
use crate::mm::flags::VmFlags;

/// Identity of a tree of anonymous memory (`anon_vma`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AnonId(pub u32);

/// What stands behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory.
    Anon,
    /// A file; shared anonymous memory is a nameless one.
    File(FileId),
    /// Pages of the pool of huge pages.
    HugePages,
    /// Raw pages that belong to no folio.
    Special,
}

/// How a mapping stands to the anonymous memory of other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Descent {
    /// Its anonymous memory, if any, began here.
    #[default]
    Own,
    /// Inherited from a parent: does not merge with mappings that have none.
    ForkChild,
}

/// Whether the mapping was offered to its left neighbour for merging when it came to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Left {
    /// It was: where they are not one, they do not fit.
    #[default]
    Tried,
    /// It was not: they may fit (children, leavings of `MREMAP_DONTUNMAP`).
    Untried,
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vma {
    /// Pages of the window.
    pub pages: Pages,
    /// Page number of its start in what backs it; for anonymous memory where it was first.
    pub offset: u32,
    /// Flags.
    pub flags: VmFlags,
    /// What stands behind it.
    pub backing: Backing,
    /// Its anonymous memory, from the first write on.
    pub anon: Option<AnonId>,
    /// Where that comes from.
    pub descent: Descent,
    /// See [`Left`]; the kernel keeps no such thing, the check needs it.
    pub left: Left,
}

impl Vma {
    /// The page number of `page` in what backs the mapping.
    #[must_use]
    pub const fn index_of(&self, page: u32) -> u32 {
        self.offset + (page - self.pages.start)
    }

    /// Whether pages of it are copied when written.
    #[must_use]
    pub const fn is_cow(&self) -> bool {
        !self.flags.has(VmFlags::SHARED) && self.flags.has(VmFlags::MAY_WRITE)
    }

    /// Whether it is private anonymous memory.
    #[must_use]
    pub fn is_anon(&self) -> bool {
        self.backing == Backing::Anon
    }

    /// Whether pages that were written in it are the process's own.
    #[must_use]
    pub fn is_private(&self) -> bool {
        match self.backing {
            Backing::Anon => true,
            Backing::File(_) => !self.flags.has(VmFlags::SHARED),
            Backing::HugePages | Backing::Special => false,
        }
    }

    /// The part inside `pages`.
    #[must_use]
    pub fn part(&self, pages: Pages) -> Self {
        let clipped = self.pages.clip(pages);
        Self {
            pages: clipped,
            offset: self.index_of(clipped.start),
            ..*self
        }
    }

    fn inherits(&self) -> bool {
        self.anon.is_some() && self.descent == Descent::ForkChild
    }

    /// Whether the two could be one but for their anonymous memory.
    fn fits(&self, next: &Self) -> bool {
        let ignored = VmFlags::MERGE_IGNORES;
        self.pages.end == next.pages.start
            && self.flags.without(ignored) == next.flags.without(ignored)
            && self.backing == next.backing
            && self.index_of(self.pages.end) == next.offset
            && !self.flags.any(VmFlags::PFN_MAP)
    }

    /// Whether a neighbour `target` may take this piece in, as far as anonymous memory goes.
    fn anon_fits_into(&self, target: &Self) -> bool {
        match (target.anon, self.anon) {
            (None, Some(_)) => !self.inherits(),
            (Some(_), None) => !target.inherits(),
            (a, b) => a == b,
        }
    }

    /// Whether the kernel would merge this mapping with its right neighbour when it changes one of
    /// them.
    #[must_use]
    pub fn merges_with(&self, next: &Self) -> bool {
        self.fits(next) && next.anon_fits_into(self) && self.anon_fits_into(next)
    }

    /// Whether a page written first in one may share the other's anonymous memory.
    fn lends_anon_to(&self, other: &Self) -> bool {
        let same = VmFlags::RIGHTS.with(VmFlags::MERGE_IGNORES);
        let (left, right) = if self.pages.start < other.pages.start {
            (self, other)
        } else {
            (other, self)
        };
        !self.inherits()
            && left.pages.end == right.pages.start
            && left.flags.without(same) == right.flags.without(same)
            && left.backing == right.backing
            && left.index_of(left.pages.end) == right.offset
    }
}

/// The mappings of a process, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Vmas {
    list: Vec<Vma>,
}

impl Vmas {
    /// All mappings, by address.
    #[must_use]
    pub fn all(&self) -> &[Vma] {
        &self.list
    }

    /// Place of the mapping at `page`, or of the first one behind it.
    #[must_use]
    pub fn place(&self, page: u32) -> usize {
        self.list.partition_point(|vma| vma.pages.end <= page)
    }

    /// The mapping at `page`.
    #[must_use]
    pub fn at(&self, page: u32) -> Option<&Vma> {
        self.first_from(page).filter(|vma| vma.pages.contains(page))
    }

    /// The mapping at `page`, or the first one behind it.
    #[must_use]
    pub fn first_from(&self, page: u32) -> Option<&Vma> {
        self.list.get(self.place(page))
    }

    /// The mappings that share a page with `pages`.
    pub fn overlapping(&self, pages: Pages) -> impl Iterator<Item = &Vma> {
        self.list[self.place(pages.start)..]
            .iter()
            .take_while(move |vma| vma.pages.start < pages.end)
    }

    /// Whether every page of `pages` is mapped.
    #[must_use]
    pub fn cover(&self, pages: Pages) -> bool {
        let mut at = pages.start;
        for vma in self.overlapping(pages) {
            if vma.pages.start > at {
                return false;
            }
            at = vma.pages.end;
        }
        at >= pages.end
    }

    /// Cuts the mapping that holds both sides of the border in front of `page`. Returns whether
    /// there was one.
    pub(crate) fn split(&mut self, page: u32) -> Option<Vma> {
        let at = self.place(page);
        let whole = *self.list.get(at)?;
        if whole.pages.start >= page {
            return None;
        }
        self.list[at].pages.end = page;
        let rest = whole.part(Pages::new(page, whole.pages.end));
        self.list.insert(
            at + 1,
            Vma {
                left: Left::Tried,
                ..rest
            },
        );
        Some(whole)
    }

    /// Enters a mapping where nothing is mapped, and merges it with its neighbours. Returns the
    /// number of mappings that vanished in it.
    pub(crate) fn insert(&mut self, vma: Vma) -> u32 {
        let at = self.place(vma.pages.start);
        self.list.insert(
            at,
            Vma {
                left: Left::Tried,
                ..vma
            },
        );
        self.merge_around(at)
    }

    /// Enters a mapping and merges nothing.
    pub(crate) fn insert_apart(&mut self, vma: Vma) {
        let at = self.place(vma.pages.start);
        self.list.insert(
            at,
            Vma {
                left: Left::Untried,
                ..vma
            },
        );
    }

    /// Takes out the mappings of `pages`, which must begin and end at borders.
    pub(crate) fn remove(&mut self, pages: Pages) -> Vec<Vma> {
        let (from, to) = (self.place(pages.start), self.place(pages.end));
        self.list.drain(from..to).collect()
    }

    /// Changes the flags of one mapping's part, whose borders were cut, and merges it with its
    /// neighbours. Returns the number of mappings that vanished.
    pub(crate) fn set_flags(&mut self, start: u32, flags: VmFlags) -> u32 {
        let at = self.place(start);
        self.list[at].flags = flags;
        self.merge_around(at)
    }

    pub(crate) fn clear_soft_dirty(&mut self) {
        for vma in &mut self.list {
            vma.flags = vma.flags.without(VmFlags::SOFT_DIRTY);
        }
    }

    pub(crate) fn get_mut(&mut self, page: u32) -> Option<&mut Vma> {
        let at = self.place(page);
        self.list.get_mut(at)
    }

    /// Merges the mapping at `at` with its neighbours, as far as the rules go.
    fn merge_around(&mut self, at: usize) -> u32 {
        let middle = self.list[at];
        self.list[at].left = Left::Tried;
        let prev = at.checked_sub(1).map(|n| self.list[n]);
        let next = self.list.get(at + 1).copied();
        let left = prev.filter(|prev| prev.fits(&middle) && middle.anon_fits_into(prev));
        let right = next.filter(|next| middle.fits(next) && middle.anon_fits_into(next));
        let right = right.filter(|next| left.is_none_or(|prev| outer_fit(&prev, next)));
        let mut gone = 0;
        if let Some(next) = right {
            self.list[at] = joined(&middle, &next);
            self.list[at].left = Left::Tried;
            self.list.remove(at + 1);
            gone += 1;
        } else if let Some(next) = self.list.get_mut(at + 1) {
            next.left = if left.is_some() {
                next.left
            } else {
                Left::Tried
            };
        }
        if let Some(prev) = left {
            self.list[at - 1] = joined(&prev, &self.list[at]);
            self.list.remove(at);
            gone += 1;
            // The right one may fit the result and still stays: nothing asks a second time.
            if let (None, Some(next)) = (right, self.list.get_mut(at)) {
                next.left = Left::Untried;
            }
        }
        gone
    }

    /// The anonymous memory that a mapping at `page` gets with its first page: a neighbour's, so
    /// that the two can become one again, or none to share.
    pub(crate) fn neighbour_anon(&self, page: u32) -> Option<AnonId> {
        let at = self.place(page);
        let vma = self.list.get(at)?;
        let lends = |other: &&Vma| other.anon.is_some() && other.lends_anon_to(vma);
        let next = self.list.get(at + 1).filter(lends);
        let prev = at.checked_sub(1).map(|n| &self.list[n]).filter(lends);
        next.or(prev)?.anon
    }
}

/// Whether the two outer mappings of three may end up in one.
fn outer_fit(prev: &Vma, next: &Vma) -> bool {
    prev.anon.is_none() || next.anon.is_none() || prev.anon == next.anon
}

/// One mapping from two neighbours.
fn joined(left: &Vma, right: &Vma) -> Vma {
    let (anon, descent) = match left.anon {
        Some(anon) => (Some(anon), left.descent),
        None => (right.anon, right.descent),
    };
    let sticky = right.flags.common(VmFlags::MERGE_IGNORES);
    Vma {
        pages: Pages::new(left.pages.start, right.pages.end),
        flags: left.flags.with(sticky),
        anon,
        descent,
        ..*left
    }
}
