use alloc::vec::Vec;
use std::sync::Mutex as StdMutex;
use std::thread;

use super::*;
use crate::test_env::TestEnv;

/// Notes what it is called with, under a lock of its own, as a framework instance would.
#[derive(Default)]
struct Sink {
    calls: StdMutex<Vec<&'static str>>,
}

impl InvalidationSink for Sink {
    fn start(&self, interval: &Interval, _span: HostSpan, _reason: InvalidateReason, seq: Seq) {
        let mut calls = self.calls.lock().expect("no test panics under the lock");
        interval.set_seq(seq);
        calls.push("start");
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {
        self.calls
            .lock()
            .expect("no test panics under the lock")
            .push("end");
    }
}

fn span(start: u64, end: u64) -> HostSpan {
    HostSpan::new(HostVa::new(start), HostVa::new(end))
}

struct World {
    env: TestEnv,
    notifiers: IntervalNotifiers<TestEnv>,
    sink: Arc<Sink>,
}

fn world() -> World {
    World {
        env: TestEnv::default(),
        notifiers: IntervalNotifiers::new(),
        sink: Arc::new(Sink::default()),
    }
}

impl World {
    fn watch(&self, start: u64, end: u64) -> Arc<Interval> {
        self.notifiers
            .insert(span(start, end), Arc::<Sink>::clone(&self.sink))
    }

    fn start(&self, start: u64, end: u64) -> Invalidation {
        self.notifiers
            .start(span(start, end), InvalidateReason::Clear)
    }

    fn calls(&self) -> Vec<&'static str> {
        self.sink
            .calls
            .lock()
            .expect("no test panics under the lock")
            .clone()
    }
}

#[test]
fn invalidation_between_read_begin_and_use_is_noticed() {
    let w = world();
    let interval = w.watch(0, 100);
    let seq = w.notifiers.read_begin(&w.env, &interval);
    assert!(!interval.read_retry(seq));
    let running = w.start(10, 20);
    assert!(interval.read_retry(seq));
    w.notifiers.end(&w.env, running);
    assert!(interval.read_retry(seq), "the old sequence stays old");
    let seq = w.notifiers.read_begin(&w.env, &interval);
    assert!(!interval.read_retry(seq));
    assert_eq!(w.calls(), ["start", "end"]);
}

#[test]
fn invalidation_elsewhere_disturbs_nobody() {
    let w = world();
    let interval = w.watch(0, 100);
    let seq = w.notifiers.read_begin(&w.env, &interval);
    let running = w.start(100, 200);
    assert!(!interval.read_retry(seq));
    w.notifiers.end(&w.env, running);
    assert!(w.calls().is_empty());
}

#[test]
fn one_invalidation_reaches_every_window_it_crosses() {
    let w = world();
    let intervals: Vec<_> = (0..16).map(|n| w.watch(n * 10, n * 10 + 10)).collect();
    let seqs: Vec<_> = intervals
        .iter()
        .map(|i| w.notifiers.read_begin(&w.env, i))
        .collect();
    let running = w.start(15, 145);
    w.notifiers.end(&w.env, running);
    let moved: Vec<_> = intervals
        .iter()
        .zip(&seqs)
        .map(|(i, s)| i.read_retry(*s))
        .collect();
    assert_eq!(moved.iter().filter(|moved| **moved).count(), 14);
    assert!(!moved[0] && !moved[15]);
}

#[test]
fn interval_inserted_during_an_invalidation_is_busy_until_it_ends() {
    let w = world();
    let _watched = w.watch(0, 100);
    let running = w.start(0, 10);
    let late = w.watch(0, 50);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let seq = w.notifiers.read_begin(&w.env, &late);
            (w.calls(), late.read_retry(seq))
        });
        w.notifiers.end(&w.env, running);
        let (calls, retry) = reader.join().expect("the reader returns");
        assert_eq!(
            calls,
            ["start", "end"],
            "the late interval was never called, and waited"
        );
        assert!(!retry);
    });
    let again = w.start(0, 1);
    w.notifiers.end(&w.env, again);
    assert_eq!(w.calls().len(), 6, "from now on both are called");
}

#[test]
fn readers_wait_for_the_last_of_overlapping_invalidations() {
    let w = world();
    let interval = w.watch(0, 100);
    let first = w.start(0, 10);
    let second = w.start(50, 60);
    w.notifiers.end(&w.env, first);
    let done = core::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let _seq = w.notifiers.read_begin(&w.env, &interval);
            done.load(Ordering::SeqCst)
        });
        thread::yield_now();
        done.store(true, Ordering::SeqCst);
        w.notifiers.end(&w.env, second);
        assert!(
            reader.join().expect("the reader returns"),
            "it read before the last end"
        );
    });
}

#[test]
fn removal_during_an_invalidation_keeps_start_and_end_balanced() {
    let w = world();
    let interval = w.watch(0, 100);
    let running = w.start(0, 10);
    thread::scope(|scope| {
        let remover = scope.spawn(|| w.notifiers.remove(&w.env, &interval));
        w.notifiers.end(&w.env, running);
        remover.join().expect("the removal returns");
    });
    let again = w.start(0, 10);
    w.notifiers.end(&w.env, again);
    assert_eq!(w.calls(), ["start", "end"]);
}
