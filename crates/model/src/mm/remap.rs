//! `mremap`: shrink, grow, move; with a given target, or leaving the old mapping behind.

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::mutant::Mutant;
use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::{What, split_blocks, unmap_locked};
use crate::mm::protect::populate_locked;
use crate::mm::vma::{Backing, Left, Vma};
use crate::mm::{Machine, Pages, Pid, Table};

/// What `mremap` may do to get room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The mapping stays where it is.
    InPlace,
    /// It may move (`MREMAP_MAYMOVE`).
    Anywhere,
    /// It moves there; what is in the way goes (`MREMAP_FIXED`).
    At(HostVa),
    /// Its pages move anywhere, the mapping stays, empty (`MREMAP_DONTUNMAP`).
    LeaveBehind,
    /// Its pages move there, the mapping stays, empty.
    LeaveBehindAt(HostVa),
}

impl Target {
    const fn fixed(self) -> Option<HostVa> {
        match self {
            Self::At(at) | Self::LeaveBehindAt(at) => Some(at),
            Self::InPlace | Self::Anywhere | Self::LeaveBehind => None,
        }
    }

    const fn leaves(self) -> bool {
        matches!(self, Self::LeaveBehind | Self::LeaveBehindAt(_))
    }
}

/// Arguments of `mremap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remap {
    /// Start of what is moved or resized.
    pub at: HostVa,
    /// Its length, rounded up to pages.
    pub old_len: u64,
    /// Its length afterwards.
    pub new_len: u64,
    /// How.
    pub target: Target,
}

/// Bytes that a process can have: `TASK_SIZE`.
const TASK_SIZE: u64 = (1 << 47) - PAGE;

/// A checked request.
struct Plan {
    old: Pages,
    /// More than a process can have.
    absurd: bool,
    new_len: u32,
    fixed: Option<Pages>,
    target: Target,
}

/// `mremap`.
///
/// # Errors
/// As the system call.
pub fn mremap<A: Around>(around: &A, pid: Pid, remap: &Remap) -> Result<HostVa, Errno> {
    let plan = around.with(|mm| mm.plan_remap(remap))?;
    let (pages, fresh) = {
        let _lock = MmapLock::write(around, pid);
        match plan.fixed {
            Some(target) if plan.new_len == plan.old.len() => {
                move_all(around, pid, &plan, target.start)?;
                (target, Pages::new(target.end, target.end))
            }
            Some(_) | None => {
                around.with(|mm| mm.check_remap(pid, &plan))?;
                remap_locked(around, pid, &plan)?
            }
        }
    };
    populate_locked(around, pid, fresh);
    Ok(around.with(|mm| mm.shape.address(pages.start)))
}

/// Moves all mappings of a span to a given target, each to where it would be in a copy of the span;
/// holes stay holes, but not at the start. What was moved before a refusal stays moved.
fn move_all<A: Around>(around: &A, pid: Pid, plan: &Plan, to: u32) -> Result<(), Errno> {
    if around.with(|mm| mm.process(pid).vmas.at(plan.old.start).is_none()) {
        return Err(Errno::Fault);
    }
    let mut at = plan.old.start;
    while at < plan.old.end {
        let vma = around.with(|mm| mm.process(pid).vmas.first_from(at).copied());
        let Some(vma) = vma.filter(|vma| vma.pages.start < plan.old.end) else {
            return Ok(());
        };
        let part = vma.part(plan.old).part(Pages::new(at, plan.old.end)).pages;
        let start = to + (part.start - plan.old.start);
        let one = Plan {
            old: part,
            absurd: false,
            new_len: part.len(),
            fixed: Some(Pages::new(start, start + part.len())),
            target: plan.target,
        };
        around.with(|mm| mm.check_remap(pid, &one))?;
        move_mapping(around, pid, &one)?;
        at = part.end;
    }
    Ok(())
}

