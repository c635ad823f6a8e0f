//! The host's memory management, as the framework sees one process.
//!
//! A host keeps, for every page of the process, where its content is: in host memory, or in a
//! device page that belongs to a [`DeviceAllocation`] (the kernel's device-private entry). It calls
//! up through two sinks: [`InvalidationSink`] brackets every change of the address space, and
//! [`CpuFaultSink`] brings a device page home when the CPU touches it.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{BusAddr, HostSpan, HostVa, PageCount, VramAddr, VramSpan};
use crate::error::Interrupted;
use crate::event::HomeCause;
use crate::mmu::{Interval, Seq};
use crate::seam::copy::CopyMove;
use crate::seam::env::Ns;

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
}

/// What backs a CPU mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaKind {
    /// Private anonymous memory: the kind that migrates.
    Anonymous,
    /// A private file mapping: pages that were written are the process's own, the others the
    /// file's. Drivers of ranges use all of it in place; single pages of its own can migrate.
    PrivateFile,
    /// Shared file or shared memory: mapped in place, never migrated.
    InPlace,
    /// Huge pages of a pool (hugetlb): mapped in place, and a request to migrate is an error.
    HugePages,
    /// I/O or PFN-mapped, or memory that must stay with the host: no device may map it.
    Special,
}

/// One CPU mapping (`vm_area_struct`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// Addresses.
    pub span: HostSpan,
    /// Loads are allowed.
    pub read: bool,
    /// Stores are allowed.
    pub write: bool,
    /// What backs it.
    pub kind: VmaKind,
}

impl Vma {
    /// Whether the mapping allows `access`.
    #[must_use]
    pub fn allows(&self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
        }
    }
}

/// Identity of a device allocation, comparable and otherwise opaque: the framework's view of the
/// kernel's zone-device data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AllocationId(pub u64);

/// Identity of one device memory (`drm_pagemap`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PagemapId(pub u32);

/// Where a run of pages lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// Host memory, reachable at this bus address.
    System(BusAddr),
    /// Device memory.
    Device {
        /// Which device memory.
        pagemap: PagemapId,
        /// Which allocation in it.
        allocation: AllocationId,
        /// Offset of the first page.
        vram: VramAddr,
    },
}

impl Location {
    /// The place `bytes` bytes further on in the same memory.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        match self {
            Self::System(bus) => Self::System(bus.plus(bytes)),
            Self::Device {
                pagemap,
                allocation,
                vram,
            } => Self::Device {
                pagemap,
                allocation,
                vram: vram.plus(bytes),
            },
        }
    }
}

/// A run of consecutive pages in one place, contiguous there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Length.
    pub pages: PageCount,
    /// Where the first page lies.
    pub at: Location,
}

/// Where the pages of a span are, as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In host memory, or nowhere yet.
    System,
    /// All in this device memory.
    Device(PagemapId),
    /// In more than one place.
    Mixed,
}

/// Who has a page for itself: an identity, comparable and otherwise opaque (the `owner` of
/// `make_device_exclusive`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner(pub u64);

/// Why the host is about to change a span (`enum mmu_notifier_event`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidateReason {
    /// munmap, mremap away, a mapping placed over this one.
    Unmap,
    /// Content goes away or moves: madvise, reclaim, copy on write.
    Clear,
    /// Rights of the mapping change: mprotect.
    ProtectVma,
    /// Rights of pages change: fork.
    ProtectPage,
    /// The address space is going away.
    Release,
    /// Pages move to or from a device.
    Migrate,
    /// A page becomes exclusive to a device, of this owner, who knows already.
    Exclusive(Owner),
}

/// Receives invalidations of one interval. **Inside: no allocation, no host call, no lock but the
/// notifier lock and leaves.**
pub trait InvalidationSink: Send + Sync {
    /// `span` is about to change. On return no device uses it any more. The implementation calls
    /// [`Interval::set_seq`] with `seq` under the lock under which it later asks
    /// [`Interval::read_retry`].
    fn start(&self, interval: &Interval, span: HostSpan, reason: InvalidateReason, seq: Seq);

