//! A device that works on a process's memory, both made of nothing but arrays.
//!
//! The four seams are filled in below: environment, process, copy engine, and the driver's part of
//! an address space. `main` lets the device add to the process's pages: they move to the device,
//! come home when the processor looks, and are gone for the device once they are unmapped.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::NotifierHeld;
use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::mmu::{Interval, IntervalNotifiers, Seq};
use gpusvm::pagemap::{Pagemap, ToDevice};
use gpusvm::seam::copy::{CopyEngine, CopyMove, CopyWith};
use gpusvm::seam::env::{Environment, Ns, Work};
use gpusvm::seam::mm::{
    Access, AddressSpace, AllocationRef, CpuFault, FaultIn, InvalidateReason, InvalidationSink,
    Location, MigrateTo, MigrationSet, Owner, PageKind, PageRun, PagemapId, Pager, Placement, Seen,
    SeenPage, Vma, VmaKind,
};
use gpusvm::seam::{Platform, Seams};
use gpusvm::svm::{Bindings, FindRange, Svm, SvmConfig, SvmOwner, Zapped};
use gpusvm::vram::Manager;

// --- Environment: a clock that counts. One thread runs all of this, so nobody ever waits. ---

#[derive(Default)]
struct Clock(AtomicU64);

impl Environment for Clock {
    type RawMutex = parking_lot::RawMutex;

    fn now(&self) -> Ns {
        Ns(self.0.fetch_add(1, Ordering::Relaxed))
    }
    fn random(&self) -> u64 {
        self.now().0
    }
    fn wait(&self, _word: &AtomicU32, _seen: u32) {}
    fn wake(&self, _word: &AtomicU32) {}
    fn sleep_until(&self, deadline: Ns) {
        self.0.fetch_max(deadline.0, Ordering::Relaxed);
    }
    fn defer(&self, _work: Work) {}
}

// --- Both memories, in words of which each stands for a page. ---

#[derive(Default)]
struct Memories {
    host: BTreeMap<u64, u64>,
    device: BTreeMap<u64, u64>,
}

type Shared<T> = Arc<Mutex<T>>;

fn locked<T, R>(shared: &Mutex<T>, work: impl FnOnce(&mut T) -> R) -> R {
    work(&mut shared.lock().unwrap_or_else(PoisonError::into_inner))
}

// --- The process: one mapping, and for each page of it that is away, the allocation. ---

struct Process {
    env: Arc<Clock>,
    memories: Shared<Memories>,
    notifiers: IntervalNotifiers<Clock>,
    mapping: Mutex<Option<HostSpan>>,
    away: Mutex<BTreeMap<HostVa, (AllocationRef, VramAddr)>>,
}

impl Process {
    /// A load by the processor: a page that is away faults, and comes home.
    fn load(&self, at: HostVa) -> u64 {
        let page = locked(&self.away, |away| away.get(&at).cloned());
        if let Some((allocation, vram)) = page {
            allocation.migrate_to_ram(CpuFault { at, vram });
        }
        locked(&self.memories, |m| m.host[&at.get()])
    }

    fn munmap(&self, span: HostSpan) {
        let change = self.notifiers.start(span, InvalidateReason::Unmap);
        locked(&self.mapping, Option::take);
        // Device memory is free when the last page of an allocation goes.
        let dropped = locked(&self.away, core::mem::take);
        self.notifiers.end(&self.env, change);
        drop(dropped);
    }
}

/// Pages on their way, with the copies that bring them there.
struct Moving<'a> {
    process: &'a Process,
    pages: Vec<(HostVa, VramAddr)>,
    copies: Vec<CopyMove>,
    /// Who holds the pages afterwards; nobody at home.
    to: Option<AllocationRef>,
}

