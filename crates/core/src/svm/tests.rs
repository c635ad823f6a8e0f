use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use std::sync::Mutex as StdMutex;

use super::*;
use crate::addr::{BusAddr, PAGE, PAGE_2M, PageCount};
use crate::mmu::IntervalNotifiers;
use crate::seam::copy::{CopyEngine, CopyMove};
use crate::seam::mm::{
    Location, MigrateTo, MigrationSet, PageRun, PagemapId, Placement, Seen, Vma, VmaKind,
};
use crate::test_env::TestEnv;

/// One mapping of plain host memory, which never migrates.
struct Host {
    env: TestEnv,
    notifiers: IntervalNotifiers<TestEnv>,
    vma: StdMutex<Option<Vma>>,
    /// Happens once, when somebody asks which pages are there.
    meanwhile: StdMutex<Option<Happens>>,
}

/// Something that happens to a host.
type Happens = Box<dyn FnOnce(&Host) + Send>;

struct NoSet;

impl MigrationSet for NoSet {
    fn moves(&self) -> &[CopyMove] {
        &[]
    }
    fn adopted(&self) -> PageCount {
        PageCount::ZERO
    }
    fn finalize(self) -> PageCount {
        PageCount::ZERO
    }
}

impl AddressSpace for Host {
    type Migration<'a> = NoSet;

    fn find_vma(&self, _at: HostVa) -> Option<Vma> {
        *self.vma.lock().expect("no test panics under the lock")
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
        let at = Location::System(BusAddr::new(request.span.start().get()));
        runs.push(PageRun {
            pages: request.span.pages(),
            at,
        });
        Ok(())
    }

    fn is_populated(&self, _span: HostSpan) -> bool {
        let happens = self.meanwhile.lock().expect("nothing panics").take();
        if let Some(happens) = happens {
            happens(self);
        }
        true
    }

    fn placement(&self, _span: HostSpan) -> Placement {
        Placement::System
    }

    fn migrate_begin(&self, _span: HostSpan, _to: MigrateTo) -> Result<NoSet, Interrupted> {
        Err(Stale::PagesRefused.into())
    }

    fn snapshot(
        &self,
        span: HostSpan,
        _keep: Option<PagemapId>,
        pages: &mut Vec<Seen>,
    ) -> Result<(), Interrupted> {
        pages.clear();
        pages.extend((0..span.pages().get()).map(|_| Seen::Absent));
        Ok(())
    }

    fn make_exclusive(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        let reason = InvalidateReason::Exclusive(owner);
        let running = self.notifiers.start(HostSpan::at(at, PAGE), reason);
        self.notifiers.end(&self.env, running);
        commit(BusAddr::new(at.get()));
        Ok(())
    }
}

struct NoCopy;

impl CopyEngine for NoCopy {
    fn run(&self, _moves: &[CopyMove]) -> Result<(), Failed> {
        Ok(())
    }
    fn adopt(&self, _vram: crate::addr::VramSpan) -> Option<HostSpan> {
        None
    }
    fn surrender(&self, _vram: crate::addr::VramSpan) -> Option<HostSpan> {
        None
    }
}

/// Notes what is flushed; a binding is whether it is valid.
#[derive(Default)]
struct Driver {
    flushed: StdMutex<Vec<HostSpan>>,
}

impl Bindings for Driver {
    type Binding = bool;

    fn zap(&self, binding: &mut bool, _held: &NotifierHeld<'_>) -> Zapped {
        if core::mem::take(binding) {
            Zapped::Entries
        } else {
            Zapped::Nothing
        }
    }

    fn flush(&self, span: HostSpan, _held: &NotifierHeld<'_>) {
        self.flushed
            .lock()
            .expect("no test panics under the lock")
            .push(span);
    }

    fn zapped(&self, _span: HostSpan, _started: Ns) {}
}

struct Toy;

impl Platform for Toy {
    type Env = TestEnv;
    type Space = Host;
    type Copy = NoCopy;
    type Sink = ();
}

struct World {
    host: Arc<Host>,
    env: Arc<TestEnv>,
    svm: Arc<Svm<Toy, Driver>>,
    owner: SvmOwner,
}

