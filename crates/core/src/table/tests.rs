use alloc::collections::BTreeMap;
use std::sync::Mutex as StdMutex;

use proptest::prelude::*;

use super::*;
use crate::NotifierHeld;
use crate::addr::{BusAddr, GpuSpan, GpuVa, PAGE, PAGE_2M, PAGE_64K, PageCount, VramAddr};
use crate::error::Failed;
use crate::seam::table::{LeafBlock, LeafFlags, LeafTarget, PageTableFormat, TableStore};

/// Three levels; an entry is its target with bits for leaf, block and device memory.
#[derive(Debug)]
struct Format;

const LEAF: u64 = 1;
const DIRECTORY: u64 = 2;
const BLOCK: u64 = 4;
const DEVICE: u64 = 8;

impl PageTableFormat for Format {
    const ROOT_LEVEL: u8 = 2;
    const MAX_LEAF_LEVEL: u8 = 1;
    const INDEX_BITS: u32 = 9;

    fn leaf(_level: u8, target: LeafTarget, _flags: LeafFlags, block: LeafBlock) -> u64 {
        let device = if matches!(target, LeafTarget::Vram(_)) {
            DEVICE
        } else {
            0
        };
        let block = if block == LeafBlock::Of64K { BLOCK } else { 0 };
        target.raw() | LEAF | block | device
    }

    fn directory(table: VramAddr) -> u64 {
        table.get() | DIRECTORY
    }
}

/// Tables in a map; allocation fails after a number of them.
#[derive(Default)]
struct Store {
    tables: StdMutex<BTreeMap<u64, [u64; 512]>>,
    next: StdMutex<u64>,
    room: StdMutex<Option<usize>>,
}

impl TableStore for Store {
    fn alloc_table(&self) -> Result<VramAddr, Failed> {
        let mut tables = self.tables.lock().expect("no test panics under the lock");
        let room = *self.room.lock().expect("no test panics under the lock");
        if room.is_some_and(|room| tables.len() >= room) {
            return Err(Failed::OutOfVram);
        }
        let mut next = self.next.lock().expect("no test panics under the lock");
        *next += PAGE;
        tables.insert(*next, [0; 512]);
        Ok(VramAddr::new(*next))
    }

    fn free_table(&self, table: VramAddr) {
        let mut tables = self.tables.lock().expect("no test panics under the lock");
        assert!(tables.remove(&table.get()).is_some(), "freed twice");
    }

    fn write(&self, table: VramAddr, first: usize, entries: &[u64]) {
        let mut tables = self.tables.lock().expect("no test panics under the lock");
        let table = tables.get_mut(&table.get()).expect("a living table");
        table[first..first + entries.len()].copy_from_slice(entries);
    }
}

impl Store {
    fn count(&self) -> usize {
        self.tables
            .lock()
            .expect("no test panics under the lock")
            .len()
    }

    /// What a device would find for `at`: the entry and its level.
    fn walk(&self, root: VramAddr, at: u64) -> Option<(u64, u8)> {
        let tables = self.tables.lock().expect("no test panics under the lock");
        let (mut table, mut level) = (root.get(), Format::ROOT_LEVEL);
        loop {
            let index = usize::try_from(at >> Format::shift(level) & 511).expect("an index");
            let entry = tables.get(&table).expect("a living table")[index];
            match entry {
                entry if entry & LEAF != 0 => return Some((entry, level)),
                entry if entry & DIRECTORY != 0 => table = entry & !0xfff,
                _ => return None,
            }
            level -= 1;
        }
    }

    /// Target of the page at `at`.
    fn target(&self, root: VramAddr, at: u64) -> Option<u64> {
        let (entry, level) = self.walk(root, at)?;
        Some((entry & !0xfff) + (at & (Format::entry_bytes(level) - 1)))
    }
}

const RW: LeafFlags = LeafFlags {
    write: true,
    atomic: true,
};

fn bus(pages: u64, at: u64) -> Segment {
    let target = LeafTarget::System(BusAddr::new(at));
    Segment {
        pages: PageCount::new(pages),
        target,
        flags: RW,
    }
}