/// The pages of the result, and those of them that are new.
fn remap_locked<A: Around>(around: &A, pid: Pid, plan: &Plan) -> Result<(Pages, Pages), Errno> {
    let old = plan.old;
    let stays = Pages::new(old.start, old.start + plan.new_len);
    if plan.fixed.is_none() && !plan.target.leaves() {
        if plan.absurd {
            return Err(Errno::Invalid);
        }
        if plan.new_len < old.len() && !around.with(|mm| mm.has(Mutant::ShrinkKeepsTail)) {
            unmap_locked(around, pid, Pages::new(stays.end, old.end));
        }
        let grown = Pages::new(old.end, stays.end);
        if plan.new_len <= old.len() || around.with(|mm| mm.grow(pid, old, grown)) {
            return Ok((stays, grown));
        }
        if plan.target == Target::InPlace {
            return Err(Errno::NoMem);
        }
    }
    move_mapping(around, pid, plan)
}

fn move_mapping<A: Around>(around: &A, pid: Pid, plan: &Plan) -> Result<(Pages, Pages), Errno> {
    let mut old = plan.old;
    if let Some(target) = plan.fixed {
        unmap_locked(around, pid, target);
        if around.with(|mm| mm.process(pid).vmas.at(old.start).is_none()) {
            return Err(Errno::Fault);
        }
        if plan.absurd {
            return Err(Errno::Invalid);
        }
        if old.len() > plan.new_len {
            let kept = Pages::new(old.start, old.start + plan.new_len);
            unmap_locked(around, pid, Pages::new(kept.end, old.end));
            old = kept;
        }
    }
    let room = |mm: &mut Machine| mm.room_for(pid, old.start, plan.new_len);
    let new = plan
        .fixed
        .or_else(|| around.with(room))
        .ok_or(Errno::NoMem)?;
    around.with(|mm| mm.copy_vma(pid, old, new))?;
    move_pages(around, pid, old, new.start);
    if plan.target.leaves() {
        around.with(|mm| mm.leave_behind(pid, old));
    } else if !old.is_empty() {
        unmap_locked(around, pid, old);
    }
    Ok((new, Pages::new(new.start + old.len(), new.end)))
}

/// Moves entries one by one; devices lose the old addresses.
fn move_pages<A: Around>(around: &A, pid: Pid, old: Pages, to: u32) {
    let aligned = around.with(|mm| old.start % mm.shape.block() == to % mm.shape.block());
    split_blocks(around, pid, old);
    let open = around.open(pid, old, InvalidateReason::Unmap);
    let left = around.with(|mm| mm.move_tables(pid, old, to));
    let mut at = old.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, old)) {
        around.step();
        let target = to + (page - old.start);
        at = around.with(|mm| {
            // What came home meanwhile may be one block again, of which only a part moves.
            let whole = aligned && !mm.sticks_out(pid, page, old);
            if mm.block(pid, page) != Block::Table && !whole {
                mm.split_block(pid, page);
            }
            mm.move_entry(pid, page, target)
        });
    }
    around.with(|mm| {
        for block in left {
            mm.drop_empty_tables(pid, block);
        }
    });
    around.close(pid, open);
    around.announce();
}

impl Machine {
    /// Checks that need no look at mappings.
    fn plan_remap(&self, remap: &Remap) -> Result<Plan, Errno> {
        if !remap.at.is_aligned(PAGE) {
            return Err(Errno::Invalid);
        }
        // Lengths wrap around zero unnoticed.
        let rounded = |len: u64| len.wrapping_add(PAGE - 1) & !(PAGE - 1);
        let (old_len, new_len) = (rounded(remap.old_len), rounded(remap.new_len));
        let absurd = old_len > TASK_SIZE;
        let old = self.argument(remap.at, if absurd { TASK_SIZE } else { old_len })?;
        if new_len == 0 || new_len > TASK_SIZE {
            return Err(Errno::Invalid);
        }
        let new_len = u32::try_from(new_len / PAGE).unwrap_or(u32::MAX);
        if remap.target.leaves() && new_len != old.len() {
            return Err(Errno::Invalid);
        }
        let fixed = match remap.target.fixed() {
            Some(at) => Some(self.fixed_target(at, new_len, (remap.at, old_len))?),
            None => None,
        };
        Ok(Plan {
            old,
            absurd,
            new_len,
            fixed,
            target: remap.target,
        })
    }

