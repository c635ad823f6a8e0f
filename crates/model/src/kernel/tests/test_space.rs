//! The seam: migrations, faults, brackets.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PageCount, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::env::Point;
use gpusvm::seam::mm::{
    Access, AddressSpace, DeviceAllocation, FaultIn, Folios, InvalidateReason, Location, MigrateTo,
    MigrationSet, Owner, PagemapId, Pager, Placement, Seen, VmaKind,
};
use gpusvm_abi::bus::{AtomicOp, SystemBus};

use super::test_bench::{Bench, Notes, RW};
use crate::kernel::bus::{Bus, Violation};
use crate::mm::entry::Entry;
use crate::mm::errno::{Errno, Signal};
use crate::mm::flags::VmFlags;
use crate::mm::map::{Map, Place, What};
use crate::mm::remap::{Remap, Target};
use crate::mm::{DeviceFolios, Machine, Shape};

fn placement(bench: &Bench, page: u32, pages: u32) -> Placement {
    bench.space.placement(bench.span(page, pages))
}

fn pages(n: u64) -> PageCount {
    PageCount::new(n)
}

#[test]
fn pages_go_to_a_device_and_come_home_when_touched() {
    let bench = Bench::new();
    bench.map(0, 4);
    bench.store(0, 10);
    bench.store(2, 12);
    let (moved, weak) = bench.send(bench.span(0, 4)).expect("nothing in the way");
    assert_eq!(moved, pages(4));
    assert_eq!(placement(&bench, 0, 4), Placement::Device(PagemapId(1)));
    bench.check();
    assert_eq!(bench.load(2), 12);
    assert!(
        weak.upgrade().is_none(),
        "the last page frees the allocation"
    );
    assert_eq!(placement(&bench, 0, 4), Placement::System);
    assert_eq!([0, 1, 3].map(|page| bench.load(page)), [10, 0, 0]);
    bench.check();
}

#[test]
fn a_dropped_migration_leaves_everything_as_it_was() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    let before = bench.space.entry(bench.at(0)).and_then(Entry::named_frame);
    let allocation = bench.allocation(bench.span(0, 2));
    let to = MigrateTo::device(allocation.clone(), None);
    drop(
        bench
            .space
            .migrate_begin(bench.span(0, 2), to)
            .expect("free"),
    );
    let after = bench.space.entry(bench.at(0)).and_then(Entry::named_frame);
    assert_eq!(before, after);
    assert_eq!(Arc::strong_count(&allocation), 1, "no page holds it");
    bench.check();
    bench.store(0, 2);
    assert_eq!(bench.load(0), 2);
}

#[test]
fn a_hole_that_is_written_meanwhile_stays_in_host_memory() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(1, 1);
    let (moved, weak) = bench
        .send_with(bench.span(0, 2), || bench.store(0, 7))
        .expect("nothing in the way");
    assert_eq!(moved, pages(1));
    assert_eq!(placement(&bench, 0, 2), Placement::Mixed);
    assert_eq!((bench.load(0), bench.load(1)), (7, 1));
    assert!(weak.upgrade().is_none());
    bench.check();
}

#[test]
fn content_dropped_meanwhile_stays_dropped() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    bench.store(1, 2);
    let drop_first = || {
        bench
            .space
            .madvise(bench.at(0), PAGE, 4)
            .expect("anonymous")
    };
    let (moved, _) = bench.send_with(bench.span(0, 2), drop_first).expect("free");
    assert_eq!(moved, pages(1));
    assert_eq!((bench.load(0), bench.load(1)), (0, 2));
    bench.check();
}

#[test]
fn unmapping_frees_the_allocation_without_a_copy() {
    let bench = Bench::new();
    bench.map(0, 4);
    bench.store(0, 1);
    let (_, weak) = bench.send(bench.span(0, 4)).expect("free");
    bench.space.munmap(bench.at(0), 3 * PAGE).expect("mapped");
    assert!(weak.upgrade().is_some(), "one page is left");
    bench.check();
    bench.space.munmap(bench.at(3), PAGE).expect("mapped");
    assert!(weak.upgrade().is_none());
    bench.check();
}

