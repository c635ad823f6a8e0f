//! Entries of CPU page tables. Every kind is a variant, and no match over them has a catch-all arm.

use crate::mm::flags::Bits;
use crate::mm::memory::FrameId;

/// A slot of the swap device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// One entry for one small page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Nothing.
    #[default]
    None,
    /// A page in host memory.
    Present(FrameId, Bits),
    /// The page of zeros that nobody owns.
    Zero(Bits),
    /// Swapped out.
    Swap(SlotId, Bits),
    /// Being moved; whoever touches it waits.
    Migration(FrameId, Bits),
    /// A page in device memory.
    DevicePrivate(FrameId, Bits),
    /// A page in host memory that only a device may use for now.
    DeviceExclusive(FrameId, Bits),
    /// The page had a memory error.
    HwPoison(FrameId),
    /// An access is an error; survives `MADV_DONTNEED`.
    Guard,
    /// Nothing, but write-protected by userfaultfd.
    UffdWp,
}

impl Entry {
    /// The frame whose mapping count this entry is part of.
    #[must_use]
    pub const fn mapped_frame(self) -> Option<FrameId> {
        match self {
            Self::Present(frame, _)
            | Self::DevicePrivate(frame, _)
            | Self::DeviceExclusive(frame, _) => Some(frame),
            Self::None
            | Self::Zero(_)
            | Self::Swap(..)
            | Self::Migration(..)
            | Self::HwPoison(_)
            | Self::Guard
            | Self::UffdWp => None,
        }
    }

    /// The frame that the entry names, mapped or not.
    #[must_use]
    pub const fn named_frame(self) -> Option<FrameId> {
        match self {
            Self::Migration(frame, _) | Self::HwPoison(frame) => Some(frame),
            Self::Present(..)
            | Self::DevicePrivate(..)
            | Self::DeviceExclusive(..)
            | Self::None
            | Self::Zero(_)
            | Self::Swap(..)
            | Self::Guard
            | Self::UffdWp => self.mapped_frame(),
        }
    }

    /// The swap slot that the entry names.
    #[must_use]
    pub const fn slot(self) -> Option<SlotId> {
        match self {
            Self::Swap(slot, _) => Some(slot),
            Self::None
            | Self::Present(..)
            | Self::Zero(_)
            | Self::Migration(..)
            | Self::DevicePrivate(..)
            | Self::DeviceExclusive(..)
            | Self::HwPoison(_)
            | Self::Guard
            | Self::UffdWp => None,
        }
    }

    /// State bits; none where the kind has none.
    #[must_use]
    pub const fn bits(self) -> Bits {
        match self {
            Self::Present(_, bits)
            | Self::Zero(bits)
            | Self::Swap(_, bits)
            | Self::Migration(_, bits)
            | Self::DevicePrivate(_, bits)
            | Self::DeviceExclusive(_, bits) => bits,
            Self::UffdWp => Bits::UFFD_WP,
            Self::None | Self::HwPoison(_) | Self::Guard => Bits::NONE,
        }
    }

    /// The same entry with other state bits.
    #[must_use]
    pub const fn with_bits(self, bits: Bits) -> Self {
        match self {
            Self::Present(frame, _) => Self::Present(frame, bits),
            Self::Zero(_) => Self::Zero(bits),
            Self::Swap(slot, _) => Self::Swap(slot, bits),
            Self::Migration(frame, _) => Self::Migration(frame, bits),
            Self::DevicePrivate(frame, _) => Self::DevicePrivate(frame, bits),
            Self::DeviceExclusive(frame, _) => Self::DeviceExclusive(frame, bits),
            Self::None | Self::HwPoison(_) | Self::Guard | Self::UffdWp => self,
        }
    }
}

/// One entry of the level above, for a block of small pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Block {
    /// See the small entries.
    #[default]
    Table,
    /// All pages of a large folio.
    Huge(FrameId, Bits),
    /// All pages of a large folio in private device memory.
    Device(FrameId, Bits),
    /// The large page of zeros.
    Zero(Bits),
}
