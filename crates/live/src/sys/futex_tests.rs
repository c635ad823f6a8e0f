//! [`futex`](crate::sys::futex) on the system's own words; `tests/orders.rs` tries it under a scheduler.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::thread;

use crate::sys::futex::{Changes, RawFutexMutex, is_marked, mark_of, wait};
use crate::sys::waits::Reason;

#[test]
fn counter_under_contention_loses_nothing() {
    let total = lock_api::Mutex::<RawFutexMutex, u64>::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..20_000).for_each(|_| *total.lock() += 1));
        }
    });
    assert_eq!(*total.lock(), 80_000);
}

#[test]
fn wait_returns_at_once_for_another_value_and_after_the_timeout() {
    let word = AtomicU32::new(1);
    wait(&word, 0, None, Reason::Clock);
    wait(&word, 1, Some(Duration::from_millis(1)), Reason::Clock);
}

#[test]
fn every_change_is_told_to_whoever_sleeps() {
    let (ping, pong) = (Changes::new(), Changes::new());
    let turns = AtomicU32::new(0);
    let play = |mine: u32, here: &Changes, there: &Changes| {
        for turn in 0..5_000 {
            let mut seen = here.seen();
            while turns.load(Ordering::Acquire) != 2 * turn + mine {
                here.wait(seen, Reason::Clock);
                seen = here.seen();
            }
            turns.fetch_add(1, Ordering::AcqRel);
            there.tell();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| play(0, &ping, &pong));
        scope.spawn(|| play(1, &pong, &ping));
    });
    assert_eq!(turns.load(Ordering::Relaxed), 10_000);
}

#[test]
fn mark_names_the_stack_it_was_made_on() {
    let base = 0x7f12_3456_7000_usize;
    let stack = base..base + 0x4000;
    for page in 0..4 {
        assert!(is_marked(mark_of(base + page * 4096 + 17), stack.clone()));
    }
    assert!(!is_marked(mark_of(base - 1), stack.clone()));
    assert!(!is_marked(mark_of(base + 0x4000), stack));
}
