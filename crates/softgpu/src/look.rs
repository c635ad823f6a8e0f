//! What the page tables say, for whoever checks them: no unit is asked, and no TLB.

use lock_api::RawMutex;

use crate::device::SoftGpu;
use crate::mmu::{self, Permit, Target};

/// Where an entry of the page tables leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// Device memory.
    Vram {
        /// Offset of the page.
        offset: u64,
        /// Stores are allowed.
        write: bool,
        /// Atomics are allowed.
        atomic: bool,
        /// Bytes of the block that one entry maps, or 16 entries together.
        block: u64,
    },
    /// Host memory.
    Bus {
        /// Bus address of the page.
        address: u64,
        /// Stores are allowed.
        write: bool,
        /// Atomics are allowed.
        atomic: bool,
        /// As above.
        block: u64,
    },
}

/// What a walk comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walked {
    /// A page table, by its offset in device memory.
    Table(u64),
    /// A page, by its virtual address, and where it leads.
    Page(u64, Option<Translation>),
}

impl Translation {
    /// Where a leaf leads at `va`.
    fn of(leaf: &mmu::Leaf, va: u64) -> Option<Self> {
        let inside = (va - leaf.va) & !0xFFF;
        let write = leaf.write == Permit::Yes;
        let atomic = leaf.atomic == Permit::Yes;
        match leaf.target {
            Target::Vram(at) => Some(Self::Vram {
                offset: at + inside,
                write,
                atomic,
                block: leaf.bytes(),
            }),
            Target::Bus(at) => Some(Self::Bus {
                address: at + inside,
                write,
                atomic,
                block: leaf.bytes(),
            }),
            Target::Null => None,
        }
    }
}

impl<R: RawMutex> SoftGpu<R> {
    /// Where the page tables lead at `va`.
    #[must_use]
    pub fn translation(&self, asid: u32, va: u64) -> Option<Translation> {
        let leaf = mmu::walk(&*self.vram, self.root(asid)?, va).ok()?;
        Translation::of(&leaf, va)
    }

    /// What a walk over every page of `[start, end)`, which is page aligned, comes by, in order.
    pub fn walk(&self, asid: u32, span: (u64, u64), mut tell: impl FnMut(Walked)) {
        let Some(root) = self.root(asid) else { return };
        mmu::walk_span(&*self.vram, root, span, &mut |found| match found {
            mmu::Found::Table(table) => tell(Walked::Table(table)),
            mmu::Found::Page(va, leaf) => {
                let leads = leaf.and_then(|leaf| Translation::of(&leaf, va));
                tell(Walked::Page(va, leads));
            }
        });
    }
}
