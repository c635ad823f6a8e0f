//! Small sets of flags.

/// Defines a set of flags over an integer.
macro_rules! flags {
    ($(#[$doc:meta])* $name:ident: $repr:ty {
        $($(#[$flag_doc:meta])* $flag:ident = $value:expr;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($repr);

        impl $name {
            /// The empty set.
            pub const NONE: Self = Self(0);
            $($(#[$flag_doc])* pub const $flag: Self = Self($value);)*

            /// Whether all of `other` is in the set.
            #[must_use]
            pub const fn has(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether some of `other` is in the set.
            #[must_use]
            pub const fn any(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// The set with `other` added.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The set with `other` taken out.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// What both have.
            #[must_use]
            pub const fn common(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }
    };
}

flags! {
    /// State bits of a page-table entry.
    Bits: u8 {
        /// Stores need no fault.
        WRITE = 1;
        /// A store happened since the entry was made.
        DIRTY = 2;
        /// An access happened.
        YOUNG = 4;
        /// Changed since soft-dirty bits were cleared.
        SOFT_DIRTY = 8;
        /// Write-protected by userfaultfd.
        UFFD_WP = 16;
        /// In entries that are not present: the page belongs to this mapping alone.
        EXCLUSIVE = 32;
    }
}

flags! {
    /// Flags of a mapping.
    VmFlags: u32 {
        /// Loads are allowed.
        READ = 1;
        /// Stores are allowed.
        WRITE = 1 << 1;
        /// Instructions may be fetched.
        EXEC = 1 << 2;
        /// Stores go to what others see.
        SHARED = 1 << 3;
        /// `mprotect` may allow loads.
        MAY_READ = 1 << 4;
        /// `mprotect` may allow stores.
        MAY_WRITE = 1 << 5;
        /// `mprotect` may allow fetches.
        MAY_EXEC = 1 << 6;
        /// Pages stay in memory.
        LOCKED = 1 << 7;
        /// Pages stay in memory from their first touch on.
        LOCK_ON_FAULT = 1 << 8;
        /// A child does not get the mapping.
        DONT_COPY = 1 << 9;
        /// A child finds the mapping empty.
        WIPE_ON_FORK = 1 << 10;
        /// Large pages wanted.
        HUGE = 1 << 11;
        /// Large pages not wanted.
        NO_HUGE = 1 << 12;
        /// Identical pages may be merged.
        MERGEABLE = 1 << 13;
        /// New since soft-dirty bits were cleared.
        SOFT_DIRTY = 1 << 14;
        /// Device memory or other raw pages.
        PFN_MAP = 1 << 15;
        /// Must not grow by `mremap`.
        DONT_EXPAND = 1 << 16;
        /// Left out of core dumps.
        DONT_DUMP = 1 << 17;
        /// Read in sequence.
        SEQUENTIAL = 1 << 18;
        /// Read at random.
        RANDOM = 1 << 19;
        /// Pages of a huge page file.
        HUGETLB = 1 << 20;
        /// Its memory is accounted for: it is private and may be or was written.
        ACCOUNT = 1 << 21;
        /// The program serves faults of missing pages (userfaultfd).
        UFFD_MISSING = 1 << 22;
        /// There are guards in it, or were.
        MAYBE_GUARD = 1 << 23;
        /// The program serves stores to pages that it protects (userfaultfd).
        UFFD_WP = 1 << 24;
    }
}

impl VmFlags {
    /// The three rights.
    pub const RIGHTS: Self = Self::READ.with(Self::WRITE).with(Self::EXEC);
    /// The three rights that `mprotect` may give.
    pub const MAY: Self = Self::MAY_READ.with(Self::MAY_WRITE).with(Self::MAY_EXEC);
    /// What the program serves. Neither a child nor a mapping that moves has it: their program would have
    /// to ask for events of these.
    pub const UFFD: Self = Self::UFFD_MISSING.with(Self::UFFD_WP);
    /// The two kinds of locking.
    pub const LOCKS: Self = Self::LOCKED.with(Self::LOCK_ON_FAULT);
    /// Flags that two mappings need not share to become one.
    pub const MERGE_IGNORES: Self = Self::SOFT_DIRTY.with(Self::MAYBE_GUARD);
}

/// Rights as `mmap` and `mprotect` take them.
pub type Prot = VmFlags;
