//! [`Timeline`]: what happened when, for the pictures of reports. A fold over events into slices of
//! time.
//!
//! Events are folded where they happen, with any lock held, so nothing is allocated then: all
//! slices are there from the start. To cover any run at a fixed size, they get wider the later
//! they are:
//!
//! ```text
//!   4096 of 100 us │ 2048 of 200 us │ 2048 of 400 us │ ... │ 2048 of 105 s │
//!   0           0.4 s            0.8 s            1.6 s                  5 days
//! ```
//!
//! So a slice is never wider than 1/2048 of the time before it, far below what a picture shows.
//! What happens after the end counts in the last slice. A timeline takes 3.2 MB.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm::event::{Event, EventSink, HomeCause};
use gpusvm::seam::env::Ns;

/// Width of the first slices, in nanoseconds.
const NARROWEST_NS: u64 = 100_000;
/// Slices of each width; twice as many of the first.
const PER_WIDTH: usize = 2048;
/// Times that slices get wider.
const DOUBLINGS: usize = 20;
/// All slices.
const SLICES: usize = PER_WIDTH * (DOUBLINGS + 2);

/// What is summed per slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// Device faults that entered service.
    Faults,
    /// Bytes that arrived in device memory.
    ToDevice,
    /// Bytes that came home because the CPU touched them.
    HomeCpuFault,
    /// Bytes that came home because device memory was short.
    HomePressure,
    /// Bytes that came home for any other reason.
    HomeOther,
    /// TLB invalidations sent.
    TlbInvalidations,
}

impl Series {
    /// How many there are.
    const COUNT: usize = 6;
}

/// One slice of time. Each number is independent of the others.
#[derive(Default)]
struct Slice {
    sums: [AtomicU64; Series::COUNT],
    /// Bytes of device memory taken and freed in the slice.
    taken: AtomicU64,
    freed: AtomicU64,
    /// Most bytes of device memory in use after one was taken in the slice.
    peak: AtomicU64,
}

/// Folds events into slices of time; see the module. Time begins with [`begin`](Self::begin), and
/// what happens before counts in the first slice.
pub struct Timeline {
    /// Start, in nanoseconds; one independent value.
    origin: AtomicU64,
    /// Bytes of device memory that hold pages.
    in_use: AtomicU64,
    slices: Box<[Slice]>,
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeline").finish_non_exhaustive()
    }
}

/// What happened in one column of a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Column {
    sums: [u64; Series::COUNT],
    /// Most bytes of device memory in use at any moment of it.
    pub resident: u64,
}

impl Column {
    /// Sum of one series.
    #[must_use]
    pub const fn get(&self, series: Series) -> u64 {
        self.sums[series as usize]
    }
}

/// Columns of equal width, from the start on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Width of each.
    pub width: Ns,
    /// The columns.
    pub columns: Vec<Column>,
}

impl Columns {
    /// When the last one ends.
    #[must_use]
    pub fn end(&self) -> Ns {
        let count = u64::try_from(self.columns.len()).unwrap_or(u64::MAX);
        Ns(self.width.0.saturating_mul(count))
    }
}

impl Timeline {
    /// An empty timeline. It is written to inside invalidations: make it in a
    /// [`RuntimeScope`](gpusvm_live::RuntimeScope).
    #[must_use]
    pub fn new() -> Self {
        Self {
            origin: AtomicU64::new(u64::MAX),
            in_use: AtomicU64::new(0),
            slices: (0..SLICES).map(|_| Slice::default()).collect(),
        }
    }

    /// Time begins at `at`.
    pub fn begin(&self, at: Ns) {
        self.origin.store(at.0, Ordering::Relaxed);
    }

    /// Bytes of device memory that hold pages now.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }

    /// End of the last slice in which anything happened.
    #[must_use]
    pub fn busy_until(&self) -> Ns {
        let busy = self.slices.iter().rposition(Slice::is_busy);
        busy.map_or(Ns(0), |last| Ns(start_of(last + 1)))
    }

    /// The time until `end`, merged into at most `most` columns: numbers are added, and of
    /// residency the greatest counts. A column is a whole number of slices, so that none is cut.
    #[must_use]
    pub fn columns(&self, end: Ns, most: u64) -> Columns {
        let last = slice_at(end.0.saturating_sub(1));
        let end = end.0.clamp(1, start_of(SLICES));
        let widest = start_of(last + 1) - start_of(last);
        let width = end.div_ceil(widest).div_ceil(most.max(1)) * widest;
        let count = start_of(last + 1).div_ceil(width);
        let mut columns = vec![Column::default(); index(count)];
        let mut level = 0_u64;
        for (n, slice) in self.slices[..=last].iter().enumerate() {
            level = slice.merge(level, &mut columns[index(start_of(n) / width)]);
        }
        Columns {
            width: Ns(width),
            columns,
        }
    }

