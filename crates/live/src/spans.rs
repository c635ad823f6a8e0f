//! A set of addresses, kept as disjoint spans that merge when they touch.

use std::collections::BTreeMap;

use gpusvm::addr::{HostSpan, HostVa};

/// The set.
#[derive(Debug, Default)]
pub(crate) struct SpanSet {
    spans: BTreeMap<HostVa, HostVa>,
}

impl SpanSet {
    /// Adds all of `span`.
    pub(crate) fn insert(&mut self, span: HostSpan) {
        if span.is_empty() {
            return;
        }
        let mut joined = span;
        while let Some(other) = self.touching(joined) {
            self.spans.remove(&other.start());
            joined = joined.join(other);
        }
        self.spans.insert(joined.start(), joined.end());
    }

    /// Takes all of `span` out.
    pub(crate) fn remove(&mut self, span: HostSpan) {
        if span.is_empty() {
            return;
        }
        while let Some(other) = self.first_overlap(span) {
            self.spans.remove(&other.start());
            let head = HostSpan::new(other.start(), span.start().min(other.end()));
            let tail = HostSpan::new(span.end().max(other.start()), other.end());
            for rest in [head, tail] {
                if !rest.is_empty() {
                    self.spans.insert(rest.start(), rest.end());
                }
            }
        }
    }

    /// Takes the first stretch of `bytes` out that starts at a multiple of `align`.
    pub(crate) fn take_first(&mut self, bytes: u64, align: u64) -> Option<HostSpan> {
        let fits = |(start, end): (&HostVa, &HostVa)| {
            let first = start.get().checked_next_multiple_of(align)?;
            let last = first.checked_add(bytes)?;
            (last <= end.get()).then(|| HostSpan::at(HostVa::new(first), bytes))
        };
        let found = self.spans.iter().find_map(fits)?;
        self.remove(found);
        Some(found)
    }

    /// Whether all of `span` is in the set.
    pub(crate) fn covers(&self, span: HostSpan) -> bool {
        self.overlapping(span)
            .next()
            .is_some_and(|other| other.covers(span))
    }

    /// Whether some of `span` is in the set.
    pub(crate) fn overlaps(&self, span: HostSpan) -> bool {
        self.first_overlap(span).is_some()
    }

    /// The parts of `span` in the set, in order, clipped to it.
    pub(crate) fn within(&self, span: HostSpan) -> Vec<HostSpan> {
        self.overlapping(span)
            .filter_map(|other| other.intersect(span))
            .collect()
    }

    /// The parts of `span` that are not in the set, in order.
    pub(crate) fn without(&self, span: HostSpan) -> Vec<HostSpan> {
        let mut at = span.start();
        let mut gaps = Vec::new();
        for part in self.within(span) {
            gaps.push(HostSpan::new(at, part.start()));
            at = part.end();
        }
        gaps.push(HostSpan::new(at, span.end()));
        gaps.retain(|gap| !gap.is_empty());
        gaps
    }

    /// The whole spans that overlap `span`.
    pub(crate) fn overlapping_whole(&self, span: HostSpan) -> impl Iterator<Item = HostSpan> {
        self.overlapping(span)
    }

    /// The hull of the whole set.
    pub(crate) fn hull(&self) -> Option<HostSpan> {
        let (start, _) = self.spans.first_key_value()?;
        let (_, end) = self.spans.last_key_value()?;
        Some(HostSpan::new(*start, *end))
    }

    /// Spans that overlap `span`, unclipped, in order.
    fn overlapping(&self, span: HostSpan) -> impl Iterator<Item = HostSpan> {
        let first = self
            .spans
            .range(..=span.start())
            .next_back()
            .map_or(span.start(), |s| *s.0);
        self.spans
            .range(first..span.end().max(first))
            .map(|(start, end)| HostSpan::new(*start, *end))
            .filter(move |other| other.overlaps(span))
    }

    fn first_overlap(&self, span: HostSpan) -> Option<HostSpan> {
        self.overlapping(span).next()
    }

    fn touching(&self, span: HostSpan) -> Option<HostSpan> {
        let (start, end) = self.spans.range(..=span.end()).next_back()?;
        (*end >= span.start()).then(|| HostSpan::new(*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, end: u64) -> HostSpan {
        HostSpan::new(HostVa::new(start), HostVa::new(end))
    }

    #[test]
    fn touching_spans_merge_and_removal_splits() {
        let mut set = SpanSet::default();
        set.insert(span(10, 20));
        set.insert(span(30, 40));
        set.insert(span(20, 30));
        assert_eq!(set.within(span(0, 100)), [span(10, 40)]);
        set.remove(span(15, 18));
        assert_eq!(set.within(span(12, 100)), [span(12, 15), span(18, 40)]);
        let gaps = [span(0, 10), span(15, 18), span(40, 50)];
        assert_eq!(set.without(span(0, 50)), gaps);
        assert_eq!(set.without(span(20, 40)), []);
        assert!(set.covers(span(18, 40)) && !set.covers(span(14, 19)));
        set.remove(span(0, 100));
        assert_eq!(set.hull(), None);
    }

    #[test]
    fn first_stretch_that_fits_is_taken() {
        let mut set = SpanSet::default();
        set.insert(span(10, 20));
        set.insert(span(30, 90));
        assert_eq!(set.take_first(8, 1), Some(span(10, 18)));
        assert_eq!(set.take_first(8, 16), Some(span(32, 40)));
        assert_eq!(set.take_first(60, 1), None);
        assert_eq!(
            set.within(span(0, 100)),
            [span(18, 20), span(30, 32), span(40, 90)]
        );
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_a_bitmap(ops: Vec<(bool, u8, u8)>) {
            let mut set = SpanSet::default();
            let mut bits = [false; 300];
            for (add, start, len) in ops {
                let (start, end) = (usize::from(start), usize::from(start) + usize::from(len % 40));
                let s = span(start as u64, end as u64);
                if add { set.insert(s) } else { set.remove(s) }
                bits[start..end].fill(add);
            }
            for (i, bit) in (0..).zip(bits) {
                assert_eq!(set.covers(span(i, i + 1)), bit, "{i}");
            }
            let parts = set.within(span(0, 300));
            assert!(parts.windows(2).all(|w| w[0].end() < w[1].start()), "{parts:?}");
        }
    }
}
