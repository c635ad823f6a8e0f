//! Worlds that show what the scheduler promises.

use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::rc::Rc;
use std::sync::Arc;

use gpusvm::seam::env::{Environment, Ns, Work};
use gpusvm_abi::bus::Park;
use proptest::prelude::*;

use super::{
    Chaos, Dfs, Explorer, Fate, KeepTape, Kind, Life, LockRules, ModelEnv, ModelMutex, Options,
    Outcome, Phase, Picker, Points, Sim, Tape, Texts, Verdict, When, keep_panics_quiet, replay,
    run, shrink,
};

pub(super) type Mutex<T> = lock_api::Mutex<ModelMutex, T>;

fn options() -> Options {
    Options {
        keep_tape: KeepTape::Always,
        ..Options::default()
    }
}

pub(super) fn go(picker: &mut Picker, build: impl FnOnce(&Sim)) -> Outcome {
    keep_panics_quiet();
    run(&options(), picker, build)
}

pub(super) fn text(outcome: &Outcome) -> String {
    let trouble = outcome.trouble.as_ref().expect("the world fails");
    assert_eq!(trouble.abandoned, 0);
    trouble.failure.to_string()
}

/// Actors that add to a number without a lock, and do a lot else.
fn lost_update(sim: &Sim, actors: u32, idle: u32) {
    let number = Arc::new(AtomicU32::new(0));
    for n in 0..actors {
        let number = Arc::clone(&number);
        sim.spawn(format!("adder{n}"), move || {
            for _ in 0..idle {
                ModelEnv.point(Kind::Other);
            }
            let seen = number.load(Ordering::Relaxed);
            ModelEnv.point(Kind::Access);
            number.store(seen + 1, Ordering::Relaxed);
            for _ in 0..idle {
                ModelEnv.point(Kind::Other);
            }
        });
    }
    sim.oracle(When::AtEnd, move || match number.load(Ordering::Relaxed) {
        all if all == actors => Ok(()),
        some => Err(format!("{some} of {actors} updates are there")),
    });
}

#[test]
fn a_lost_update_is_found_and_shrunk_to_what_matters() {
    for actors in [2, 3] {
        let explorer = Explorer {
            options: Options::default(),
            picker: Picker::swarm,
            threads: 2,
            build: move |sim: &Sim| lost_update(sim, actors, 60),
        };
        let summary = explorer.run_seeds(0..20_000, &|_| {});
        let (seed, trouble) = summary.failure.expect("some world loses an update");
        let tape = explorer.shrink(&trouble, 5_000, &mut |_| {});
        println!(
            "{actors} actors: seed {seed}, {} of {} choices, shrunk to {} of {}",
            trouble.tape.interesting(),
            trouble.tape.choices.len(),
            tape.interesting(),
            tape.choices.len()
        );
        assert!(tape.interesting() <= 3, "{tape}");
        let alone = shrink_alone(&explorer, &trouble.tape);
        println!("without looking for another way: {}", alone.interesting());
        assert!(alone.interesting() <= 30, "{alone}");
        let again: Tape = tape.to_string().parse().expect("a tape survives its text");
        let outcome = replay(&explorer.options, &again, explorer.build);
        assert_eq!(Some(outcome.hash), tape.hash);
        assert!(outcome.trouble.is_some());
    }
}

/// Shrinks a tape by what stands on it alone.
fn shrink_alone<B: Fn(&Sim) + Sync>(explorer: &Explorer<B>, tape: &Tape) -> Tape {
    let mut verdict = |tape: &Tape| match replay(&explorer.options, tape, &explorer.build).trouble {
        Some(found) => Verdict::Fails(found.tape.choices),
        None => Verdict::Passes,
    };
    shrink(tape, 5_000, &mut verdict, &mut |_| {})
}