const BASE: u64 = 16 * PAGE_2M;

fn span(start: u64, bytes: u64) -> HostSpan {
    HostSpan::at(HostVa::new(BASE + start), bytes)
}

fn world() -> World {
    let vma = Vma {
        span: span(0, 8 * PAGE_2M),
        read: true,
        write: true,
        kind: VmaKind::Anonymous,
    };
    let host = Arc::new(Host {
        env: TestEnv::default(),
        notifiers: IntervalNotifiers::new(),
        vma: StdMutex::new(Some(vma)),
        meanwhile: StdMutex::default(),
    });
    let env = Arc::new(TestEnv::default());
    let seams = Seams {
        env: Arc::clone(&env),
        space: Arc::clone(&host),
        sink: Arc::new(()),
    };
    let area = HostSpan::at(HostVa::new(0), 1 << 40);
    let config = SvmConfig {
        vm: 1,
        owner: Owner(1),
        area,
        window_bytes: 512 << 20,
    };
    let (svm, owner) = Svm::new(seams, Driver::default(), config).expect("a good window");
    World {
        host,
        env,
        svm,
        owner,
    }
}

impl Drop for World {
    /// As a driver does: without ranges nobody watches, and nobody refers to anybody.
    fn drop(&mut self) {
        self.svm.close(&mut self.owner);
        while let Some(dead) = self.svm.pop_garbage(&mut self.owner) {
            self.remove(&dead);
        }
        while let Some(range) = self.svm.any_range(&mut self.owner) {
            self.remove(&range);
        }
    }
}

impl World {
    fn remove(&mut self, range: &RangeRef) -> Option<()> {
        self.svm
            .remove_range(&mut self.owner, range, |_binding, _held| ())
    }

    fn range(&mut self, at: u64) -> RangeRef {
        self.range_of(at, PAGE_2M)
    }

    /// A range of at most so many bytes.
    fn range_of(&mut self, at: u64, largest: u64) -> RangeRef {
        let find = FindRange {
            at: HostVa::new(BASE + at),
            area: HostSpan::at(HostVa::new(0), 1 << 40),
            access: Access::Write,
            device_memory: true,
            populated_up_to: 0,
            largest,
        };
        self.svm
            .find_or_insert_range(&mut self.owner, &find)
            .expect("the address is mapped")
    }

    fn bind(&self, range: &RangeRef, access: Access) -> Result<(), Stale> {
        let pages = self
            .svm
            .get_pages(range, access, None)
            .expect("pages are there");
        self.svm
            .commit(range, pages, |binding, _held| *binding = true)
    }

    fn invalidate(&self, what: HostSpan, reason: InvalidateReason) {
        let running = self.host.notifiers.start(what, reason);
        self.host.notifiers.end(&self.host.env, running);
    }

    fn is_bound(&self, range: &RangeRef, access: Access) -> bool {
        self.svm
            .is_bound(range, access, |binding, _pagemap| *binding)
    }

    /// The race of races: the CPU mapping changes between gathering pages and committing them.
    /// Returns whether an entry to the old pages survived.
    fn stale_entry_survives(&mut self) -> bool {
        let range = self.range(0);
        let pages = self
            .svm
            .get_pages(&range, Access::Write, None)
            .expect("pages are there");
        self.invalidate(range.span(), InvalidateReason::Clear);
        let _committed = self
            .svm
            .commit(&range, pages, |binding, _held| *binding = true);
        self.is_bound(&range, Access::Write)
    }
}

#[test]
fn change_between_gathering_and_committing_forces_a_retry() {
    assert!(!world().stale_entry_survives());
}

#[test]
fn planted_missing_recheck_is_caught() {
    let mut world = world();
    world.svm.plant_missing_recheck();
    assert!(
        world.stale_entry_survives(),
        "the test above would fail without the re-check"
    );
}

