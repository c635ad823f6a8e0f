//! What a CPU actor does, by name.

macro_rules! operations {
    ($($(#[$doc:meta])* $id:ident = $name:literal,)*) => {
        /// One operation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Op {
            $($(#[$doc])* $id,)*
        }

        impl Op {
            /// All operations.
            pub(super) const ALL: &[Self] = &[$(Self::$id,)*];

            /// Name, as reports show it.
            pub(super) const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* }
            }
        }
    };
}

operations! {
    /// A load.
    Load = "load",
    /// A store of the next version.
    Store = "store",
    /// Pages are moved to a device.
    Send = "send",
    /// A device lets go of everything.
    Evict = "evict",
    /// A page is swapped out.
    SwapOut = "swap_out",
    /// `MADV_DONTNEED`.
    Discard = "discard",
    /// `munmap`, and a fresh mapping in the hole.
    Unmap = "unmap",
    /// `mremap` to elsewhere and back.
    Move = "move",
    /// `mprotect` to read-only and back.
    ProtectRead = "protect_read",
    /// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE`.
    Guard = "guard",
    /// `MADV_HUGEPAGE` and `MADV_COLLAPSE`.
    Collapse = "collapse",
    /// `fork`; the child looks, writes and exits.
    Fork = "fork",
    /// A page is pinned for a moment.
    Pin = "pin",
    /// A page is made exclusive to a device, until a CPU touches it.
    Exclusive = "exclusive",
    /// `MADV_HWPOISON`, and `MADV_DONTNEED` to get a page that is well.
    Poison = "poison",
    /// Pages are protected against stores by userfaultfd, until the program is done with them.
    WriteProtect = "write_protect",
    /// `MADV_FREE`: content may go until it is stored to again. Not [everywhere](Self::EVERYWHERE).
    FreeLazily = "free_lazily",
    /// One is added to the counter that a page has in some worlds. Not [everywhere](Self::EVERYWHERE).
    Add = "add",
}

impl Op {
    /// What all worlds can do: all but the last two.
    pub(super) const EVERYWHERE: &[Self] = match Self::ALL {
        [others @ .., _, _] => others,
        _ => &[],
    };

    /// Whether it changes pages that nobody else changes meanwhile.
    pub(super) const fn is_alone(self) -> bool {
        match self {
            Self::Discard
            | Self::Unmap
            | Self::Move
            | Self::ProtectRead
            | Self::Guard
            | Self::Poison
            | Self::WriteProtect
            | Self::FreeLazily => true,
            Self::Load
            | Self::Store
            | Self::Send
            | Self::Evict
            | Self::SwapOut
            | Self::Collapse
            | Self::Fork
            | Self::Pin
            | Self::Exclusive
            | Self::Add => false,
        }
    }
}