/// Actors that lock, wait, sleep and emit as their stream says.
fn busy_world(sim: &Sim) {
    let total = Arc::new(Mutex::new(0_u32));
    let inside = Rc::new(Cell::new(0_u32));
    let word = Arc::new(AtomicU32::new(0));
    for n in 0..4_u32 {
        let (total, inside, word) = (Arc::clone(&total), Rc::clone(&inside), Arc::clone(&word));
        sim.spawn(format!("actor{n}"), move || {
            let mut stream = ModelEnv.stream(&format!("data{n}"));
            for _ in 0..3 {
                let mut guard = total.lock();
                assert_eq!(inside.replace(1), 0, "somebody else is inside");
                ModelEnv.point(Kind::Pte);
                *guard += 1;
                inside.set(0);
                drop(guard);
                ModelEnv.emit("added", [stream.draw(), u64::from(n)]);
                match stream.below(3) {
                    0 => ModelEnv.sleep_until(Environment::now(&ModelEnv).after(Ns(50))),
                    1 => {
                        word.fetch_add(1, Ordering::Relaxed);
                        Environment::wake(&ModelEnv, &word);
                    }
                    _ => drop(ModelEnv.may_fail("nothing")),
                }
            }
        });
    }
    sim.oracle(When::AtEnd, move || match *total.lock() {
        12 => Ok(()),
        n => Err(format!("{n} additions")),
    });
}

proptest! {
    #[test]
    fn any_tape_replays_to_the_same_world(choices in prop::collection::vec(0_u32..4, 0..200)) {
        let first = go(&mut Picker::playback(&choices), busy_world);
        prop_assert!(first.trouble.is_none(), "{:?}", first.trouble);
        let tape = first.tape.expect("tapes are kept");
        let again = replay(&options(), &tape, busy_world);
        prop_assert_eq!(first.hash, again.hash);
        prop_assert_eq!(Some(again.hash), tape.hash);
        let mut trimmed = tape;
        trimmed.trim();
        prop_assert_eq!(replay(&options(), &trimmed, busy_world).hash, again.hash);
    }

    #[test]
    fn a_seed_means_a_world_and_a_mutex_excludes(seed: u64) {
        let first = go(&mut Picker::swarm(seed), busy_world);
        let second = go(&mut Picker::swarm(seed), busy_world);
        prop_assert!(first.trouble.is_none(), "{:?}", first.trouble);
        prop_assert_eq!(first.hash, second.hash);
    }
}

#[test]
fn another_schedule_is_another_world() {
    let hash = |seed| go(&mut Picker::uniform(seed), busy_world).hash;
    assert_ne!(hash(1), hash(2));
}

fn stepping(sim: &Sim, actors: usize, points: u32) {
    for n in 0..actors {
        sim.spawn(format!("actor{n}"), move || {
            for step in 0..points {
                ModelEnv.emit("step", [u64::from(step), 0]);
                ModelEnv.point(Kind::Other);
            }
        });
    }
}

fn count_worlds(preemptions_max: u32, actors: usize, points: u32) -> u64 {
    let explorer = Explorer {
        options: Options::default(),
        picker: Picker::uniform,
        threads: 1,
        build: move |sim: &Sim| stepping(sim, actors, points),
    };
    let summary = explorer.run_all(preemptions_max, 100_000);
    assert!(summary.failure.is_none());
    summary.worlds
}

#[test]
fn the_search_sees_every_interleaving_once() {
    // With `points` points an actor has `points + 1` pieces: the orders of two actors' pieces are
    // the binomial coefficients.
    assert_eq!(count_worlds(99, 2, 1), 6);
    assert_eq!(count_worlds(99, 2, 2), 20);
    assert_eq!(count_worlds(99, 2, 4), 252);
    assert_eq!(count_worlds(99, 3, 1), 90);
    assert_eq!(count_worlds(0, 2, 4), 2);
    assert_eq!(count_worlds(0, 3, 4), 6);
    // One preemption: either actor, at any of its points.
    assert_eq!(count_worlds(1, 2, 4), 2 + 2 * 4);
}

#[test]
fn the_search_is_complete_where_it_finds_nothing() {
    let mut dfs = Picker::Dfs(Dfs::new(99));
    let mut failing = 0;
    let mut worlds = 0;
    loop {
        worlds += 1;
        failing += u32::from(go(&mut dfs, |sim| lost_update(sim, 2, 0)).trouble.is_some());
        if !dfs.advance() {
            break;
        }
    }
    // Only the two worlds in which one actor is done before the other begins are good.
    assert_eq!((worlds, failing), (6, 4));
}

