//! Random operations with migrations, against a map from page to value.

use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::BTreeMap;

use gpusvm::addr::PAGE;
use gpusvm::error::Interrupted;
use gpusvm::seam::mm::{AddressSpace, DeviceAllocation, MigrateTo, MigrationSet, Owner};
use gpusvm_abi::bus::AtomicOp;
use proptest::prelude::*;

use super::test_bench::Bench;
use crate::mm::entry::Entry;
use crate::mm::errno::Errno;
use crate::mm::memory::FrameId;
use crate::mm::remap::{Remap, Target};
use crate::mm::{DeviceFolios, Shape};

const PAGES: u32 = 12;

#[derive(Clone, Debug)]
enum Op {
    Store(u32, u64),
    Load(u32),
    Send(u32, u32),
    Drop(u32, u32),
    Unmap(u32, u32),
    Map(u32, u32),
    Move(u32, u32, u32),
    Reclaim(u32),
    Large(u32, u32),
    Collapse(u32, u32),
    ForkAndWrite(u32),
    Exclusive(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let at = || 0..PAGES;
    let len = || 1..5u32;
    prop_oneof![
        6 => (at(), 1..9u64).prop_map(|(a, v)| Op::Store(a, v)),
        4 => at().prop_map(Op::Load),
        6 => (at(), len()).prop_map(|(a, l)| Op::Send(a, l)),
        2 => (at(), len()).prop_map(|(a, l)| Op::Drop(a, l)),
        1 => (at(), len()).prop_map(|(a, l)| Op::Unmap(a, l)),
        2 => (at(), len()).prop_map(|(a, l)| Op::Map(a, l)),
        2 => (at(), len(), at()).prop_map(|(a, l, b)| Op::Move(a, l, b)),
        2 => at().prop_map(Op::Reclaim),
        1 => (at(), len()).prop_map(|(a, l)| Op::Large(a, l)),
        1 => (at(), len()).prop_map(|(a, l)| Op::Collapse(a, l)),
        1 => at().prop_map(Op::ForkAndWrite),
        1 => at().prop_map(Op::Exclusive),
    ]
}

fn run(bench: &Bench, values: &mut BTreeMap<u32, u64>, op: &Op) {
    let bytes = |pages: u32| u64::from(pages) * PAGE;
    let inside = |at: u32, len: u32| at + len <= PAGES;
    match *op {
        Op::Store(page, value) => {
            if bench.space.store(bench.at(page), value).is_ok() {
                assert!(values.insert(page, value).is_some());
            }
        }
        Op::Load(page) => {
            let got = bench.space.load(bench.at(page)).ok();
            assert_eq!(got, values.get(&page).copied());
        }
        Op::Send(at, len) => match bench.send(bench.span(at, len)) {
            Ok(_) | Err(Interrupted::Stale(_) | Interrupted::Failed(_)) => {}
        },
        Op::Drop(at, len) => {
            let held = bench.space.madvise(bench.at(at), bytes(len), 4);
            assert_eq!(
                held.is_ok(),
                (at..at + len).all(|page| values.contains_key(&page))
            );
            values
                .range_mut(at..at + len)
                .for_each(|(_, value)| *value = 0);
        }
        Op::Unmap(at, len) => {
            bench
                .space
                .munmap(bench.at(at), bytes(len))
                .expect("inside the window");
            values.retain(|page, _| !(at..at + len).contains(page));
        }
        Op::Map(at, len) if inside(at, len) => {
            bench.map(at, len);
            values.extend((at..at + len).map(|page| (page, 0)));
        }
        Op::Move(at, len, to) if inside(to, len) => {
            let remap = Remap {
                at: bench.at(at),
                old_len: bytes(len),
                new_len: bytes(len),
                target: Target::At(bench.at(to)),
            };
            if bench.space.mremap(&remap).is_ok() {
                for n in 0..len {
                    if let Some(value) = values.remove(&(at + n)) {
                        values.insert(to + n, value);
                    }
                }
            }
        }
        Op::Map(..) | Op::Move(..) => {}
        Op::Reclaim(page) => assert!([true, false].contains(&bench.space.reclaim(bench.at(page)))),
        Op::Large(at, len) => drop(bench.space.madvise(bench.at(at), bytes(len), 14)),
        Op::Collapse(at, len) => drop(bench.space.madvise(bench.at(at), bytes(len), 25)),
        Op::ForkAndWrite(page) => {
            let child = bench.space.fork().expect("room");
            bench.kernel.check_quiet().expect("consistent");
            if child.load(bench.at(page)).ok() == Some(1) {
                child.store(bench.at(page), 99).expect("mapped");
            }
            child.exit();
        }
        Op::Exclusive(page) => {
            let _made = bench
                .space
                .make_exclusive(bench.at(page), Owner(1), &mut |_bus| ());
        }
    }
}

#[test]
fn no_write_is_lost_when_everything_happens_at_once() {
    let bench = Bench::new();
    bench.map(0, 8);
    let (adds, done) = (400, AtomicBool::new(false));
    let until_done = |act: &dyn Fn(u32)| {
        for n in (0..).take_while(|_| !done.load(Ordering::Acquire)) {
            act(n);
        }
    };
    let space = &bench.space;
    std::thread::scope(|scope| {
        scope.spawn(|| until_done(&|n| drop(bench.send(bench.span(n % 7, 1 + n % 2)))));
        scope.spawn(|| {
            until_done(&|n| {
                let gone = space.reclaim(bench.at(n % 8));
                let advice = if gone { 25 } else { 14 };
                let advised = space.madvise(bench.at(0), 8 * PAGE, advice);
                assert_ne!(advised, Err(Errno::Fault));
                if let Ok(child) = space.fork() {
                    child.exit();
                }
            });
        });
        for n in 0..adds {
            let page = n % 8;
            let added = space.atomic(bench.at(page), AtomicOp::Add(1));
            assert!(added.is_ok(), "{added:?}");
        }
        done.store(true, Ordering::Release);
    });
    for page in 0..8 {
        assert_eq!(bench.load(page), u64::from(adds / 8), "page {page}");
    }
    bench.check();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_write_is_lost_whatever_moves(
        large in prop_oneof![Just(DeviceFolios::Small), Just(DeviceFolios::Large)],
        ops in prop::collection::vec(op(), 1..50),
    ) {
        let bench = Bench::of(Shape { device_folios: large, ..Shape::default() });
        bench.env.watch(&bench.kernel);
        let mut values = BTreeMap::new();
        bench.map(0, 8);
        values.extend((0..8).map(|page| (page, 0)));
        for op in &ops {
            run(&bench, &mut values, op);
            bench.check();
        }
        for (page, value) in &values {
            assert_eq!(bench.load(*page), *value, "page {page}");
        }
        bench.space.exit();
        bench.check();
        let free = bench.kernel.look(|mm| mm.memory().free_frames() == mm.memory().host_frames());
        assert!(free, "no page is left");
    }
}

/// Pages in this order are this many runs that follow each other; holes follow each other, too.
fn runs(frames: &[Option<FrameId>]) -> usize {
    let apart = |pair: &&[Option<FrameId>]| match pair {
        [Some(one), Some(next)] => one.plus(1) != *next,
        [one, next] => one.is_some() || next.is_some(),
        _ => false,
    };
    frames.windows(2).filter(apart).count() + usize::from(!frames.is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Pages are written in any order, so that they lie anywhere, and not all of them.
    #[test]
    fn a_migration_copies_once_per_run_of_pages(order in prop::collection::vec(0_u32..PAGES, 0..24)) {
        let bench = Bench::new();
        bench.map(0, PAGES);
        order.iter().for_each(|page| bench.store(*page, u64::from(*page) + 1));
        let frames = || -> Vec<_> {
            let entry = |page| bench.space.entry(bench.at(page));
            (0..PAGES).map(|page| entry(page).and_then(Entry::mapped_frame)).collect()
        };
        let span = bench.span(0, PAGES);
        let toy = bench.allocation(span);
        let (first, there) = (toy.vram().start(), frames());
        let set = bench.space.migrate_begin(span, MigrateTo::device(toy.clone(), None)).expect("quiet");
        prop_assert_eq!(set.moves().len(), runs(&there));
        let mut next = first;
        for copy in set.moves() {
            prop_assert_eq!(copy.vram.start(), next, "without gaps");
            next = copy.vram.end();
        }
        prop_assert_eq!(next, first.plus(span.bytes()));
        bench.copy(set.moves());
        set.finalize();
        let home = MigrateTo::home(toy, None);
        let set = bench.space.migrate_begin(span, home).expect("quiet");
        let back = set.moves().len();
        bench.copy(set.moves());
        set.finalize();
        prop_assert_eq!(back, runs(&frames()));
        for page in 0..PAGES {
            let wanted = if order.contains(&page) { u64::from(page) + 1 } else { 0 };
            prop_assert_eq!(bench.load(page), wanted);
        }
        bench.check();
    }
}
