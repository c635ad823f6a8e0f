//! Swap: slots with a use count and content, and the swap cache.

use crate::mm::changes::Marks;
use crate::mm::entry::SlotId;
use crate::mm::memory::{FrameId, index32};

/// A slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Page-table entries that name it.
    pub count: u32,
    /// The page that holds its content in memory, at the moment or still.
    pub cache: Option<FrameId>,
    /// The content is on the device, not in the cache alone.
    pub written: bool,
}

/// The swap device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Swap {
    pub(crate) slots: Vec<Slot>,
    words: Vec<u64>,
    per_page: u32,
    /// Slots that may have changed.
    pub(crate) changed: Marks,
}

impl Swap {
    pub(crate) fn new(slots: u32, per_page: u32) -> Self {
        Self {
            slots: vec![Slot::default(); slots as usize],
            words: vec![0; (slots * per_page) as usize],
            per_page,
            changed: Marks::default(),
        }
    }

    /// A slot.
    #[must_use]
    pub fn slot(&self, slot: SlotId) -> &Slot {
        &self.slots[slot.0 as usize]
    }

    pub(crate) fn slot_mut(&mut self, slot: SlotId) -> &mut Slot {
        self.changed.add(slot.0);
        &mut self.slots[slot.0 as usize]
    }

    /// A slot that nobody uses, for the page `cache`.
    pub(crate) fn allocate(&mut self, cache: FrameId) -> Option<SlotId> {
        let free = |slot: &Slot| slot.count == 0 && slot.cache.is_none();
        let at = self.slots.iter().position(free)?;
        let slot = SlotId(index32(at));
        *self.slot_mut(slot) = Slot {
            cache: Some(cache),
            ..Slot::default()
        };
        Some(slot)
    }

    /// Whether there is a slot that nobody uses.
    pub(crate) fn has_room(&self) -> bool {
        let free = |slot: &Slot| slot.count == 0 && slot.cache.is_none();
        self.slots.iter().any(free)
    }

    /// The content of a slot.
    #[must_use]
    pub fn content(&self, slot: SlotId) -> &[u64] {
        let at = (slot.0 * self.per_page) as usize;
        &self.words[at..at + self.per_page as usize]
    }

    pub(crate) fn content_mut(&mut self, slot: SlotId) -> &mut [u64] {
        let at = (slot.0 * self.per_page) as usize;
        &mut self.words[at..at + self.per_page as usize]
    }
}