    fn fixed_target(&self, at: HostVa, len: u32, old: (HostVa, u64)) -> Result<Pages, Errno> {
        let start = self.shape.page(at).ok_or(Errno::Invalid)?;
        let pages = Pages::new(start, start.saturating_add(len));
        let (from, bytes) = old;
        // The end of the old span wraps around zero unnoticed.
        let old_end = from.get().wrapping_add(bytes);
        let overlaps = old_end > at.get() && at.get() + u64::from(len) * PAGE > from.get();
        if !at.is_aligned(PAGE) || pages.end > self.shape.pages || overlaps {
            return Err(Errno::Invalid);
        }
        Ok(pages)
    }

    /// Checks against the mapping.
    fn check_remap(&self, pid: Pid, plan: &Plan) -> Result<(), Errno> {
        let vma = self
            .process(pid)
            .vmas
            .at(plan.old.start)
            .ok_or(Errno::Fault)?;
        // An old length of zero asks for a second mapping of what is shared.
        if plan.old.is_empty() && !vma.flags.has(VmFlags::SHARED) {
            return Err(Errno::Invalid);
        }
        if plan.target.leaves() && vma.flags.any(VmFlags::DONT_EXPAND.with(VmFlags::PFN_MAP)) {
            return Err(Errno::Invalid);
        }
        // What shrinks or stays as it is may span several mappings, but not what moves.
        let stays = plan.fixed.is_none() && !plan.target.leaves();
        let kept = plan.new_len.min(plan.old.len());
        let moved = if stays && plan.new_len <= plan.old.len() {
            0
        } else {
            kept
        };
        if !vma
            .pages
            .covers(Pages::new(plan.old.start, plan.old.start + moved))
        {
            return Err(Errno::Fault);
        }
        if vma.backing == Backing::HugePages {
            return Err(Errno::NotSupported);
        }
        let rigid = vma.flags.any(VmFlags::DONT_EXPAND.with(VmFlags::PFN_MAP));
        if plan.new_len > plan.old.len() && rigid {
            return Err(Errno::Fault);
        }
        Ok(())
    }

    /// Where the mapping at `page` can move to.
    fn room_for(&self, pid: Pid, page: u32, len: u32) -> Option<Pages> {
        let vma = self.process(pid).vmas.at(page)?;
        let what = if vma.is_anon() {
            What::Private
        } else {
            What::Shared
        };
        self.near(pid, HostVa::new(0), len, what)
    }

    /// Extends a mapping in place, if `old` is its end and there is room. Returns whether it did.
    fn grow(&mut self, pid: Pid, old: Pages, grown: Pages) -> bool {
        let vmas = &self.process(pid).vmas;
        let Some(vma) = vmas.at(old.start).copied() else {
            return false;
        };
        let room = grown.end <= self.shape.pages && !self.is_mapped(pid, grown);
        if old.is_empty() || vma.pages.end != old.end || !room {
            return false;
        }
        let more = Vma {
            pages: grown,
            offset: vma.index_of(grown.start),
            ..vma
        };
        self.process_mut(pid).vmas.insert(more);
        true
    }

    /// Makes the mapping to which the pages of `old` move.
    fn copy_vma(&mut self, pid: Pid, old: Pages, new: Pages) -> Result<(), Errno> {
        let vma = *self.process(pid).vmas.at(old.start).ok_or(Errno::Fault)?;
        // What was never written has no place of its own yet, and takes the new one.
        let fresh = vma.backing == Backing::Anon && vma.anon.is_none();
        let offset = if fresh {
            new.start
        } else {
            vma.index_of(old.start)
        };
        let copy = Vma {
            pages: new,
            offset,
            left: Left::Tried,
            flags: vma.flags.without(VmFlags::UFFD),
            ..vma
        };
        self.process_mut(pid).vmas.insert(copy);
        Ok(())
    }

