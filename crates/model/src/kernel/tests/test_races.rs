//! What others do to pages in the middle of an operation.

use std::sync::Arc;

use gpusvm::addr::{BusAddr, PAGE, PageCount, VramSpan};
use gpusvm::event::HomeCause;
use gpusvm::seam::env::Point;
use gpusvm::seam::mm::{
    Access, AddressSpace, DeviceAllocation, Folios, MigrateTo, MigrationSet, Owner,
};
use gpusvm_abi::bus::SystemBus;

use super::test_bench::Bench;
use crate::kernel::bus::Bus;
use crate::mm::entry::Entry;
use crate::mm::errno::Signal;
use crate::mm::flags::Bits;
use crate::mm::pagemap::PM_SOFT_DIRTY;
use crate::mm::reclaim::poison;
use crate::mm::remap::{Remap, Target};
use crate::mm::uffd::Stores;
use crate::mm::{DeviceFolios, Shape};

const DONTNEED: i32 = 4;
const HUGE: i32 = 14;
const NO_HUGE: i32 = 15;
const FREE: i32 = 8;

fn pages(n: u64) -> PageCount {
    PageCount::new(n)
}

/// Two blocks of memory that gets large pages, on devices, too.
fn large() -> Bench {
    let bench = Bench::of(Shape {
        device_folios: DeviceFolios::Large,
        ..Shape::default()
    });
    bench.map(0, 8);
    let huge = bench.space.madvise(bench.at(0), 8 * PAGE, HUGE);
    huge.expect("anonymous");
    bench
}

fn entry(bench: &Bench, page: u32) -> Entry {
    bench.space.entry(bench.at(page)).expect("inside")
}

#[test]
fn a_page_that_is_discarded_while_a_device_takes_it_stays_until_it_has_it() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 7);
    let mut seen = None;
    let mut commit = |page| {
        let discarded = bench.space.madvise(bench.at(0), PAGE, DONTNEED);
        discarded.expect("anonymous");
        seen = Some(bench.read(page));
    };
    let taken = bench
        .space
        .make_exclusive(bench.at(0), Owner(1), &mut commit);
    assert_eq!((taken, seen), (Ok(()), Some(7)));
    assert_eq!(entry(&bench, 0), Entry::None);
    bench.check();
}

#[test]
fn missing_pages_that_the_program_serves_are_not_filled_on_a_device() {
    for (advice, there) in [(NO_HUGE, 1), (HUGE, 4)] {
        let bench = large();
        let advised = bench.space.madvise(bench.at(0), 8 * PAGE, advice);
        advised.expect("anonymous");
        bench.store(0, 1);
        bench.space.serve_missing(bench.span(0, 8)).expect("mapped");
        let (moved, _weak) = bench.send(bench.span(0, 8)).expect("free");
        assert_eq!(moved, pages(there), "not what the program has to give");
        assert_eq!(entry(&bench, 5), Entry::None);
        let filled = bench.space.fill_missing(bench.at(5), &[9]);
        assert_eq!((filled, bench.load(5)), (Ok(()), 9));
        bench.check();
    }
}

#[test]
fn half_of_a_block_moves_while_all_of_it_comes_home_at_once() {
    let bench = large();
    (0..4).for_each(|page| bench.store(page, u64::from(page) + 1));
    let (_, allocation) = bench.send(bench.span(0, 4)).expect("free");
    let allocation = allocation.upgrade().expect("it has pages");
    // Between cutting the block and moving the first entry.
    bench.env.at(Point::PteWrite, move || {
        let home = allocation.bring_home(HomeCause::CpuFault);
        assert_eq!(home, Ok(pages(4)));
    });
    let remap = Remap {
        at: bench.at(2),
        old_len: 2 * PAGE,
        new_len: 2 * PAGE,
        target: Target::At(bench.at(10)),
    };
    assert_eq!(bench.space.mremap(&remap), Ok(bench.at(10)));
    bench.check();
    assert_eq!([0, 1, 10, 11].map(|page| bench.load(page)), [1, 2, 3, 4]);
    assert_eq!(bench.space.load(bench.at(2)), Err(Signal::Segv));
    bench.check();
}

#[test]
fn protecting_a_part_of_a_block_that_came_late_leaves_the_rest_alone() {
    let bench = large();
    bench.space.serve_stores(bench.span(0, 8)).expect("mapped");
    let space = Arc::clone(&bench.space);
    let first = bench.at(0);
    bench.env.at(Point::PteWrite, move || {
        space.store(first, 7).expect("writable");
    });
    let protected = bench.space.write_protect(bench.span(2, 2), Stores::Wait);
    assert_eq!(protected, Ok(()));
    let bits = [0, 1, 2, 3].map(|page| entry(&bench, page).bits().has(Bits::UFFD_WP));
    assert_eq!(bits, [false, false, true, true]);
    bench.store(1, 8);
    assert_eq!((bench.load(0), bench.load(1)), (7, 8));
    bench.check();
}

