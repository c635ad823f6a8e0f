//! Mappings as the framework sees them: joined where arming has cut them, cut where guards are.
//!
//! A device fault looks its mapping up twice, before and after it takes note of the sequence. Watched
//! mappings are remembered between bracketed changes, so that the second look costs no system call.

use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, HostVa, PAGE_2M};
use gpusvm::seam::mm::{Vma, VmaKind};

use gpusvm::seam::env::Mutex;

use crate::env::LiveEnv;
use crate::level::FaultLevel;
use crate::residency::State;
use crate::space::LiveSpace;
use crate::sys::heap;
use crate::sys::procmap::{MapInfo, NameKind, Sharing};
use crate::sys::thread;

/// Places for remembered mappings; each 2 MiB of addresses have one.
const PLACES: usize = 64;

/// Watched mappings, as they were at the last look. Leaf lock.
#[derive(Debug)]
pub(crate) struct Remembered {
    /// Bumped by every change that brackets see.
    changes: AtomicU64,
    places: Mutex<LiveEnv, [Option<Memory>; PLACES]>,
}

/// What the mapping in a block of 2 MiB was after so many changes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    changes: u64,
    block: HostVa,
    vma: Vma,
}

impl Default for Remembered {
    fn default() -> Self {
        Self {
            changes: AtomicU64::new(0),
            places: Mutex::<LiveEnv, _>::new([None; PLACES]),
        }
    }
}

impl Remembered {
    /// Something has changed, or is about to: nothing is known any more.
    pub(crate) fn forget(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    fn place(block: HostVa) -> usize {
        usize::try_from(block.get() / PAGE_2M).unwrap_or(0) % PLACES
    }

    fn recall(&self, at: HostVa) -> Option<Vma> {
        let block = at.align_down(PAGE_2M);
        let memory = self.places.lock()[Self::place(block)]?;
        let fresh = memory.changes == self.changes.load(Ordering::Acquire);
        (fresh && memory.block == block && memory.vma.span.contains(at)).then_some(memory.vma)
    }

    /// Takes note of what was found after `changes` changes.
    fn note(&self, changes: u64, at: HostVa, vma: Vma) {
        let block = at.align_down(PAGE_2M);
        let memory = Memory {
            changes,
            block,
            vma,
        };
        self.places.lock()[Self::place(block)] = Some(memory);
    }
}

impl LiveSpace {
    /// The mapping at `at` or behind it, with the pieces that arming has cut joined again inside
    /// the 2 MiB around `at`.
    pub(crate) fn vma_around(&self, at: HostVa) -> Option<Vma> {
        // Without brackets nobody tells of changes in time.
        if !self.level().is_patched() {
            let vma = self.look_up(at)?;
            if !self.watch.covers(vma.span) {
                self.judge(vma.span);
            }
            return Some(vma);
        }
        if let Some(vma) = self.remembered.recall(at) {
            return Some(vma);
        }
        let changes = self.remembered.changes.load(Ordering::Acquire);
        let vma = self.look_up(at)?;
        if !self.watch.covers(vma.span) {
            self.judge(vma.span);
        } else if vma.span.contains(at) {
            self.remembered.note(changes, at, vma);
        }
        Some(vma)
    }

    /// Whether a mapping is a stack. The heap's blocks lie above what nobody may access, as stacks do,
    /// and are none.
    fn judge(&self, mapping: HostSpan) {
        if !heap::contains(mapping.start()) {
            self.stays.judge(&self.procmap, mapping);
        }
    }

    /// As [`vma_around`](Self::vma_around), for faults of devices. Where nothing migrates by itself
    /// they use the pages where they are.
    pub(crate) fn vma_for_device(&self, at: HostVa) -> Option<Vma> {
        let mut vma = self.vma_around(at)?;
        if self.level().faults == FaultLevel::Explicit && vma.kind == VmaKind::Anonymous {
            vma.kind = VmaKind::InPlace;
        }
        Some(vma)
    }

    /// Whether every page of `span`, which is home, has content.
    pub(crate) fn populated(&self, span: HostSpan) -> bool {
        if heap::contains(span.start()) {
            return heap::first_data(span) == Some(span);
        }
        self.pagemap.populated(span)
    }

    /// As [`vma_around`](Self::vma_around), from the system.
    fn look_up(&self, at: HostVa) -> Option<Vma> {
        let mut vma = self.query(at)?;
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        if vma.span.covers(block) || !self.may_be_cut(block) {
            return Some(vma);
        }
        while vma.span.contains(at) && vma.span.start() > block.start() {
            let before = HostVa::new(vma.span.start().get() - 1);
            let Some(other) = self.joinable(&vma, before) else {
                break;
            };
            vma.span = vma.span.join(other);
        }
        while vma.span.contains(at) && vma.span.end() < block.end() {
            let Some(other) = self.joinable(&vma, vma.span.end()) else {
                break;
            };
            vma.span = vma.span.join(other);
        }
        Some(vma)
    }