#[test]
fn priorities_find_a_bug_of_depth_two_as_often_as_promised() {
    const POINTS: u32 = 20;
    // `checker` must run completely between two given steps of `worker`.
    let build = |sim: &Sim, wanted: u32| {
        let stage = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&stage);
        sim.spawn("worker", move || {
            for step in 0..POINTS {
                stage.store(step, Ordering::Relaxed);
                ModelEnv.point(Kind::Other);
            }
        });
        sim.spawn("checker", move || {
            if seen.load(Ordering::Relaxed) == wanted {
                ModelEnv.fail("seen at the wrong moment");
            }
        });
    };
    let runs = 40_000;
    let fails = |seed: &u32| {
        // Neither the first step nor the last one, which are easier or cannot be met.
        let world = |sim: &Sim| build(sim, 1 + seed % (POINTS - 2));
        let mut picker = Picker::pct(u64::from(*seed), 2, POINTS);
        go(&mut picker, world).trouble.is_some()
    };
    let found = (0..runs).filter(fails).count();
    println!("PCT, depth 2: {found} of {runs}");
    let promised = (runs / (2 * POINTS)) as usize;
    assert!(
        found >= promised * 95 / 100,
        "{found} of {runs}, {promised} promised"
    );
}

#[test]
fn time_goes_to_the_next_deadline_when_all_sleep() {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let outcome = go(&mut Picker::uniform(1), |sim| {
        for n in [3, 1, 2] {
            let seen = Rc::clone(&seen);
            sim.spawn(format!("sleeper{n}"), move || {
                ModelEnv.sleep_until(Ns(n * 1_000_000));
                seen.borrow_mut().push(n);
            });
        }
    });
    assert!(outcome.trouble.is_none());
    assert_eq!(*seen.borrow(), [1, 2, 3]);
    assert!(outcome.time >= Ns(3_000_000) && outcome.time < Ns(3_001_000));
}

#[test]
fn time_may_jump_while_somebody_runs() {
    let slept_through = |jump_one_in| {
        let options = Options {
            jump_one_in,
            ..Options::default()
        };
        let steps = Rc::new(Cell::new(0));
        let (counted, seen) = (Rc::clone(&steps), Rc::new(Cell::new(0)));
        let shown = Rc::clone(&seen);
        let outcome = run(&options, &mut Picker::uniform(1), |sim| {
            sim.spawn("sleeper", move || {
                ModelEnv.sleep_until(Ns(1_000_000));
                seen.set(steps.get());
            });
            sim.spawn("runner", move || {
                for step in 1..=100 {
                    counted.set(step);
                    ModelEnv.point(Kind::Other);
                }
            });
        });
        assert!(outcome.trouble.is_none());
        shown.get()
    };
    assert_eq!(slept_through(0), 100);
    assert!(slept_through(4) < 100);
}

#[test]
fn deferred_work_is_done_once_by_the_worker() {
    let done = Rc::new(Cell::new(0));
    let seen = Rc::clone(&done);
    let outcome = go(&mut Picker::playback(&[]), |sim| {
        sim.spawn("asker", || {
            for _ in 0..3 {
                ModelEnv.defer(Work::CollectGarbage { vm: 1 });
            }
        });
        sim.worker("worker", move |work| {
            assert_eq!(work, Work::CollectGarbage { vm: 1 });
            seen.set(seen.get() + 1);
        });
    });
    assert!(outcome.trouble.is_none(), "{:?}", outcome.trouble);
    assert_eq!(done.get(), 1);
}

#[test]
fn daemons_end_with_their_world() {
    let ended = Rc::new(Cell::new(false));
    let seen = Rc::clone(&ended);
    let outcome = go(&mut Picker::uniform(2), |sim| {
        sim.spawn("short", || ModelEnv.point(Kind::Other));
        sim.daemon("server", move || {
            let word = AtomicU32::new(0);
            while ModelEnv.idle(&word, 0) == Life::Goes {}
            seen.set(true);
        });
        sim.daemon("rude", || {
            Environment::wait(&ModelEnv, &AtomicU32::new(0), 0)
        });
    });
    assert!(outcome.trouble.is_none(), "{:?}", outcome.trouble);
    assert!(ended.get());
}

