//! The device's memory as a place for pages: free stretches, by their offset.

use alloc::collections::BTreeMap;

use gpusvm::addr::{PAGE, PAGE_2M, PageCount, VramAddr, VramSpan};

/// Free stretches of device memory: offset and end of each.
#[derive(Debug)]
pub(crate) struct Free(BTreeMap<u64, u64>);

impl Free {
    /// All of `bytes` bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        Self(BTreeMap::from([(0, bytes)]))
    }

    /// Takes a stretch of so many pages, the lowest there is; one of 2 MiB is aligned to its size.
    pub(crate) fn take(&mut self, pages: PageCount) -> Option<VramSpan> {
        let bytes = pages.bytes();
        let align = if bytes == PAGE_2M { PAGE_2M } else { PAGE };
        let fits = |(start, end): (&u64, &u64)| {
            let at = start.next_multiple_of(align);
            (at + bytes <= *end).then_some((*start, *end, at))
        };
        let (start, end, at) = self.0.iter().find_map(fits)?;
        self.0.remove(&start);
        self.put_back(start, at);
        self.put_back(at + bytes, end);
        Some(VramSpan::at(VramAddr::new(at), bytes))
    }

    /// Gives a stretch back.
    pub(crate) fn give(&mut self, span: VramSpan) {
        let (mut start, mut end) = (span.start().get(), span.end().get());
        if let Some((&before, &until)) = self.0.range(..start).next_back()
            && until == start
        {
            self.0.remove(&before);
            start = before;
        }
        if let Some(until) = self.0.remove(&end) {
            end = until;
        }
        self.put_back(start, end);
    }

    fn put_back(&mut self, start: u64, end: u64) {
        if start < end {
            self.0.insert(start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_taken_from_below_and_join_again() {
        let mut free = Free::new(2 * PAGE_2M);
        let small = free.take(PageCount::new(1)).expect("room");
        let large = free.take(PageCount::new(512)).expect("room");
        assert_eq!(small.start(), VramAddr::new(0));
        assert_eq!(large.start(), VramAddr::new(PAGE_2M));
        assert_eq!(free.take(PageCount::new(512)), None, "only 511 are left");
        free.give(small);
        free.give(large);
        assert_eq!(free.0, BTreeMap::from([(0, 2 * PAGE_2M)]));
    }
}
