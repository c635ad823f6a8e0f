//! Pages that a device has for itself (`make_device_exclusive`).
//!
//! The very page is moved out of the mapping into memory of the runtime's own, where the device
//! reaches it; a touch by the CPU, and every change of the address space that keeps content, brings
//! it back as it does pages of device memory. So an exclusive page is a page of a device memory
//! that is no device's.

use core::fmt;
use std::sync::{Arc, OnceLock, Weak};

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::HomeCause;
use gpusvm::seam::env::Mutex;
use gpusvm::seam::mm::{
    Access, AddressSpace, AllocationId, AllocationRef, CpuFault, CpuFaultOutcome, CpuFaultSink,
    DeviceAllocation, FaultIn, Folios, InvalidateReason, MigrateTo, MigrationSet, Owner, PagemapId,
    Pager, VmaKind,
};
use gpusvm_abi::bus::VramStore;

use crate::env::LiveEnv;
use crate::migrate::Goal;
use crate::space::LiveSpace;
use crate::sys::advise;
use crate::sys::vram::{LiveVram, VramMode};

/// Identity of the memory: that of no device.
const NOBODYS: PagemapId = PagemapId(u32::MAX);

/// Bytes that can be exclusive at a time. They cost address space, and mappings of the process, of which
/// there are not many: each page may cut one in three.
const BYTES: u64 = 32 << 20;
/// Pages that are sent home, at most, to make room for one.
const VICTIMS_MAX: usize = 16;

/// Places for exclusive pages. The lock is a leaf.
pub(crate) struct Lone {
    space: OnceLock<Weak<LiveSpace>>,
    memory: OnceLock<Arc<LiveVram>>,
    places: Mutex<LiveEnv, Places>,
}

/// Which places are free.
#[derive(Default)]
struct Places {
    free: Vec<u64>,
    /// Who has, or had last, each place that was ever used, in their order.
    holders: Vec<Weak<Exclusive>>,
    /// Whose page goes home next, where no place is free.
    hand: usize,
}

impl Places {
    /// A place for nobody's page yet.
    fn take(&mut self) -> Option<u64> {
        if let Some(place) = self.free.pop() {
            return Some(place);
        }
        let fresh = u64::try_from(self.holders.len()).ok()? * PAGE;
        (fresh < BYTES).then(|| {
            self.holders.push(Weak::new());
            fresh
        })
    }

    /// Who is next to make room, by turns.
    fn victim(&mut self) -> Option<Arc<Exclusive>> {
        let holder = self.holders.get(self.hand)?.upgrade();
        self.hand = (self.hand + 1) % self.holders.len();
        holder
    }
}

impl Default for Lone {
    fn default() -> Self {
        Self {
            space: OnceLock::new(),
            memory: OnceLock::new(),
            places: Mutex::<LiveEnv, _>::new(Places::default()),
        }
    }
}

impl fmt::Debug for Lone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lone").finish_non_exhaustive()
    }
}

impl Lone {
    /// Where its pages come home to.
    pub(crate) fn belong_to(&self, space: &Arc<LiveSpace>) {
        let _once = self.space.set(Arc::downgrade(space));
    }

    /// A place, for which others may have to go home.
    fn take(&self) -> Result<u64, Interrupted> {
        for _victim in 0..VICTIMS_MAX {
            let mut places = self.places.lock();
            if let Some(place) = places.take() {
                return Ok(place);
            }
            let victim = places.victim();
            // Dropping a page takes the lock.
            drop(places);
            if let Some(victim) = victim {
                victim.bring_home(HomeCause::Pressure)?;
            }
        }
        Err(Stale::PagesBusy.into())
    }

    /// Says whose page is in a place that was taken.
    fn enter(&self, page: &Arc<Exclusive>) {
        let index = usize::try_from(page.place / PAGE).unwrap_or(usize::MAX);
        let mut places = self.places.lock();
        if let Some(holder) = places.holders.get_mut(index) {
            *holder = Arc::downgrade(page);
        }
    }
}

/// One exclusive page.
struct Exclusive {
    space: Weak<LiveSpace>,
    memory: Arc<LiveVram>,
    place: u64,
    origin: HostSpan,
}

impl LiveSpace {
    /// Moves the page at `at` to where only devices reach it. Pages of the heap that stands for
    /// userfaultfd cannot.
    pub(crate) fn take_for_device(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        let span = HostSpan::at(at, PAGE);
        self.check_exclusive(at)?;
        // A page that is on a device, or a device's own already, comes home first.
        let request = FaultIn {
            span,
            access: Access::Write,
            keep: None,
            pager: Pager::Wait,
        };
        self.fault_in(&request, &mut Vec::new())?;
        advise::populate_write(span).map_err(|_errno| Failed::BadPage(at))?;
        let memory = self.lone_memory()?;
        let space = self.lone.space.get().cloned().unwrap_or_default();
        let place = self.lone.take()?;
        let page = Arc::new(Exclusive {
            space,
            memory: Arc::clone(&memory),
            place,
            origin: span,
        });
        self.lone.enter(&page);
        let aperture = page.aperture();
        memory.discard(place, PAGE);
        let there = aperture.ok_or(Failed::NotMigratable(at))?.start();
        let goal = Goal {
            allocation: page as AllocationRef,
            aperture,
            folios: Folios::Keep,
            reason: InvalidateReason::Exclusive(owner),
        };
        let set = self.begin_out(span, &goal)?;
        commit(BusAddr::new(there.get()));
        set.finalize();
        Ok(())
    }

