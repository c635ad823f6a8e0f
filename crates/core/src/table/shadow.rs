//! The shadow: which tables exist, and which of their entries are taken.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::marker::PhantomData;

use crate::NotifierHeld;
use crate::addr::{GpuSpan, GpuVa, VramAddr};
use crate::error::Interrupted;
use crate::seam::table::{LeafFlags, LeafTarget, PageTableFormat, TableStore};
use crate::table::plan::{LeafSlot, LeafWrite, Link, Segment, TablePlan, zap};

/// The tables of one address space, as the CPU knows them.
///
/// ```
/// # use gpusvm::addr::*;
/// # use gpusvm::error::Interrupted;
/// # use gpusvm::seam::table::*;
/// # use gpusvm::table::{PageTable, Segment};
/// # struct F;
/// # impl PageTableFormat for F {
/// #     const ROOT_LEVEL: u8 = 2;
/// #     const MAX_LEAF_LEVEL: u8 = 1;
/// #     const INDEX_BITS: u32 = 9;
/// #     fn leaf(_: u8, t: LeafTarget, _: LeafFlags, _: LeafBlock) -> u64 { t.raw() | 1 }
/// #     fn directory(t: VramAddr) -> u64 { t.get() | 3 }
/// # }
/// # struct Tables(std::sync::Mutex<u64>);
/// # impl TableStore for Tables {
/// #     fn alloc_table(&self) -> Result<VramAddr, Interrupted> {
/// #         let mut next = self.0.lock().unwrap();
/// #         *next += 4096;
/// #         Ok(VramAddr::new(*next))
/// #     }
/// #     fn free_table(&self, _: VramAddr) {}
/// #     fn write(&self, _: VramAddr, _: usize, _: &[u64]) {}
/// # }
/// # let store = Tables(std::sync::Mutex::new(0));
/// let mut table = PageTable::<F>::new(&store)?;
/// let span = GpuSpan::at(GpuVa::new(4 << 20), 2 << 20);
/// let segment = Segment {
///     pages: PageCount::new(512),
///     target: LeafTarget::Vram(VramAddr::new(6 << 20)),
///     flags: LeafFlags { write: true, atomic: false },
/// };
/// // Nothing is visible to the device yet; `commit` needs the notifier lock, `abort` does not.
/// let plan = table.plan(&store, span, &[segment])?;
/// table.abort(plan, &store);
/// # Ok::<(), Interrupted>(())
/// ```
#[derive(Debug)]
pub struct PageTable<F: PageTableFormat> {
    root: Node,
    format: PhantomData<F>,
}

#[derive(Debug)]
struct Node {
    table: VramAddr,
    level: u8,
    /// One bit per entry that is a leaf, valid or zapped, or leads to a table.
    taken: [u64; 8],
    children: BTreeMap<u16, Box<Self>>,
}

impl Node {
    const fn new(table: VramAddr, level: u8) -> Self {
        Self {
            table,
            level,
            taken: [0; 8],
            children: BTreeMap::new(),
        }
    }

    const fn set(&mut self, index: u16) {
        self.taken[(index / 64) as usize] |= 1 << (index % 64);
    }

    const fn clear(&mut self, index: u16) {
        self.taken[(index / 64) as usize] &= !(1 << (index % 64));
    }

    fn is_empty(&self) -> bool {
        self.taken == [0; 8]
    }

    /// All tables from here down, lowest last.
    fn collect_into(&self, out: &mut Vec<VramAddr>) {
        out.push(self.table);
        self.children
            .values()
            .for_each(|child| child.collect_into(out));
    }

    fn count(&self) -> usize {
        1 + self
            .children
            .values()
            .map(|child| child.count())
            .sum::<usize>()
    }
}

/// What a commit made.
#[derive(Debug)]
pub struct Committed {
    /// Where the leaves stand.
    pub slots: Vec<LeafSlot>,
    /// Tables that larger leaves replaced.
    pub garbage: DetachedTables,
}

/// Tables that no entry leads to any more. A walk that has begun may still read them: flush the
/// TLBs before [`free`](Self::free).
#[derive(Debug, Default)]
#[must_use = "detached tables must be freed after a flush"]
pub struct DetachedTables(Vec<VramAddr>);

impl DetachedTables {
    /// Whether there is nothing to flush and free.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Frees the tables.
    pub fn free(self, store: &dyn TableStore) {
        self.0.into_iter().for_each(|table| store.free_table(table));
    }
}

/// A walk over segments, in address order.
struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind.
    done: u64,
}