#[test]
fn a_child_shares_device_pages_and_both_find_their_content() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 5);
    let (_, weak) = bench.send(bench.span(0, 2)).expect("free");
    let child = bench.space.fork().expect("room");
    bench.check();
    assert_eq!(
        child.placement(bench.span(0, 2)),
        Placement::Device(PagemapId(1))
    );
    child.store(bench.at(0), 6).expect("writable");
    assert!(
        weak.upgrade().is_none(),
        "a touch by one brings the page home for both"
    );
    assert_eq!(bench.load(0), 5);
    assert_eq!(child.load(bench.at(0)), Ok(6));
    child.exit();
    bench.check();
    assert_eq!(child.find_vma(bench.at(0)), None);
}

#[test]
fn moved_mappings_take_their_device_pages_along() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(1, 9);
    bench.send(bench.span(0, 2)).expect("free");
    let remap = Remap {
        at: bench.at(0),
        old_len: 2 * PAGE,
        new_len: 2 * PAGE,
        target: Target::At(bench.at(20)),
    };
    bench.space.mremap(&remap).expect("free");
    assert_eq!(placement(&bench, 20, 2), Placement::Device(PagemapId(1)));
    bench.check();
    assert_eq!(bench.load(21), 9);
    bench.check();
}

#[test]
fn a_fault_during_the_way_home_waits_for_it() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 3);
    bench.send(bench.span(0, 1)).expect("free");
    let (space, at) = (Arc::clone(&bench.space), bench.at(0));
    let adds: u64 = 200;
    std::thread::scope(|scope| {
        let adder = scope.spawn(|| {
            for _ in 0..adds {
                space.atomic(at, AtomicOp::Add(1)).expect("writable");
            }
        });
        while !adder.is_finished() {
            match bench.send(bench.span(0, 1)) {
                Ok(_) | Err(Interrupted::Stale(_)) => {}
                Err(Interrupted::Failed(failed)) => panic!("{failed}"),
            }
        }
    });
    assert_eq!(bench.load(0), 3 + adds);
    bench.check();
}

#[test]
fn fault_in_reports_runs_and_brings_foreign_pages_home() {
    let bench = Bench::new();
    bench.map(0, 4);
    bench.store(0, 1);
    bench.send(bench.span(2, 2)).expect("free");
    let mut runs = Vec::new();
    let mut request = FaultIn {
        span: bench.span(0, 4),
        access: Access::Write,
        keep: Some(PagemapId(1)),
        pager: Pager::Wait,
    };
    bench.space.fault_in(&request, &mut runs).expect("mapped");
    let total: PageCount = runs.iter().map(|run| run.pages).sum();
    assert_eq!(total, pages(4));
    let last = runs.last().expect("not empty");
    assert_eq!(last.pages, pages(2));
    assert!(matches!(
        last.at,
        Location::Device {
            pagemap: PagemapId(1),
            ..
        }
    ));
    request.keep = None;
    bench.space.fault_in(&request, &mut runs).expect("mapped");
    assert!(runs.iter().all(|run| matches!(run.at, Location::System(_))));
    bench.check();
}

#[test]
fn fault_in_tells_why_a_page_cannot_be_used() {
    let bench = Bench::new();
    bench.map(0, 2);
    let mut runs = Vec::new();
    let mut request = FaultIn {
        span: bench.span(0, 3),
        access: Access::Read,
        keep: None,
        pager: Pager::Wait,
    };
    let bad = |page: u32| Err(Interrupted::Failed(Failed::BadPage(bench.at(page))));
    assert_eq!(bench.space.fault_in(&request, &mut runs), bad(2));
    bench
        .space
        .madvise(bench.at(1), PAGE, 102)
        .expect("anonymous");
    request.span = bench.span(0, 2);
    assert_eq!(bench.space.fault_in(&request, &mut runs), bad(1));
    bench
        .space
        .mprotect(bench.at(0), PAGE, VmFlags::READ)
        .expect("mapped");
    request.access = Access::Write;
    request.span = bench.span(0, 1);
    let denied = Err(Interrupted::Failed(Failed::Permission(bench.at(0))));
    assert_eq!(bench.space.fault_in(&request, &mut runs), denied);
}

