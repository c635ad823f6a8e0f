//! The page-table walk. Decodes what the driver encoded, with code of its own: the two readings of
//! one format check each other.

use gpusvm_abi::bus::VramStore;
use gpusvm_abi::fault::{AccessType, FaultKind};
use gpusvm_abi::pte;

/// Where a translation leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// An offset into device memory.
    Vram(u64),
    /// A bus address of host memory.
    Bus(u64),
    /// Nowhere: reads are zero, writes are dropped.
    Null,
}

/// A translation of one aligned block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// First virtual address.
    pub(crate) va: u64,
    /// log2 of the block's bytes: 12, 16, 21 or 30.
    pub(crate) shift: u32,
    pub(crate) target: Target,
    pub(crate) write: Permit,
    pub(crate) atomic: Permit,
}

/// Whether a kind of access is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Permit {
    Yes,
    No,
}

impl Permit {
    const fn of(bit: u64) -> Self {
        if bit == 0 { Self::No } else { Self::Yes }
    }
}

/// A walk found no way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoWay {
    pub(crate) kind: FaultKind,
    /// Level of the entry that stopped it.
    pub(crate) level: u8,
}

impl Leaf {
    /// Bytes of the block.
    pub(crate) const fn bytes(&self) -> u64 {
        1 << self.shift
    }

    /// Whether the leaf allows `access`.
    pub(crate) fn check(&self, access: AccessType) -> Result<(), FaultKind> {
        match access {
            AccessType::Read => Ok(()),
            AccessType::Write | AccessType::Atomic if self.write == Permit::No => {
                Err(FaultKind::WriteProtected)
            }
            AccessType::Atomic if self.atomic == Permit::No => Err(FaultKind::AtomicProtected),
            AccessType::Write | AccessType::Atomic => Ok(()),
        }
    }
}

/// Walks from the root table at `root` to the leaf for `va`. A table that lies outside of device
/// memory counts as not present: a device never reads where it has no memory.
pub(crate) fn walk(vram: &dyn VramStore, root: u64, va: u64) -> Result<Leaf, NoWay> {
    if va >> pte::VA_BITS != 0 {
        return Err(absent(pte::ROOT_LEVEL));
    }
    let mut at = (root, pte::ROOT_LEVEL);
    loop {
        match step(vram, at, va)? {
            Step::Leaf(leaf) => return Ok(leaf),
            Step::Down(table) => at = (table, at.1 - 1),
        }
    }
}

/// What a walk over a span comes by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found {
    /// A table at this offset.
    Table(u64),
    /// A page, and the leaf above it, if there is one.
    Page(u64, Option<Leaf>),
}

/// Walks from the root table at `root` to every page of `[start, end)`, which is page aligned, and
/// tells what it comes by. Each table is found once.
pub(crate) fn walk_span(
    vram: &dyn VramStore,
    root: u64,
    (start, end): (u64, u64),
    tell: &mut dyn FnMut(Found),
) {
    let end_of_space = 1 << pte::VA_BITS;
    let inside = (start, end.min(end_of_space));
    walk_table(vram, (root, pte::ROOT_LEVEL), inside, tell);
    tell_pages((start.max(end_of_space), end), None, tell);
}

fn tell_pages((start, end): (u64, u64), leaf: Option<Leaf>, tell: &mut dyn FnMut(Found)) {
    let pages = (start..end).step_by(4096);
    pages.for_each(|va| tell(Found::Page(va, leaf)));
}

fn walk_table(
    vram: &dyn VramStore,
    (table, level): (u64, u8),
    (start, end): (u64, u64),
    tell: &mut dyn FnMut(Found),
) {
    tell(Found::Table(table));
    let bytes = 1 << pte::level_shift(level);
    let mut va = start;
    while va < end {
        let behind = ((va & !(bytes - 1)) + bytes).min(end);
        match step(vram, (table, level), va) {
            Ok(Step::Down(table)) => walk_table(vram, (table, level - 1), (va, behind), tell),
            Ok(Step::Leaf(leaf)) => tell_pages((va, behind), Some(leaf), tell),
            Err(_no_way) => tell_pages((va, behind), None, tell),
        }
        va = behind;
    }
}

/// One step of a walk.
enum Step {
    Leaf(Leaf),
    /// To the table at this offset.
    Down(u64),
}

/// Reads the entry for `va` in the table at an offset, of a level.
fn step(vram: &dyn VramStore, (table, level): (u64, u8), va: u64) -> Result<Step, NoWay> {
    let index = va >> pte::level_shift(level) & (pte::ENTRIES_PER_TABLE - 1);
    let entry = read_entry(vram, table + index * 8).ok_or(absent(level))?;
    if entry & pte::PRESENT == 0 {
        return Err(absent(level));
    }
    if level == 0 || entry & pte::PAGE_SIZE != 0 {
        let leaf = leaf(vram, va, level, entry);
        return leaf.map(Step::Leaf).ok_or(absent(level));
    }
    Ok(Step::Down(entry & pte::ADDRESS_MASK))
}

const fn absent(level: u8) -> NoWay {
    NoWay {
        kind: FaultKind::NotPresent,
        level,
    }
}

fn read_entry(vram: &dyn VramStore, at: u64) -> Option<u64> {
    let inside = at.checked_add(8).is_some_and(|end| end <= vram.size());
    inside.then(|| vram.word(at))
}

/// Decodes a leaf entry; `None` for one that leads outside of device memory, or at a level that
/// has no leaves.
fn leaf(vram: &dyn VramStore, va: u64, level: u8, entry: u64) -> Option<Leaf> {
    let block = level == 0 && entry & pte::PS64 != 0;
    let shift = match (level, block) {
        (0, true) => 16,
        (0..=2, _) => pte::level_shift(level),
        _ => return None,
    };
    // The entry holds the address of its own page; the block starts where its first page does.
    let address = entry & pte::ADDRESS_MASK & !((1 << shift) - 1);
    let target = if entry & pte::NULL != 0 {
        Target::Null
    } else if entry & pte::DEVICE_MEMORY != 0 {
        let end = address.checked_add(1 << shift)?;
        (end <= vram.size()).then_some(Target::Vram(address))?
    } else {
        Target::Bus(address)
    };
    Some(Leaf {
        va: va & !((1 << shift) - 1),
        shift,
        target,
        write: Permit::of(entry & pte::WRITABLE),
        atomic: Permit::of(entry & pte::ATOMIC_ENABLE),
    })
}
