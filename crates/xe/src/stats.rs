//! Statistics: a fold over events into counters with the kernel's names (`svm-design.md` section
//! 5.14), and their text form.
//!
//! One block of counters per GT. The text form is one `name: value` line per counter; the first
//! four are those of the original statistics file.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, PAGE, PAGE_64K, PageCount};
use gpusvm::event::{Event, EventSink, FaultEnd, HomeCause};
use gpusvm::seam::env::Ns;

macro_rules! counters {
    ($(#[doc = $doc:literal] $id:ident = $name:literal,)*) => {
        /// One counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter {
            $(#[doc = $doc] $id,)*
        }

        impl Counter {
            /// All counters, in the order of the text form.
            pub const ALL: &[Self] = &[$(Self::$id,)*];

            /// Name, as the statistics file has it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* }
            }

            /// What it counts: a sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$id => $doc.trim_ascii(),)* }
            }
        }
    };
}

counters! {
    /// SVM faults entered.
    SvmPagefaultCount = "svm_pagefault_count",
    /// TLB invalidations sent.
    TlbInvalCount = "tlb_inval_count",
    /// Faults on mappings that are no mirrors. There are none yet, so it stays zero.
    VmaPagefaultCount = "vma_pagefault_count",
    /// Bytes of those mappings, in KiB.
    VmaPagefaultKb = "vma_pagefault_kb",
    /// Invalidations by the host that zapped entries.
    SvmTlbInvalCount = "svm_tlb_inval_count",
    /// Time in them.
    SvmTlbInvalUs = "svm_tlb_inval_us",
    /// Faults that found a 4 KiB range, once per attempt.
    Svm4kPagefaultCount = "svm_4K_pagefault_count",
    /// As above, 64 KiB.
    Svm64kPagefaultCount = "svm_64K_pagefault_count",
    /// As above, 2 MiB.
    Svm2mPagefaultCount = "svm_2M_pagefault_count",
    /// Faults that found a valid 4 KiB binding.
    Svm4kValidPagefaultCount = "svm_4K_valid_pagefault_count",
    /// As above, 64 KiB.
    Svm64kValidPagefaultCount = "svm_64K_valid_pagefault_count",
    /// As above, 2 MiB.
    Svm2mValidPagefaultCount = "svm_2M_valid_pagefault_count",
    /// Time of successful faults on 4 KiB ranges.
    Svm4kPagefaultUs = "svm_4K_pagefault_us",
    /// As above, 64 KiB.
    Svm64kPagefaultUs = "svm_64K_pagefault_us",
    /// As above, 2 MiB.
    Svm2mPagefaultUs = "svm_2M_pagefault_us",
    /// Migrations to the device attempted, 4 KiB.
    Svm4kMigrateCount = "svm_4K_migrate_count",
    /// As above, 64 KiB.
    Svm64kMigrateCount = "svm_64K_migrate_count",
    /// As above, 2 MiB.
    Svm2mMigrateCount = "svm_2M_migrate_count",
    /// Time of migrations, including refused ones, 4 KiB.
    Svm4kMigrateUs = "svm_4K_migrate_us",
    /// As above, 64 KiB.
    Svm64kMigrateUs = "svm_64K_migrate_us",
    /// As above, 2 MiB.
    Svm2mMigrateUs = "svm_2M_migrate_us",
    /// Time of moves to the device.
    SvmDeviceCopyUs = "svm_device_copy_us",
    /// As above, 4 KiB.
    Svm4kDeviceCopyUs = "svm_4K_device_copy_us",
    /// As above, 64 KiB.
    Svm64kDeviceCopyUs = "svm_64K_device_copy_us",
    /// As above, 2 MiB.
    Svm2mDeviceCopyUs = "svm_2M_device_copy_us",
    /// Time of moves to host memory.
    SvmCpuCopyUs = "svm_cpu_copy_us",
    /// As above, 4 KiB.
    Svm4kCpuCopyUs = "svm_4K_cpu_copy_us",
    /// As above, 64 KiB.
    Svm64kCpuCopyUs = "svm_64K_cpu_copy_us",
    /// As above, 2 MiB.
    Svm2mCpuCopyUs = "svm_2M_cpu_copy_us",
    /// KiB copied to the device.
    SvmDeviceCopyKb = "svm_device_copy_kb",
    /// As above, in 4 KiB moves.
    Svm4kDeviceCopyKb = "svm_4K_device_copy_kb",
    /// As above, in 64 KiB moves.
    Svm64kDeviceCopyKb = "svm_64K_device_copy_kb",
    /// As above, in 2 MiB moves.
    Svm2mDeviceCopyKb = "svm_2M_device_copy_kb",
    /// KiB copied to host memory.
    SvmCpuCopyKb = "svm_cpu_copy_kb",
    /// As above, in 4 KiB moves.
    Svm4kCpuCopyKb = "svm_4K_cpu_copy_kb",
    /// As above, in 64 KiB moves.
    Svm64kCpuCopyKb = "svm_64K_cpu_copy_kb",
    /// As above, in 2 MiB moves.
    Svm2mCpuCopyKb = "svm_2M_cpu_copy_kb",
    /// Time to gather pages, 4 KiB.
    Svm4kGetPagesUs = "svm_4K_get_pages_us",
    /// As above, 64 KiB.
    Svm64kGetPagesUs = "svm_64K_get_pages_us",
    /// As above, 2 MiB.
    Svm2mGetPagesUs = "svm_2M_get_pages_us",
    /// Time to bind, 4 KiB.
    Svm4kBindUs = "svm_4K_bind_us",
    /// As above, 64 KiB.
    Svm64kBindUs = "svm_64K_bind_us",
    /// As above, 2 MiB.
    Svm2mBindUs = "svm_2M_bind_us",
    /// Faults that were refused.
    RefusedPagefaultCount = "refused_pagefault_count",
    /// Attempts of faults that started over.
    RetryPagefaultCount = "retry_pagefault_count",
    /// TLB invalidations that were not acknowledged in time.
    TlbTimeoutCount = "tlb_timeout_count",
    /// CPU faults on device memory.
    CpuFaultCount = "cpu_fault_count",
    /// Allocations evicted under pressure.
    EvictCount = "evict_count",
    /// Allocations sent home because a range's pages lay in several places.
    EvictMixedCount = "evict_mixed_count",
    /// Allocations sent home because the address space changed.
    EvictSpaceChangeCount = "evict_space_change_count",
    /// Allocations sent home at the end.
    EvictTeardownCount = "evict_teardown_count",
    /// KiB that came home because the CPU touched them.
    HomeCpuFaultKb = "home_cpu_fault_kb",
    /// KiB that came home to make room.
    HomePressureKb = "home_pressure_kb",
    /// KiB that came home because a range's pages lay in several places.
    HomeMixedKb = "home_mixed_kb",
    /// KiB that came home because the address space changed.
    HomeSpaceChangeKb = "home_space_change_kb",
    /// KiB that came home at the end, or because the program asked.
    HomeTeardownKb = "home_teardown_kb",
    /// Changes of the address space that were seen only after they had happened.
    LateInvalidationCount = "late_invalidation_count",
    /// Pages that found newer content at home.
    HostConflictCount = "host_conflict_count",
    /// Moves that the system reported wrongly; the pages decided.
    MoveMisreportedCount = "move_misreported_count",
    /// Pages that found no mapping to come home to.
    HostGoneCount = "host_gone_count",
    /// KiB handed over to the device without a copy.
    AdoptedToDeviceKb = "adopted_to_device_kb",
    /// KiB handed back without a copy.
    AdoptedToSystemKb = "adopted_to_system_kb",
    /// KiB handed over without a copy, both ways.
    AdoptedKb = "adopted_kb",
}

