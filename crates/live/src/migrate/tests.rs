use super::*;
use core::sync::atomic::Ordering;
use std::sync::Arc;

use gpusvm::addr::{HostVa, PAGE, PAGE_2M};

use crate::sys::fault_copy::LiveBus;
use crate::sys::mapping::{AnonMapping, Huge};
use crate::sys::territory::{Advise, Territory};
use crate::sys::vram::VramMode;
use crate::toy::{Bench, Toy};
use gpusvm_abi::bus::SystemBus;

const BYTES: u64 = 2 * PAGE_2M;

/// Memory in which word `n` holds `n + 1`, and its addresses.
fn filled(huge: Huge) -> (AnonMapping, HostSpan) {
    let bytes = usize::try_from(BYTES).expect("64-bit");
    let mut map = AnonMapping::new(bytes, huge).expect("4M can be mapped");
    (map.words_mut().iter_mut().zip(1..)).for_each(|(word, n)| *word = n);
    let span = HostSpan::at(HostVa::new(map.address()), BYTES);
    (map, span)
}

fn intact(map: &AnonMapping) -> bool {
    map.words().iter().zip(1..).all(|(word, n)| *word == n)
}

/// What MOVE answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answers {
    True,
    /// That nothing moved, although all did.
    False,
}

/// Out, looked at there, and home by a touch; from huge pages and from small ones.
fn round_trip(mode: VramMode, answers: Answers) {
    let Some(bench) = Bench::open(mode) else {
        return;
    };
    if answers == Answers::False {
        bench.space.staging.uffd.misreport_moves();
        let shards = &bench.space.watch.shards;
        for shard in shards.ids() {
            shards.uffd(shard).misreport_moves();
        }
    }
    for huge in [Huge::Advise, Huge::Never] {
        let (map, span) = filled(huge);
        // The first mapping is gone, and this one may be in its place.
        bench.space.settle_events();
        bench.send(span).expect("plain memory migrates");
        assert_eq!(bench.device_word(0), 1);
        assert_eq!(bench.device_word(BYTES / 8 - 1), BYTES / 8);
        assert!(intact(&map), "home again after the first touch");
    }
    assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
    let misreported = bench.counts.misreported.load(Ordering::Relaxed);
    // Two ways, two kinds of pages, two blocks; the kernel may add its own.
    assert!(answers == Answers::True || misreported >= 8);
}

#[test]
fn adopted_pages_go_and_come_back() {
    round_trip(VramMode::Adopt, Answers::True);
}

#[test]
fn copied_pages_go_and_come_back() {
    round_trip(VramMode::Copy, Answers::True);
}

#[test]
fn adopted_pages_survive_moves_that_report_failure_and_did_all() {
    round_trip(VramMode::Adopt, Answers::False);
}

#[test]
fn copied_pages_survive_moves_that_report_failure_and_did_all() {
    round_trip(VramMode::Copy, Answers::False);
}

#[test]
fn pinned_page_in_the_middle_sends_all_others_back() {
    for mode in [VramMode::Adopt, VramMode::Copy] {
        let Some(bench) = Bench::open(mode) else {
            return;
        };
        let (map, span) = filled(Huge::Never);
        let Some(pinned) = map.pin_page(3 << 20) else {
            println!("skipped: io_uring is refused, so nothing can be pinned");
            return;
        };
        assert_eq!(
            bench.send(span).err(),
            Some(Interrupted::Stale(Stale::PagesRefused))
        );
        assert!(intact(&map));
        assert!(!bench.space.residency.lock().is_travelling(span));
        drop(pinned);
    }
}

#[test]
fn set_that_is_dropped_puts_everything_back() {
    for mode in [VramMode::Adopt, VramMode::Copy] {
        let Some(bench) = Bench::open(mode) else {
            return;
        };
        let (map, span) = filled(Huge::Advise);
        let allocation: AllocationRef = bench.allocation(span);
        let to = MigrateTo::device(allocation, None);
        drop(bench.space.begin(span, to).expect("plain memory migrates"));
        assert!(intact(&map));
        assert!(
            bench
                .space
                .residency
                .lock()
                .overlapping(span)
                .next()
                .is_none()
        );
    }
}

