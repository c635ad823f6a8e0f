use super::*;

use core::sync::atomic::AtomicU64;
use std::sync::Arc;

use gpusvm::addr::{HostVa, PAGE_2M};

use crate::env::LiveEnv;
use crate::sys::child::{By, Child};
use crate::sys::mapping::{AnonMapping, Huge};
use crate::sys::uffd::{Features, OpenMode, RegisterMode};
use crate::sys::vram::VramMode;
use crate::toy::Bench;

const BYTES: u64 = 2 * PAGE_2M;

/// Memory whose words hold `value`, and its addresses.
fn filled(huge: Huge, value: u64) -> (AnonMapping, HostSpan) {
    let bytes = usize::try_from(BYTES).expect("64-bit");
    let mut map = AnonMapping::new(bytes, huge).expect("4M can be mapped");
    map.words_mut().fill(value);
    let span = HostSpan::at(HostVa::new(map.address()), BYTES);
    (map, span)
}

fn all(map: &AnonMapping, value: u64) -> bool {
    map.words().iter().all(|word| *word == value)
}

/// Every way in which pages move, with both kinds of pages.
fn each(test: impl Fn(&Bench, Huge)) {
    for mode in [VramMode::Adopt, VramMode::Copy] {
        for huge in [Huge::Advise, Huge::Never] {
            let Some(bench) = Bench::open(mode) else {
                return;
            };
            test(&bench, huge);
            assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
        }
    }
}

#[test]
fn child_and_parent_have_the_same_memory_and_not_each_others_writes() {
    each(|bench, huge| {
        let (mut map, span) = filled(huge, 5);
        bench.send(span).expect("plain memory migrates");
        let child = Child::make(By::Fork, || all(&map, 5)).expect("a child");
        // The child has not looked yet.
        map.words_mut().fill(6);
        bench.send(span).expect("shared pages are made exclusive");
        assert!(
            child.passed().expect("ours"),
            "{huge:?}: the child has what was there at the fork"
        );
        assert!(all(&map, 6), "{huge:?}");
        let address = map.address();
        let writer = Child::make(By::Fork, || {
            let mut mine = AnonMapping::borrowed(address, BYTES);
            mine.words_mut().fill(7);
            all(&mine, 7)
        });
        bench.send(span).expect("shared pages are made exclusive");
        assert!(writer.expect("a child").passed().expect("ours"));
        assert!(all(&map, 6), "{huge:?}: the child's writes are its own");
    });
}

#[test]
fn nothing_leaves_while_a_fork_goes_on() {
    each(|bench, huge| {
        let (map, span) = filled(huge, 5);
        bench.space.before_fork();
        assert!(bench.send(span).is_err(), "pages are held");
        bench.space.after_fork();
        bench.send(span).expect("it is over");
        bench.space.after_fork();
        assert!(all(&map, 5), "one end too many does no harm");
    });
}

#[test]
fn threads_migrate_and_fork_and_no_child_misses_a_page() {
    const ROUNDS: u64 = 30;
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (map, span) = filled(Huge::Advise, 5);
    let (forked, sent) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while forked.load(Ordering::Relaxed) < ROUNDS {
                let moved = bench.send(span).is_ok();
                sent.fetch_add(u64::from(moved), Ordering::Relaxed);
            }
        });
        for _ in 0..ROUNDS {
            while !bench.space.residency.lock().has_departed(span) {
                std::thread::yield_now();
            }
            let child = Child::make(By::Fork, || all(&map, 5)).expect("a child");
            assert!(child.passed().expect("ours"));
            forked.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(sent.load(Ordering::Relaxed) > 0);
    assert!(all(&map, 5));
}

#[test]
fn child_of_a_raw_clone_gets_what_was_away() {
    each(|bench, huge| {
        if let Err(errno) = Uffd::open(OpenMode::Full, Features::FORK) {
            println!("skipped: news of clones needs a privilege: {errno}");
            return;
        }
        let (map, span) = filled(huge, 5);
        bench.send(span).expect("plain memory migrates");
        let child = Child::make(By::RawClone, || all(&map, 5)).expect("a child");
        assert!(child.passed().expect("ours"), "{huge:?}");
        assert!(all(&map, 5), "{huge:?}");
    });
}

#[test]
fn child_knows_itself_however_it_was_made() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    assert!(!atfork::is_child());
    for (by, is_child) in [(By::Fork, true), (By::RawClone, true), (By::Vfork, false)] {
        let child = Child::make(by, || atfork::is_child() == is_child).expect("a child");
        assert!(child.passed().expect("ours"), "{by:?}");
    }
    assert!(!atfork::is_child());
    drop(bench);
}

/// A child that changes its memory waits until somebody has read that, and takes no copies meanwhile.
#[test]
fn child_that_changes_its_memory_while_it_is_fed_goes_on() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (map, span) = filled(Huge::Never, 5);
    // Any descriptor will do: what counts is that somebody waits for its news to be read.
    let memory = Uffd::open(OpenMode::UserModeOnly, Features::EVENTS).expect("as the bench's");
    let (mut other, place) = filled(Huge::Never, 6);
    memory
        .register(place, RegisterMode::WriteProtect)
        .expect("plain memory");
    std::thread::scope(|scope| {
        scope.spawn(|| other.discard(0, 4096).expect("it is mapped"));
        while !memory.is_changing() {
            std::thread::yield_now();
        }
        feed(&bench.space, Orphan::new(memory, vec![span]));
    });
    assert_eq!(other.words()[0], 0);
    assert!(all(&map, 5));
}

#[test]
fn copies_go_where_the_child_has_its_mappings() {
    if let Ok(memory) = Uffd::open(OpenMode::UserModeOnly, Features::EVENTS) {
        let mut child = Orphan::new(memory, Vec::new());
        let block = |n: u64| HostSpan::at(HostVa::new(n * PAGE_2M), PAGE_2M);
        child.changes.push(Change::Move {
            from: block(1),
            to: block(5).start(),
        });
        child.changes.push(Change::Remove(block(2)));
        assert_eq!(child.fate(block(1)).place, Some(block(5).start()));
        assert_eq!(child.fate(block(2)).place, None);
        assert_eq!(child.fate(block(3)), Fate::home(block(3)));
    }
}

#[test]
fn child_cannot_open_a_space_of_its_own() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let env = LiveEnv::new(1);
    let child = Child::make(By::Fork, || {
        let opened = LiveSpace::open(&crate::LiveConfig::default(), env.clone(), Arc::new(()));
        matches!(opened, Err(crate::OpenError::Forked))
    });
    assert!(child.expect("a child").passed().expect("ours"));
    drop(bench);
}