impl Cursor<'_> {
    fn skip_empty(&mut self) {
        while let [first, rest @ ..] = self.segments
            && first.pages.bytes() == self.done
        {
            self.segments = rest;
            self.done = 0;
        }
    }

    /// Takes `bytes` bytes with one contiguous target, or nothing where the segments do not
    /// continue that far or the target is not aligned to the leaf.
    fn take(&mut self, bytes: u64) -> Option<(LeafTarget, LeafFlags)> {
        self.skip_empty();
        let first = *self.segments.first()?;
        let target = first.target.plus(self.done);
        if !target.raw().is_multiple_of(bytes) || self.reach(target, &first, bytes) < bytes {
            return None;
        }
        self.done += bytes;
        while let [first, rest @ ..] = self.segments
            && self.done > first.pages.bytes()
        {
            self.done -= first.pages.bytes();
            self.segments = rest;
        }
        Some((target, first.flags))
    }

    /// Bytes from here on, up to `most`, whose targets and flags continue those of `first`.
    fn reach(&self, target: LeafTarget, first: &Segment, most: u64) -> u64 {
        let mut bytes = first.pages.bytes() - self.done;
        for next in &self.segments[1..] {
            if bytes >= most || next.target != target.plus(bytes) || next.flags != first.flags {
                break;
            }
            bytes += next.pages.bytes();
        }
        bytes
    }
}

impl<F: PageTableFormat> PageTable<F> {
    /// An empty root table.
    ///
    /// # Errors
    /// As [`TableStore::alloc_table`].
    pub fn new(store: &dyn TableStore) -> Result<Self, Interrupted> {
        let root = Node::new(store.alloc_table()?, F::ROOT_LEVEL);
        Ok(Self {
            root,
            format: PhantomData,
        })
    }

    /// Where the root table is.
    #[must_use]
    pub const fn root(&self) -> VramAddr {
        self.root.table
    }

    /// Number of tables.
    #[must_use]
    pub fn table_count(&self) -> usize {
        self.root.count()
    }

    /// Plans entries for `span`. `segments` are dense and cover it exactly. Allocates missing
    /// tables; the device sees nothing yet.
    ///
    /// # Errors
    /// As [`TableStore::alloc_table`]; then everything is as before.
    ///
    /// # Panics
    /// Where the segments do not cover the span exactly.
    #[expect(
        clippy::panic_in_result_fn,
        reason = "a caller's bug, not a condition to handle"
    )]
    pub fn plan(
        &mut self,
        store: &dyn TableStore,
        span: GpuSpan,
        segments: &[Segment],
    ) -> Result<TablePlan, Interrupted> {
        let covered: u64 = segments.iter().map(|segment| segment.pages.bytes()).sum();
        assert_eq!(covered, span.bytes(), "segments must cover {span} exactly");
        let mut plan = TablePlan::default();
        let mut cursor = Cursor { segments, done: 0 };
        match plan_node::<F>(&mut self.root, store, span, &mut cursor, &mut plan) {
            Ok(()) => {
                let replaced = plan.replaced.iter();
                let room = replaced
                    .map(|(level, at)| self.child_count(*level, *at))
                    .sum();
                plan.garbage.reserve_exact(room);
                Ok(plan)
            }
            Err(interrupted) => {
                self.abort(plan, store);
                Err(interrupted)
            }
        }
    }

    /// Writes the planned entries. Does not allocate and cannot fail.
    pub fn commit(
        &mut self,
        plan: TablePlan,
        store: &dyn TableStore,
        _held: &NotifierHeld<'_>,
    ) -> Committed {
        let TablePlan {
            leaves,
            links,
            replaced,
            slots,
            mut garbage,
        } = plan;
        for leaf in &leaves {
            leaf.write::<F>(store);
        }
        for link in &links {
            let index = index_of::<F>(link.level, link.at);
            store.write(link.parent, usize::from(index), &[F::directory(link.table)]);
        }
        for slot in &slots {
            if let Some(node) = self.node(slot.level, slot.at) {
                (slot.first..slot.first + slot.count).for_each(|index| node.set(index));
            }
        }
        for link in &links {
            if let Some(node) = self.node(link.level, link.at) {
                node.set(index_of::<F>(link.level, link.at));
            }
        }
        for (level, at) in replaced {
            let index = index_of::<F>(level, at);
            if let Some(child) = self.node(level, at).and_then(|n| n.children.remove(&index)) {
                child.collect_into(&mut garbage);
            }
        }
        Committed {
            slots,
            garbage: DetachedTables(garbage),
        }
    }

    /// Undoes a plan: its tables are freed.
    pub fn abort(&mut self, plan: TablePlan, store: &dyn TableStore) {
        // From the leaves up, as they were listed: a table is empty when it goes.
        for link in plan.links {
            let index = index_of::<F>(link.level, link.at);
            if let Some(parent) = self.node(link.level, link.at) {
                parent.children.remove(&index);
            }
            store.free_table(link.table);
        }
    }

    /// Clears entries for good, and detaches tables that have none left, up to the root, which
    /// stays.
    pub fn unbind(
        &mut self,
        store: &dyn TableStore,
        slots: &[LeafSlot],
        held: &NotifierHeld<'_>,
    ) -> DetachedTables {
        zap(slots, store, held);
        let mut detached = DetachedTables::default();
        for slot in slots {
            let Some(node) = self.node(slot.level, slot.at) else {
                continue;
            };
            (slot.first..slot.first + slot.count).for_each(|index| node.clear(index));
            self.detach_empty(slot, store, &mut detached);
        }
        detached
    }

    /// Frees every table, also the root. The address space must be out of use.
    pub fn clear(&mut self, store: &dyn TableStore) {
        let mut all = Vec::new();
        self.root.collect_into(&mut all);
        self.root = Node::new(self.root.table, F::ROOT_LEVEL);
        all.into_iter().for_each(|table| store.free_table(table));
    }

    fn detach_empty(
        &mut self,
        slot: &LeafSlot,
        store: &dyn TableStore,
        detached: &mut DetachedTables,
    ) {
        for level in slot.level..F::ROOT_LEVEL {
            if !self
                .node(level, slot.at)
                .is_some_and(|node| node.is_empty())
            {
                return;
            }
            let Some(parent) = self.node(level + 1, slot.at) else {
                return;
            };
            let index = index_of::<F>(level + 1, slot.at);
            store.write(parent.table, usize::from(index), &[0]);
            parent.clear(index);
            if let Some(child) = parent.children.remove(&index) {
                detached.0.push(child.table);
            }
        }
    }

    /// The table of `level` on the way to `at`.
    fn node(&mut self, level: u8, at: GpuVa) -> Option<&mut Node> {
        let mut node = &mut self.root;
        while node.level > level {
            let index = index_of::<F>(node.level, at);
            node = node.children.get_mut(&index)?;
        }
        Some(node)
    }

    fn child_count(&mut self, level: u8, at: GpuVa) -> usize {
        let index = index_of::<F>(level, at);
        let child = self
            .node(level, at)
            .and_then(|node| node.children.get(&index));
        child.map_or(0, |child| child.count())
    }
}

