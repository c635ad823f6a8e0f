//! The operations, by name.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::torture::world::Sight;

macro_rules! operations {
    ($($(#[$doc:meta])* $id:ident = $name:literal,)*) => {
        /// One operation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Op {
            $($(#[$doc])* $id,)*
        }

        impl Op {
            /// All operations.
            pub(super) const ALL: [Self; [$(Self::$id,)*].len()] = [$(Self::$id,)*];

            /// Name, as reports show it.
            pub(super) const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* }
            }
        }
    };
}

operations! {
    /// `MADV_DONTNEED`.
    Discard = "discard",
    /// `process_madvise` with `MADV_DONTNEED`, two spans at once.
    DiscardAll = "discard_all",
    /// As discard, by a raw system call that no bracket sees.
    DiscardRaw = "discard_raw",
    /// `MADV_FREE`.
    Free = "free",
    /// `munmap`, and a fresh mapping in the hole.
    Unmap = "unmap",
    /// As unmap, by a raw system call that no bracket sees.
    UnmapRaw = "unmap_raw",
    /// `mmap` with `MAP_FIXED` over what is there.
    MapOver = "map_over",
    /// `mremap` that shrinks and grows again in place.
    Resize = "resize",
    /// `mremap` of everything to the other home.
    Move = "move",
    /// `mremap` of a part to elsewhere and back.
    MoveAway = "move_away",
    /// As above, the first with `MREMAP_DONTUNMAP`.
    MoveKeep = "move_keep",
    /// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE`.
    Guard = "guard",
    /// `mprotect` to no access and back.
    ProtectNone = "protect_none",
    /// `mprotect` to read-only and back.
    ProtectRead = "protect_read",
    /// `MADV_COLLAPSE`.
    Collapse = "collapse",
    /// `MADV_PAGEOUT`.
    PageOut = "pageout",
    /// `MADV_COLD`.
    Cold = "cold",
    /// `MADV_POPULATE_WRITE`.
    Populate = "populate",
    /// `mlock` and `munlock`.
    Lock = "lock",
    /// `mlock`, `MADV_DONTNEED_LOCKED`, `munlock`.
    DiscardLocked = "discard_locked",
    /// `MADV_HUGEPAGE` or `MADV_NOHUGEPAGE`, and the other one.
    Huge = "huge",
    /// The system reads the memory: it goes through a pipe.
    Pipe = "pipe",
    /// A block from the allocator, used and freed.
    Heap = "heap",
    /// A thread that starts, works and exits.
    Thread = "thread",
    /// `fork`; the child looks, writes and exits.
    Fork = "fork",
    /// `fork` and `exec`.
    Exec = "exec",
}

impl ValueEnum for Op {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

impl Op {
    /// When the operation is seen, where others are seen at `sight`.
    pub(super) const fn sight(self, sight: Sight) -> Sight {
        match self {
            Self::DiscardRaw | Self::UnmapRaw => Sight::After,
            _ => sight,
        }
    }

    /// Whether churners do it.
    pub(super) const fn is_churned(self) -> bool {
        !matches!(self, Self::Fork | Self::Exec)
    }

    /// Whether the operation's effect is promised where changes are seen afterwards only: rights
    /// and guards raise no event there, and a mapping of armed and unarmed pieces does not move.
    pub(super) const fn is_promised(self, sight: Sight) -> bool {
        match self {
            Self::Resize
            | Self::Move
            | Self::MoveAway
            | Self::MoveKeep
            | Self::Guard
            | Self::ProtectNone
            | Self::ProtectRead => matches!(sight, Sight::Before),
            _ => true,
        }
    }
}