/// What [`put_newer`] writes.
const NEWER: u64 = 0x0707_0707_0707_0707;

/// A page at `at` of `span`, whose pages are away.
fn put_newer(bench: &Bench, span: HostSpan, at: HostVa) {
    let newer = [7_u8; 4096];
    let from = HostVa::new(u64::try_from(newer.as_ptr().addr()).expect("64-bit"));
    let watch = &bench.space.watch;
    let shard = watch.shard_of(span).expect("it is watched");
    let copied = watch.shards.uffd(shard).copy(at, HostSpan::at(from, PAGE));
    assert_eq!(copied.error, None);
}

#[test]
fn what_finds_no_way_back_is_not_left_where_the_next_try_goes() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (map, span) = filled(Huge::Never);
    let allocation = bench.allocation(span);
    let aperture = allocation.aperture().expect("it adopts");
    let to = MigrateTo::device(allocation, Some(aperture));
    let set = bench.space.begin(span, to).expect("plain memory migrates");
    put_newer(&bench, span, span.start());
    drop(set);
    assert_eq!(map.words()[0], NEWER);
    assert_eq!(bench.space.first_populated(aperture), None);
}

#[test]
fn content_that_came_meanwhile_wins_and_is_counted() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (map, span) = filled(Huge::Never);
    bench.send(span).expect("plain memory migrates");
    put_newer(&bench, span, span.start().plus(PAGE_2M + 5 * PAGE));
    assert_eq!(map.words()[0], 1, "the touch brings all home");
    let word = usize::try_from((PAGE_2M + 5 * PAGE) / 8).expect("64-bit");
    assert_eq!(map.words()[word], NEWER);
    assert_eq!(
        map.words()[word + 512],
        u64::try_from(word + 513).expect("64-bit")
    );
    assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 1);
}

/// Memory of small pages, of which the first 64 are there and begin with nines.
fn nines() -> Territory {
    let land = Territory::reserve(BYTES).expect("there is room");
    land.map(land.span(), Huge::Never).expect("memory");
    for page in 0..64 {
        let at = land.span().start().plus(page * PAGE);
        LiveBus.write(at.get(), &[9; 8]).expect("mapped");
    }
    land
}

/// Where pages are away, the system tells nobody of guards; copying over them would remove them,
/// as Linux 6.18 does.
#[test]
fn guards_that_nobody_told_of_stay_when_pages_come_home() {
    for mode in [VramMode::Adopt, VramMode::Copy] {
        let Some(bench) = Bench::open(mode) else {
            return;
        };
        let land = nines();
        let at = |page: u64| land.span().start().plus(page * PAGE);
        bench
            .send(HostSpan::new(at(0), at(64)))
            .expect("plain memory migrates");
        let guarded = HostSpan::new(at(20), at(28));
        if let Err(why) = land.advise(guarded, Advise::GuardInstall) {
            return println!("skipped: guards: {why}");
        }
        let read = |page| {
            let mut found = [0xFF; 8];
            let read = LiveBus.read(at(page).get(), &mut found);
            read.ok().map(|()| found[0])
        };
        let expect = |inside| {
            for page in 0..64 {
                let is_guarded = guarded.contains(at(page));
                let wanted = if is_guarded { inside } else { Some(9) };
                assert_eq!(read(page), wanted, "page {page}");
            }
        };
        expect(None);
        let removed = land.advise(guarded, Advise::GuardRemove);
        removed.expect("they are there");
        expect(Some(0));
    }
}

#[test]
fn mapping_that_was_cut_before_its_first_write_is_one_again_when_it_is_let_go() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(8 << 20).expect("there is room");
    let whole = HostSpan::at(land.span().start(), 6 << 20);
    land.map(whole, Huge::Never).expect("a hole");
    let middle = HostSpan::at(whole.start().plus(PAGE_2M), PAGE_2M);
    bench.send(middle).expect("an empty block migrates");
    for block in 0..3 {
        let at = whole.start().plus(block * PAGE_2M + PAGE);
        LiveBus::new().write(at.get(), &[1; 8]).expect("mapped");
    }
    let _suspended = bench.space.watch.suspend(whole);
    land.resize(whole, 8 << 20)
        .expect("the system grows what is one mapping");
}