/// Index of the entry for `at` in its table of `level`.
fn index_of<F: PageTableFormat>(level: u8, at: GpuVa) -> u16 {
    let index = at.get() >> F::shift(level) & ((1 << F::INDEX_BITS) - 1);
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// Plans the part of `span` under `node`: a leaf where an entry is covered by one aligned piece of
/// target, else one level down.
fn plan_node<F: PageTableFormat>(
    node: &mut Node,
    store: &dyn TableStore,
    span: GpuSpan,
    cursor: &mut Cursor<'_>,
    plan: &mut TablePlan,
) -> Result<(), Interrupted> {
    let level = node.level;
    let bytes = F::entry_bytes(level);
    let mut at = span.start();
    while at < span.end() {
        let entry = GpuSpan::at(at.align_down(bytes), bytes);
        let part = entry.intersect(span).unwrap_or(entry);
        let index = index_of::<F>(level, at);
        let leaf = (level <= F::MAX_LEAF_LEVEL && part == entry)
            .then(|| cursor.take(bytes))
            .flatten();
        if let Some((target, flags)) = leaf {
            let slot = LeafSlot {
                table: node.table,
                at,
                first: index,
                count: 1,
                level,
            };
            plan.push::<F>(LeafWrite::new(slot, target, flags));
            if node.children.contains_key(&index) {
                plan.replaced.push((level, at));
            }
        } else {
            plan_child::<F>(node, store, part, cursor, plan)?;
        }
        at = part.end();
    }
    Ok(())
}

/// As [`plan_node`], in the child that covers `part`; makes it where it is missing.
fn plan_child<F: PageTableFormat>(
    node: &mut Node,
    store: &dyn TableStore,
    part: GpuSpan,
    cursor: &mut Cursor<'_>,
    plan: &mut TablePlan,
) -> Result<(), Interrupted> {
    let index = index_of::<F>(node.level, part.start());
    if let Some(child) = node.children.get_mut(&index) {
        return plan_node::<F>(child, store, part, cursor, plan);
    }
    let table = store.alloc_table()?;
    let link = Link {
        parent: node.table,
        level: node.level,
        at: part.start(),
        table,
    };
    let fresh = Box::new(Node::new(table, node.level - 1));
    let child = node.children.entry(index).or_insert(fresh);
    let planned = plan_node::<F>(child, store, part, cursor, plan);
    // Listed behind the tables below it, and also when those failed: abort takes it back.
    plan.links.push(link);
    planned
}
