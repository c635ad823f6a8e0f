//! Which aligned piece of the address space becomes a range (`svm-design.md` section 2.5).
//!
//! Candidates are tried from the largest chunk size down. A candidate must lie inside the CPU
//! mapping, the notifier window and the device's area; above 4 KiB it must overlap no range; and up
//! to the presence threshold all of its pages must be populated, because a migration is all or
//! nothing and small allocations of several programs would otherwise end up half absent.

use crate::addr::{HostSpan, HostVa, PAGE, PAGE_2M, PAGE_64K};

/// Chunk sizes, descending; the last one always fits.
pub const CHUNKS: [u64; 3] = [PAGE_2M, PAGE_64K, PAGE];

/// What a chunk must stay inside.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The CPU mapping.
    pub vma: HostSpan,
    /// The notifier window.
    pub window: HostSpan,
    /// The device's view: its mirror area.
    pub area: HostSpan,
    /// Chunks up to this many bytes must be populated.
    pub populated_up_to: u64,
    /// Most bytes, at least a page.
    pub largest: u64,
}

/// Picks the range for a fault at `at`. `overlaps` tells whether a range exists in a span,
/// `populated` whether all pages of a span have content. `None` only where `at` itself lies outside
/// the limits.
pub fn choose(
    at: HostVa,
    limits: &Limits,
    overlaps: impl Fn(HostSpan) -> bool,
    populated: impl Fn(HostSpan) -> bool,
) -> Option<HostSpan> {
    let mut sizes = CHUNKS.into_iter().filter(|size| *size <= limits.largest);
    sizes.find_map(|size| {
        let chunk = HostSpan::aligned_around(at, size)?;
        let inside = [limits.vma, limits.window, limits.area]
            .into_iter()
            .all(|outer| outer.covers(chunk));
        let free = || size == PAGE || !overlaps(chunk);
        let present = || size == PAGE || size > limits.populated_up_to || populated(chunk);
        (inside && free() && present()).then_some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    #[derive(PartialEq)]
    enum Touched {
        All,
        Some,
    }

    fn span(start: u64, end: u64) -> HostSpan {
        HostSpan::new(HostVa::new(start), HostVa::new(end))
    }

    fn limits(vma: HostSpan) -> Limits {
        let all = span(0, 1 << 47);
        Limits {
            vma,
            window: all,
            area: all,
            populated_up_to: PAGE_64K,
            largest: PAGE_2M,
        }
    }

    fn pick(at: u64, limits: &Limits, taken: &[HostSpan], touched: Touched) -> Option<HostSpan> {
        choose(
            HostVa::new(at),
            limits,
            |c| taken.iter().any(|t| t.overlaps(c)),
            |_| touched == Touched::All,
        )
    }

    #[test]
    fn fresh_four_megabytes_give_a_huge_range_without_a_presence_check() {
        let got = pick(5 * M, &limits(span(4 * M, 8 * M)), &[], Touched::Some);
        assert_eq!(got, Some(span(4 * M, 6 * M)));
    }

    #[test]
    fn small_allocation_is_64k_only_when_fully_touched() {
        let limits = limits(span(M, M + 128 * 1024));
        assert_eq!(
            pick(M + 5, &limits, &[], Touched::All),
            Some(span(M, M + 65536))
        );
        assert_eq!(
            pick(M + 5, &limits, &[], Touched::Some),
            Some(span(M, M + 4096))
        );
    }

    #[test]
    fn existing_small_range_forbids_a_larger_one_over_it() {
        let taken = [span(4 * M, 4 * M + 4096)];
        let limits = limits(span(0, 64 * M));
        assert_eq!(
            pick(4 * M + 8192, &limits, &taken, Touched::All),
            Some(span(4 * M + 8192, 4 * M + 12288))
        );
        assert_eq!(
            pick(5 * M, &limits, &taken, Touched::All),
            Some(span(5 * M, 5 * M + 65536))
        );
    }

    #[test]
    fn last_page_of_a_ragged_mapping_is_a_small_range() {
        let got = pick(
            6 * M + 10,
            &limits(span(4 * M, 6 * M + 4096)),
            &[],
            Touched::All,
        );
        assert_eq!(got, Some(span(6 * M, 6 * M + 4096)));
    }

    #[test]
    fn nothing_is_larger_than_was_asked_for() {
        let one_page = Limits {
            largest: PAGE,
            ..limits(span(4 * M, 8 * M))
        };
        let got = pick(5 * M, &one_page, &[], Touched::All);
        assert_eq!(got, Some(span(5 * M, 5 * M + PAGE)));
    }

    #[test]
    fn window_and_area_bound_the_chunk() {
        let mut limits = limits(span(0, 64 * M));
        limits.window = span(4 * M, 4 * M + 65536);
        assert_eq!(pick(4 * M, &limits, &[], Touched::All), Some(limits.window));
        limits.area = span(4 * M, 4 * M + 8192);
        assert_eq!(
            pick(4 * M, &limits, &[], Touched::All),
            Some(span(4 * M, 4 * M + 4096))
        );
        limits.area = span(8 * M, 9 * M);
        assert_eq!(pick(4 * M, &limits, &[], Touched::All), None);
    }
}
