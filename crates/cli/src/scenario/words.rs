//! The words that name things in scenarios, each in one place.

use gpusvm::seam::env::Point;
use gpusvm_xe::vm::Rights as Mirror;

use crate::atomics::Atomics;

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $id:ident = $word:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$of])* $id,)* }

        impl Word for $name {
            const KIND: &'static str = stringify!($name);
            const ALL: &'static [(&'static str, Self)] = &[$(($word, Self::$id),)*];
        }
    )*};
}

/// Something that has a closed list of names.
pub(crate) trait Word: Copy + 'static {
    /// What it is.
    const KIND: &'static str;
    /// All names.
    const ALL: &'static [(&'static str, Self)];

    /// What a name means.
    ///
    /// # Errors
    /// The names that there are.
    fn of(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(name, _)| *name).collect();
            let kind = Self::KIND.to_lowercase();
            format!("`{text}` is no {kind}: there are {}", names.join(", "))
        })
    }
}

words! {
    /// Rights of a mapping of the process.
    Rights {
        None = "none",
        Read = "read",
        Write = "write",
    }

    /// What backs a mapping.
    Backing {
        /// Private anonymous memory.
        Private = "private",
        /// Anonymous memory shared with children.
        Shared = "shared",
        /// A file, shared.
        File = "file",
        /// A file, private.
        PrivateFile = "private-file",
        /// Raw pages, as of a device.
        Io = "io",
    }

    /// Whether large pages are wanted.
    Huge {
        Yes = "huge",
        No = "small",
    }

    /// What `madvise` is told.
    Advice {
        Discard = "dontneed",
        Free = "free",
        Huge = "hugepage",
        Small = "nohugepage",
        Collapse = "collapse",
        Guard = "guard-install",
        Unguard = "guard-remove",
        Cold = "cold",
        PageOut = "pageout",
        Populate = "populate-write",
    }

    /// What is done to pages or mappings beside the calls that change them.
    Deed {
        /// `mlock`.
        Lock = "lock",
        /// `munlock`.
        Unlock = "unlock",
        /// A long-term pin of every page.
        Pin = "pin",
        /// The pins end.
        Unpin = "unpin",
        /// Every page is swapped out.
        Swap = "swap-out",
        /// Every page is given to a device alone, for atomics on host memory.
        Exclusive = "make-exclusive",
        /// A memory error in every page.
        Poison = "poison",
    }

    /// Where GPU page-table entries lead, or what they allow.
    Entries {
        None = "none",
        Valid = "valid",
        Read = "read",
        Write = "write",
        /// They allow atomics.
        Atomic = "atomic",
        /// They allow stores, and no atomics.
        Plain = "plain",
    }

    /// How a number is compared.
    Compare {
        Equal = "=",
        AtLeast = ">=",
        AtMost = "<=",
    }

    /// When dead ranges are collected.
    Collector {
        /// By the worker, soon.
        Runs = "runs",
        /// By faults alone.
        Held = "held",
    }

    /// What becomes of a device's answers to TLB invalidations.
    Answers {
        Arrive = "arrive",
        Lost = "lost",
    }

    /// What may become of an object in device memory.
    Object {
        Evictable = "evictable",
        Pinned = "pinned",
    }
}

impl Word for Atomics {
    const KIND: &'static str = "policy";
    const ALL: &'static [(&'static str, Self)] = &[
        ("system", Self::System),
        ("device", Self::Device),
        ("exclusive", Self::Exclusive),
        ("cpu", Self::Cpu),
    ];
}

impl Word for Mirror {
    const KIND: &'static str = "right";
    const ALL: &'static [(&'static str, Self)] =
        &[("read", Self::ReadOnly), ("write", Self::ReadWrite)];
}

impl Word for Point {
    const KIND: &'static str = "point";
    const ALL: &'static [(&'static str, Self)] = &[
        ("after-walk", Self::AfterFaultIn),
        ("before-commit", Self::BeforeCommit),
        ("after-collect", Self::AfterCollect),
        ("before-finalize", Self::BeforeFinalize),
    ];
}