    fn check_exclusive(&self, at: HostVa) -> Result<(), Failed> {
        let vma = self.vma_around(at).filter(|vma| vma.span.contains(at));
        let vma = vma.ok_or(Failed::BadPage(at))?;
        let vma = self.piece_at(vma, at);
        if !vma.read || !vma.write {
            return Err(Failed::BadPage(at));
        }
        if vma.kind != VmaKind::Anonymous || !self.level().faults.has_uffd() {
            return Err(Failed::NotMigratable(at));
        }
        Ok(())
    }

    fn lone_memory(&self) -> Result<Arc<LiveVram>, Failed> {
        if let Some(memory) = self.lone.memory.get() {
            return Ok(Arc::clone(memory));
        }
        let made = self.create_vram(BYTES, VramMode::Adopt);
        let made = made.map_err(|_no_room| Failed::OutOfMemory)?;
        Ok(Arc::clone(self.lone.memory.get_or_init(|| made)))
    }
}

impl Exclusive {
    fn aperture(&self) -> Option<HostSpan> {
        let at = self.memory.aperture(self.place)?;
        Some(HostSpan::at(HostVa::new(at), PAGE))
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        if let Some(space) = self.space.upgrade() {
            space.lone.places.lock().free.push(self.place);
        }
    }
}

impl CpuFaultSink for Exclusive {
    fn migrate_to_ram(self: Arc<Self>, _fault: CpuFault) -> CpuFaultOutcome {
        match self.bring_home(HomeCause::CpuFault) {
            Ok(_) | Err(Interrupted::Stale(_)) => CpuFaultOutcome::Retry,
            Err(Interrupted::Failed(_)) => CpuFaultOutcome::Lost,
        }
    }
}

impl DeviceAllocation for Exclusive {
    fn id(&self) -> AllocationId {
        AllocationId((u64::from(NOBODYS.0) << 32) | (self.place / PAGE))
    }

    fn pagemap(&self) -> PagemapId {
        NOBODYS
    }

    fn vram(&self) -> VramSpan {
        VramSpan::at(VramAddr::new(self.place), PAGE)
    }

    fn origin(&self) -> HostSpan {
        self.origin
    }

    fn bring_home(self: Arc<Self>, _cause: HomeCause) -> Result<PageCount, Interrupted> {
        let space = self.space.upgrade().ok_or(Failed::AddressSpaceGone)?;
        let (origin, aperture) = (self.origin, self.aperture());
        let set = space.begin(origin, MigrateTo::home(self as AllocationRef, aperture))?;
        if set.moves().is_empty() {
            Ok(set.finalize())
        } else {
            Err(Stale::PagesRefused.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::seam::mm::{AddressSpace, Seen};
    use gpusvm_abi::bus::SystemBus;

    use crate::sys::fault_copy::LiveBus;
    use crate::sys::file::FileMapping;
    use crate::sys::mapping::{AnonMapping, Huge};
    use crate::toy::Bench;

    fn seen(bench: &Bench, span: HostSpan) -> Vec<Seen> {
        let mut pages = Vec::new();
        let looked = bench.space.snapshot(span, Some(PagemapId(1)), &mut pages);
        looked.expect("the space is open");
        pages
    }

    #[test]
    fn device_has_the_page_until_the_cpu_touches_it() {
        let Some(bench) = Bench::open(VramMode::Adopt) else {
            return;
        };
        let mut map = AnonMapping::new(2 << 20, Huge::Never).expect("2M can be mapped");
        map.words_mut().fill(3);
        let at = HostVa::new(map.address());
        let page = HostSpan::at(at, PAGE);
        let mut given = None;
        let made = bench
            .space
            .make_exclusive(at, Owner(1), &mut |bus| given = Some(bus));
        made.expect("private memory");
        let bus = given.expect("committed").get();
        assert_eq!(seen(&bench, page), [Seen::Absent]);
        let mut word = [0; 8];
        LiveBus.read(bus, &mut word).expect("the device reaches it");
        assert_eq!(u64::from_ne_bytes(word), 3);
        LiveBus
            .write(bus, &4_u64.to_ne_bytes())
            .expect("and writes it");
        assert_eq!(map.words()[0], 4, "the very page came back");
        assert!(matches!(seen(&bench, page)[..], [Seen::Page(_)]));
    }

    #[test]
    fn the_first_pages_make_room_where_there_are_too_many() {
        let Some(bench) = Bench::open(VramMode::Adopt) else {
            return;
        };
        let bytes = BYTES + 2 * PAGE;
        let len = usize::try_from(bytes).expect("64-bit");
        let mut map = AnonMapping::new(len, Huge::Never).expect("some memory can be mapped");
        map.words_mut().fill(3);
        let all = HostSpan::at(HostVa::new(map.address()), bytes);
        for n in 0..all.pages().get() {
            let at = all.start().plus(n * PAGE);
            let made = bench.space.make_exclusive(at, Owner(1), &mut |_bus| ());
            made.expect("private memory");
        }
        let seen = seen(&bench, all);
        assert!(matches!(seen[..2], [Seen::Page(_), Seen::Page(_)]));
        assert!(seen[2..].iter().all(|page| *page == Seen::Absent));
        assert!(map.words().iter().all(|word| *word == 3));
    }

    #[test]
    fn pages_of_files_cannot_be_exclusive() {
        let Some(bench) = Bench::open(VramMode::Adopt) else {
            return;
        };
        let own = std::env::current_exe().expect("a program has a file");
        let map = FileMapping::open(&own).expect("it can be read");
        let at = HostVa::new(map.address());
        let made = bench.space.make_exclusive(at, Owner(1), &mut |_bus| ());
        assert!(matches!(made, Err(Interrupted::Failed(_))), "{made:?}");
    }
}