#[test]
fn oracles_look_at_quiet_moments_only() {
    for (when, fails) in [(When::Quiescent, false), (When::EveryStep, true)] {
        let outcome = go(&mut Picker::uniform(1), |sim| {
            let pair = Rc::new(Cell::new((0, 0)));
            let shown = Rc::clone(&pair);
            sim.spawn("writer", move || {
                let _busy = ModelEnv.busy();
                pair.set((1, 0));
                ModelEnv.point(Kind::Pte);
                pair.set((1, 1));
            });
            sim.oracle(when, move || match shown.get() {
                (a, b) if a == b => Ok(()),
                torn => Err(format!("torn: {torn:?}")),
            });
        });
        assert_eq!(outcome.trouble.is_some(), fails);
    }
}

#[test]
fn oracles_of_changes_look_once_per_change() {
    let looks = Rc::new(Cell::new(0));
    let seen = Rc::clone(&looks);
    let outcome = go(&mut Picker::uniform(1), |sim| {
        sim.spawn("writer", || {
            for step in 0..30 {
                if step % 10 == 5 {
                    ModelEnv.touch();
                }
                ModelEnv.point(Kind::Other);
            }
        });
        sim.oracle(When::Changed, move || {
            looks.set(looks.get() + 1);
            Ok(())
        });
    });
    assert!(outcome.trouble.is_none());
    // The first look is at the beginning.
    assert_eq!(seen.get(), 1 + 3);
}

#[test]
fn oracles_that_count_look_when_their_number_moves() {
    let looks = Rc::new(Cell::new(0));
    let seen = Rc::clone(&looks);
    let outcome = go(&mut Picker::uniform(1), |sim| {
        let number = Arc::new(AtomicU64::new(0));
        sim.oracle_counting(Arc::clone(&number), move || {
            looks.set(looks.get() + 1);
            Ok(())
        });
        sim.spawn("writer", move || {
            for step in 0..30 {
                number.fetch_add(u64::from(step % 10 == 5), Ordering::Relaxed);
                ModelEnv.point(Kind::Other);
            }
        });
    });
    assert!(outcome.trouble.is_none());
    // The first look is at the beginning.
    assert_eq!(seen.get(), 1 + 3);
}

#[test]
fn some_worlds_have_all_points_by_their_seeds() {
    let steps = |seed| {
        let options = Options {
            seed,
            points: Points::only(&[]),
            all_points_one_in: 4,
            ..Options::default()
        };
        let build = |sim: &Sim| sim.spawn("a", || ModelEnv.point(Kind::Other));
        run(&options, &mut Picker::uniform(seed), build).steps
    };
    let all: Vec<u64> = (0..400).map(steps).collect();
    let fewest = all.iter().min().copied().unwrap_or(0);
    let full = all.iter().filter(|steps| **steps > fewest).count();
    assert!((60..140).contains(&full), "{full} of 400");
}

#[test]
fn a_panic_is_a_finding_with_its_place() {
    let outcome = go(&mut Picker::uniform(1), |sim| {
        let lock = Arc::new(Mutex::new(()));
        let other = Arc::clone(&lock);
        sim.spawn("bad", move || {
            let _held = lock.lock();
            assert_eq!(1, 2, "arithmetic");
        });
        sim.spawn("good", move || drop(other.lock()));
    });
    let told = text(&outcome);
    assert!(told.starts_with("panic"), "{told}");
    assert!(
        told.contains("arithmetic") && told.contains("tests.rs"),
        "{told}"
    );
}

/// Locks again when it goes.
struct LocksLate(Arc<Mutex<u32>>);

impl Drop for LocksLate {
    fn drop(&mut self) {
        *self.0.lock() += 1;
    }
}

#[test]
fn a_failed_world_is_taken_down_without_losing_exclusion() {
    let lock = Arc::new(Mutex::new(0));
    let outcome = go(&mut Picker::playback(&[]), |sim| {
        let (held, late) = (Arc::clone(&lock), Arc::clone(&lock));
        // The unwinding of `late` needs what `holder`, who ends after it, holds.
        sim.spawn("late", move || {
            let _late = LocksLate(late);
            ModelEnv.sleep_until(Ns(1_000_000));
        });
        sim.spawn("holder", move || {
            let _held = held.lock();
            ModelEnv.sleep_until(Ns(2_000_000));
        });
        sim.spawn("bad", || {
            ModelEnv.sleep_until(Ns(1000));
            ModelEnv.fail("enough");
        });
    });
    assert!(text(&outcome).contains("enough"));
    assert_eq!(*lock.lock(), 1);
}

