use super::*;
use core::sync::atomic::AtomicBool;
use std::thread;

use gpusvm::addr::PAGE_2M;
use gpusvm::error::{Interrupted, Stale};
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::mm::{AddressSpace, InvalidationSink};
use gpusvm_abi::bus::{SystemBus, VramStore};

use crate::sys::fault_copy::LiveBus;
use crate::sys::futex::now_ns;
use crate::sys::mapping::{AnonMapping, Huge};
use crate::sys::territory::{Advise, Leave, Territory};
use crate::sys::vram::VramMode;
use crate::toy::Bench;

/// A device unit in the middle of an access, as an invalidation meets it: it is quiescent when the
/// access has ended.
#[derive(Default)]
struct Unit {
    invalidated: AtomicBool,
    ended: AtomicBool,
    gave_up: AtomicBool,
}

impl InvalidationSink for Unit {
    fn start(&self, _interval: &Interval, _span: HostSpan, _why: InvalidateReason, _seq: Seq) {
        self.invalidated.store(true, Ordering::SeqCst);
        let deadline = now_ns() + 5_000_000_000;
        while !self.ended.load(Ordering::SeqCst) {
            if now_ns() > deadline {
                self.gave_up.store(true, Ordering::SeqCst);
                return;
            }
            thread::yield_now();
        }
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

#[test]
fn hole_is_filled_while_bringing_pages_home_waits_for_a_unit_at_the_hole() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let bytes = usize::try_from(2 * PAGE_2M).expect("64-bit");
    let mut map = AnonMapping::new(bytes, Huge::Advise).expect("4M can be mapped");
    let block = bytes / 2;
    map.bytes_mut()[block] = 7;
    map.discard(block + 4096, 4096).expect("a hole");
    map.bytes_mut()[0] = 1;
    let at = HostVa::new(map.address());
    let second = HostSpan::at(at.plus(PAGE_2M), PAGE_2M);
    bench.send(second).expect("plain memory migrates");
    assert_eq!(map.bytes()[block], 7, "home again, and armed");
    let first = HostSpan::at(at, PAGE_2M);
    bench.send(first).expect("plain memory migrates");

    let unit = Arc::new(Unit::default());
    let window = HostSpan::new(first.start(), second.end());
    let interval = bench.space.subscribe(window, Arc::<Unit>::clone(&unit));
    let interval = interval.expect("it can be watched");
    thread::scope(|scope| {
        scope.spawn(|| {
            while !unit.invalidated.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            assert_eq!(map.bytes()[block + 4096], 0, "the hole reads as zero");
            unit.ended.store(true, Ordering::SeqCst);
        });
        assert_eq!(map.bytes()[0], 1, "the touch brings it home");
    });
    assert!(
        !unit.gave_up.load(Ordering::SeqCst),
        "the hole was not filled"
    );
    bench.space.unsubscribe(&interval);
}

#[test]
fn thread_that_waited_in_a_mapping_that_is_gone_gets_nothing_in_the_next_one() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 1);
    bench.send(span).expect("plain memory migrates");
    assert_eq!(byte(span.start()), 1, "home again, and watched");
    land.advise(span, Advise::Discard).expect("a hole");
    let shards = &bench.space.watch.shards;
    let own = bench.space.watch.shard_of(span).expect("watched");
    let other = shards.ids().find(|id| *id != own);
    let at = span.start();
    let fault = |shard| Fault { at, shard };
    let page = HostSpan::at(at, PAGE);
    if let Some(other) = other {
        assert!(
            bench.space.fill_hole(fault(other)),
            "there is nothing to do"
        );
        assert_eq!(bench.space.first_populated(page), None);
    }
    assert_eq!(byte(at), 0, "its own shard fills it");
}