#[test]
fn every_change_is_bracketed_with_its_reason() {
    let bench = Bench::new();
    bench.map(0, 4);
    bench.store(0, 1);
    let notes = Arc::new(Notes::default());
    let interval = bench
        .space
        .subscribe(bench.span(0, 64), notes.clone())
        .expect("alive");
    let reasons = |act: &dyn Fn()| {
        notes.0.lock().expect("no panics").clear();
        let seq = bench.space.read_begin(&interval);
        act();
        let seen = notes.0.lock().expect("no panics").clone();
        assert_eq!(interval.read_retry(seq), !seen.is_empty());
        seen.into_iter()
            .map(|(_, reason)| reason)
            .collect::<Vec<_>>()
    };
    let advise = |advice| {
        bench
            .space
            .madvise(bench.at(0), PAGE, advice)
            .expect("anonymous")
    };
    assert_eq!(reasons(&|| drop(bench.load(0).to_string())), []);
    assert_eq!(reasons(&|| advise(4)), [InvalidateReason::Clear]);
    let protect = || {
        bench
            .space
            .mprotect(bench.at(0), PAGE, VmFlags::READ)
            .expect("mapped")
    };
    assert_eq!(reasons(&protect), [InvalidateReason::ProtectVma]);
    let send = || drop(bench.send(bench.span(1, 1)).is_ok().to_string());
    assert_eq!(reasons(&send), [InvalidateReason::Migrate; 2]);
    let fork = || drop(bench.space.fork().is_ok().to_string());
    assert_eq!(reasons(&fork), [InvalidateReason::ProtectPage; 2]);
    let unmap = || bench.space.munmap(bench.at(0), 4 * PAGE).expect("mapped");
    assert_eq!(reasons(&unmap), [InvalidateReason::Unmap]);
    bench.space.unsubscribe(&interval);
}

#[test]
fn a_change_between_reading_and_using_is_seen() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    let notes = Arc::new(Notes::default());
    let interval = bench
        .space
        .subscribe(bench.span(0, 1), notes)
        .expect("alive");
    let seq = bench.space.read_begin(&interval);
    let mut runs = Vec::new();
    let request = FaultIn {
        span: bench.span(0, 1),
        access: Access::Read,
        keep: None,
        pager: Pager::Wait,
    };
    bench.space.fault_in(&request, &mut runs).expect("mapped");
    bench
        .space
        .madvise(bench.at(0), PAGE, 4)
        .expect("anonymous");
    assert!(interval.read_retry(seq));
    let Location::System(at) = runs[0].at else {
        panic!("in host memory");
    };
    let bus = Bus::new(Arc::clone(&bench.kernel));
    assert!(bus.read(at.get(), &mut [0; 8]).is_err());
    assert_eq!(bench.kernel.violations(), [Violation::UseAfterFree(at)]);
    bench.space.unsubscribe(&interval);
}

#[test]
fn pinned_pages_refuse_and_shared_ones_move() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    let frame = bench
        .space
        .pin(bench.at(0), Access::Write)
        .expect("writable");
    let refused = bench.send(bench.span(0, 2)).map(|_| ());
    assert_eq!(refused, Err(Stale::PagesRefused.into()));
    bench.check();
    bench.space.unpin(frame);
    let child = bench.space.fork().expect("room");
    let (moved, _) = bench.send(bench.span(0, 2)).expect("free");
    assert_eq!(moved, pages(2));
    assert_eq!(child.load(bench.at(0)), Ok(1));
    assert_eq!(bench.load(0), 1);
    bench.check();
}

#[test]
fn large_pages_split_when_they_migrate() {
    let bench = Bench::new();
    bench.map(0, 8);
    bench
        .space
        .madvise(bench.at(0), 8 * PAGE, 14)
        .expect("anonymous");
    bench.store(1, 4);
    assert!(bench.kernel.look(|mm| mm.is_huge(bench.space.pid(), 0)));
    let (moved, _) = bench.send(bench.span(1, 2)).expect("free");
    assert_eq!(moved, pages(2));
    bench.check();
    assert_eq!((bench.load(0), bench.load(1)), (0, 4));
}

#[test]
fn an_exclusive_page_comes_back_when_the_cpu_touches_it() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 4);
    let mut given = None;
    let made = bench
        .space
        .make_exclusive(bench.at(0), Owner(1), &mut |bus| given = Some(bus));
    made.expect("private memory");
    assert_eq!(bench.read(given.expect("committed")), 4);
    assert!(matches!(
        bench.space.entry(bench.at(0)),
        Some(Entry::DeviceExclusive(..))
    ));
    bench.check();
    assert_eq!(bench.load(0), 4);
    assert!(matches!(
        bench.space.entry(bench.at(0)),
        Some(Entry::Present(..))
    ));
}