/// Actors that hold, wait and let go in every possible place, until one of them fails.
fn doomed(sim: &Sim) {
    let locks = Rc::new([0, 1, 2].map(|_| Arc::new(Mutex::new(0))));
    let word = Rc::new(AtomicU32::new(0));
    for n in 0..4 {
        let (locks, word) = (Rc::clone(&locks), Rc::clone(&word));
        sim.spawn(format!("actor{n}"), move || {
            for _ in 0..10 {
                let _late = LocksLate(Arc::clone(&locks[ModelEnv.choose(3) as usize]));
                let mut held = locks[ModelEnv.choose(3) as usize].lock();
                *held += 1;
                match ModelEnv.choose(5) {
                    0 if ModelEnv.random().is_multiple_of(2) => panic!("doomed"),
                    0 => ModelEnv.fail("doomed"),
                    1 => ModelEnv.sleep_until(Environment::now(&ModelEnv).after(Ns(20))),
                    2 => Environment::wake(&ModelEnv, &word),
                    3 => Park::wait(&ModelEnv, &word, 0, Some(30)),
                    _ => *locks[ModelEnv.choose(3) as usize].lock() += 1,
                }
            }
        });
    }
    sim.daemon("server", || {
        while ModelEnv.idle(&AtomicU32::new(0), 0) == Life::Goes {}
    });
}

#[test]
fn failed_worlds_end_wherever_their_actors_are() {
    keep_panics_quiet();
    let mut kinds = std::collections::BTreeMap::new();
    for seed in 0..3_000 {
        let options = Options {
            seed,
            lock_rules: LockRules::Ignore,
            ..Options::default()
        };
        let trouble = run(&options, &mut Picker::swarm(seed), doomed).trouble;
        let Some(trouble) = trouble else { continue };
        assert_eq!(trouble.abandoned, 0, "{trouble}");
        *kinds.entry(trouble.failure.kind.to_string()).or_insert(0) += 1;
        let again = replay(&options, &trouble.tape, doomed);
        assert_eq!(Some(again.hash), trouble.tape.hash);
    }
    println!("{kinds:?}");
    assert!(
        kinds.len() == 3,
        "violations, panics and deadlocks: {kinds:?}"
    );
}

#[test]
fn a_world_that_goes_in_circles_is_told() {
    let outcome = go(&mut Picker::uniform(1), |sim| {
        sim.spawn("spinner", || {
            loop {
                ModelEnv.point(Kind::Spin);
            }
        });
    });
    let told = text(&outcome);
    assert!(
        told.starts_with("no progress") && told.contains("spinner can run"),
        "{told}"
    );
}

#[test]
fn an_actor_that_spins_lets_the_others_go_on() {
    for picker in [Picker::playback(&[]), Picker::pct(3, 3, 50)] {
        let mut picker = picker;
        let outcome = go(&mut picker, |sim| {
            let flag = Rc::new(Cell::new(false));
            let set = Rc::clone(&flag);
            sim.spawn("spinner", move || {
                while !flag.get() {
                    ModelEnv.point(Kind::Spin);
                }
            });
            sim.spawn("setter", move || {
                ModelEnv.sleep_until(Ns(1_000_000));
                set.set(true);
            });
        });
        assert!(outcome.trouble.is_none(), "{:?}", outcome.trouble);
        assert!(outcome.steps < 100);
    }
}

#[test]
fn chaos_strikes_in_the_safety_phase_alone() {
    let failures = Rc::new(Cell::new([0_u32; 2]));
    let seen = Rc::clone(&failures);
    let options = Options {
        chaos: Chaos::OneIn(4),
        ..Options::default()
    };
    let outcome = run(&options, &mut Picker::uniform(5), |sim| {
        sim.spawn("caller", move || {
            for n in 0..2000 {
                if n == 1000 {
                    ModelEnv.calm();
                }
                if ModelEnv.may_fail("call") == Fate::Fail {
                    let mut counts = seen.get();
                    counts[usize::from(ModelEnv.phase() == Phase::Liveness)] += 1;
                    seen.set(counts);
                }
            }
        });
    });
    assert!(outcome.trouble.is_none());
    let [safety, liveness] = failures.get();
    assert!(safety > 60 && liveness == 0, "{safety} {liveness}");
}