#[test]
fn page_that_another_shard_sends_away_meanwhile_is_not_filled() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 2);
    let shards = &bench.space.watch.shards;
    let own = shards.of(span.start());
    let other = shards
        .ids()
        .find(|id| *id != own && Some(*id) != shards.compute_only());
    let Some(other) = other else {
        return;
    };
    // A thread that waited in what was mapped here before: nobody watches this mapping yet.
    let fault = Fault {
        at: span.start(),
        shard: other,
    };
    let gate = &shards.uffd(other).gate;
    gate.close();
    thread::scope(|scope| {
        scope.spawn(|| bench.space.fill_hole(fault));
        gate.meet();
        bench.send(span).expect("plain memory migrates");
        gate.open();
    });
    assert_eq!(bench.space.watch.shard_of(span), Some(own));
    assert_eq!([span.start(), last(span)].map(byte), [2, 2]);
    assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
}

/// A mapping of two blocks that is written all over with `value`, and reached by copies.
fn filled(land: &Territory, value: u8) -> HostSpan {
    let span = HostSpan::at(land.span().start(), 2 * PAGE_2M);
    land.map(span, Huge::Never).expect("a hole");
    fill(span, value);
    span
}

fn fill(span: HostSpan, value: u8) {
    for at in (span.start().get()..span.end().get()).step_by(4096) {
        LiveBus::new().write(at, &[value; 4096]).expect("mapped");
    }
}

/// The first byte of a page.
fn byte(at: HostVa) -> u8 {
    let mut one = [0];
    LiveBus::new().read(at.get(), &mut one).expect("mapped");
    one[0]
}

/// The last page of a span.
fn last(span: HostSpan) -> HostVa {
    span.start().plus(span.bytes() - PAGE)
}

#[test]
fn memory_that_was_mapped_anew_unseen_is_armed_again_before_its_pages_leave() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 1);
    bench.send(span).expect("plain memory migrates");
    assert_eq!(byte(span.start()), 1, "home again, and armed");
    land.map_over(span, Huge::Never).expect("it is replaced");
    bench.space.settle_events();
    fill(span, 2);
    bench.send(span).expect("plain memory migrates");
    assert_eq!(
        byte(span.start().plus(PAGE)),
        2,
        "not a fresh page of zeros"
    );
}

#[test]
fn content_of_a_mapping_that_was_replaced_unseen_does_not_come_back() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 1);
    bench.send(span).expect("plain memory migrates");
    let middle = HostSpan::at(span.start().plus(PAGE_2M / 2), PAGE_2M);
    land.map_over(middle, Huge::Never).expect("it is replaced");
    bench.space.settle_events();
    let seen = [0, 1, 2, 3].map(|half| byte(span.start().plus(half * PAGE_2M / 2)));
    assert_eq!(seen, [1, 0, 0, 1]);
}

#[test]
fn moved_mapping_takes_its_pages_along_and_what_stays_behind_is_empty() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(8 << 20).expect("there is room");
    let span = filled(&land, 1);
    bench.send(span).expect("plain memory migrates");
    let moved = land.relocate(span, span.end(), Leave::Empty);
    moved.expect("the system moves it");
    assert_eq!(byte(span.end().plus(PAGE)), 1);
    bench.space.settle_events();
    assert_eq!(byte(span.start().plus(PAGE)), 0);
    assert_eq!(byte(span.end()), 1);
}

#[test]
fn what_begins_to_leave_the_new_place_does_not_take_along_what_moved_there() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(8 << 20).expect("there is room");
    let span = filled(&land, 1);
    bench.send(span).expect("plain memory migrates");
    let there = HostSpan::at(span.end(), span.bytes());
    let table = &bench.space.residency;
    // A migration that has not heard of the news yet.
    let own = bench.space.watch.shard_of(span).expect("watched");
    table.lock().claim(there, own).expect("nothing is there");
    let moved = land.relocate(span, there.start(), Leave::Empty);
    moved.expect("the system moves it");
    let is_claimed = || matches!(table.lock().at(there.start()), Some((_, State::Claimed)));
    while is_claimed() && !table.lock().is_changing(there) {
        thread::yield_now();
    }
    assert!(is_claimed(), "nobody else comes in between");
    // It hears of it, and gives up.
    table.lock().depart(there);
    let released = table.lock().release(there);
    bench.space.arrived(there, own);
    drop(released);
    bench.space.settle_events();
    assert_eq!([there.start(), last(there)].map(byte), [1, 1]);
    assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
}

