//! The TLB of one unit: filled by walks, emptied by invalidations, and by a newer translation that
//! needs the place. Direct-mapped, one array per block size.

use alloc::boxed::Box;

use crate::mmu::Leaf;

/// Block sizes, as shifts; the most useful first.
const SHIFTS: [u32; 4] = [21, 12, 16, 30];

#[derive(Clone, Copy, Debug)]
struct Entry {
    asid: u32,
    leaf: Leaf,
}

/// Cached translations.
#[derive(Debug)]
pub(crate) struct Tlb {
    /// Per size: entries, and how many are valid.
    sizes: [(Box<[Option<Entry>]>, usize); SHIFTS.len()],
}

impl Tlb {
    /// `entries` places per block size, rounded up to a power of two.
    pub(crate) fn new(entries: usize) -> Self {
        let places = entries.next_power_of_two().max(1);
        Self {
            sizes: SHIFTS.map(|_| (alloc::vec![None; places].into_boxed_slice(), 0)),
        }
    }

    /// The translation for `va`, if it is cached.
    pub(crate) fn look_up(&self, asid: u32, va: u64) -> Option<Leaf> {
        SHIFTS
            .into_iter()
            .zip(&self.sizes)
            .find_map(|(shift, (places, valid))| {
                if *valid == 0 {
                    return None;
                }
                let entry = places[place(va, shift, places.len())]?;
                (entry.asid == asid && entry.leaf.va == va >> shift << shift).then_some(entry.leaf)
            })
    }

    /// Whether a translation of an address space is cached.
    pub(crate) fn has(&self, asid: u32) -> bool {
        let all = self.sizes.iter().flat_map(|(places, _)| places.iter());
        all.flatten().any(|entry| entry.asid == asid)
    }

    /// Caches a walk's result.
    pub(crate) fn insert(&mut self, asid: u32, leaf: Leaf) {
        let Some((places, valid)) = self.of(leaf.shift) else {
            return;
        };
        let place = &mut places[place(leaf.va, leaf.shift, places.len())];
        *valid += usize::from(place.is_none());
        *place = Some(Entry { asid, leaf });
    }

    /// Drops every translation of `[start, end)`.
    pub(crate) fn invalidate(&mut self, asid: u32, start: u64, end: u64) {
        for (shift, (places, valid)) in SHIFTS.into_iter().zip(&mut self.sizes) {
            if *valid == 0 || start >= end {
                continue;
            }
            let (first, last) = (start >> shift, (end - 1) >> shift);
            let count = places.len();
            // A span of more blocks than there are places touches every place.
            let places_hit = usize::try_from(last - first + 1)
                .unwrap_or(count)
                .min(count);
            for n in 0..places_hit {
                let at = place(start, shift, count).wrapping_add(n) & (count - 1);
                let hit = places[at].is_some_and(|entry| {
                    let block = entry.leaf.va >> shift;
                    entry.asid == asid && first <= block && block <= last
                });
                if hit {
                    places[at] = None;
                    *valid -= 1;
                }
            }
        }
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        for (places, valid) in &mut self.sizes {
            places.fill(None);
            *valid = 0;
        }
    }

    fn of(&mut self, shift: u32) -> Option<(&mut [Option<Entry>], &mut usize)> {
        let index = SHIFTS.into_iter().position(|s| s == shift)?;
        let (places, valid) = &mut self.sizes[index];
        Some((places, valid))
    }
}

/// The place of the block around `va`; `places` is a power of two.
fn place(va: u64, shift: u32, places: usize) -> usize {
    let mask = u64::try_from(places).unwrap_or(1) - 1;
    usize::try_from(va >> shift & mask).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::{Permit, Target};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn leaf(va: u64, shift: u32) -> Leaf {
        let va = va >> shift << shift;
        Leaf {
            va,
            shift,
            target: Target::Bus(va),
            write: Permit::Yes,
            atomic: Permit::No,
        }
    }

    #[test]
    fn span_of_any_size_removes_what_it_touches_and_nothing_else() {
        let mut tlb = Tlb::new(8);
        tlb.insert(1, leaf(0x20_0000, 21));
        tlb.insert(1, leaf(0x40_0000, 12));
        tlb.insert(2, leaf(0x60_1000, 12));
        tlb.invalidate(1, 0x3f_f000, 0x40_0000);
        assert!(tlb.look_up(1, 0x20_1234).is_none());
        assert!(tlb.look_up(1, 0x40_0fff).is_some());
        tlb.invalidate(1, 0x1000, 1 << 47);
        assert!(tlb.look_up(1, 0x40_0000).is_none());
        assert!(tlb.look_up(2, 0x60_1000).is_some(), "another address space");
        tlb.clear();
        assert!(tlb.look_up(2, 0x60_1000).is_none());
    }

    proptest! {
        #[test]
        fn never_returns_what_was_invalidated(ops in prop::collection::vec((0_u64..64, 0_usize..4, 0_u64..16, any::<bool>()), 1..100)) {
            let mut tlb = Tlb::new(4);
            let mut live: Vec<Leaf> = Vec::new();
            for (page, size, len, add) in ops {
                let va = page << 20;
                if add {
                    let leaf = leaf(va, SHIFTS[size]);
                    live.retain(|l| l.va != leaf.va || l.shift != leaf.shift);
                    live.push(leaf);
                    tlb.insert(1, leaf);
                } else {
                    let end = va + (len << 20);
                    tlb.invalidate(1, va, end);
                    live.retain(|l| va == end || l.va >= end || va >= l.va + l.bytes());
                }
                for probe in 0..64 {
                    if let Some(found) = tlb.look_up(1, probe << 20) {
                        prop_assert!(live.contains(&found), "{found:?}");
                    }
                }
            }
        }
    }
}
