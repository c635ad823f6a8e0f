//! Pages that are refused, of host memory and of a device's, in the middle of a migration.

use std::sync::Arc;

use gpusvm::addr::{PAGE, PageCount};
use gpusvm::error::Failed;
use gpusvm::seam::mm::{AddressSpace, MigrateTo, PagemapId, Placement};

use super::test_bench::Bench;
use crate::mm::errno::Signal;

#[test]
fn a_refused_device_page_undoes_the_migration() {
    for nth in 1..=2 {
        let bench = Bench::new();
        bench.map(0, 2);
        bench.store(0, 5);
        bench.store(1, 6);
        bench.kernel.refuse(nth);
        let toy = bench.allocation(bench.span(0, 2));
        let to = MigrateTo::device(toy.clone(), None);
        let begun = bench.space.migrate_begin(bench.span(0, 2), to).map(drop);
        assert_eq!(begun, Err(Failed::OutOfMemory.into()));
        assert_eq!(Arc::strong_count(&toy), 1, "the host lets go of it");
        assert_eq!([0, 1].map(|page| bench.load(page)), [5, 6]);
        bench.check();
    }
}

#[test]
fn pages_that_are_refused_on_a_device_stay_where_they_are() {
    let bench = Bench::new();
    bench.map(0, 4);
    bench.store(0, 5);
    bench.store(1, 6);
    for nth in 1..=4 {
        // Holes are filled first, then come pages with content.
        let refuse = || bench.kernel.refuse(nth);
        let (moved, _weak) = bench.send_with(bench.span(0, 4), refuse).expect("quiet");
        assert_eq!(moved, PageCount::new(3), "all but the one that was refused");
        assert_eq!(bench.space.placement(bench.span(0, 4)), Placement::Mixed);
        bench.check();
        assert_eq!([0, 1, 2, 3].map(|page| bench.load(page)), [5, 6, 0, 0]);
        bench
            .space
            .madvise(bench.at(2), 2 * PAGE, 4)
            .expect("anonymous");
    }
    assert_eq!(bench.kernel.refused(), 0, "host memory was not short");
}

#[test]
fn a_page_that_host_memory_is_refused_for_stays_on_its_device() {
    let bench = Bench::new();
    bench.map(0, 2);
    bench.store(0, 5);
    bench.store(1, 6);
    bench.send(bench.span(0, 2)).expect("quiet");
    for nth in 1..=2 {
        bench.kernel.refuse(nth);
        assert_eq!(bench.space.load(bench.at(0)), Err(Signal::Bus));
        assert_eq!(bench.kernel.refused(), nth);
        assert_eq!(
            bench.space.placement(bench.span(0, 2)),
            Placement::Device(PagemapId(1))
        );
        bench.check();
    }
    assert_eq!([0, 1].map(|page| bench.load(page)), [5, 6]);
    bench.check();
}