#[test]
fn exactly_the_nth_call_fails() {
    let options = Options {
        chaos: Chaos::Nth {
            site: "call".into(),
            n: 3,
        },
        ..Options::default()
    };
    let failed = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&failed);
    let outcome = run(&options, &mut Picker::uniform(5), |sim| {
        sim.spawn("caller", move || {
            for n in 0..10 {
                assert_eq!(ModelEnv.may_fail("other"), Fate::Go);
                if ModelEnv.may_fail("call") == Fate::Fail {
                    seen.borrow_mut().push(n);
                }
            }
        });
    });
    assert!(outcome.trouble.is_none());
    assert_eq!(*failed.borrow(), [3]);
}

#[test]
fn the_summary_is_the_same_on_any_number_of_threads() {
    let summary = |threads| {
        let explorer = Explorer {
            options: Options::default(),
            picker: Picker::swarm,
            threads,
            build: busy_world,
        };
        let summary = explorer.run_seeds(0..500, &|_| {});
        (summary.worlds, summary.steps, summary.hash)
    };
    assert_eq!(summary(1), summary(3));
}

#[test]
fn a_wait_of_device_code_ends_at_its_timeout() {
    let outcome = go(&mut Picker::uniform(1), |sim| {
        sim.spawn("unit", || {
            Park::wait(&ModelEnv, &AtomicU32::new(0), 0, Some(5_000));
            assert!(Park::now_ns(&ModelEnv) >= 5_000);
        });
    });
    assert!(outcome.trouble.is_none(), "{:?}", outcome.trouble);
}

#[test]
fn an_actor_makes_actors() {
    let sum = Rc::new(Cell::new(0));
    let seen = Rc::clone(&sum);
    let outcome = go(&mut Picker::uniform(9), |sim| {
        let sim = *sim;
        sim.spawn("parent", move || {
            for n in 1..=3 {
                let sum = Rc::clone(&sum);
                sim.spawn(format!("child{n}"), move || sum.set(sum.get() + n));
            }
        });
    });
    assert!(outcome.trouble.is_none(), "{:?}", outcome.trouble);
    assert_eq!(seen.get(), 6);
}

#[test]
fn a_failure_shows_the_last_events_of_each_actor() {
    let options = Options {
        texts: Texts::Kept,
        ..options()
    };
    let outcome = run(&options, &mut Picker::playback(&[]), |sim| {
        sim.spawn("cpu0", || ModelEnv.emit("store", [0x10, 1]));
        sim.spawn("gpu0", || {
            ModelEnv.tell("load", [0x10, 0], || "load of page 16: old".into());
            ModelEnv.fail("a load returned an old store");
        });
    });
    let trouble = outcome.trouble.expect("the world fails");
    let shown = trouble.to_string();
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(
        lines[0],
        "violation at 1 ns, gpu0: a load returned an old store"
    );
    assert_eq!(lines[1], "      time | cpu0           | gpu0");
    assert_eq!(lines[2], "         0 | store 0x10 0x1 |");
    assert_eq!(
        lines[3],
        "         1 |                | load of page 16: old"
    );
}

#[test]
fn points_that_are_off_are_no_choices() {
    let options = Options {
        points: Points::ALL.without(&[Kind::Other]),
        ..options()
    };
    let outcome = run(&options, &mut Picker::uniform(1), |sim| {
        stepping(sim, 2, 50)
    });
    assert!(outcome.steps <= 2, "{}", outcome.steps);
}

#[test]
fn goals_are_counted_by_worlds_on_any_number_of_threads() {
    let counts = |threads| {
        let explorer = Explorer {
            options: Options::default(),
            picker: Picker::swarm,
            threads,
            build: |sim: &Sim| {
                let goal = u32::try_from(sim.seed() % 3).expect("small") * 40;
                sim.spawn("actor", move || {
                    assert_eq!(ModelEnv.actor(), 0);
                    ModelEnv.reach(goal);
                    ModelEnv.reach(goal);
                });
            },
        };
        let reached = explorer.run_seeds(0..1000, &|_| {}).reached;
        [0, 40, 80].map(|goal| reached[goal])
    };
    assert_eq!(counts(1), [334, 333, 333]);
    assert_eq!(counts(3), counts(1));
}