impl MigrationSet for Moving<'_> {
    fn moves(&self) -> &[CopyMove] {
        &self.copies
    }
    fn adopted(&self) -> PageCount {
        PageCount::ZERO
    }
    fn finalize(self) -> PageCount {
        let released = locked(&self.process.away, |away| {
            let mut released = Vec::new();
            for (at, vram) in &self.pages {
                released.push(match &self.to {
                    Some(allocation) => away.insert(*at, (allocation.clone(), *vram)),
                    None => away.remove(at),
                });
            }
            released
        });
        drop(released);
        PageCount::new(self.pages.len() as u64)
    }
}

impl AddressSpace for Process {
    type Migration<'a> = Moving<'a>;

    fn find_vma(&self, _at: HostVa) -> Option<Vma> {
        let span = locked(&self.mapping, |mapping| *mapping)?;
        let kind = VmaKind::Anonymous;
        let (read, write) = (true, true);
        Some(Vma {
            span,
            read,
            write,
            kind,
        })
    }

    fn subscribe(
        &self,
        window: HostSpan,
        sink: Arc<dyn InvalidationSink>,
    ) -> Result<Arc<Interval>, Interrupted> {
        Ok(self.notifiers.insert(window, sink))
    }

    fn unsubscribe(&self, interval: &Arc<Interval>) {
        self.notifiers.remove(&self.env, interval);
    }

    fn read_begin(&self, interval: &Interval) -> Seq {
        self.notifiers.read_begin(&self.env, interval)
    }

    fn fault_in(&self, request: &FaultIn, runs: &mut Vec<PageRun>) -> Result<(), Interrupted> {
        for page in 0..request.span.pages().get() {
            let at = request.span.start().plus(page * PAGE);
            let away = locked(&self.away, |away| away.get(&at).cloned());
            let at = match away {
                None => Location::System(BusAddr::new(at.get())),
                Some((allocation, vram)) => Location::Device {
                    pagemap: allocation.pagemap(),
                    allocation: allocation.id(),
                    vram,
                },
            };
            runs.push(PageRun {
                pages: PageCount::new(1),
                at,
            });
        }
        Ok(())
    }

    fn is_populated(&self, _span: HostSpan) -> bool {
        true
    }

    fn placement(&self, span: HostSpan) -> Placement {
        let away = locked(&self.away, |away| {
            let inside = away.range(span.start()..span.end());
            inside.map(|(_, (a, _))| a.pagemap()).collect::<Vec<_>>()
        });
        match away.first() {
            None => Placement::System,
            Some(one) if away.len() as u64 == span.pages().get() => Placement::Device(*one),
            Some(_) => Placement::Mixed,
        }
    }

    fn migrate_begin(&self, span: HostSpan, to: MigrateTo) -> Result<Moving<'_>, Interrupted> {
        let change = self.notifiers.start(span, InvalidateReason::Migrate);
        self.notifiers.end(&self.env, change);
        let set = match to {
            MigrateTo::Device { allocation, .. } => {
                let place = |n| {
                    (
                        span.start().plus(n * PAGE),
                        allocation.vram().start().plus(n * PAGE),
                    )
                };
                let pages: Vec<_> = (0..span.pages().get()).map(place).collect();
                let copies = copies(&pages, CopyWith::From);
                Moving {
                    process: self,
                    pages,
                    copies,
                    to: Some(allocation),
                }
            }
            MigrateTo::System { allocation, .. } => {
                let held = |(at, (owner, vram)): (&HostVa, &(AllocationRef, VramAddr))| {
                    (owner.id() == allocation.id()).then_some((*at, *vram))
                };
                let pages: Vec<_> =
                    locked(&self.away, |away| away.iter().filter_map(held).collect());
                let copies = copies(&pages, CopyWith::To);
                Moving {
                    process: self,
                    pages,
                    copies,
                    to: None,
                }
            }
        };
        Ok(set)
    }

    fn snapshot(
        &self,
        span: HostSpan,
        keep: Option<PagemapId>,
        pages: &mut Vec<Seen>,
    ) -> Result<(), Interrupted> {
        let mut runs = Vec::new();
        let access = Access::Write;
        let request = FaultIn {
            span,
            access,
            keep,
            pager: Pager::Wait,
        };
        self.fault_in(&request, &mut runs)?;
        let page = |run: &PageRun| {
            Seen::Page(SeenPage {
                at: run.at,
                access,
                order: 0,
                folio: 0,
                kind: PageKind::Plain,
            })
        };
        pages.clear();
        pages.extend(runs.iter().map(page));
        Ok(())
    }

    /// Nobody asks for it here.
    fn make_exclusive(
        &self,
        at: HostVa,
        _owner: Owner,
        _commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        Err(Failed::NotMigratable(at).into())
    }
}

