//! The order in which evictable objects were last used.

use alloc::collections::BTreeMap;
use alloc::sync::Weak;

use crate::addr::VramSpan;
use crate::vram::manager::Evict;

/// Evictable objects, least recently used first.
#[derive(Default)]
pub(super) struct Lru {
    clock: u64,
    by_age: BTreeMap<u64, Entry>,
    age_of: BTreeMap<u64, u64>,
}

/// One object on the list.
pub(super) struct Entry {
    pub(super) id: u64,
    /// Its memory.
    pub(super) span: VramSpan,
    pub(super) who: Weak<dyn Evict>,
}

impl Lru {
    /// Puts an object at the recently-used end.
    pub(super) fn insert(&mut self, entry: Entry) {
        self.remove(entry.id);
        self.clock += 1;
        self.age_of.insert(entry.id, self.clock);
        self.by_age.insert(self.clock, entry);
    }

    /// Takes an object off, if it is on.
    pub(super) fn remove(&mut self, id: u64) -> Option<Entry> {
        let age = self.age_of.remove(&id)?;
        self.by_age.remove(&age)
    }

    /// Takes the least recently used object off.
    pub(super) fn pop_oldest(&mut self) -> Option<Entry> {
        let (_, entry) = self.by_age.pop_first()?;
        self.age_of.remove(&entry.id);
        Some(entry)
    }

    /// Takes the least recently used object off that has memory of `span`.
    pub(super) fn pop_in(&mut self, span: VramSpan) -> Option<Entry> {
        let mut entries = self.by_age.values();
        let id = entries.find(|entry| entry.span.overlaps(span))?.id;
        self.remove(id)
    }

    /// Objects on the list.
    pub(super) fn len(&self) -> usize {
        self.by_age.len()
    }
}