#[test]
fn exclusive_page_is_bound_unless_somebody_else_has_it() {
    let mut world = world();
    let range = world.range_of(0, PAGE);
    world.bind(&range, Access::Write).expect("nothing changed");
    let pages = world.svm.make_exclusive(&range).expect("it is private");
    assert!(pages.is_exclusive());
    assert!(!world.is_bound(&range, Access::Write), "it is zapped first");
    let bound = world
        .svm
        .commit(&range, pages, |binding, _held| *binding = true);
    assert_eq!(bound, Ok(()), "the own event is no change");
    assert!(world.is_bound(&range, Access::Write));
    for other in [
        InvalidateReason::Exclusive(Owner(2)),
        InvalidateReason::Clear,
    ] {
        let pages = world.svm.make_exclusive(&range).expect("it is private");
        world.invalidate(range.span(), other);
        let bound = world
            .svm
            .commit(&range, pages, |binding, _held| *binding = true);
        assert_eq!(bound, Err(Stale::CpuMappingChanged), "{other:?}");
    }
}

#[test]
fn larger_ranges_are_not_exclusive() {
    let mut world = world();
    let range = world.range(0);
    let made = world.svm.make_exclusive(&range);
    assert!(matches!(made, Err(Interrupted::Failed(_))), "{made:?}");
}

#[test]
fn commit_with_read_right_does_not_satisfy_a_write() {
    let mut world = world();
    let range = world.range(0);
    world.bind(&range, Access::Read).expect("nothing changed");
    assert!(world.is_bound(&range, Access::Read));
    assert!(!world.is_bound(&range, Access::Write));
}

#[test]
fn flush_covers_every_zapped_range() {
    let mut world = world();
    for at in [0, PAGE_2M, 2 * PAGE_2M] {
        let range = world.range(at);
        world.bind(&range, Access::Write).expect("nothing changed");
    }
    // From the middle of the first range into the third.
    world.invalidate(span(PAGE_2M / 2, 2 * PAGE_2M), InvalidateReason::Clear);
    let flushed = world
        .svm
        .driver()
        .flushed
        .lock()
        .expect("no test panics under the lock");
    assert_eq!(
        *flushed,
        vec![span(0, 3 * PAGE_2M)],
        "one flush, from the first range's start"
    );
}

#[test]
fn neighbour_in_the_same_window_stays_bound() {
    let mut world = world();
    let (near, far) = (world.range(0), world.range(4 * PAGE_2M));
    world.bind(&near, Access::Write).expect("nothing changed");
    world.bind(&far, Access::Write).expect("nothing changed");
    world.invalidate(near.span(), InvalidateReason::Clear);
    assert!(!world.is_bound(&near, Access::Write));
    assert!(world.is_bound(&far, Access::Write));
    let flushes = world
        .svm
        .driver()
        .flushed
        .lock()
        .expect("no test panics under the lock")
        .len();
    assert_eq!(flushes, 1);
}

#[test]
fn partly_unmapped_range_is_collected_once_and_never_bound_again() {
    let mut world = world();
    let range = world.range(0);
    world.bind(&range, Access::Write).expect("nothing changed");
    world.invalidate(span(0, 4096), InvalidateReason::Unmap);
    world.invalidate(span(4096, 4096), InvalidateReason::Unmap);
    assert_eq!(world.env.deferred.load(Ordering::Relaxed), 2);
    assert_eq!(world.bind(&range, Access::Write), Err(Stale::RangeUnmapped));
    let dead = world
        .svm
        .pop_garbage(&mut world.owner)
        .expect("one dead range");
    assert_eq!(dead.span(), range.span());
    assert!(
        world.svm.pop_garbage(&mut world.owner).is_none(),
        "queued once"
    );
    world.remove(&dead);
    assert_eq!(world.svm.range_count(), 0);
    let fresh = world.range(0);
    world
        .bind(&fresh, Access::Write)
        .expect("a new range works");
    assert!(
        !world.is_bound(&range, Access::Write),
        "the old name does not lead to the new range"
    );
}

