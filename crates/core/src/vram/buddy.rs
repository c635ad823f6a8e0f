//! The buddy allocator: which parts of device memory are free (`svm-design.md` section 5.11.3).
//!
//! ```text
//!  order 2  [        16K         ]        a request of 12K takes one order-2 block
//!  order 1  [   8K    ][   8K    ]        and gives the last 4K back
//!  order 0  [4K ][4K ][4K ][4K ]
//! ```
//!
//! Blocks are contiguous and aligned to their power-of-two size; what a request does not need is
//! returned at once. A size that is no power of two is several roots.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{PAGE, VramAddr, VramSpan};

/// From which end a block is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// The tightest block, at the lowest address.
    Bottom,
    /// The highest address: for long-lived small blocks, away from ranges.
    Top,
}

/// Free blocks of one device memory.
///
/// ```
/// use gpusvm::vram::{Buddy, From};
///
/// let mut buddy = Buddy::new(16 << 20);
/// let range = buddy.alloc(2 << 20, From::Bottom).unwrap();
/// let table = buddy.alloc(4 << 10, From::Top).unwrap();
/// assert_eq!(table.end().get(), 16 << 20);
/// buddy.free(range);
/// buddy.free(table);
/// assert_eq!(buddy.largest_free(), 16 << 20);
/// ```
#[derive(Clone)]
pub struct Buddy {
    size: u64,
    free_bytes: u64,
    /// Start addresses of free blocks, by order.
    free: Vec<BTreeSet<u64>>,
}

impl fmt::Debug for Buddy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buddy({} of {} bytes free)", self.free_bytes, self.size)
    }
}

/// The free blocks per order, for reports.
impl fmt::Display for Buddy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (order, blocks) in self.free.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            writeln!(f, "{:>10} KiB x {}", (PAGE << order) / 1024, blocks.len())?;
        }
        Ok(())
    }
}

impl Buddy {
    /// All of `size` bytes free; what does not fill a page is left out.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let size = size / PAGE * PAGE;
        let orders = order_of(size.next_power_of_two().max(PAGE)) + 1;
        let mut buddy = Self {
            size,
            free_bytes: 0,
            free: alloc::vec![BTreeSet::new(); orders],
        };
        buddy.put(0, size);
        buddy
    }

    /// Bytes managed.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Bytes free.
    #[must_use]
    pub const fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Bytes of the largest free block.
    #[must_use]
    pub fn largest_free(&self) -> u64 {
        self.free
            .iter()
            .rposition(|blocks| !blocks.is_empty())
            .map_or(0, |order| PAGE << order)
    }

    /// Takes `bytes` bytes, rounded up to pages, contiguous and aligned to the next power of two.
    /// `None` where no free block is large enough, or for zero bytes.
    pub fn alloc(&mut self, bytes: u64, from: From) -> Option<VramSpan> {
        let bytes = bytes
            .checked_next_multiple_of(PAGE)
            .filter(|bytes| *bytes > 0)?;
        let wanted = order_of(bytes.checked_next_power_of_two()?);
        let (order, start) = match from {
            From::Bottom => self.lowest_of_tightest(wanted)?,
            From::Top => self.highest(wanted)?,
        };
        self.free[order].remove(&start);
        let whole = PAGE << order;
        self.free_bytes -= whole;
        let at = match from {
            From::Bottom => start,
            From::Top => start + whole - (PAGE << wanted),
        };
        self.put(start, at);
        self.put(at + bytes, start + whole);
        Some(VramSpan::at(VramAddr::new(at), bytes))
    }

    /// Gives a span back; it may be any part of what was allocated.
    ///
    /// # Panics
    /// On a span that is no allocated one: outside, unaligned, or partly free.
    pub fn free(&mut self, span: VramSpan) {
        let raw = span.raw();
        assert!(raw.end <= self.size, "{span} lies outside of device memory");
        assert!(
            raw.start.is_multiple_of(PAGE) && raw.end.is_multiple_of(PAGE),
            "{span} is not page aligned"
        );
        self.put(raw.start, raw.end);
    }

    /// Takes what is free of `span`; returns the pieces.
    pub(super) fn claim(&mut self, span: VramSpan) -> Vec<VramSpan> {
        let raw = span.raw();
        let mut claimed = Vec::new();
        for order in 0..self.free.len() {
            let bytes = PAGE << order;
            let overlapping = self.free[order].range(..raw.end);
            let overlapping = overlapping
                .rev()
                .take_while(|start| *start + bytes > raw.start);
            for start in overlapping.copied().collect::<Vec<_>>() {
                self.free[order].remove(&start);
                self.free_bytes -= bytes;
                claimed.push((start.max(raw.start), (start + bytes).min(raw.end)));
                self.put(start, raw.start.max(start));
                self.put(raw.end.min(start + bytes), start + bytes);
            }
        }
        let at = |(start, end)| VramSpan::new(VramAddr::new(start), VramAddr::new(end));
        claimed.into_iter().map(at).collect()
    }

    fn lowest_of_tightest(&self, wanted: usize) -> Option<(usize, u64)> {
        let orders = self.free.iter().enumerate().skip(wanted);
        orders
            .filter_map(|(order, blocks)| Some((order, *blocks.first()?)))
            .next()
    }

    fn highest(&self, wanted: usize) -> Option<(usize, u64)> {
        let orders = self.free.iter().enumerate().skip(wanted);
        orders
            .filter_map(|(order, blocks)| Some((order, *blocks.last()?)))
            .max_by_key(|(order, start)| start + (PAGE << order))
    }

    /// Frees `[start, end)` as the largest aligned blocks, merging each with its buddy.
    fn put(&mut self, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            let fit = order_of(prev_power_of_two(end - at));
            let aligned = if at == 0 {
                fit
            } else {
                fit.min(order_of(1 << at.trailing_zeros()))
            };
            self.put_block(at, aligned.min(self.free.len() - 1));
            at += PAGE << aligned.min(self.free.len() - 1);
        }
    }

    fn put_block(&mut self, start: u64, order: usize) {
        assert!(
            !self.overlaps_free(start, PAGE << order),
            "block at {start:#x} freed twice"
        );
        self.free_bytes += PAGE << order;
        let (mut start, mut order) = (start, order);
        while order + 1 < self.free.len() && self.free[order].remove(&(start ^ (PAGE << order))) {
            start &= !(PAGE << order);
            order += 1;
        }
        self.free[order].insert(start);
    }

    fn overlaps_free(&self, start: u64, bytes: u64) -> bool {
        self.free.iter().enumerate().any(|(order, blocks)| {
            let last = blocks.range(..start + bytes).next_back();
            last.is_some_and(|block| block + (PAGE << order) > start)
        })
    }
}