fn copies(pages: &[(HostVa, VramAddr)], way: impl Fn(BusAddr) -> CopyWith) -> Vec<CopyMove> {
    let one = |(at, vram): &(HostVa, VramAddr)| CopyMove {
        vram: VramSpan::at(*vram, PAGE),
        with: way(BusAddr::new(at.get())),
    };
    pages.iter().map(one).collect()
}

// --- The device: a copy engine, and a page table that is a map. ---

struct Engine(Shared<Memories>);

impl CopyEngine for Engine {
    fn run(&self, moves: &[CopyMove]) -> Result<(), Failed> {
        locked(&self.0, |m| {
            for step in moves {
                let vram = step.vram.start().get();
                match step.with {
                    CopyWith::From(bus) => *m.device.entry(vram).or_default() = m.host[&bus.get()],
                    CopyWith::To(bus) => *m.host.entry(bus.get()).or_default() = m.device[&vram],
                    CopyWith::Hole => *m.device.entry(vram).or_default() = 0,
                }
            }
        });
        Ok(())
    }
    fn adopt(&self, _vram: VramSpan) -> Option<HostSpan> {
        None
    }
    fn surrender(&self, _vram: VramSpan) -> Option<HostSpan> {
        None
    }
}

#[derive(Default)]
struct Driver {
    table: Mutex<BTreeMap<HostVa, Location>>,
}

impl Bindings for Driver {
    /// The span that has entries.
    type Binding = Option<HostSpan>;

    fn zap(&self, binding: &mut Self::Binding, _held: &NotifierHeld<'_>) -> Zapped {
        let Some(span) = binding.take() else {
            return Zapped::Nothing;
        };
        locked(&self.table, |table| {
            table.retain(|at, _| !span.contains(*at))
        });
        Zapped::Entries
    }
    fn flush(&self, _span: HostSpan, _held: &NotifierHeld<'_>) {}
    fn zapped(&self, _span: HostSpan, _started: Ns) {}
}

// --- All of it together. ---

struct Toy;

impl Platform for Toy {
    type Env = Clock;
    type Space = Process;
    type Copy = Engine;
    type Sink = ();
}

struct Device {
    svm: Arc<Svm<Toy, Driver>>,
    owner: SvmOwner,
    pagemap: Arc<Pagemap<Toy>>,
    memories: Shared<Memories>,
}

impl Device {
    /// The device adds to a word of the process: translate, or fault and translate again.
    fn add(&mut self, at: HostVa, value: u64) -> Result<Location, Failed> {
        loop {
            let entry = locked(&self.svm.driver().table, |table| table.get(&at).copied());
            match entry {
                None => self.fault(at)?,
                Some(place) => {
                    locked(&self.memories, |m| match place {
                        Location::System(bus) => *m.host.entry(bus.get()).or_default() += value,
                        Location::Device { vram, .. } => {
                            *m.device.entry(vram.get()).or_default() += value;
                        }
                    });
                    return Ok(place);
                }
            }
        }
    }

    /// The device-fault flow: again while the process was faster, no further when it failed.
    fn fault(&mut self, at: HostVa) -> Result<(), Failed> {
        loop {
            match self.try_fault(at) {
                Ok(()) => return Ok(()),
                Err(Interrupted::Stale(_)) => {}
                Err(Interrupted::Failed(why)) => return Err(why),
            }
        }
    }

