//! Mappings as the framework sees them: joined where arming has cut them, cut where guards are.

use core::sync::atomic::Ordering;

use gpusvm::addr::{HostSpan, HostVa, PAGE_2M};
use gpusvm::seam::mm::{Vma, VmaKind};

use crate::space::LiveSpace;
use crate::sys::procmap::{MapInfo, NameKind, Sharing};
use crate::sys::thread;

impl LiveSpace {
    /// The mapping at `at` or behind it, with the pieces that arming has cut joined again inside
    /// the 2 MiB around `at`.
    pub(crate) fn vma_around(&self, at: HostVa) -> Option<Vma> {
        let found = self.procmap.query(at).ok()??;
        let mut vma = vma_of(&found);
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        if vma.span.covers(block) || !self.watch.may_be_cut(block) {
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

    /// Watches a mapping before a device may use any of it.
    pub(crate) fn ensure_watched(&self, vma: &Vma) {
        if self.watch.ensure(vma) && self.pagemap.first_guard(vma.span).is_some() {
            self.guards.store(true, Ordering::Release);
        }
    }

    /// The mapping that contains `at`, if it differs from `vma` in nothing that matters.
    fn joinable(&self, vma: &Vma, at: HostVa) -> Option<HostSpan> {
        let other = vma_of(&self.procmap.query(at).ok()??);
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
