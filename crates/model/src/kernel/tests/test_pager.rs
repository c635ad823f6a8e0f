//! Faults that the program serves itself, and memory errors.

use gpusvm::addr::PAGE;
use gpusvm::error::Failed;
use gpusvm::seam::env::Point;
use gpusvm::seam::mm::{Access, AddressSpace, FaultIn, MigrateTo, Pager};

use super::test_bench::Bench;
use crate::mm::errno::{Errno, Signal};
use crate::mm::uffd::Stores;
use crate::mm::{Pid, reclaim};

#[test]
fn missing_pages_are_filled_by_the_program() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.space.serve_missing(bench.span(0, 2)).expect("mapped");
    let mut request = FaultIn {
        span: bench.span(0, 2),
        access: Access::Read,
        keep: None,
        pager: Pager::Refuse,
    };
    let mut runs = Vec::new();
    let refused = bench.space.fault_in(&request, &mut runs);
    assert_eq!(refused, Err(Failed::BadPage(bench.at(0)).into()));
    request.pager = Pager::Wait;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _page in 0..2 {
                let at = bench.space.next_fault();
                bench.space.fill_missing(at, &[7]).expect("missing");
            }
        });
        bench.space.fault_in(&request, &mut runs).expect("filled");
    });
    assert_eq!((bench.load(0), bench.load(1)), (7, 7));
    let full = bench.space.fill_missing(bench.at(0), &[8]);
    assert_eq!(full, Err(Errno::Exist));
    bench.check();
}

#[test]
fn stores_to_protected_pages_wait_for_the_program() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    let span = bench.span(0, 2);
    let refused = bench.space.write_protect(span, Stores::Wait);
    assert_eq!(refused, Err(Errno::NoEnt), "nobody serves them");
    bench.space.serve_stores(span).expect("mapped");
    bench
        .space
        .write_protect(span, Stores::Wait)
        .expect("served");
    let mut request = FaultIn {
        span: bench.span(0, 1),
        access: Access::Write,
        keep: None,
        pager: Pager::Refuse,
    };
    let mut runs = Vec::new();
    let refused = bench.space.fault_in(&request, &mut runs);
    assert_eq!(refused, Err(Failed::BadPage(bench.at(0)).into()));
    request.access = Access::Read;
    let read = bench.space.fault_in(&request, &mut runs);
    read.expect("loads go on");
    for page in 0..2 {
        std::thread::scope(|scope| {
            let stored = scope.spawn(|| bench.space.store(bench.at(page), 5));
            assert_eq!(bench.space.next_fault(), bench.at(page));
            assert!(!stored.is_finished());
            let allowed = bench.space.write_protect(bench.span(page, 1), Stores::Go);
            allowed.expect("served");
            assert_eq!(stored.join().expect("it ends"), Ok(()));
        });
        assert_eq!(bench.load(page), 5);
    }
    bench.space.stop_serving(span).expect("a span");
    bench.check();
}

#[test]
fn a_memory_error_waits_for_a_migration_and_devices_are_refused() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 1);
    bench.store(1, 2);
    let span = bench.span(0, 1);
    let to = MigrateTo::device(bench.allocation(span), None);
    let set = bench.space.migrate_begin(span, to).expect("free");
    std::thread::scope(|scope| {
        let kernel = bench.space.kernel();
        let lost = scope.spawn(|| reclaim::inject_error(&**kernel, Pid(0), 0));
        (0..1000).for_each(|_| std::thread::yield_now());
        assert!(!lost.is_finished(), "whoever moves it is waited for");
        drop(set);
        assert_eq!(lost.join().expect("it ends"), Ok(()));
    });
    assert_eq!(bench.space.load(bench.at(0)), Err(Signal::Bus));
    let request = FaultIn {
        span: bench.span(0, 2),
        access: Access::Read,
        keep: None,
        pager: Pager::Wait,
    };
    let refused = bench.space.fault_in(&request, &mut Vec::new());
    assert_eq!(refused, Err(Failed::BadPage(bench.at(0)).into()));
    bench.check();
}

/// A page that was read in from swap is freed by who had it last, be it whom an error made lock it.
#[test]
fn a_child_that_ends_during_a_memory_error_leaves_no_page_behind() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    assert!(bench.space.reclaim(bench.at(0)), "it goes to swap");
    let child = bench.space.fork().expect("room");
    bench.env.at(Point::PteWrite, move || child.exit());
    let lost = reclaim::inject_error(&**bench.space.kernel(), Pid(0), 0);
    assert_eq!(lost, Ok(()));
    let unmapped = bench.space.munmap(bench.at(0), PAGE);
    unmapped.expect("mapped");
    let left = bench.kernel.look(|mm| mm.memory().taken_frames().count());
    assert_eq!(left, 0);
    bench.check();
}