    /// The mapping at `at` or behind it, as the system has it; but where the view of the heap is
    /// closed, as it was before.
    fn query(&self, at: HostVa) -> Option<Vma> {
        if self.level().faults.has_uffd() {
            return Some(vma_of(&self.procmap.query(at).ok()??));
        }
        // Views are closed and opened while the table names their span: it must not change between
        // the two looks.
        let table = self.residency.lock();
        let found = self.procmap.query(at).ok()??;
        let mut vma = vma_of(&found);
        if !heap::is_block(found.span.start(), found.inode) {
            vma.kind = match vma.kind {
                VmaKind::Anonymous => VmaKind::InPlace,
                other => other,
            };
            return Some(vma);
        }
        let at = at.max(vma.span.start());
        for (away, state) in table.overlapping(vma.span) {
            if matches!(state, State::Claimed) {
                continue;
            }
            if away.contains(at) {
                (vma.span, vma.read, vma.write) = (away, true, true);
                break;
            }
            vma.span = if away.end() <= at {
                HostSpan::new(away.end(), vma.span.end())
            } else {
                HostSpan::new(vma.span.start(), away.start())
            };
        }
        vma.kind = match (vma.kind, vma.read && vma.write) {
            (VmaKind::Special, _) => VmaKind::Special,
            (_, true) => VmaKind::Anonymous,
            (_, false) => VmaKind::InPlace,
        };
        Some(vma)
    }

    /// Whether the mappings in `block` may be pieces of one.
    fn may_be_cut(&self, block: HostSpan) -> bool {
        self.watch.may_be_cut(block)
            || heap::overlaps(block) && self.residency.lock().has_departed(block)
    }

    /// What of `vma` can be accessed around `at`: guards cut it as a change of rights would. Looks no
    /// further than the 2 MiB around `at`, in which every range lies.
    pub(crate) fn between_guards(&self, mut vma: Vma, at: HostVa) -> Vma {
        if vma.kind != VmaKind::Anonymous || !self.guards.load(Ordering::Acquire) {
            return vma;
        }
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        let mut rest = block.intersect(vma.span);
        while let Some(guard) = rest.and_then(|rest| self.pagemap.first_guard(rest)) {
            if guard.contains(at) {
                (vma.span, vma.read, vma.write) = (guard, false, false);
                return vma;
            }
            let around = if guard.end() <= at {
                HostSpan::new(guard.end(), vma.span.end())
            } else {
                HostSpan::new(vma.span.start(), guard.start())
            };
            vma.span = around;
            rest = HostSpan::new(guard.end(), block.end()).intersect(vma.span);
        }
        vma
    }

    /// Whether some page of `span` is a guard. Looks no further where nobody has installed any.
    pub(crate) fn has_guards(&self, span: HostSpan) -> bool {
        self.guards.load(Ordering::Acquire) && self.pagemap.first_guard(span).is_some()
    }

    /// Takes note of guards in a mapping that is watched from now on.
    pub(crate) fn look_for_guards(&self, vma: &Vma) {
        if self.pagemap.first_guard(vma.span).is_some() {
            self.guards.store(true, Ordering::Release);
        }
    }

    /// The mapping that contains `at`, if it differs from `vma` in nothing that matters.
    fn joinable(&self, vma: &Vma, at: HostVa) -> Option<HostSpan> {
        let other = self.query(at)?;
        let same = other.kind == VmaKind::Anonymous
            && vma.kind == VmaKind::Anonymous
            && other.read == vma.read
            && other.write == vma.write
            && other.span.contains(at)
            && self.watch.is_watched(other.span);
        same.then_some(other.span)
    }
}

fn vma_of(map: &MapInfo) -> Vma {
    let special = thread::runtime_owns(map.span) || map.name == NameKind::Special;
    let private = map.sharing == Sharing::Private && map.inode == 0 && map.name != NameKind::Stack;
    let kind = if special {
        VmaKind::Special
    } else if private && map.read && map.write && !map.exec {
        VmaKind::Anonymous
    } else {
        VmaKind::InPlace
    };
    Vma {
        span: map.span,
        read: map.read,
        write: map.write,
        kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, bytes: u64) -> Vma {
        Vma {
            span: HostSpan::at(HostVa::new(start), bytes),
            read: true,
            write: true,
            kind: VmaKind::Anonymous,
        }
    }

    #[test]
    fn mapping_is_remembered_in_its_block_until_something_changes() {
        let known = Remembered::default();
        let vma = mapping(8 * PAGE_2M, 2 * PAGE_2M);
        let (here, next) = (HostVa::new(8 * PAGE_2M + 4096), HostVa::new(9 * PAGE_2M));
        known.note(0, here, vma);
        assert_eq!(known.recall(here), Some(vma));
        assert_eq!(known.recall(next), None, "another block");
        known.forget();
        assert_eq!(known.recall(here), None);
        // What was looked up while something changed is never used.
        known.note(0, here, vma);
        assert_eq!(known.recall(here), None);
    }
}