#[test]
fn a_page_that_goes_bad_while_it_moves_is_lost_where_it_stays() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    bench.store(1, 2);
    let bad = entry(&bench, 0).mapped_frame().expect("present");
    let to = MigrateTo::device(bench.allocation(bench.span(0, 2)), None);
    let set = bench.space.migrate_begin(bench.span(0, 2), to);
    let set = set.expect("free");
    poison(&*bench.kernel, bad);
    drop(set);
    assert_eq!(bench.space.load(bench.at(0)), Err(Signal::Bus));
    assert_eq!(bench.load(1), 2);
    bench.check();
}

#[test]
fn a_large_device_page_with_a_bad_one_in_it_is_not_used_again() {
    let bench = large();
    bench.store(1, 2);
    let (_, allocation) = bench.send(bench.span(0, 4)).expect("free");
    let allocation = allocation.upgrade().expect("it has pages");
    let bad = entry(&bench, 1).mapped_frame().expect("on the device");
    let to = MigrateTo::System {
        allocation: allocation.clone(),
        part: VramSpan::at(allocation.vram().start(), 4 * PAGE),
        aperture: None,
        folios: Folios::Keep,
    };
    let set = bench.space.migrate_begin(bench.span(0, 4), to);
    let set = set.expect("free");
    poison(&*bench.kernel, bad);
    bench.copy(set.moves());
    assert_eq!(set.finalize(), pages(4));
    bench.check();
    for _again in 0..2 {
        let (moved, _weak) = bench.send(bench.span(0, 8)).expect("free");
        assert_eq!(moved, pages(8));
        assert!((0..8).all(|page| entry(&bench, page).named_frame() != Some(bad)));
        bench.check();
        assert_eq!([1, 7].map(|page| bench.load(page)), [2, 0]);
    }
}

#[test]
fn a_large_device_page_comes_home_in_pieces_where_there_is_no_large_page() {
    let bench = large();
    (0..4).for_each(|page| bench.store(page, u64::from(page) + 1));
    let (_, allocation) = bench.send(bench.span(0, 4)).expect("free");
    bench.kernel.refuse(1);
    assert_eq!(bench.load(1), 2);
    assert_eq!(bench.kernel.refused(), 1, "the large page");
    let whole = bench.kernel.look(|mm| mm.is_huge(bench.space.pid(), 0));
    assert!(!whole && allocation.upgrade().is_none());
    assert_eq!([0, 1, 2, 3].map(|page| bench.load(page)), [1, 2, 3, 4]);
    bench.check();
}

/// A device writes the first word of a page.
fn write(bench: &Bench, page: BusAddr, word: u64) {
    let bus = Bus::new(Arc::clone(&bench.kernel));
    let written = bus.write(page.get(), &word.to_ne_bytes());
    written.expect("somebody's");
}

#[test]
fn what_a_device_writes_to_a_page_that_was_given_away_stays() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    let freed = bench.space.madvise(bench.at(0), PAGE, FREE);
    freed.expect("anonymous");
    let page = bench.look_up(Access::Write);
    write(&bench, page, 7);
    let gone = [0, 1].map(|_time| bench.space.reclaim(bench.at(0)));
    assert_eq!(gone, [false, true], "given away no more, then swapped out");
    assert_eq!(bench.load(0), 7);
    bench.check();
}

#[test]
fn what_a_device_writes_to_its_own_page_that_was_given_away_stays() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    // Between faulting it in and taking it.
    let (env, space, at) = (
        Arc::clone(&bench.env),
        Arc::clone(&bench.space),
        bench.at(0),
    );
    bench.env.at(Point::HostLock, move || {
        env.at(Point::HostLock, move || {
            space.madvise(at, PAGE, FREE).expect("anonymous");
        });
    });
    let mut commit = |page| write(&bench, page, 7);
    let taken = bench.space.make_exclusive(at, Owner(1), &mut commit);
    assert_eq!(taken, Ok(()));
    let gone = [0, 1].map(|_time| bench.space.reclaim(at));
    assert_eq!(gone, [false, true], "given away no more, then swapped out");
    assert_eq!(bench.load(0), 7);
    bench.check();
}

#[test]
fn what_moves_counts_as_written_wherever_it_is() {
    let bench = large();
    let advised = bench.space.madvise(bench.at(0), 4 * PAGE, NO_HUGE);
    advised.expect("anonymous");
    (1..3).for_each(|page| bench.store(page, 1));
    // A page of zeros, one on a device, one that a device has for itself, a large page of zeros.
    assert_eq!((bench.load(0), bench.load(4)), (0, 0));
    bench.send(bench.span(1, 1)).expect("free");
    let taken = bench
        .space
        .make_exclusive(bench.at(2), Owner(1), &mut |_page| ());
    taken.expect("free");
    bench.space.clear_soft_dirty();
    let dirty = |page| bench.space.pagemap(bench.at(page)) & PM_SOFT_DIRTY != 0;
    assert_eq!([0, 1, 2, 4].map(dirty), [false; 4]);
    for (from, to) in [(0, 8), (4, 12)] {
        let remap = Remap {
            at: bench.at(from),
            old_len: 4 * PAGE,
            new_len: 4 * PAGE,
            target: Target::At(bench.at(to)),
        };
        bench.space.mremap(&remap).expect("one mapping");
    }
    assert_eq!([8, 9, 10, 12].map(dirty), [true; 4]);
    bench.check();
}