    /// Tables move where the spans lie so that whole ones can; others are made anew. Returns the blocks
    /// that will have none when the entries have moved, too.
    fn move_tables(&mut self, pid: Pid, old: Pages, to: u32) -> Vec<Pages> {
        let mut left = Vec::new();
        let size = self.shape.block();
        let back = self.realigned(pid, old, to);
        let (mut from, mut to) = (old.start - back, to - back);
        while from < old.end {
            let room = (size - from % size).min(size - to % size);
            let piece = room.min(old.end - from);
            if self.has_table(pid, from) {
                let moves = piece == size && !self.has_table(pid, to);
                self.set_table(pid, to, Table::There);
                if moves {
                    left.push(self.shape.block_around(from));
                }
            }
            from += piece;
            to += piece;
        }
        left
    }

    /// By how many pages a move may begin earlier, so that it begins at a block: both mappings begin
    /// with the move, and nothing else is mapped in front of them there.
    fn realigned(&self, pid: Pid, old: Pages, to: u32) -> u32 {
        let size = self.shape.block();
        let back = old.start % size;
        let free = |start: u32| {
            let begins = self.process(pid).vmas.at(start);
            let begins = begins.is_some_and(|vma| vma.pages.start == start);
            begins && !self.is_mapped(pid, Pages::new(start - back, start))
        };
        let worth = old.len() >= size - back && to % size == back;
        if worth && free(old.start) && free(to) {
            back
        } else {
            0
        }
    }

    /// Moves an entry, or a whole block entry. Returns the first page behind what it moved.
    fn move_entry(&mut self, pid: Pid, from: u32, to: u32) -> u32 {
        match self.block(pid, from) {
            Block::Table => {
                let found = self.entry(pid, from);
                let marker = found == Entry::UffdWp;
                let entry = if marker { Entry::None } else { found };
                let bits = match entry {
                    Entry::Present(..)
                    | Entry::Zero(_)
                    | Entry::Swap(..)
                    | Entry::Migration(..)
                    | Entry::DevicePrivate(..)
                    | Entry::DeviceExclusive(..) => entry.bits().with(Bits::SOFT_DIRTY),
                    Entry::None | Entry::HwPoison(_) | Entry::Guard | Entry::UffdWp => entry.bits(),
                };
                let bits = bits.without(Bits::UFFD_WP);
                self.replace(pid, to, entry.with_bits(bits));
                self.replace(pid, from, Entry::None);
                return from + 1;
            }
            Block::Huge(head, bits) | Block::Device(head, bits) => {
                self.hold(head);
                self.unmap_block(pid, from);
                let bits = bits.with(Bits::SOFT_DIRTY).without(Bits::UFFD_WP);
                self.map_block(pid, to, head, bits);
                self.unhold(head);
            }
            Block::Zero(bits) => {
                self.unmap_block(pid, from);
                let bits = bits.with(Bits::SOFT_DIRTY).without(Bits::UFFD_WP);
                self.set_block(pid, to, Block::Zero(bits));
            }
        }
        self.shape.block_around(from).end
    }

    /// The mapping whose pages moved away stays, unlocked; if they were all of it, it forgets its
    /// anonymous memory.
    fn leave_behind(&mut self, pid: Pid, old: Pages) {
        let locks = if self.has(Mutant::LockSurvivesMove) {
            VmFlags::NONE
        } else {
            VmFlags::LOCKS
        };
        let vmas = &mut self.process_mut(pid).vmas;
        let Some(vma) = vmas.get_mut(old.start) else {
            return;
        };
        vma.flags = vma.flags.without(locks);
        vma.left = Left::Untried;
        if vma.pages == old {
            vma.anon = None;
        }
        let end = vma.pages.end;
        if let Some(next) = vmas.get_mut(end) {
            next.left = Left::Untried;
        }
    }
}
