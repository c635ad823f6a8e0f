//! Address newtypes and half-open spans. Every conversion between address spaces is a named
//! function in this file.

use core::fmt;
use core::ops::Range;

/// Bytes of the smallest page.
pub const PAGE: u64 = 4 << 10;
/// Bytes of the middle page size, 64 KiB.
pub const PAGE_64K: u64 = 64 << 10;
/// Bytes of the huge page size, 2 MiB.
pub const PAGE_2M: u64 = 2 << 20;

/// What all address types can do; sealed by being useful only to [`Span`].
pub trait Address: Copy + Ord + fmt::Debug {
    /// The address as a plain integer.
    fn raw(self) -> u64;
    /// The address with this value.
    fn from_raw(raw: u64) -> Self;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The address with this value.
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The address as a plain integer.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on; saturates at the end of the address space.
            #[must_use]
            pub const fn plus(self, bytes: u64) -> Self {
                Self(self.0.saturating_add(bytes))
            }

            /// Bytes from `origin` to here; zero where `origin` lies behind.
            #[must_use]
            pub const fn offset_from(self, origin: Self) -> u64 {
                self.0.saturating_sub(origin.0)
            }

            /// Rounds down to a multiple of `align`, a power of two.
            #[must_use]
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }

            /// Whether the address is a multiple of `align`, a power of two.
            #[must_use]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
        }

        impl Address for $name {
            fn raw(self) -> u64 {
                self.0
            }
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A virtual address of the host process.
    HostVa
}
address! {
    /// A virtual address of a device address space.
    GpuVa
}
address! {
    /// An offset into the memory of one device.
    VramAddr
}
address! {
    /// An address by which a device reaches host memory.
    BusAddr
}

impl GpuVa {
    /// The device address of `at` inside a CPU-address mirror, where both are equal.
    #[must_use]
    pub const fn mirror(at: HostVa) -> Self {
        Self(at.0)
    }
}

impl HostVa {
    /// The host address of `at` inside a CPU-address mirror, where both are equal.
    #[must_use]
    pub const fn mirrored_by(at: GpuVa) -> Self {
        Self(at.0)
    }
}

/// A number of 4 KiB pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageCount(u64);

impl PageCount {
    /// No pages.
    pub const ZERO: Self = Self(0);

    /// This many pages.
    #[must_use]
    pub const fn new(pages: u64) -> Self {
        Self(pages)
    }

    /// Pages that `bytes` fill, rounded up.
    #[must_use]
    pub const fn of_bytes(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE))
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Bytes in this many pages.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE
    }
}

impl core::ops::Add for PageCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl core::iter::Sum for PageCount {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, |a, b| a + b)
    }
}

/// A half-open span `[start, end)` of one address space. Never inverted; may be empty.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span<A> {
    start: A,
    end: A,
}

/// A span of host virtual addresses.
pub type HostSpan = Span<HostVa>;
/// A span of device virtual addresses.
pub type GpuSpan = Span<GpuVa>;
/// A span of device memory.
pub type VramSpan = Span<VramAddr>;

impl<A: Address> Span<A> {
    /// The span from `start` to `end`; empty at `start` where `end` lies before it.
    #[must_use]
    pub fn new(start: A, end: A) -> Self {
        Self {
            start,
            end: end.max(start),
        }
    }

    /// The span of `bytes` bytes at `start`, clipped at the end of the address space.
    #[must_use]
    pub fn at(start: A, bytes: u64) -> Self {
        Self {
            start,
            end: A::from_raw(start.raw().saturating_add(bytes)),
        }
    }

    /// The aligned block of `size` bytes (a power of two) around `at`, or `None` where it would
    /// reach past the address space.
    #[must_use]
    pub fn aligned_around(at: A, size: u64) -> Option<Self> {
        let start = at.raw() & !(size - 1);
        let end = start.checked_add(size)?;
        Some(Self {
            start: A::from_raw(start),
            end: A::from_raw(end),
        })
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> A {
        self.start
    }

    /// First address behind.
    #[must_use]
    pub const fn end(self) -> A {
        self.end
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.end.raw() - self.start.raw()
    }

    /// Whole 4 KiB pages, rounded up.
    #[must_use]
    pub fn pages(self) -> PageCount {
        PageCount::of_bytes(self.bytes())
    }

    /// Whether no address lies inside.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Whether `at` lies inside.
    #[must_use]
    pub fn contains(self, at: A) -> bool {
        self.start <= at && at < self.end
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The shared part; `None` where there is none.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let both = Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        };
        (both.start < both.end).then_some(both)
    }

    /// The smallest span around both.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }

    /// The smallest span of whole blocks of `align` bytes (a power of two) around this one.
    #[must_use]
    pub fn align_outward(self, align: u64) -> Self {
        let start = self.start.raw() & !(align - 1);
        let end = self
            .end
            .raw()
            .checked_next_multiple_of(align)
            .unwrap_or(!(align - 1));
        Self {
            start: A::from_raw(start),
            end: A::from_raw(end),
        }
    }

    /// The addresses as plain integers.
    #[must_use]
    pub fn raw(self) -> Range<u64> {
        self.start.raw()..self.end.raw()
    }
}

impl GpuSpan {
    /// The device addresses of `span` inside a CPU-address mirror, where both are equal.
    #[must_use]
    pub const fn mirror(span: HostSpan) -> Self {
        Self {
            start: GpuVa::mirror(span.start),
            end: GpuVa::mirror(span.end),
        }
    }
}

impl<A: Address> fmt::Debug for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.raw(), self.end.raw())
    }
}

impl<A: Address> fmt::Display for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use core::borrow::Borrow;
    use core::ops::{Add, Deref, Sub};

    use static_assertions::{assert_not_impl_any, assert_type_ne_all};

    use super::*;

    /// No way from one kind to another, or to a comparison with it, but the named functions above.
    macro_rules! apart {
        ($($one:ident $other:ident,)*) => {$(
            assert_not_impl_any!(
                $one: From<$other>, Into<$other>, PartialEq<$other>, PartialOrd<$other>,
                AsRef<$other>, Borrow<$other>, Add<$other>, Sub<$other>
            );
            assert_not_impl_any!(
                Span<$one>: From<Span<$other>>, PartialEq<Span<$other>>, From<Range<$other>>
            );
        )*};
    }

    /// Nor to a plain number.
    macro_rules! no_numbers {
        ($($one:ident)*) => {$(
            assert_not_impl_any!(
                $one: From<u64>, Into<u64>, PartialEq<u64>, From<usize>, Into<usize>, Deref,
                Add<u64>, Sub<u64>, Sub<$one>
            );
        )*};
    }

    #[test]
    fn kinds_of_addresses_do_not_mix() {
        apart! {
            HostVa GpuVa, HostVa VramAddr, HostVa BusAddr,
            GpuVa HostVa, GpuVa VramAddr, GpuVa BusAddr,
            VramAddr HostVa, VramAddr GpuVa, VramAddr BusAddr,
            BusAddr HostVa, BusAddr GpuVa, BusAddr VramAddr,
        }
        no_numbers!(HostVa GpuVa VramAddr BusAddr PageCount);
        assert_not_impl_any!(PageCount: From<HostVa>, From<GpuVa>, From<VramAddr>, From<BusAddr>);
        assert_type_ne_all!(HostVa, GpuVa, VramAddr, BusAddr, PageCount, u64);
        assert_type_ne_all!(HostSpan, GpuSpan, VramSpan);
        // The two ways that there are keep the number.
        let at = HostVa::new(0x7000);
        assert_eq!(HostVa::mirrored_by(GpuVa::mirror(at)), at);
    }
}