    /// The change that [`start`](Self::start) announced is complete.
    fn end(&self, interval: &Interval, span: HostSpan);
}

/// What became of a CPU fault on device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuFaultOutcome {
    /// The page is home, or on its way: let the thread fault again.
    Retry,
    /// The allocation's timeslice is not over: let the thread fault again at this time.
    RetryAt(Ns),
    /// The page is lost: the kernel would deliver SIGBUS.
    Lost,
}

/// A touch of device memory by the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFault {
    /// The page that was touched.
    pub at: HostVa,
    /// Where it is in device memory.
    pub vram: VramAddr,
}

/// Brings device pages home when the CPU touches them.
pub trait CpuFaultSink: Send + Sync {
    /// Migrates the allocation's pages around the touched one to host memory.
    ///
    /// Called by the host with none of its locks held. Calls back into
    /// [`AddressSpace::migrate_begin`]. Does not take the `vm` lock.
    fn migrate_to_ram(self: Arc<Self>, fault: CpuFault) -> CpuFaultOutcome;
}

/// One allocation of device memory that holds pages of a process (`drm_pagemap_devmem` with its
/// zone-device data). The host keeps one counted reference per span of device pages; the memory
/// is free when the last one goes.
pub trait DeviceAllocation: CpuFaultSink {
    /// Identity.
    fn id(&self) -> AllocationId;
    /// Bus address of its first page where the CPU, too, uses the memory in place
    /// (`DEVICE_COHERENT`): its pages stay mapped, and no touch brings them home. `None` for memory
    /// that is the device's alone.
    fn coherent_at(&self) -> Option<BusAddr> {
        None
    }
    /// Device memory it lies in.
    fn pagemap(&self) -> PagemapId;
    /// Where it lies.
    fn vram(&self) -> VramSpan;
    /// Host addresses at which its pages were when they came. Page `n` of the allocation belongs
    /// to page `n` of this span unless the process has moved its mappings since.
    fn origin(&self) -> HostSpan;
    /// Brings all its pages to host memory. As [`CpuFaultSink::migrate_to_ram`], for reasons other
    /// than a touch: no timeslice is waited for.
    ///
    /// # Errors
    /// `Stale` when another operation holds the pages; `Failed` when they cannot be moved.
    fn bring_home(self: Arc<Self>, cause: HomeCause) -> Result<PageCount, Interrupted>;
    /// The host has taken pages with a memory error away from all processes (`memory_failure` of
    /// `dev_pagemap_ops`): they must not be used again. Called with no lock held; does nothing where
    /// the memory is not used again anyway.
    fn memory_failure(&self, _bad: VramSpan) {}
}

/// A counted reference to an allocation, as the host keeps it.
pub type AllocationRef = Arc<dyn DeviceAllocation>;

/// What [`AddressSpace::fault_in`] is asked for (`struct hmm_range`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultIn {
    /// Pages, 4 KiB aligned.
    pub span: HostSpan,
    /// Right that every page must give.
    pub access: Access,
    /// Device memory whose pages may be reported as they are; pages in any other device memory
    /// come home first. `None` brings all pages home.
    pub keep: Option<PagemapId>,
    /// What to do at a page whose faults the program serves.
    pub pager: Pager,
}

/// What to do at a missing page whose faults the program itself serves (userfaultfd).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pager {
    /// Wait until it has served the fault.
    #[default]
    Wait,
    /// Fail, as where nobody may wait: `Failed::BadPage`. A host that does not know of pagers
    /// waits.
    Refuse,
}

/// What becomes of the process's large pages that a migration covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folios {
    /// They stay whole, as far as the host can: a part of one that is mapped whole brings all of it.
    Keep,
    /// They are split: the other side has small pages only.
    Split,
}

