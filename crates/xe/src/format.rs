//! The Xe page-table format: encoding only. The device decodes with code of its own.

use gpusvm::addr::VramAddr;
use gpusvm::seam::table::{LeafBlock, LeafFlags, LeafTarget, PageTableFormat};
use gpusvm_abi::pte;

/// Four levels, leaves of 4 KiB, 2 MiB and 1 GiB (`svm-design.md` section 5.8.1).
#[derive(Clone, Copy, Debug)]
pub struct XeFormat;

impl PageTableFormat for XeFormat {
    const ROOT_LEVEL: u8 = pte::ROOT_LEVEL;
    const MAX_LEAF_LEVEL: u8 = 2;
    const INDEX_BITS: u32 = 9;

    fn leaf(level: u8, target: LeafTarget, flags: LeafFlags, block: LeafBlock) -> u64 {
        let mut entry = pte::PRESENT | (target.raw() & pte::ADDRESS_MASK);
        if flags.write {
            entry |= pte::WRITABLE;
        }
        if flags.atomic {
            entry |= pte::ATOMIC_ENABLE;
        }
        if matches!(target, LeafTarget::Vram(_)) {
            entry |= pte::DEVICE_MEMORY;
        }
        match (level, block) {
            (0, LeafBlock::Of64K) => entry | pte::PS64,
            (0, LeafBlock::Single) => entry,
            (_, _) => entry | pte::PAGE_SIZE,
        }
    }

    fn directory(table: VramAddr) -> u64 {
        pte::PRESENT | pte::WRITABLE | (table.get() & pte::ADDRESS_MASK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::BusAddr;

    const RW: LeafFlags = LeafFlags {
        write: true,
        atomic: false,
    };

    #[test]
    fn placement_decides_the_device_memory_bit() {
        let vram = XeFormat::leaf(
            1,
            LeafTarget::Vram(VramAddr::new(0x20_0000)),
            RW,
            LeafBlock::Single,
        );
        let bus = XeFormat::leaf(
            1,
            LeafTarget::System(BusAddr::new(0x20_0000)),
            RW,
            LeafBlock::Single,
        );
        assert_eq!(vram ^ bus, pte::DEVICE_MEMORY);
        assert_eq!(vram & pte::ADDRESS_MASK, 0x20_0000);
        assert_ne!(vram & pte::PAGE_SIZE, 0);
    }

    #[test]
    fn small_leaves_never_carry_the_page_size_bit() {
        let target = LeafTarget::System(BusAddr::new(0x1000));
        let ro = LeafFlags {
            write: false,
            atomic: false,
        };
        let single = XeFormat::leaf(0, target, ro, LeafBlock::Single);
        let block = XeFormat::leaf(0, target, ro, LeafBlock::Of64K);
        assert_eq!(single, pte::PRESENT | 0x1000);
        assert_eq!(block, single | pte::PS64);
    }
}