#[test]
fn mapping_is_not_watched_in_the_middle_of_a_change() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    land.map(land.span(), Huge::Never).expect("a hole");
    let vma = bench.space.vma_around(land.span().start());
    let vma = vma.expect("it is mapped");
    let part = HostSpan::at(vma.span.start().plus(PAGE), PAGE);
    bench.space.begin_change(&[part]);
    let watch = || bench.space.watch.ensure(&vma, &bench.space.residency);
    assert_eq!(watch(), Err(Busy));
    assert!(!bench.space.watch.is_watched(vma.span));
    bench.space.end_change(&[part]);
    assert_eq!(watch(), Ok(true));
    assert!(bench.space.watch.is_watched(part));
}

#[test]
fn what_was_copied_home_is_not_left_for_the_next_one_to_leave() {
    let Some(bench) = Bench::open(VramMode::Copy) else {
        return;
    };
    let (map, span) = filled(Huge::Never);
    let pages = |from: u64, count: u64| HostSpan::at(span.start().plus(from * PAGE), count * PAGE);
    // The slot through which these come home keeps its pages.
    bench.send(pages(0, 4)).expect("plain memory migrates");
    assert!(intact(&map), "home again after the first touch");
    // The same slot, given back in the middle of the way home of others.
    bench.send(pages(8, 2)).expect("plain memory migrates");
    let home = MigrateTo::home(bench.allocation(pages(8, 2)), None);
    drop(bench.space.begin(pages(8, 2), home).expect("they are away"));
    // Holes leave through it.
    advise::drop_pages(HostSpan::at(span.start().plus(PAGE_2M), PAGE_2M));
    let holes = HostSpan::at(span.start().plus(PAGE_2M), 4 * PAGE);
    bench.send(holes).expect("plain memory migrates");
    assert_eq!(bench.device_word(0), 0);
    assert_eq!(bench.device_word(2047), 0);
}

/// What is left of an allocation may be more pieces than there are slots.
#[test]
fn allocation_in_many_pieces_comes_home() {
    for mode in [VramMode::Adopt, VramMode::Copy] {
        let Some(bench) = Bench::open(mode) else {
            return;
        };
        let land = nines();
        let at = |page: u64| land.span().start().plus(page * PAGE);
        let span = HostSpan::new(at(0), at(64));
        bench.send(span).expect("plain memory migrates");
        for page in (0..64).step_by(2) {
            let dropped = land.discard_raw(HostSpan::at(at(page), PAGE));
            dropped.expect("it is mapped");
        }
        bench.space.settle_events();
        for page in 0..64 {
            let mut found = [0xFF; 8];
            LiveBus.read(at(page).get(), &mut found).expect("mapped");
            let wanted = if page % 2 == 0 { 0 } else { 9 };
            assert_eq!(found, [wanted; 8], "page {page}");
        }
        assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn what_cannot_be_copied_keeps_nothing_else_away() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (map, span) = filled(Huge::Never);
    let stuck = HostSpan::at(span.start(), PAGE_2M);
    let rest = HostSpan::at(stuck.end(), PAGE_2M);
    let to = MigrateTo::device(Arc::new(Toy::loose(2, stuck)), None);
    let set = bench.space.begin(stuck, to);
    set.expect("plain memory migrates").finalize();
    bench.send(rest).expect("plain memory migrates");
    bench.space.bring_span_home(span);
    let table = bench.space.residency.lock();
    let away = [stuck, rest].map(|span| table.has_departed(span));
    drop(table);
    assert_eq!(away, [true, false]);
    let first = usize::try_from(PAGE_2M / 8).expect("64-bit");
    assert_eq!(map.words()[first], PAGE_2M / 8 + 1);
}