/// Where a migration goes.
#[derive(Clone, Debug)]
pub enum MigrateTo {
    /// From host memory to the start of a fresh allocation of the same size.
    Device {
        /// The allocation, with no pages yet.
        allocation: AllocationRef,
        /// Host span that becomes the allocation's memory when pages are placed there
        /// ([`CopyEngine::adopt`](crate::seam::copy::CopyEngine::adopt)).
        aperture: Option<HostSpan>,
        /// What becomes of large pages.
        folios: Folios,
    },
    /// From this allocation to host memory, whatever the process still has of it.
    System {
        /// The allocation.
        allocation: AllocationRef,
        /// The part of the allocation's memory whose pages come home.
        part: VramSpan,
        /// Host span of all of the allocation's memory, where pages can be taken back without a
        /// copy.
        aperture: Option<HostSpan>,
        /// What becomes of large pages.
        folios: Folios,
    },
}

impl MigrateTo {
    /// To a fresh allocation, large pages as they are.
    #[must_use]
    pub const fn device(allocation: AllocationRef, aperture: Option<HostSpan>) -> Self {
        Self::Device {
            allocation,
            aperture,
            folios: Folios::Keep,
        }
    }

    /// Home with all of an allocation, large pages as they are.
    #[must_use]
    pub fn home(allocation: AllocationRef, aperture: Option<HostSpan>) -> Self {
        Self::System {
            part: allocation.vram(),
            allocation,
            aperture,
            folios: Folios::Keep,
        }
    }
}

/// What a device finds at a page without a fault (`hmm_range_fault` without a request).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing that it could use as it is; a fault may help.
    Absent,
    /// Nothing that it could ever use: no mapping, a mapping that may not be read, raw pages.
    Never,
    /// A page.
    Page(SeenPage),
}

/// A page that a device could use without a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenPage {
    /// Where it is.
    pub at: Location,
    /// The right that the CPU's entry gives.
    pub access: Access,
    /// Pages that the CPU's entry maps, as a power of two.
    pub order: u8,
    /// Pages of the large page (folio) that it is a part of, as a power of two: they stay together
    /// where small entries map them, too, so that a device may have one entry for them.
    pub folio: u8,
    /// What kind of page it is.
    pub kind: PageKind,
}

/// What kind of page a device found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// One of the process, or of a file, or of the device's own memory.
    Plain,
    /// The page of zeros that nobody owns.
    Zero,
    /// One in device memory that the CPU, too, uses in place: in this one.
    Coherent(PagemapId),
}

impl core::fmt::Debug for dyn DeviceAllocation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "allocation {} at {}", self.id().0, self.vram())
    }
}

/// Pages isolated for a migration (`struct migrate_vma` after setup). Nobody else can move or
/// touch them; CPU accesses wait. Dropping the set puts everything back where it was.
pub trait MigrationSet {
    /// Copies that bring the content to its new place, in order; empty where the host hands
    /// pages over without copying.
    fn moves(&self) -> &[CopyMove];

    /// Pages that are handed over without a copy.
    fn adopted(&self) -> PageCount;

    /// Makes the move real: entries point to the new place and waiting CPU accesses go on.
    /// Returns the number of pages that moved; pages that raced stay where they were. May sleep.
    fn finalize(self) -> PageCount;
}