/// Size classes of the per-size counters.
#[derive(Clone, Copy)]
enum Class {
    Small,
    Middle,
    Huge,
}

impl Class {
    fn of(span: HostSpan) -> Self {
        match span.bytes() {
            0..=PAGE => Self::Small,
            bytes if bytes <= PAGE_64K => Self::Middle,
            _ => Self::Huge,
        }
    }

    fn pick(self, of: [Counter; 3]) -> Counter {
        match self {
            Self::Small => of[0],
            Self::Middle => of[1],
            Self::Huge => of[2],
        }
    }
}

/// Counters of one GT. Each is one independent value.
pub struct GtStats {
    values: Box<[AtomicU64]>,
}

impl GtStats {
    fn new() -> Self {
        Self {
            values: Counter::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Value of `counter`.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.values[counter as usize].load(Ordering::Relaxed)
    }

    /// Sets every counter to zero.
    pub fn reset(&self) {
        self.values
            .iter()
            .for_each(|value| value.store(0, Ordering::Relaxed));
    }

    fn add(&self, counter: Counter, by: u64) {
        self.values[counter as usize].fetch_add(by, Ordering::Relaxed);
    }

    fn us(&self, counter: Counter, took: Ns) {
        self.add(counter, took.0 / 1000);
    }

    fn kb(&self, counter: Counter, pages: PageCount) {
        self.add(counter, pages.bytes() / 1024);
    }
}

impl fmt::Debug for GtStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text form: one `name: value` line per counter.
impl fmt::Display for GtStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Counter::ALL
            .iter()
            .try_for_each(|c| writeln!(f, "{}: {}", c.name(), self.get(*c)))
    }
}

