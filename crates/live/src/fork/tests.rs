use super::*;

use core::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::Arc;

use gpusvm::addr::{HostVa, PAGE_2M};

use crate::env::LiveEnv;
use crate::sys::child::{By, Child};
use crate::sys::mapping::{AnonMapping, Huge};
use crate::sys::patch::{Call, SysCall};
use crate::sys::territory::{Advise, Territory};
use crate::sys::uffd::{Features, OpenMode, RegisterMode};
use crate::sys::vram::VramMode;
use crate::sys::waits::{self, Reason, Sleeper};
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
        if !hears_of_clones() {
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

/// Whether news of clones can be had; says why not.
fn hears_of_clones() -> bool {
    let heard = Uffd::open(OpenMode::Full, Features::FORK);
    if let Err(errno) = &heard {
        println!("skipped: news of clones needs a privilege: {errno}");
    }
    heard.is_ok()
}

/// Memory at `span` that holds `value` in all words.
fn holds(span: HostSpan, value: u64) -> bool {
    all(
        &AnonMapping::borrowed(span.start().get(), span.bytes()),
        value,
    )
}

/// Memory of its own kind, all words of which hold 5.
fn territory(huge: Huge) -> Territory {
    let land = Territory::reserve(BYTES).expect("there is room");
    land.map(land.span(), huge).expect("a hole");
    let at = land.span().start().get();
    AnonMapping::borrowed(at, BYTES).words_mut().fill(5);
    land
}

/// A call is made while a child of a raw clone has not got its pages yet.
fn call_while_a_child_waits(bench: &Bench, huge: Huge, call: Call, advice: usize) {
    let land = territory(huge);
    let span = land.span();
    let raw = |number| usize::try_from(number).expect("64-bit");
    let call = SysCall::new(call, &[raw(span.start().get()), raw(span.bytes()), advice]);
    // The test feeds the child when it is time.
    bench.space.attendant.stop();
    bench.send(span).expect("plain memory migrates");
    let child = Child::make(By::RawClone, || holds(span, 5)).expect("a child");
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bench.space.bracket(&call);
            ended.store(true, Ordering::SeqCst);
        });
        let waits = |sleeper: &Sleeper| sleeper.reason == Reason::Travel;
        while !ended.load(Ordering::SeqCst) && !waits::sleepers().iter().any(waits) {
            std::thread::yield_now();
        }
        while let Some(orphan) = bench.space.attendant.next_orphan() {
            feed(&bench.space, orphan);
        }
    });
    assert!(child.passed().expect("ours"), "{huge:?}, {call:?}");
    assert!(!bench.space.residency.lock().is_owed(span), "it has all");
}

#[test]
fn call_that_drops_content_waits_until_the_child_of_a_raw_clone_has_it() {
    const MADV_DONTNEED: usize = 4;
    if hears_of_clones() {
        each(|bench, huge| call_while_a_child_waits(bench, huge, Call::Madvise, MADV_DONTNEED));
        each(|bench, huge| call_while_a_child_waits(bench, huge, Call::Munmap, 0));
    }
}

#[test]
fn child_gets_zeros_of_memory_that_is_wiped_for_children() {
    for by in [By::RawClone, By::Fork] {
        if !hears_of_clones() {
            return;
        }
        each(|bench, huge| {
            let land = territory(huge);
            let span = land.span();
            bench.send(span).expect("plain memory migrates");
            let wiped = HostSpan::at(span.start(), PAGE_2M + PAGE);
            land.advise(wiped, Advise::WipeOnFork)
                .expect("plain memory");
            assert!(bench.space.residency.lock().has_departed(span));
            let kept = HostSpan::new(wiped.end(), span.end());
            let child = Child::make(by, || holds(wiped, 0) && holds(kept, 5));
            let content = child.expect("a child").passed().expect("ours");
            assert!(content, "{by:?}, {huge:?}");
            assert!(holds(span, 5), "{by:?}, {huge:?}");
        });
    }
}

/// Advice cuts mappings, in the parent and so in the child.
#[test]
fn child_of_a_raw_clone_gets_what_was_away_of_several_mappings() {
    each(|bench, huge| {
        if !hears_of_clones() {
            return;
        }
        let land = territory(huge);
        let span = land.span();
        bench.send(span).expect("plain memory migrates");
        let advice = match huge {
            Huge::Advise => Advise::Small,
            Huge::Never => Advise::Huge,
        };
        for at in [3 * PAGE, 4 * PAGE, PAGE_2M + 5 * PAGE] {
            let page = HostSpan::at(span.start().plus(at), PAGE);
            land.advise(page, advice).expect("plain memory");
        }
        let left_out = HostSpan::at(span.start().plus(8 * PAGE), 9 * PAGE);
        land.advise(left_out, Advise::DontFork)
            .expect("plain memory");
        let (before, after) = (
            HostSpan::new(span.start(), left_out.start()),
            HostSpan::new(left_out.end(), span.end()),
        );
        let child = Child::make(By::RawClone, || holds(before, 5) && holds(after, 5));
        let content = child.expect("a child").passed().expect("ours");
        assert!(content, "{huge:?}");
        assert!(holds(span, 5), "{huge:?}");
    });
}

/// A child gets its pages although the system has no memory for them at first.
#[test]
fn child_gets_pages_that_find_no_memory_at_first() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (map, span) = filled(Huge::Never, 5);
    let memory = Uffd::open(OpenMode::UserModeOnly, Features::EVENTS).expect("as the bench's");
    let bytes = usize::try_from(BYTES).expect("64-bit");
    // Stands for the child's memory.
    let place = AnonMapping::new(bytes, Huge::Never).expect("4M can be mapped");
    let there = HostSpan::at(HostVa::new(place.address()), BYTES);
    memory
        .register(there, RegisterMode::MissingAndWriteProtect)
        .expect("plain memory");
    memory.starved.store(3, Ordering::Relaxed);
    let mut orphan = Orphan::new(memory, vec![span]);
    orphan.changes.push(Change::Move {
        from: span,
        to: there.start(),
    });
    feed(&bench.space, orphan);
    assert!(all(&place, 5));
    assert!(all(&map, 5));
}

/// Others hold locks when the process forks, and do not give them back in the child.
#[test]
fn child_begins_anew_whatever_locks_others_held() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let (ready, made) = (AtomicBool::new(false), AtomicBool::new(false));
    let is_made = || made.load(Ordering::SeqCst);
    let wait = |until: &dyn Fn() -> bool| {
        while !until() && !is_made() {
            std::thread::yield_now();
        }
    };
    let wants = |sleeper: &Sleeper| sleeper.reason == Reason::Lock;
    let child = std::thread::scope(|scope| {
        scope.spawn(|| {
            bracket::held::patches(|| {
                ready.store(true, Ordering::SeqCst);
                while !is_made() {
                    // The forking thread asks for the space before and after: it has asked.
                    wait(&|| bench.space.forks.0.load(Ordering::SeqCst) > 0);
                    bracket::held::space(|| wait(&|| waits::sleepers().iter().any(wants)));
                }
            });
        });
        while !ready.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let child = Child::make(By::Fork, || {
            !bracket::held::any() && {
                begin_anew();
                !atfork::is_child() && bracket::current_space().is_none()
            }
        });
        made.store(true, Ordering::SeqCst);
        child
    });
    assert!(child.expect("a child").passed().expect("ours"));
}