fn vram(pages: u64, at: u64) -> Segment {
    let target = LeafTarget::Vram(VramAddr::new(at));
    Segment {
        pages: PageCount::new(pages),
        target,
        flags: RW,
    }
}

fn span(at: u64, bytes: u64) -> GpuSpan {
    GpuSpan::at(GpuVa::new(at), bytes)
}

/// Plans and commits.
fn bind(
    table: &mut PageTable<Format>,
    store: &Store,
    span: GpuSpan,
    segments: &[Segment],
) -> alloc::vec::Vec<LeafSlot> {
    let plan = table
        .plan(store, span, segments)
        .expect("tables can be made");
    let done = table.commit(plan, store, &NotifierHeld::new());
    done.garbage.free(store);
    done.slots
}

#[test]
fn contiguous_pages_are_one_large_leaf_and_a_gap_makes_small_ones() {
    let store = Store::default();
    let mut table = PageTable::<Format>::new(&store).expect("room");
    let singles: alloc::vec::Vec<_> = (0..512).map(|n| bus(1, PAGE_2M + n * PAGE)).collect();
    bind(&mut table, &store, span(0, PAGE_2M), &singles);
    assert_eq!(
        store.walk(table.root(), 5 * PAGE).map(|(_, level)| level),
        Some(1)
    );
    let mut gap = singles;
    gap[100] = bus(1, 0);
    bind(&mut table, &store, span(PAGE_2M, PAGE_2M), &gap);
    let (entry, level) = store.walk(table.root(), PAGE_2M).expect("bound");
    assert_eq!(
        (level, entry & BLOCK),
        (0, BLOCK),
        "whole 64K blocks are hinted"
    );
    let (entry, _) = store
        .walk(table.root(), PAGE_2M + 100 * PAGE)
        .expect("bound");
    assert_eq!(entry & BLOCK, 0);
}

#[test]
fn neighbours_of_different_kinds_are_not_merged() {
    let store = Store::default();
    let mut table = PageTable::<Format>::new(&store).expect("room");
    let halves = [vram(256, PAGE_2M), bus(256, PAGE_2M + 256 * PAGE)];
    bind(&mut table, &store, span(0, PAGE_2M), &halves);
    let kind = |at| {
        store
            .walk(table.root(), at)
            .map(|(entry, level)| (entry & DEVICE, level))
    };
    assert_eq!(kind(0), Some((DEVICE, 0)));
    assert_eq!(kind(256 * PAGE), Some((0, 0)));
}

#[test]
fn unbind_frees_tables_upwards_and_zap_does_not() {
    let store = Store::default();
    let mut table = PageTable::<Format>::new(&store).expect("room");
    let slots = bind(&mut table, &store, span(PAGE, PAGE), &[bus(1, 0)]);
    let other = bind(&mut table, &store, span(3 * PAGE, PAGE), &[bus(1, PAGE)]);
    assert_eq!(store.count(), 3);
    zap(&slots, &store, &NotifierHeld::new());
    assert_eq!(store.target(table.root(), PAGE), None);
    assert_eq!(
        store.count(),
        3,
        "the entry's place is kept for the next binding"
    );
    let held = NotifierHeld::new();
    assert!(table.unbind(&store, &slots, &held).is_empty());
    let gone = table.unbind(&store, &other, &held);
    assert!(!gone.is_empty());
    gone.free(&store);
    assert_eq!(store.count(), 1, "only the root is left");
}

#[test]
fn larger_leaf_replaces_a_table_and_returns_it() {
    let store = Store::default();
    let mut table = PageTable::<Format>::new(&store).expect("room");
    let small = bind(&mut table, &store, span(0, PAGE_64K), &[bus(16, PAGE)]);
    zap(&small, &store, &NotifierHeld::new());
    let before = store.count();
    bind(&mut table, &store, span(0, PAGE_2M), &[vram(512, 0)]);
    assert_eq!(store.count(), before - 1);
    assert_eq!(store.walk(table.root(), 0).map(|(_, level)| level), Some(1));
    table.clear(&store);
    assert_eq!(store.count(), 0);
}