/// Counters of all GTs of a device.
#[derive(Debug)]
pub struct DeviceStats {
    gts: Vec<GtStats>,
    /// Nanoseconds in fault service: the file's microseconds are too coarse for short faults.
    fault_ns: AtomicU64,
    /// Moves to the device and home.
    moves: [AtomicU64; 2],
}

impl DeviceStats {
    /// Zeros for `gts` GTs, at least one.
    #[must_use]
    pub fn new(gts: u16) -> Self {
        let gts = (0..gts.max(1)).map(|_| GtStats::new()).collect();
        Self {
            gts,
            fault_ns: AtomicU64::new(0),
            moves: [const { AtomicU64::new(0) }; 2],
        }
    }

    /// One GT.
    #[must_use]
    pub fn gt(&self, index: u16) -> Option<&GtStats> {
        self.gts.get(usize::from(index))
    }

    /// Sum of a counter over all GTs.
    #[must_use]
    pub fn total(&self, counter: Counter) -> u64 {
        self.gts.iter().map(|gt| gt.get(counter)).sum()
    }

    /// Nanoseconds in fault service so far.
    #[must_use]
    pub fn fault_ns(&self) -> u64 {
        self.fault_ns.load(Ordering::Relaxed)
    }

    /// Moves of pages to the device so far, whoever asked.
    #[must_use]
    pub fn migrations_to_device(&self) -> u64 {
        self.moves[0].load(Ordering::Relaxed)
    }

    /// Moves of pages home so far.
    #[must_use]
    pub fn migrations_home(&self) -> u64 {
        self.moves[1].load(Ordering::Relaxed)
    }

    /// The GT that an event names; what names none is counted at the first.
    fn of(&self, gt: u16) -> &GtStats {
        self.gt(gt).unwrap_or(&self.gts[0])
    }

    fn fold_fault(&self, gt: u16, range: Option<HostSpan>, end: FaultEnd, took: Ns) {
        use Counter as C;
        self.fault_ns.fetch_add(took.0, Ordering::Relaxed);
        let gt = self.of(gt);
        if matches!(end, FaultEnd::Refused(_)) {
            gt.add(C::RefusedPagefaultCount, 1);
        }
        let Some(class) = range.map(Class::of) else {
            return;
        };
        if end == FaultEnd::Valid {
            gt.add(class.pick(VALID_COUNT), 1);
        }
        if !matches!(end, FaultEnd::Refused(_)) {
            gt.us(class.pick(FAULT_US), took);
        }
    }

    fn fold_to_device(&self, span: HostSpan, copied: PageCount, adopted: PageCount, took: Ns) {
        use Counter as C;
        self.moves[0].fetch_add(1, Ordering::Relaxed);
        let gt = &self.gts[0];
        let class = Class::of(span);
        gt.us(C::SvmDeviceCopyUs, took);
        gt.us(class.pick(DEVICE_US), took);
        gt.kb(C::SvmDeviceCopyKb, copied);
        gt.kb(class.pick(DEVICE_KB), copied);
        gt.kb(C::AdoptedToDeviceKb, adopted);
        gt.kb(C::AdoptedKb, adopted);
    }

    fn fold_to_system(&self, span: HostSpan, copied: PageCount, adopted: PageCount, took: Ns) {
        use Counter as C;
        self.moves[1].fetch_add(1, Ordering::Relaxed);
        let gt = &self.gts[0];
        let class = Class::of(span);
        gt.us(C::SvmCpuCopyUs, took);
        gt.us(class.pick(CPU_US), took);
        gt.kb(C::SvmCpuCopyKb, copied);
        gt.kb(class.pick(CPU_KB), copied);
        gt.kb(C::AdoptedToSystemKb, adopted);
        gt.kb(C::AdoptedKb, adopted);
    }

    fn count_home(&self, cause: HomeCause, pages: PageCount) {
        use Counter as C;
        let (count, kb) = match cause {
            // Counted where they begin.
            HomeCause::CpuFault => (None, C::HomeCpuFaultKb),
            HomeCause::Pressure => (None, C::HomePressureKb),
            HomeCause::Mixed => (Some(C::EvictMixedCount), C::HomeMixedKb),
            HomeCause::SpaceChange => (Some(C::EvictSpaceChangeCount), C::HomeSpaceChangeKb),
            HomeCause::Teardown => (Some(C::EvictTeardownCount), C::HomeTeardownKb),
        };
        self.gts[0].kb(kb, pages);
        if let Some(count) = count {
            self.gts[0].add(count, 1);
        }
    }
}

