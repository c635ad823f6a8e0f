//! Page tables: the pure format, the store that holds entries, the invalidation of TLBs.

use crate::addr::{BusAddr, GpuSpan, VramAddr};
use crate::error::Interrupted;

/// Where a leaf points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafTarget {
    /// Memory of this device.
    Vram(VramAddr),
    /// Host memory.
    System(BusAddr),
}

impl LeafTarget {
    /// The target `bytes` further on.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        match self {
            Self::Vram(at) => Self::Vram(at.plus(bytes)),
            Self::System(at) => Self::System(at.plus(bytes)),
        }
    }

    /// The plain address, for alignment questions.
    #[must_use]
    pub fn raw(self) -> u64 {
        match self {
            Self::Vram(at) => at.get(),
            Self::System(at) => at.get(),
        }
    }
}

/// Rights and attributes of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafFlags {
    /// The device may write.
    pub write: bool,
    /// The device may use atomics.
    pub atomic: bool,
}

/// Whether a level-0 leaf belongs to a larger block that a TLB may cache as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafBlock {
    /// The leaf stands alone.
    Single,
    /// The leaf is one of the 16 entries of an aligned, contiguous 64 KiB block, and all 16 are
    /// being written.
    Of64K,
}

/// Layout of one page-table format: constants and pure functions, no state.
pub trait PageTableFormat: Send + Sync + 'static {
    /// Level of the root table; leaves of 4 KiB are at level 0.
    const ROOT_LEVEL: u8;
    /// Highest level that may hold leaves.
    const MAX_LEAF_LEVEL: u8;
    /// Index bits per level; a table has `1 << INDEX_BITS` entries of 8 bytes.
    const INDEX_BITS: u32;

    /// Lowest address bit that `level` translates.
    #[must_use]
    fn shift(level: u8) -> u32 {
        12 + Self::INDEX_BITS * u32::from(level)
    }

    /// Bytes that one entry of `level` maps.
    #[must_use]
    fn entry_bytes(level: u8) -> u64 {
        1 << Self::shift(level)
    }

    /// Entry for a leaf.
    fn leaf(level: u8, target: LeafTarget, flags: LeafFlags, block: LeafBlock) -> u64;

    /// Entry that points to the next lower table.
    fn directory(table: VramAddr) -> u64;
}

/// Holds the tables of one device.
pub trait TableStore: Send + Sync {
    /// Allocates a zeroed table. May sleep and evict; called with `vm` held only.
    ///
    /// # Errors
    /// [`Failed::OutOfVram`](crate::error::Failed::OutOfVram), or `Stale` where what could go is in use.
    fn alloc_table(&self) -> Result<VramAddr, Interrupted>;

    /// Frees a table. Called with `vm` held only, after the TLBs were invalidated.
    fn free_table(&self, table: VramAddr);

    /// Writes `entries` from index `first` on. Called with the notifier lock held: must not
    /// allocate, sleep or call back.
    fn write(&self, table: VramAddr, first: usize, entries: &[u64]);
}

/// Invalidation of the TLBs that cache one address space.
pub trait TlbInvalidate: Send + Sync {
    /// Invalidates `span` in all TLBs and waits until no access uses an older translation. Called
    /// with the notifier lock held: must not allocate or call back; may wait for device units,
    /// which hold nothing while they access memory. A unit that does not answer in time is
    /// reported by the implementation as an event; the call returns all the same.
    fn invalidate(&self, span: GpuSpan);
}
