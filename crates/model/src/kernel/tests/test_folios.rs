//! Device folios: cut around what comes home, and lost to memory errors.

use gpusvm::addr::{PAGE, PageCount, VramSpan};
use gpusvm::error::Failed;
use gpusvm::seam::mm::{
    Access, AddressSpace, DeviceAllocation, FaultIn, Folios, MigrateTo, MigrationSet, PagemapId,
    Pager,
};

use super::test_bench::{Bench, RW, Toy};
use crate::mm::entry::Entry;
use crate::mm::errno::Signal;
use crate::mm::flags::Prot;
use crate::mm::memory::DevicePage;
use crate::mm::{DeviceFolios, Shape};

fn pages(n: u64) -> PageCount {
    PageCount::new(n)
}

/// Pages of the folios of an allocation, in order, and what each keeps of its own: its references and
/// where it is in the allocation.
fn folios_of(bench: &Bench, allocation: &Toy) -> Vec<u32> {
    let id = allocation.id().0;
    bench.kernel.look(|mm| {
        let place = mm.place_of(id).expect("it has pages");
        let folios = mm.device_folios(place);
        for (head, pages) in &folios {
            let folio = mm.memory().frame(*head);
            assert_eq!(folio.refs, pages.len(), "one mapping of each page");
            let at = DevicePage {
                place,
                page: pages.start,
            };
            assert_eq!(mm.memory().device_page(*head), Some(at));
        }
        let covered = folios.iter().flat_map(|(_, pages)| pages.iter());
        let covered: Vec<u32> = covered.collect();
        assert!(
            covered.is_sorted_by(|one, next| one < next),
            "no page twice"
        );
        folios.iter().map(|(_, pages)| pages.len()).collect()
    })
}

#[test]
fn what_is_left_of_a_large_device_page_stays_as_large_as_it_can() {
    let bench = Bench::of(Shape {
        device_folios: DeviceFolios::Large,
        pmd_order: 9,
        pages: 512,
        frames: 1024,
        ..Shape::default()
    });
    bench.map(0, 512);
    let huge = bench.space.madvise(bench.at(0), 512 * PAGE, 14);
    huge.expect("anonymous");
    for page in [0, 99, 100, 101, 511] {
        bench.store(page, u64::from(page) + 1);
    }
    let (moved, allocation) = bench.send(bench.span(0, 512)).expect("free");
    assert_eq!(moved, pages(512));
    let allocation = allocation.upgrade().expect("it has pages");
    // Small entries for one large page, as after any change of a part of it.
    for prot in [Prot::READ, RW] {
        let changed = bench.space.mprotect(bench.at(100), PAGE, prot);
        changed.expect("mapped");
    }
    let at = |page: u64| allocation.vram().start().plus(page * PAGE);
    let one = VramSpan::at(at(100), PAGE);
    assert_eq!(bench.bring(&allocation, one, Folios::Keep), pages(1));
    let left = [64, 32, 4, 1, 2, 8, 16, 128, 256];
    assert_eq!(folios_of(&bench, &allocation), left);
    bench.check();
    // Three pages that lie in two of those.
    let three = VramSpan::at(at(98), 3 * PAGE);
    assert_eq!(bench.bring(&allocation, three, Folios::Keep), pages(2));
    let left = [64, 32, 2, 1, 2, 8, 16, 128, 256];
    assert_eq!(folios_of(&bench, &allocation), left);
    bench.check();
    drop(allocation);
    let found = [0, 99, 100, 101, 511].map(|page| bench.load(page));
    assert_eq!(found, [1, 100, 101, 102, 512]);
    bench.check();
}

#[test]
fn a_bad_device_page_is_lost_and_all_others_come_home() {
    for folios in [DeviceFolios::Small, DeviceFolios::Large] {
        let bench = Bench::of(Shape {
            device_folios: folios,
            ..Shape::default()
        });
        bench.map(0, 4);
        let huge = bench.space.madvise(bench.at(0), 4 * PAGE, 14);
        huge.expect("anonymous");
        (0..4).for_each(|page| bench.store(page, u64::from(page) + 1));
        let (_, allocation) = bench.send(bench.span(0, 4)).expect("free");
        let allocation = allocation.upgrade().expect("it has pages");
        let frame = |page| {
            bench
                .space
                .entry(bench.at(page))
                .and_then(Entry::named_frame)
        };
        let bad = frame(1).expect("on the device");
        bench.space.poison(bench.at(1));
        bench.check();
        let at = |page: u64| allocation.vram().start().plus(page * PAGE);
        let lost = VramSpan::at(at(1), PAGE);
        assert_eq!(allocation.lost(), [lost], "the device is told");
        // The CPU, and the device.
        assert_eq!(bench.space.load(bench.at(1)), Err(Signal::Bus));
        let request = FaultIn {
            span: bench.span(0, 4),
            access: Access::Read,
            keep: Some(PagemapId(1)),
            pager: Pager::Wait,
        };
        let refused = bench.space.fault_in(&request, &mut Vec::new());
        assert_eq!(refused, Err(Failed::BadPage(bench.at(1)).into()));
        let home = MigrateTo::home(allocation.clone(), None);
        let set = bench.space.migrate_begin(bench.span(0, 4), home);
        let set = set.expect("free");
        let read = |vram: VramSpan| set.moves().iter().any(|copy| copy.vram.overlaps(vram));
        assert!(!read(lost) && read(VramSpan::at(at(2), PAGE)));
        bench.copy(set.moves());
        assert_eq!(set.finalize(), pages(3));
        assert_eq!([0, 2, 3].map(|page| bench.load(page)), [1, 3, 4]);
        // A new mapping in its place, and device pages, among which it is not.
        bench.space.munmap(bench.at(0), 4 * PAGE).expect("mapped");
        bench.map(0, 8);
        bench.send(bench.span(0, 8)).expect("free");
        assert!((0..8).all(|page| frame(page).is_some_and(|frame| frame != bad)));
        bench.check();
    }
}