/// A machine whose device memory has large pages of four, with two of coherent memory.
fn large() -> Bench {
    let bench = Bench::of(Shape {
        device_folios: DeviceFolios::Large,
        coherent: 2,
        ..Shape::default()
    });
    bench.map(0, 8);
    let huge = bench.space.madvise(bench.at(0), 8 * PAGE, 14);
    huge.expect("anonymous");
    bench
}

fn order_at(bench: &Bench, page: u32) -> Option<u8> {
    let mut seen = Vec::new();
    let looked = bench
        .space
        .snapshot(bench.span(page, 1), Some(PagemapId(1)), &mut seen);
    looked.expect("alive");
    match seen[..] {
        [Seen::Page(page)] => Some(page.order),
        _ => None,
    }
}

#[test]
fn large_pages_go_and_come_whole() {
    let bench = large();
    bench.store(1, 4);
    // A block that was written, and one of holes.
    let (moved, allocation) = bench.send(bench.span(0, 8)).expect("free");
    assert_eq!(moved, pages(8));
    assert_eq!(
        (order_at(&bench, 0), order_at(&bench, 5)),
        (Some(2), Some(2))
    );
    bench.check();
    assert_eq!((bench.load(0), bench.load(1), bench.load(7)), (0, 4, 0));
    assert_eq!(order_at(&bench, 1), Some(2), "home in one piece");
    assert!(allocation.upgrade().is_none());
    bench.check();
}

#[test]
fn part_of_a_large_device_page_comes_home_alone() {
    let bench = large();
    bench.store(1, 4);
    bench.store(2, 5);
    let (_, allocation) = bench.send(bench.span(0, 4)).expect("free");
    let allocation = allocation.upgrade().expect("it has pages");
    let part = VramSpan::at(allocation.vram().start().plus(PAGE), PAGE);
    assert_eq!(bench.bring(&allocation, part, Folios::Split), pages(1));
    assert_eq!(order_at(&bench, 0), Some(0), "cut");
    assert!(matches!(
        bench.space.entry(bench.at(2)),
        Some(Entry::DevicePrivate(..))
    ));
    bench.check();
    drop(allocation);
    assert_eq!((bench.load(1), bench.load(2)), (4, 5));
    bench.check();
}

#[test]
fn half_of_a_large_device_page_can_be_unmapped_moved_and_inherited() {
    let bench = large();
    bench.store(1, 4);
    bench.store(6, 9);
    bench.send(bench.span(0, 8)).expect("free");
    bench.space.munmap(bench.at(2), 2 * PAGE).expect("mapped");
    bench.check();
    let child = bench.space.fork().expect("room");
    bench.check();
    assert_eq!(child.load(bench.at(6)), Ok(9));
    assert_eq!((bench.load(1), bench.load(6)), (4, 9));
    child.exit();
    bench.check();
}

#[test]
fn a_mixed_span_comes_home_by_its_device_pages_and_nothing_else_moves() {
    let bench = Bench::new();
    bench.map(0, 8);
    (0..8).for_each(|page| bench.store(page, u64::from(page) + 1));
    let frame = |page| {
        bench
            .space
            .entry(bench.at(page))
            .and_then(Entry::mapped_frame)
    };
    let (_, first) = bench.send(bench.span(2, 2)).expect("free");
    let (_, second) = bench.send(bench.span(5, 1)).expect("free");
    let stay = [0, 1, 4, 6, 7];
    let before = stay.map(frame);
    let request = FaultIn {
        span: bench.span(0, 8),
        access: Access::Read,
        keep: None,
        pager: Pager::Wait,
    };
    let home = bench.space.fault_in(&request, &mut Vec::new());
    home.expect("mapped");
    assert_eq!(stay.map(frame), before);
    assert_eq!(placement(&bench, 0, 8), Placement::System);
    assert!(first.upgrade().is_none() && second.upgrade().is_none());
    assert_eq!([2, 3, 5].map(|page| bench.load(page)), [3, 4, 6]);
    bench.check();
}