/// The host mm: one process.
///
/// Handles come in two tiers, as in the kernel: the object itself is *identity* and can always be
/// held; every operation needs the process *alive* and answers
/// [`Failed::AddressSpaceGone`](crate::error::Failed::AddressSpaceGone) when it is not.
pub trait AddressSpace: Send + Sync + 'static {
    /// Isolated pages.
    type Migration<'a>: MigrationSet
    where
        Self: 'a;

    /// The mapping at `at`, or the first one behind it. May sleep; `vm` may be held.
    fn find_vma(&self, at: HostVa) -> Option<Vma>;

    /// Registers `sink` for all changes of `window` and returns the interval. May sleep; `vm` may
    /// be held, the notifier lock may not.
    ///
    /// # Errors
    /// The process is gone, or the host cannot watch that window.
    fn subscribe(
        &self,
        window: HostSpan,
        sink: Arc<dyn InvalidationSink>,
    ) -> Result<Arc<Interval>, Interrupted>;

    /// Ends a subscription. Waits for running invalidations; no call of the sink runs or will
    /// run afterwards. Neither the notifier lock nor any host lock may be held.
    fn unsubscribe(&self, interval: &Arc<Interval>);

    /// Starts a read side: waits while an invalidation of the interval runs, then returns its
    /// sequence for [`Interval::read_retry`]. The notifier lock must not be held.
    fn read_begin(&self, interval: &Interval) -> Seq;

    /// Makes the pages of a span accessible and says where they are, as dense runs that cover the
    /// span exactly (`hmm_range_fault`). May sleep, and may call [`CpuFaultSink`]; only `vm` may
    /// be held.
    ///
    /// # Errors
    /// No mapping, missing rights, or pages that cannot be made present; `Stale` when another
    /// operation holds pages.
    fn fault_in(&self, request: &FaultIn, runs: &mut Vec<PageRun>) -> Result<(), Interrupted>;

    /// Whether every page of `span` has content already, in host or device memory. Advisory: the
    /// answer is old when it arrives.
    fn is_populated(&self, span: HostSpan) -> bool;

    /// Where the pages of `span` are (`drm_pagemap_scan_mm`). Advisory, cheap, faults nothing in.
    fn placement(&self, span: HostSpan) -> Placement;

    /// Isolates pages for a migration. Runs the invalidation of their addresses itself, so no
    /// lock but `vm` may be held.
    ///
    /// To a device: the pages of `span`, which must lie in one mapping; all or nothing. To host
    /// memory: every page that the allocation still holds in `part`, wherever the process has it
    /// mapped (`span` is where all of the allocation's pages were when they came); an allocation
    /// without pages gives an empty set.
    ///
    /// # Errors
    /// `Stale` when pages are busy or refuse; `Failed` when the mapping cannot migrate.
    fn migrate_begin(
        &self,
        span: HostSpan,
        to: MigrateTo,
    ) -> Result<Self::Migration<'_>, Interrupted>;

    /// Tells page by page what a device finds in `span` without a fault; nothing is faulted in
    /// (`hmm_range_fault` without a request). Pages in private device memory other than `keep` are
    /// absent. Old when it arrives, unless the caller's sequence says otherwise. May sleep; only
    /// `vm` may be held.
    ///
    /// # Errors
    /// The process is gone.
    fn snapshot(
        &self,
        span: HostSpan,
        keep: Option<PagemapId>,
        pages: &mut Vec<Seen>,
    ) -> Result<(), Interrupted>;

    /// Takes the page at `at` away from the CPU and gives it, where it is, to a device alone, for
    /// atomics on host memory (`make_device_exclusive`). The page is faulted in for writing first;
    /// the next access by the CPU takes it back, inside an invalidation. The taking itself is one of
    /// the reason [`Exclusive`](InvalidateReason::Exclusive), with this `owner`; it has ended when `commit`
    /// is called.
    ///
    /// `commit` enters the page's bus address in the device's table. Meanwhile the page is locked: the CPU
    /// does not get at it. A change of the address space does, as an invalidation tells. `commit` takes the notifier lock
    /// and leaves, nothing else. It is called at most once, and not where this fails.
    ///
    /// # Errors
    /// `Failed::NotMigratable` where the page is not private anonymous memory (`-EOPNOTSUPP`),
    /// otherwise as [`fault_in`](Self::fault_in); `Stale` when the page is busy or refuses.
    fn make_exclusive(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted>;
}