/// Order of a power-of-two number of bytes: 4 KiB is order 0.
fn order_of(bytes: u64) -> usize {
    usize::try_from(bytes.trailing_zeros().saturating_sub(PAGE.trailing_zeros())).unwrap_or(0)
}

/// Largest power of two that is not above `n`, which is not zero.
fn prev_power_of_two(n: u64) -> u64 {
    1 << (63 - n.leading_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    const M: u64 = 1 << 20;

    #[test]
    fn odd_sizes_are_several_roots_and_all_of_them_usable() {
        let mut buddy = Buddy::new(7 * M + 4096);
        assert_eq!(buddy.free_bytes(), 7 * M + 4096);
        assert_eq!(buddy.largest_free(), 4 * M);
        let mut got = 0;
        while buddy.alloc(4096, From::Bottom).is_some() {
            got += 1;
        }
        assert_eq!(got, (7 * M + 4096) / 4096);
    }

    #[test]
    fn what_a_request_does_not_need_is_returned() {
        let mut buddy = Buddy::new(8 * M);
        let span = buddy.alloc(3 * M, From::Bottom);
        assert_eq!(span.map(|s| (s.start().get(), s.bytes())), Some((0, 3 * M)));
        assert_eq!(buddy.free_bytes(), 5 * M);
        assert!(buddy.alloc(8 * M, From::Bottom).is_none());
        assert!(buddy.alloc(0, From::Bottom).is_none());
        assert!(buddy.alloc(u64::MAX, From::Top).is_none());
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn double_free_is_noticed() {
        let mut buddy = Buddy::new(M);
        let span = buddy
            .alloc(8192, From::Top)
            .expect("an empty buddy has room");
        buddy.free(span);
        buddy.free(span);
    }

    proptest! {
        #[test]
        fn agrees_with_a_bitmap(pages in 1_u64..300, ops in prop::collection::vec((any::<bool>(), 1_u64..40, any::<bool>()), 1..120)) {
            let mut buddy = Buddy::new(pages * PAGE);
            let mut used = alloc::vec![false; usize::try_from(pages).unwrap()];
            let mut live: Vec<VramSpan> = Vec::new();
            for (take, n, top) in ops {
                if take || live.is_empty() {
                    let from = if top { From::Top } else { From::Bottom };
                    let Some(span) = buddy.alloc(n * PAGE, from) else { continue };
                    prop_assert_eq!(span.bytes(), n * PAGE);
                    prop_assert!(span.start().is_aligned((n * PAGE).next_power_of_two()));
                    for page in span.start().get() / PAGE..span.end().get() / PAGE {
                        prop_assert!(!core::mem::replace(&mut used[usize::try_from(page).unwrap()], true));
                    }
                    live.push(span);
                } else {
                    let span = live.swap_remove(usize::try_from(n).unwrap() % live.len());
                    buddy.free(span);
                    for page in span.start().get() / PAGE..span.end().get() / PAGE {
                        used[usize::try_from(page).unwrap()] = false;
                    }
                }
                let free = used.iter().filter(|u| !**u).count();
                prop_assert_eq!(buddy.free_bytes(), u64::try_from(free).unwrap() * PAGE);
            }
            live.into_iter().for_each(|span| buddy.free(span));
            prop_assert_eq!(buddy.to_string_free(), Buddy::new(pages * PAGE).to_string_free());
        }
    }

    impl Buddy {
        fn to_string_free(&self) -> alloc::string::String {
            alloc::format!("{self}")
        }
    }
}