use Counter as C;
const FAULT_COUNT: [C; 3] = [
    C::Svm4kPagefaultCount,
    C::Svm64kPagefaultCount,
    C::Svm2mPagefaultCount,
];
const VALID_COUNT: [C; 3] = [
    C::Svm4kValidPagefaultCount,
    C::Svm64kValidPagefaultCount,
    C::Svm2mValidPagefaultCount,
];
const FAULT_US: [C; 3] = [
    C::Svm4kPagefaultUs,
    C::Svm64kPagefaultUs,
    C::Svm2mPagefaultUs,
];
const MIGRATE_COUNT: [C; 3] = [
    C::Svm4kMigrateCount,
    C::Svm64kMigrateCount,
    C::Svm2mMigrateCount,
];
const MIGRATE_US: [C; 3] = [C::Svm4kMigrateUs, C::Svm64kMigrateUs, C::Svm2mMigrateUs];
const DEVICE_US: [C; 3] = [
    C::Svm4kDeviceCopyUs,
    C::Svm64kDeviceCopyUs,
    C::Svm2mDeviceCopyUs,
];
const CPU_US: [C; 3] = [C::Svm4kCpuCopyUs, C::Svm64kCpuCopyUs, C::Svm2mCpuCopyUs];
const DEVICE_KB: [C; 3] = [
    C::Svm4kDeviceCopyKb,
    C::Svm64kDeviceCopyKb,
    C::Svm2mDeviceCopyKb,
];
const CPU_KB: [C; 3] = [C::Svm4kCpuCopyKb, C::Svm64kCpuCopyKb, C::Svm2mCpuCopyKb];
const GET_PAGES_US: [C; 3] = [C::Svm4kGetPagesUs, C::Svm64kGetPagesUs, C::Svm2mGetPagesUs];
const BIND_US: [C; 3] = [C::Svm4kBindUs, C::Svm64kBindUs, C::Svm2mBindUs];

impl EventSink for DeviceStats {
    fn record(&self, _at: Ns, event: &Event) {
        match *event {
            Event::FaultStart { gt, .. } => self.of(gt).add(C::SvmPagefaultCount, 1),
            Event::FaultRange { gt, range } => {
                self.of(gt).add(Class::of(range).pick(FAULT_COUNT), 1);
            }
            Event::FaultDone {
                gt,
                range,
                end,
                took,
                ..
            } => self.fold_fault(gt, range, end, took),
            Event::FaultRetry { .. } => self.gts[0].add(C::RetryPagefaultCount, 1),
            Event::MigrateToDevice { gt, span, took, .. } => {
                let class = Class::of(span);
                self.of(gt).add(class.pick(MIGRATE_COUNT), 1);
                self.of(gt).us(class.pick(MIGRATE_US), took);
            }
            Event::ToDevice {
                span,
                copied,
                adopted,
                took,
            } => {
                self.fold_to_device(span, copied, adopted, took);
            }
            Event::ToSystem {
                span,
                cause,
                copied,
                adopted,
                took,
            } => {
                self.count_home(cause, copied + adopted);
                self.fold_to_system(span, copied, adopted, took);
            }
            Event::CpuFault { .. } => self.gts[0].add(C::CpuFaultCount, 1),
            Event::Evict { .. } => self.gts[0].add(C::EvictCount, 1),
            Event::GetPages { gt, range, took } => {
                self.of(gt).us(Class::of(range).pick(GET_PAGES_US), took);
            }
            Event::Bind { gt, range, took } => {
                self.of(gt).us(Class::of(range).pick(BIND_US), took);
            }
            Event::Zapped { gt, took, .. } => {
                self.of(gt).add(C::SvmTlbInvalCount, 1);
                self.of(gt).us(C::SvmTlbInvalUs, took);
            }
            Event::TlbInvalidate { gt } => self.of(gt).add(C::TlbInvalCount, 1),
            Event::TlbTimeout { gt } => self.of(gt).add(C::TlbTimeoutCount, 1),
            Event::LateInvalidation { .. } => self.gts[0].add(C::LateInvalidationCount, 1),
            Event::HostConflict { pages, .. } => {
                self.gts[0].add(C::HostConflictCount, pages.get());
            }
            Event::MoveMisreported { .. } => self.gts[0].add(C::MoveMisreportedCount, 1),
            Event::HostGone { pages, .. } => self.gts[0].add(C::HostGoneCount, pages.get()),
            Event::InvalidateStart { .. }
            | Event::RangeCollected { .. }
            | Event::VramTaken { .. }
            | Event::VramFreed { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests;