#[test]
fn a_large_leaf_goes_to_pieces_with_one_table_or_not_at_all() {
    let store = Store::default();
    let mut table = PageTable::<Format>::new(&store).expect("room");
    bind(&mut table, &store, span(0, PAGE_2M), &[vram(512, 0)]);
    let (whole, before) = (store.walk(table.root(), 0), store.count());
    let pieces: alloc::vec::Vec<_> = (0..512).map(|n| bus(1, 3 * n * PAGE)).collect();
    let allow = |tables| *store.room.lock().expect("no test panics under the lock") = Some(tables);
    allow(before);
    let refused = table.plan(&store, span(0, PAGE_2M), &pieces);
    assert_eq!(refused.map(drop), Err(Failed::OutOfVram));
    assert_eq!(
        (store.walk(table.root(), 0), store.count()),
        (whole, before)
    );
    allow(before + 1);
    let plan = table.plan(&store, span(0, PAGE_2M), &pieces);
    let plan = plan.expect("one is enough");
    assert_eq!(
        store.walk(table.root(), 0),
        whole,
        "as long as it is a plan"
    );
    let done = table.commit(plan, &store, &NotifierHeld::new());
    done.garbage.free(&store);
    for n in [0, 1, 511] {
        assert_eq!(store.target(table.root(), n * PAGE), Some(3 * n * PAGE));
    }
    assert_eq!(
        (store.count(), table.table_count()),
        (before + 1, before + 1)
    );
}

#[test]
fn failed_plan_leaves_everything_as_it_was() {
    for room in 1..6 {
        let store = Store::default();
        let mut table = PageTable::<Format>::new(&store).expect("room");
        *store.room.lock().expect("no test panics under the lock") = Some(room);
        // Crosses a border of the level above, so that it needs two tables of two levels.
        let at = (1 << 30) - PAGE;
        match table.plan(&store, span(at, 2 * PAGE), &[bus(2, 0)]) {
            Ok(plan) => {
                assert_eq!(room, 5);
                table.abort(plan, &store);
            }
            Err(failed) => assert_eq!(failed, Failed::OutOfVram),
        }
        assert_eq!(
            (store.count(), table.table_count()),
            (1, 1),
            "room for {room}"
        );
    }
}

proptest! {
    #[test]
    fn agrees_with_a_flat_map(ops in prop::collection::vec((0_u64..24, 0_usize..3, 0_u64..64, any::<bool>()), 1..60)) {
        let store = Store::default();
        let mut table = PageTable::<Format>::new(&store).expect("room");
        // Slots and target of each bound range.
        let mut bound: BTreeMap<u64, (u64, u64, alloc::vec::Vec<LeafSlot>)> = BTreeMap::new();
        for (place, size, target, add) in ops {
            let bytes = [PAGE, PAGE_64K, PAGE_2M][size];
            let at = (place * 511 * PAGE) / bytes * bytes;
            let target = target * 3 * PAGE;
            let hits = |(start, (len, ..)): (&u64, &(u64, u64, _))| *start < at + bytes && at < start + len;
            let overlapping: alloc::vec::Vec<u64> = bound.iter().filter(|b| hits((b.0, b.1))).map(|b| *b.0).collect();
            for start in overlapping {
                if let Some((_, _, slots)) = bound.remove(&start) {
                    table.unbind(&store, &slots, &NotifierHeld::new()).free(&store);
                }
            }
            if add {
                let slots = bind(&mut table, &store, span(at, bytes), &[bus(bytes / PAGE, target)]);
                bound.insert(at, (bytes, target, slots));
            }
            for page in (0..24 * 511 + 512).map(|n| n * PAGE).step_by(7 * 4096) {
                let want = bound.range(..=page).next_back()
                    .filter(|(start, (len, ..))| page < *start + len)
                    .map(|(start, (_, target, _))| target + (page - start));
                prop_assert_eq!(store.target(table.root(), page), want, "page {:#x}", page);
            }
        }
        for (_, (_, _, slots)) in bound {
            table.unbind(&store, &slots, &NotifierHeld::new()).free(&store);
        }
        prop_assert_eq!(store.count(), 1);
    }
}
