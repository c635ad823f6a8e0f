use super::*;
use core::sync::atomic::AtomicBool;
use std::thread;

use gpusvm::addr::PAGE_2M;
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::mm::{AddressSpace, InvalidationSink};

use crate::sys::futex::now_ns;
use crate::sys::mapping::{AnonMapping, Huge};
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