    fn slice(&self, at: Ns) -> &Slice {
        let origin = Ns(self.origin.load(Ordering::Relaxed));
        &self.slices[slice_at(at.since(origin).0)]
    }

    fn add(&self, at: Ns, series: Series, by: u64) {
        self.slice(at).sums[series as usize].fetch_add(by, Ordering::Relaxed);
    }

    fn take(&self, at: Ns, bytes: u64) {
        let now = self.in_use.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let slice = self.slice(at);
        slice.taken.fetch_add(bytes, Ordering::Relaxed);
        slice.peak.fetch_max(now, Ordering::Relaxed);
    }

    fn free(&self, at: Ns, bytes: u64) {
        self.in_use.fetch_sub(bytes, Ordering::Relaxed);
        self.slice(at).freed.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

impl EventSink for Timeline {
    fn record(&self, at: Ns, event: &Event) {
        match *event {
            Event::FaultStart { .. } => self.add(at, Series::Faults, 1),
            Event::ToDevice {
                copied, adopted, ..
            } => self.add(at, Series::ToDevice, (copied + adopted).bytes()),
            Event::ToSystem {
                cause,
                copied,
                adopted,
                ..
            } => self.add(at, home(cause), (copied + adopted).bytes()),
            Event::TlbInvalidate { .. } => self.add(at, Series::TlbInvalidations, 1),
            Event::VramTaken { vram } => self.take(at, vram.bytes()),
            Event::VramFreed { vram } => self.free(at, vram.bytes()),
            _ => {}
        }
    }
}

const fn home(cause: HomeCause) -> Series {
    match cause {
        HomeCause::CpuFault => Series::HomeCpuFault,
        HomeCause::Pressure => Series::HomePressure,
        HomeCause::Mixed | HomeCause::SpaceChange | HomeCause::Teardown => Series::HomeOther,
    }
}

impl Slice {
    fn is_busy(&self) -> bool {
        let numbers = self.sums.iter().chain([&self.taken, &self.freed]);
        numbers.into_iter().any(|n| n.load(Ordering::Relaxed) > 0)
    }

    /// Adds the slice to `column`, with `level` bytes of device memory in use at its start; returns
    /// the level at its end.
    fn merge(&self, level: u64, column: &mut Column) -> u64 {
        for (sum, more) in column.sums.iter_mut().zip(&self.sums) {
            *sum += more.load(Ordering::Relaxed);
        }
        let peak = self.peak.load(Ordering::Relaxed);
        column.resident = column.resident.max(peak).max(level);
        // Events of one moment may lie in neighbouring slices: a level is never below zero.
        (level + self.taken.load(Ordering::Relaxed))
            .saturating_sub(self.freed.load(Ordering::Relaxed))
    }
}

/// The slice of the moment `ns` after the start.
fn slice_at(ns: u64) -> usize {
    let narrow = index(ns / NARROWEST_NS);
    if narrow < 2 * PER_WIDTH {
        return narrow;
    }
    let doublings = index(u64::from(narrow.ilog2() - PER_WIDTH.ilog2()));
    (PER_WIDTH * doublings + (narrow >> doublings)).min(SLICES - 1)
}

/// When slice `n` starts, in nanoseconds; of [`SLICES`], when the last one ends.
fn start_of(n: usize) -> u64 {
    let doublings = (n / PER_WIDTH).saturating_sub(1);
    let narrow = (n - PER_WIDTH * doublings) << doublings;
    u64::try_from(narrow).unwrap_or(u64::MAX) * NARROWEST_NS
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{HostSpan, HostVa, PageCount, VramAddr, VramSpan};
    use gpusvm::seam::mm::Access;

    const MS: u64 = 1_000_000;
    const FAULT: Event = Event::FaultStart {
        gt: 0,
        at: HostVa::new(0x1000),
        access: Access::Read,
    };

    fn begun() -> Timeline {
        let timeline = Timeline::new();
        timeline.begin(Ns(0));
        timeline
    }

    fn vram(bytes: u64) -> VramSpan {
        VramSpan::at(VramAddr::new(0), bytes)
    }

    fn home(cause: HomeCause, copied: u64, adopted: u64) -> Event {
        Event::ToSystem {
            span: HostSpan::at(HostVa::new(0x20_0000), 0x20_0000),
            cause,
            copied: PageCount::new(copied),
            adopted: PageCount::new(adopted),
            took: Ns(1),
        }
    }

    #[test]
    fn slices_are_numbered_without_gaps_and_end_after_five_days() {
        assert!((0..SLICES).all(|n| slice_at(start_of(n)) == n));
        assert!((1..=SLICES).all(|n| slice_at(start_of(n) - 1) == n - 1));
        let widths: Vec<u64> = (0..SLICES).map(|n| start_of(n + 1) - start_of(n)).collect();
        assert!(widths.is_sorted());
        assert_eq!(widths[0], NARROWEST_NS);
        assert!((2 * PER_WIDTH..SLICES).all(|n| widths[n] * 2048 <= start_of(n)));
        assert_eq!(start_of(SLICES) / MS / 86_400_000, 4);
        assert!(SLICES * size_of::<Slice>() < 3_300_000);
    }

    #[test]
    fn events_count_by_kind_and_cause_and_bytes_are_those_moved_either_way() {
        let timeline = begun();
        let to_device = Event::ToDevice {
            span: HostSpan::at(HostVa::new(0x20_0000), 0x20_0000),
            copied: PageCount::new(500),
            adopted: PageCount::new(12),
            took: Ns(1),
        };
        let events = [
            FAULT,
            FAULT,
            to_device,
            home(HomeCause::CpuFault, 1, 0),
            home(HomeCause::Pressure, 0, 2),
            home(HomeCause::Mixed, 4, 0),
            home(HomeCause::SpaceChange, 0, 8),
            home(HomeCause::Teardown, 16, 16),
            Event::TlbInvalidate { gt: 0 },
        ];
        events.iter().for_each(|e| timeline.record(Ns(5), e));
        let columns = timeline.columns(Ns(1), 1).columns;
        let expected = [2, 2 << 20, 4096, 2 * 4096, 44 * 4096, 1];
        assert_eq!(
            columns,
            [Column {
                sums: expected,
                resident: 0
            }]
        );
        assert_eq!(columns[0].get(Series::HomePressure), 2 * 4096);
    }

    #[test]
    fn time_starts_when_it_is_told_and_what_was_before_is_not_lost() {
        let timeline = Timeline::new();
        timeline.record(Ns(1000 * MS), &FAULT);
        timeline.begin(Ns(2000 * MS));
        timeline.record(Ns(1999 * MS), &FAULT);
        timeline.record(Ns(2003 * MS), &FAULT);
        let columns = timeline.columns(Ns(4 * MS), 4);
        let faults: Vec<u64> = columns
            .columns
            .iter()
            .map(|c| c.get(Series::Faults))
            .collect();
        assert_eq!((columns.width, faults), (Ns(MS), vec![2, 0, 0, 1]));
        assert_eq!(timeline.busy_until(), Ns(3 * MS + 100_000));
    }

    #[test]
    fn what_happens_after_the_end_counts_in_the_last_slice() {
        let timeline = begun();
        for at in [start_of(SLICES) - 1, start_of(SLICES), u64::MAX] {
            timeline.record(Ns(at), &FAULT);
        }
        assert_eq!(timeline.busy_until(), Ns(start_of(SLICES)));
        let columns = timeline.columns(Ns(u64::MAX), 200).columns;
        assert!(columns.len() <= 200);
        assert_eq!(columns.last().map(|c| c.get(Series::Faults)), Some(3));
    }

    #[test]
    fn merging_keeps_every_event_whatever_the_length_of_the_run() {
        for end in [
            1,
            99_999,
            100_000,
            250 * MS,
            410 * MS,
            9_390 * MS,
            7_200_000 * MS,
        ] {
            let timeline = begun();
            for n in 0..1000 {
                timeline.record(Ns(end / 1000 * n), &FAULT);
            }
            let merged = timeline.columns(Ns(end), 200);
            let count = u64::try_from(merged.columns.len()).expect("64-bit");
            assert!(count <= 200, "{end}: {count} columns");
            assert!(end < 20 * MS || count > 180, "{end}: {count} columns");
            assert!(merged.width.0 * count >= end, "{end}");
            let faults: u64 = merged.columns.iter().map(|c| c.get(Series::Faults)).sum();
            assert_eq!(faults, 1000, "{end}");
        }
    }

    #[test]
    fn residency_keeps_its_peaks_and_its_level_where_nothing_happens() {
        let timeline = begun();
        timeline.record(Ns(0), &Event::VramTaken { vram: vram(4) });
        // A peak of one microsecond, in the second millisecond.
        timeline.record(Ns(MS + 1000), &Event::VramTaken { vram: vram(100) });
        timeline.record(Ns(MS + 2000), &Event::VramFreed { vram: vram(100) });
        timeline.record(Ns(3 * MS), &Event::VramFreed { vram: vram(4) });
        let columns = timeline.columns(Ns(5 * MS), 5).columns;
        let resident: Vec<u64> = columns.iter().map(|c| c.resident).collect();
        // In its last column the memory was in use at the start.
        assert_eq!(resident, [4, 104, 4, 4, 0]);
        assert_eq!(timeline.in_use(), 0);
    }

    #[test]
    fn a_pair_with_an_absent_sink_feeds_the_one_that_is_there() {
        let sinks = (Some(std::sync::Arc::new(begun())), None::<Timeline>);
        sinks.record(Ns(0), &FAULT);
        let kept = sinks.0.map(|timeline| timeline.columns(Ns(1), 1));
        let faults = kept.map(|columns| columns.columns[0].get(Series::Faults));
        assert_eq!(faults, Some(1));
    }
}
