//! Deadlocks, ranks and orders of locks, and who is told to hold what.

use core::sync::atomic::AtomicU32;
use std::sync::Arc;

use gpusvm::seam::env::{Environment, Ns};

use super::tests::{Mutex, go, text};
use super::{Explorer, FailureKind, LockRules, ModelEnv, Options, Picker, Rank, Sim};

#[test]
fn a_deadlock_is_told_by_name() {
    let build = |sim: &Sim| {
        let locks = Arc::new((Mutex::new(0), Mutex::new(0)));
        sim.name_locks(&locks.0, "left", Rank::VM);
        sim.name_locks(&locks.1, "right", Rank::VRAM);
        let (a, b) = (Arc::clone(&locks), locks);
        sim.spawn("cpu", move || {
            let _left = a.0.lock();
            let _right = a.1.lock();
        });
        sim.spawn("gpu", move || {
            let _right = b.1.lock();
            let _left = b.0.lock();
        });
    };
    let explorer = Explorer {
        options: Options {
            lock_rules: LockRules::Ignore,
            ..Options::default()
        },
        picker: Picker::uniform,
        threads: 1,
        build,
    };
    let summary = explorer.run_seeds(0..1000, &|_| {});
    let (_, trouble) = summary.failure.expect("they meet");
    assert_eq!(trouble.failure.kind, FailureKind::Deadlock);
    assert_eq!(trouble.abandoned, 0);
    let told = &trouble.failure.text;
    assert!(told.contains("cpu waits for `right`"), "{told}");
    assert!(
        told.contains("held by gpu, taken at tests_locks.rs:"),
        "{told}"
    );
    assert!(told.contains("gpu waits for `left`"), "{told}");
}

#[test]
fn a_wake_up_that_never_comes_is_a_deadlock() {
    let word = Arc::new(AtomicU32::new(0));
    let outcome = go(&mut Picker::uniform(1), |sim| {
        sim.name_locks(&*word, "ended", Rank::LEAF);
        let word = Arc::clone(&word);
        sim.spawn("reader", move || Environment::wait(&ModelEnv, &word, 0));
    });
    let told = text(&outcome);
    assert!(told.starts_with("deadlock"), "{told}");
    assert!(
        told.contains("reader waits for a word in `ended`"),
        "{told}"
    );
}

#[test]
fn a_lock_taken_twice_is_a_deadlock() {
    let outcome = go(&mut Picker::uniform(1), |sim| {
        let lock = Mutex::new(());
        sim.spawn("one", move || {
            let _first = lock.lock();
            let _second = lock.lock();
        });
    });
    let told = text(&outcome);
    assert!(told.contains("held by one"), "{told}");
}

fn two_locks(name: [&'static str; 2], rank: [Rank; 2]) -> impl Fn(&Sim) {
    move |sim: &Sim| {
        let locks = Arc::new((Mutex::new(0), Mutex::new(0)));
        if !name[0].is_empty() {
            sim.name_locks(&locks.0, name[0], rank[0]);
            sim.name_locks(&locks.1, name[1], rank[1]);
        }
        let other = Arc::clone(&locks);
        sim.spawn("first", move || {
            let _left = locks.0.lock();
            let _right = locks.1.lock();
        });
        sim.spawn("second", move || {
            let _right = other.1.lock();
            let _left = other.0.lock();
        });
    }
}

#[test]
fn ranks_are_checked_in_worlds_that_do_not_deadlock() {
    let build = two_locks(["vm", "notifier"], [Rank::VM, Rank::NOTIFIER]);
    let outcome = go(&mut Picker::playback(&[]), build);
    let told = text(&outcome);
    assert!(
        told.contains("second: takes `vm` (rank 10)") && told.contains("holds `notifier`"),
        "{told}"
    );
}

#[test]
fn orders_of_locks_without_names_are_checked_too() {
    let outcome = go(
        &mut Picker::playback(&[]),
        two_locks(["", ""], [Rank::VM; 2]),
    );
    let told = text(&outcome);
    assert!(told.starts_with("lock order"), "{told}");
    assert!(told.contains("elsewhere the order is"), "{told}");
}

#[test]
fn no_lock_but_the_outermost_is_held_while_sleeping() {
    for (rank, fails) in [(Rank::VM, false), (Rank::NOTIFIER, true)] {
        let outcome = go(&mut Picker::uniform(1), |sim| {
            let lock = Arc::new(Mutex::new(()));
            sim.name_locks(&*lock, "lock", rank);
            sim.spawn("sleeper", move || {
                let _held = lock.lock();
                ModelEnv.sleep_until(Ns(1000));
            });
        });
        assert_eq!(outcome.trouble.is_some(), fails);
    }
}

#[test]
fn opposite_orders_in_different_worlds_are_told() {
    let build = |sim: &Sim| {
        let locks = Arc::new((Mutex::new(0), Mutex::new(0)));
        sim.name_locks(&locks.0, "left", Rank(1));
        sim.name_locks(&locks.1, "right", Rank(1));
        let turned = sim.seed() % 2 == 1;
        sim.spawn("one", move || {
            let (a, b) = if turned {
                (&locks.1, &locks.0)
            } else {
                (&locks.0, &locks.1)
            };
            let _outer = a.lock();
            let _inner = b.lock();
        });
    };
    let explorer = Explorer {
        options: Options {
            scenario: "opposite orders".into(),
            lock_rules: LockRules::Ignore,
            ..Options::default()
        },
        picker: Picker::uniform,
        threads: 1,
        build,
    };
    let summary = explorer.run_seeds(0..4, &|_| {});
    assert!(summary.failure.is_none());
    assert_eq!(summary.lock_cycles.len(), 1, "{summary}");
    assert!(summary.to_string().contains("`left`"), "{summary}");
}
