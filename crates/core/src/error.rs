//! `Stale` and `Failed` are different types: one means *try again*, the other means *report*.

use core::fmt;

use crate::addr::HostVa;

/// The world changed under an operation. Nothing is wrong; the caller's retry loop starts over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// The CPU mapping changed between reading it and using it (the sequence moved).
    CpuMappingChanged,
    /// The range was unmapped and waits for the collector.
    RangeUnmapped,
    /// The pages of a range lie in more than one place; the range has to be brought home.
    MixedPlacement,
    /// Another migration, or an address-space change, holds some of the pages.
    PagesBusy,
    /// Some pages refused to move (pinned, shared after fork): the kernel's `-EBUSY`.
    PagesRefused,
    /// The allocation is younger than its timeslice.
    Timeslice,
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuMappingChanged => "the CPU mapping changed meanwhile",
            Self::RangeUnmapped => "the range was unmapped meanwhile",
            Self::MixedPlacement => "the pages of the range lie in more than one place",
            Self::PagesBusy => "another operation holds the pages",
            Self::PagesRefused => "some pages cannot be moved",
            Self::Timeslice => "the allocation's timeslice is not over",
        })
    }
}

/// The operation cannot succeed. Each kind is one errno at the uAPI border.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// No CPU mapping at this address (`-ENOENT`).
    NoVma(HostVa),
    /// The CPU mapping forbids the access (`-EPERM`).
    Permission(HostVa),
    /// The mapping is of a kind that no device may map (`-EIO`).
    Unmappable(HostVa),
    /// The address lies outside what the address space or area covers (`-EINVAL`).
    OutOfArea(HostVa),
    /// The process is gone (`-EFAULT`).
    AddressSpaceGone,
    /// The access stopped at a page that cannot be made present (`-EFAULT`).
    BadPage(HostVa),
    /// Device memory is full and nothing can be evicted (`-ENOMEM`).
    OutOfVram,
    /// A request that can never fit into device memory (`-E2BIG`).
    TooLarge,
    /// Host memory is exhausted (`-ENOMEM`).
    OutOfMemory,
    /// A copy engine could not reach host memory (`-EIO`).
    Copy,
    /// A retry budget ran out (`-EBUSY`); the reason of the last retry is kept.
    Budget(Stale),
    /// The VM is closed (`-ENOENT`).
    Closed,
    /// The device may do no atomics here: they are the CPU's alone (`-EACCES`).
    AtomicForbidden(HostVa),
    /// Access needs device memory, which this kind of mapping cannot have (`-EACCES`).
    NotMigratable(HostVa),
    /// The operating system refused (errno).
    Os(i32),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVma(at) => write!(f, "nothing is mapped at {at}"),
            Self::Permission(at) => write!(f, "the mapping at {at} forbids the access"),
            Self::Unmappable(at) => write!(f, "the mapping at {at} cannot be shared with a device"),
            Self::OutOfArea(at) => write!(f, "{at} lies outside the mirrored area"),
            Self::AddressSpaceGone => f.write_str("the process is gone"),
            Self::BadPage(at) => write!(f, "the page at {at} cannot be made present"),
            Self::OutOfVram => f.write_str("device memory is full and nothing can be evicted"),
            Self::TooLarge => f.write_str("the request is larger than device memory"),
            Self::OutOfMemory => f.write_str("host memory is exhausted"),
            Self::Copy => f.write_str("the copy engine could not reach host memory"),
            Self::Budget(last) => write!(f, "gave up retrying: {last}"),
            Self::Closed => f.write_str("the address space is closed"),
            Self::AtomicForbidden(at) => write!(f, "atomics at {at} are the CPU's alone"),
            Self::NotMigratable(at) => {
                write!(f, "the mapping at {at} cannot move to device memory")
            }
            Self::Os(errno) => write!(f, "the operating system refused: errno {errno}"),
        }
    }
}

impl core::error::Error for Failed {}

/// An operation did not complete: either [`Stale`] or [`Failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// Try again.
    Stale(Stale),
    /// Report.
    Failed(Failed),
}

impl From<Stale> for Interrupted {
    fn from(stale: Stale) -> Self {
        Self::Stale(stale)
    }
}

impl From<Failed> for Interrupted {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale(stale) => stale.fmt(f),
            Self::Failed(failed) => failed.fmt(f),
        }
    }
}