#[test]
fn coherent_pages_are_used_where_they_are() {
    let bench = large();
    bench.store(1, 4);
    let toy = bench.coherent(bench.span(1, 1));
    let to = MigrateTo::device(toy, None);
    let set = bench.space.migrate_begin(bench.span(1, 1), to);
    let set = set.expect("free");
    Bench::copy_coherent(&bench.kernel, set.moves());
    assert_eq!(set.finalize(), pages(1));
    bench.check();
    bench.store(1, bench.load(1) + 1);
    let present = bench.space.entry(bench.at(1)).and_then(Entry::mapped_frame);
    let coherent = |mm: &Machine| present.is_some_and(|frame| mm.memory().is_coherent(frame));
    assert!(bench.kernel.look(coherent), "no touch brings it home");
    // What stays long is not in device memory.
    let pinned = bench.space.pin(bench.at(1), Access::Write).expect("mapped");
    assert!(!bench.kernel.look(|mm| mm.memory().is_device(pinned)));
    assert_eq!(bench.load(1), 5);
    bench.space.unpin(pinned);
    bench.check();
}

#[test]
fn pages_of_the_pool_come_whole_and_are_not_cut() {
    let bench = Bench::new();
    let map = Map {
        place: Place::Hint(HostVa::new(0)),
        len: PAGE,
        prot: RW,
        what: What::Hugetlb,
        extra: VmFlags::NONE,
    };
    let at = bench.space.mmap(&map).expect("room");
    bench.space.store(at.plus(PAGE), 7).expect("writable");
    let kind = bench.space.find_vma(at).map(|vma| (vma.kind, vma.span));
    assert_eq!(kind, Some((VmaKind::HugePages, HostSpan::at(at, 4 * PAGE))));
    assert_eq!(bench.space.munmap(at, PAGE), Err(Errno::Invalid));
    let child = bench.space.fork().expect("room");
    child.store(at.plus(PAGE), 8).expect("writable");
    assert_eq!(bench.space.load(at.plus(PAGE)), Ok(7));
    child.exit();
    bench.space.munmap(at, 4 * PAGE).expect("whole");
    bench.check();
}

#[test]
fn reclaim_between_steps_of_an_unmap_loses_nothing() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    bench.store(1, 2);
    let (space, at) = (Arc::clone(&bench.space), bench.at(1));
    bench.env.at(Point::PteWrite, move || {
        assert!(space.reclaim(at));
        space.kernel().check().expect("true between steps, too");
    });
    bench
        .space
        .madvise(bench.at(0), PAGE, 4)
        .expect("anonymous");
    assert!(matches!(
        bench.space.entry(bench.at(1)),
        Some(Entry::Swap(..))
    ));
    assert_eq!((bench.load(0), bench.load(1)), (0, 2));
    bench.check();
}

#[test]
fn a_process_that_ended_answers_that_it_is_gone() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    let (_, weak) = bench.send(bench.span(0, 1)).expect("free");
    bench.space.exit();
    assert!(weak.upgrade().is_none());
    let gone = bench.send(bench.span(0, 1)).map(|_| ());
    assert_eq!(gone, Err(Failed::AddressSpaceGone.into()));
    assert_eq!(bench.space.load(bench.at(0)), Err(Signal::Segv));
    bench.check();
}

#[test]
fn bytes_are_loaded_and_stored_across_pages() {
    let bench = Bench::new();
    bench.map(0, 2);
    let (before, border) = (bench.at(0).plus(PAGE - 2), bench.at(1));
    // The last bytes of the first page lie behind the words that it has.
    bench
        .space
        .write(before, &[1, 2, 3, 4, 5, 6])
        .expect("mapped");
    let mut found = [9; 7];
    bench.space.read(before, &mut found).expect("mapped");
    assert_eq!(found, [0, 0, 3, 4, 5, 6, 0]);
    bench.space.write(border.plus(1), &[7]).expect("mapped");
    let word = bench.space.load(border).expect("mapped");
    assert_eq!(word.to_ne_bytes(), [3, 7, 5, 6, 0, 0, 0, 0]);
    let behind = bench.space.write(bench.at(2), &[1]);
    assert_eq!(behind, Err(Signal::Segv));
    bench.check();
}