#[test]
fn range_that_died_meanwhile_is_left_to_the_collector() {
    let mut world = world();
    let ranges = [0, PAGE_2M, 2 * PAGE_2M].map(|at| world.range(at));
    for range in &ranges {
        world.invalidate(range.span(), InvalidateReason::Unmap);
    }
    // A fault that finds its mapping gone wants to remove its range; it is in the middle of the
    // garbage list by then.
    assert!(world.remove(&ranges[1]).is_none());
    while let Some(dead) = world.svm.pop_garbage(&mut world.owner) {
        world.remove(&dead);
    }
    assert_eq!(world.svm.range_count(), 0, "none is lost from the list");
}

#[test]
fn closed_address_space_queues_no_garbage() {
    let mut world = world();
    let range = world.range(0);
    world.bind(&range, Access::Write).expect("nothing changed");
    world.svm.close(&mut world.owner);
    world.invalidate(range.span(), InvalidateReason::Unmap);
    assert!(
        !world.is_bound(&range, Access::Write),
        "entries go all the same"
    );
    assert!(world.svm.pop_garbage(&mut world.owner).is_none());
}

#[test]
fn a_thousand_dead_ranges_are_collected_after_closing() {
    const RANGES: u64 = 1000;
    let mut world = world();
    let all = span(0, RANGES * PAGE_2M);
    if let Some(vma) = world
        .host
        .vma
        .lock()
        .expect("no test panics under the lock")
        .as_mut()
    {
        vma.span = all;
    }
    for n in 0..RANGES {
        let range = world.range(n * PAGE_2M);
        world.bind(&range, Access::Write).expect("nothing changed");
    }
    world.invalidate(all, InvalidateReason::Unmap);
    world.svm.close(&mut world.owner);
    let mut collected = 0;
    while let Some(dead) = world.svm.pop_garbage(&mut world.owner) {
        world.remove(&dead);
        collected += 1;
    }
    assert_eq!((collected, world.svm.range_count()), (RANGES, 0));
}

#[test]
fn mapping_decides_how_a_look_up_fails() {
    let mut world = world();
    let find = |at: u64, access| FindRange {
        at: HostVa::new(at),
        area: HostSpan::at(HostVa::new(0), 1 << 40),
        access,
        device_memory: true,
        populated_up_to: 0,
        largest: PAGE_2M,
    };
    let beyond = HostVa::new(BASE + 8 * PAGE_2M);
    let missing = world
        .svm
        .find_or_insert_range(&mut world.owner, &find(beyond.get(), Access::Read));
    assert_eq!(missing.map(|_range| ()), Err(Failed::NoVma(beyond).into()));
    if let Some(vma) = world
        .host
        .vma
        .lock()
        .expect("no test panics under the lock")
        .as_mut()
    {
        vma.write = false;
    }
    let at = HostVa::new(BASE);
    let write = world
        .svm
        .find_or_insert_range(&mut world.owner, &find(BASE, Access::Write));
    assert_eq!(write.map(|_range| ()), Err(Failed::Permission(at).into()));
    assert!(
        world
            .svm
            .find_or_insert_range(&mut world.owner, &find(BASE, Access::Read))
            .is_ok()
    );
}

#[test]
fn mapping_that_goes_while_its_range_is_made_leaves_none_behind() {
    let mut world = world();
    let find = FindRange {
        at: HostVa::new(BASE),
        area: HostSpan::at(HostVa::new(0), 1 << 40),
        access: Access::Write,
        device_memory: true,
        populated_up_to: PAGE_2M,
        largest: PAGE_2M,
    };
    let unmap = |host: &Host| {
        let running = host
            .notifiers
            .start(span(0, 8 * PAGE_2M), InvalidateReason::Unmap);
        *host.vma.lock().expect("nothing panics") = None;
        host.notifiers.end(&host.env, running);
    };
    *world.host.meanwhile.lock().expect("nothing panics") = Some(Box::new(unmap));
    let mut look = || {
        let found = world.svm.find_or_insert_range(&mut world.owner, &find);
        found.map(|_range| ())
    };
    assert_eq!(look(), Err(Stale::CpuMappingChanged.into()));
    assert_eq!(look(), Err(Failed::NoVma(find.at).into()));
    assert_eq!(world.svm.range_count(), 0);
    assert_eq!(world.svm.notifier_count(), 0);
}