    fn try_fault(&mut self, at: HostVa) -> Result<(), Interrupted> {
        while let Some(dead) = self.svm.pop_garbage(&mut self.owner) {
            let driver = self.svm.driver();
            self.svm
                .remove_range(&mut self.owner, &dead, |binding, held| {
                    driver.zap(binding, held)
                });
        }
        let find = FindRange {
            at,
            area: area(),
            access: Access::Write,
            device_memory: true,
            populated_up_to: 0,
            largest: gpusvm::addr::PAGE_2M,
        };
        let range = self.svm.find_or_insert_range(&mut self.owner, &find)?;
        let (span, timeslice) = (range.span(), Ns(0));
        match self.pagemap.to_device(ToDevice { span, timeslice }) {
            // No room: the pages are used where they are.
            Ok(()) | Err(Interrupted::Failed(Failed::OutOfVram)) => {}
            Err(why) => return Err(why),
        }
        let pages = self
            .svm
            .get_pages(&range, Access::Write, Some(self.pagemap.id()))?;
        let entries: Vec<_> = pages.runs().iter().map(|run| run.at).collect();
        let bind = |binding: &mut Option<HostSpan>, _held: &NotifierHeld<'_>| {
            *binding = Some(span);
            locked(&self.svm.driver().table, |table| {
                for (page, entry) in (0..).zip(entries) {
                    table.insert(span.start().plus(page * PAGE), entry);
                }
            });
        };
        self.svm.commit(&range, pages, bind).map_err(Stale::into)
    }
}

/// What may be shared: all user addresses.
fn area() -> HostSpan {
    HostSpan::new(HostVa::new(0), HostVa::new(1 << 47))
}

#[expect(clippy::panic_in_result_fn, reason = "it asserts what it shows")]
fn main() -> Result<(), Interrupted> {
    // A process with one mapping of 64 KiB, every page of which holds 5.
    let buffer = HostSpan::at(HostVa::new(0x1000_0000), 16 * PAGE);
    let memories = Shared::<Memories>::default();
    locked(&memories, |m| {
        m.host.extend((0..16).map(|n| (0x1000_0000 + n * PAGE, 5)));
    });
    let env = Arc::new(Clock::default());
    let process = Arc::new(Process {
        env: env.clone(),
        memories: memories.clone(),
        notifiers: IntervalNotifiers::new(),
        mapping: Mutex::new(Some(buffer)),
        away: Mutex::default(),
    });

    // A device with 64 KiB of memory that shares the process's addresses.
    let seams = Seams::<Toy> {
        env: env.clone(),
        space: process.clone(),
        sink: Arc::new(()),
    };
    let vram = Arc::new(Manager::new(env, 64 << 10));
    let engine = Arc::new(Engine(memories.clone()));
    let pagemap = Pagemap::new(seams.clone(), PagemapId(1), engine, vram);
    let config = SvmConfig {
        vm: 1,
        owner: Owner(1),
        area: area(),
        window_bytes: 512 << 20,
    };
    let (svm, owner) = Svm::new(seams, Driver::default(), config)?;
    let mut device = Device {
        svm,
        owner,
        pagemap,
        memories,
    };

    // The first access faults, and brings all 64 KiB to the device; the second one hits.
    let (first, second) = (buffer.start(), buffer.start().plus(PAGE));
    assert!(matches!(device.add(first, 1)?, Location::Device { .. }));
    assert!(matches!(device.add(second, 2)?, Location::Device { .. }));
    assert_eq!(process.placement(buffer), Placement::Device(PagemapId(1)));

    // The processor sees what the device wrote: its load faults, and the pages come home.
    assert_eq!(process.load(first), 6);
    assert_eq!(process.load(second), 7);
    assert_eq!(process.placement(buffer), Placement::System);
    assert_eq!(device.pagemap.vram().used(), 0);

    // Unmapped memory is gone for the device at once, and its device memory is free.
    device.add(first, 1)?;
    process.munmap(buffer);
    assert_eq!(device.add(first, 1), Err(Failed::NoVma(first)));
    assert_eq!(device.pagemap.vram().used(), 0);
    Ok(())
}
