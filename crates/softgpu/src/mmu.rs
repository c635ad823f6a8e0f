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
            // Device memory is always the device's to update.
            AccessType::Atomic
                if self.atomic == Permit::No && matches!(self.target, Target::Bus(_)) =>
            {
                Err(FaultKind::AtomicProtected)
            }
            AccessType::Write | AccessType::Atomic => Ok(()),
        }
    }
}

/// Walks from the root table at `root` to the leaf for `va`. A table that lies outside of device
/// memory counts as not present: a device never reads where it has no memory.
pub(crate) fn walk(vram: &dyn VramStore, root: u64, va: u64) -> Result<Leaf, NoWay> {
    let absent = |level| NoWay {
        kind: FaultKind::NotPresent,
        level,
    };
    let mut table = root;
    let mut level = pte::ROOT_LEVEL;
    if va >> pte::VA_BITS != 0 {
        return Err(absent(level));
    }
    loop {
        let index = va >> pte::level_shift(level) & (pte::ENTRIES_PER_TABLE - 1);
        let entry = read_entry(vram, table + index * 8).ok_or(absent(level))?;
        if entry & pte::PRESENT == 0 {
            return Err(absent(level));
        }
        let is_leaf = level == 0 || entry & pte::PAGE_SIZE != 0;
        if is_leaf {
            return leaf(vram, va, level, entry).ok_or(absent(level));
        }
        table = entry & pte::ADDRESS_MASK;
        level -= 1;
    }
}

fn read_entry(vram: &dyn VramStore, at: u64) -> Option<u64> {
    let inside = at.checked_add(8).is_some_and(|end| end <= vram.size());
    inside.then(|| {
        let mut word = [0; 8];
        vram.read(at, &mut word);
        u64::from_ne_bytes(word)
    })
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
