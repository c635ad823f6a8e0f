//! Bits of a page-table entry, Xe layout (`svm-design.md` section 5.8.1).
//!
//! A table holds 512 entries of 8 bytes. Level 0 maps 4 KiB, level 1 maps 2 MiB, level 2 maps
//! 1 GiB per entry; levels 3 (and 4 with 57-bit addresses) hold directory entries only.

/// Entries in one table.
pub const ENTRIES_PER_TABLE: u64 = 512;
/// Bytes of one table: 512 entries of 8 bytes.
pub const TABLE_BYTES: u64 = 4096;
/// Level of the root table with 48-bit addresses.
pub const ROOT_LEVEL: u8 = 3;
/// Bits of a virtual address that the tables translate.
pub const VA_BITS: u32 = 48;

/// The entry is valid (all levels).
pub const PRESENT: u64 = 1 << 0;
/// Writes are allowed (all levels).
pub const WRITABLE: u64 = 1 << 1;
/// Bit 0 of the page-attribute index.
pub const PAT0: u64 = 1 << 3;
/// Bit 1 of the page-attribute index.
pub const PAT1: u64 = 1 << 4;
/// Level 1 and 2: the entry is a leaf of 2 MiB or 1 GiB. At level 0 this bit is [`PAT2_LEVEL0`].
pub const PAGE_SIZE: u64 = 1 << 7;
/// Bit 2 of the page-attribute index in a level-0 entry.
pub const PAT2_LEVEL0: u64 = 1 << 7;
/// Level 0: this entry is part of an aligned, contiguous 64 KiB block (set on all 16 entries).
pub const PS64: u64 = 1 << 8;
/// Leaf: reads return zero, writes are dropped.
pub const NULL: u64 = 1 << 9;
/// Leaf: device atomics are allowed.
pub const ATOMIC_ENABLE: u64 = 1 << 10;
/// Leaf: the address is an offset into device memory, not a bus address.
pub const DEVICE_MEMORY: u64 = 1 << 11;
/// Bit 2 of the page-attribute index in a leaf above level 0.
pub const PAT2_LARGE: u64 = 1 << 12;
/// Bits 51:12 hold the address of a 4 KiB leaf or of the next table.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Lowest virtual-address bit that level `level` translates: 12, 21, 30, 39, 48.
#[must_use]
pub const fn level_shift(level: u8) -> u32 {
    12 + 9 * level as u32
}

const _: () = assert!(ENTRIES_PER_TABLE * 8 == TABLE_BYTES);
const _: () = assert!(level_shift(ROOT_LEVEL) + 9 == VA_BITS);