#[test]
fn discarded_memory_reads_as_zero_at_once_although_nobody_saw_it() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 1);
    for _ in 0..100 {
        fill(span, 1);
        bench.vram.discard(0, span.bytes());
        // What the last round touched may still be on its way.
        while bench.send(span) == Err(Interrupted::Stale(Stale::PagesBusy)) {
            thread::yield_now();
        }
        land.advise(span, Advise::Discard).expect("mapped");
        assert_eq!(byte(span.start().plus(PAGE)), 0);
        bench.space.settle_events();
    }
}

#[test]
fn content_that_is_gone_does_not_come_home_before_the_news_is_handled() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 1);
    bench.send(span).expect("plain memory migrates");
    // The handler waits for this change to end.
    bench.space.begin_change(&[span]);
    let half = HostSpan::at(span.start().plus(PAGE), PAGE_2M);
    land.advise(half, Advise::Discard).expect("mapped");
    bench.space.bring_home(span, HomeCause::SpaceChange);
    let ends = [span.start(), half.start(), last(half), half.end()].map(byte);
    bench.space.end_change(&[span]);
    assert_eq!(ends, [1, 0, 0, 1]);
    bench.space.settle_events();
    assert_eq!(byte(half.end()), 1);
    assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
}

/// Unmaps part of a span unseen when its pages are about to leave.
struct Unmaps {
    land: Territory,
    part: HostSpan,
    done: AtomicBool,
}

impl InvalidationSink for Unmaps {
    fn start(&self, _interval: &Interval, _span: HostSpan, why: InvalidateReason, _seq: Seq) {
        if why == InvalidateReason::Migrate && !self.done.swap(true, Ordering::SeqCst) {
            self.land.unmap_raw(self.part).expect("it is mapped");
        }
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

#[test]
fn nothing_leaves_a_span_of_which_news_was_read_and_is_not_handled() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(4 << 20).expect("there is room");
    let span = filled(&land, 1);
    let part = HostSpan::at(span.start(), 16 * PAGE);
    let unmaps = Arc::new(Unmaps {
        land,
        part,
        done: AtomicBool::new(false),
    });
    let interval = bench.space.subscribe(span, Arc::<Unmaps>::clone(&unmaps));
    let interval = interval.expect("it can be watched");
    let busy = Interrupted::Stale(Stale::PagesBusy);
    assert_eq!(bench.send(span), Err(busy));
    assert!(unmaps.done.load(Ordering::SeqCst));
    bench.space.settle_events();
    unmaps.land.map(part, Huge::Never).expect("a hole");
    fill(part, 2);
    let residency = bench.space.residency.lock();
    assert!(!residency.has_departed(span), "all is here");
    drop(residency);
    assert_eq!([part.start(), last(part), part.end()].map(byte), [2, 2, 1]);
    bench.space.unsubscribe(&interval);
}

#[test]
fn late_news_of_one_shard_takes_nothing_from_a_mapping_of_another() {
    /// Mappings that start so far apart are of neighbouring shards.
    const APART: u64 = 64 << 20;
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = Territory::reserve(2 * APART).expect("there is room");
    let place = HostSpan::at(land.span().start().plus(APART), 2 * PAGE_2M);
    let watch = &bench.space.watch;
    land.map(place, Huge::Never).expect("a hole");
    fill(place, 1);
    bench.send(place).expect("plain memory migrates");
    assert_eq!(byte(place.start()), 1, "home again");
    let old = watch.shard_of(place).expect("it is watched");
    land.unmap_raw(place).expect("it is mapped");
    bench.space.settle_events();
    let whole = HostSpan::new(land.span().start(), place.end());
    land.map(whole, Huge::Never).expect("a hole");
    fill(place, 2);
    bench.send(place).expect("plain memory migrates");
    assert_ne!(watch.shard_of(place), Some(old));
    let late = News {
        change: Change::Unmap(place),
        shard: old,
        number: u64::MAX,
    };
    late_news(&bench.space, &late);
    assert!(
        bench.space.residency.lock().has_departed(place),
        "still away"
    );
    assert_eq!(byte(place.start()), 2);
    assert_eq!(byte(last(place)), 2);
}
