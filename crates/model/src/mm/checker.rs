//! Checks only what has changed, and finds what [`check`](crate::mm::check::check) would find.
//!
//! | changed | looked at |
//! |---|---|
//! | an entry | its page; the frame and the slot that it names and that it named |
//! | a frame | its folio; the pages that lead to it; whose it is |
//! | a slot | the entries that name it; the page in its cache |
//! | mappings of a process | all of them, and all its entries |
//!
//! What must be counted over everything, free frames and the pages of device allocations, is kept
//! from look to look.

use crate::mm::changes::{Changes, Marks};
use crate::mm::check::{
    At, Broken, check_cached, check_entry, check_folio, check_slot, check_vmas, rule,
};
use crate::mm::memory::{Frame, FrameId, Owner, index32};
use crate::mm::swap::Slot;
use crate::mm::{Machine, Pid};

/// Checks one machine, look after look.
#[derive(Debug, Default)]
pub struct Checker {
    /// What has changed since the last look.
    changes: Changes,
    counts: Counts,
}

/// What is counted over everything.
#[derive(Debug, Default)]
struct Counts {
    /// Whose every frame was; `None` for one that was not looked at, and where it was no head.
    owners: Vec<Option<Owner>>,
    /// Pages that the allocation in every place had.
    device_pages: Vec<u32>,
    /// Slots with a page in their cache.
    cached: Vec<u32>,
    free: u32,
}

impl Checker {
    /// Of a machine that was never looked at: the first look is at all that is not free.
    #[must_use]
    pub fn new(mm: &Machine) -> Self {
        let mut checker = Self {
            changes: Changes::new(mm.shape.processes),
            ..Self::default()
        };
        let Self { changes, counts } = &mut checker;
        for (n, frame) in (0..).zip(&mm.memory.frames) {
            let free = Frame {
                head: n,
                ..Frame::default()
            };
            if *frame == free && n < mm.memory.host_frames() {
                counts.owners.push(Some(Owner::Free));
                counts.free += 1;
            } else {
                counts.owners.push(None);
                changes.frames.add(n);
            }
        }
        for process in &mm.processes {
            let slots = process.entries.iter().filter_map(|entry| entry.slot());
            slots.for_each(|slot| changes.slots.add(slot.0));
        }
        for (n, slot) in (0..).zip(&mm.swap.slots) {
            if *slot != Slot::default() {
                changes.slots.add(n);
            }
        }
        mm.pids()
            .for_each(|pid| changes.mappings.add(u32::from(pid.0)));
        (0..index32(mm.device_pages.len())).for_each(|place| changes.places.add(place));
        checker
    }

    /// Takes note of what has changed, and leaves nothing of it: the next [`check`](Self::check)
    /// looks at it.
    pub fn note(&mut self, changes: &mut Changes) {
        self.changes.take_from(changes);
    }

    /// Whether nothing has changed since the last look.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.changes.is_empty()
    }

    /// Looks at what has changed.
    ///
    /// # Errors
    /// A rule that does not hold.
    pub fn check(&mut self, mm: &Machine) -> Result<(), Broken> {
        let result = self.counts.look(mm, &mut self.changes);
        self.changes.clear();
        result
    }
}

impl Counts {
    /// Looks at what has changed, and counts it.
    fn look(&mut self, mm: &Machine, changes: &mut Changes) -> Result<(), Broken> {
        for pid in changes.mappings.iter() {
            let pid = Pid(u8::try_from(pid).unwrap_or(u8::MAX));
            check_vmas(mm, pid)?;
            (0..mm.shape.pages).for_each(|page| changes.pages[usize::from(pid.0)].add(page));
        }
        for frame in changes.frames.iter().map(FrameId) {
            let head = mm.memory.head(frame);
            let inside = frame.0.wrapping_sub(head.0) < 1 << mm.memory.frame(head).order;
            let at = At::Frame(frame, head.0, frame.0);
            rule!(inside, "pages know their head", at)?;
            check_folio(mm, head)?;
            self.count(mm, frame, &mut changes.places)?;
        }
        for (pid, pages) in (0..).map(Pid).zip(&changes.pages) {
            pages
                .iter()
                .try_for_each(|page| check_entry(mm, pid, page))?;
        }
        self.look_at_slots(mm, &changes.slots)?;
        self.compare_counts(mm, &changes.places)
    }

    fn look_at_slots(&mut self, mm: &Machine, slots: &Marks) -> Result<(), Broken> {
        for slot in slots.iter() {
            check_slot(mm, slot)?;
            self.cached.retain(|known| *known != slot);
            if mm.swap.slots[slot as usize].cache.is_some() {
                self.cached.push(slot);
            }
        }
        // Also a page that left the cache on its own side alone.
        self.cached.iter().try_for_each(|n| check_cached(mm, *n))
    }

    /// Keeps the counts up to date with one frame.
    fn count(&mut self, mm: &Machine, frame: FrameId, places: &mut Marks) -> Result<(), Broken> {
        let is_head = mm.memory.head(frame) == frame;
        let now = is_head.then(|| mm.memory.frame(frame).owner);
        if self.owners.len() <= frame.index() {
            self.owners.resize(mm.memory.frames.len(), None);
        }
        let former = core::mem::replace(&mut self.owners[frame.index()], now);
        if now == former {
            return Ok(());
        }
        if !mm.memory.is_device(frame) {
            self.free += u32::from(now == Some(Owner::Free));
            self.free -= u32::from(former == Some(Owner::Free));
            return Ok(());
        }
        if let Some(Owner::Device(place, _)) = former {
            self.device_pages[place as usize] -= 1;
            places.add(place);
        }
        if let Some(owner @ Owner::Device(place, _)) = now {
            let at = place as usize;
            self.device_pages
                .resize(self.device_pages.len().max(at + 1), 0);
            self.device_pages[at] += 1;
            places.add(place);
            let device = &mm.memory.frames[mm.memory.host_frames() as usize..];
            let one = device.iter().filter(|other| other.owner == owner).count() == 1;
            rule!(one, "a device page has one owner", At::Allocation(place))?;
        }
        Ok(())
    }

    fn compare_counts(&self, mm: &Machine, places: &Marks) -> Result<(), Broken> {
        for place in places.iter() {
            let found = self.device_pages.get(place as usize).copied();
            let expected = mm.device_pages.get(place as usize).copied();
            rule!(
                found.unwrap_or(0) == expected.unwrap_or(0),
                "an allocation counts its pages",
                At::Allocation(place),
            )?;
        }
        let known = mm.memory.free_frames();
        rule!(
            self.free == known,
            "free pages are counted",
            At::Count(known, self.free),
        )
    }
}
