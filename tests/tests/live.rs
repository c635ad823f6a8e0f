//! Whole machines on this process's own memory: what the program does to its address space while a
//! device kernel uses it (`svm-design.md` section 7.3).
//!
//! A process has one live space, so the tests take turns.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use gpusvm::addr::{HostSpan, HostVa, VramAddr, VramSpan};
use gpusvm::error::Failed;
use gpusvm_abi::bus::AtomicOp;
use gpusvm_cli::atomics::Atomics;
use gpusvm_cli::machine::{Machine, MachineConfig, Place};
use gpusvm_live::{
    BracketChoice, FaultLevel, Huge, Leave, LiveConfig, Protect, Territory, VramMode,
};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_tests::stage::{
    Add, MIB, assert_goes_on, assert_nothing_leaks, filled, modes, span_of, start, turn,
};
use gpusvm_xe::stats::Counter;
use gpusvm_xe::vm::{MirrorArea, Rights};

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

const OLD: u64 = 7;

/// Reads words of `span` until told to stop. A read that began after `changed` was set must not find
/// the old value in `gone`.
struct Watch<'a> {
    span: Range<u64>,
    gone: Range<u64>,
    changed: &'a AtomicBool,
    stop: &'a AtomicBool,
    reads: &'a AtomicU64,
    stale: &'a AtomicU64,
}

impl Kernel for Watch<'_> {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let bytes = self.span.end - self.span.start;
        let mut offset = u64::from(group) * 4096;
        while !self.stop.load(Ordering::SeqCst) {
            let changed = self.changed.load(Ordering::SeqCst);
            let at = self.span.start + offset % bytes;
            let word: u64 = tile.load_one(at)?;
            self.reads.fetch_add(1, Ordering::Relaxed);
            if changed && word == OLD && self.gone.contains(&at) {
                self.stale.fetch_add(1, Ordering::Relaxed);
            }
            offset += 4096 * 3;
        }
        Ok(())
    }
}

/// What a watching kernel saw.
struct Watched {
    /// How the kernel ended.
    ended: Result<(), Stop>,
    /// Reads of what was gone by then.
    stale: u64,
}

impl Watched {
    /// Asserts that nothing stale was read and the kernel was refused an access in `gone`.
    fn assert_refused(self, gone: &Range<u64>, what: &dyn Debug) {
        assert_eq!(self.stale, 0, "{what:?}: the device read what was gone");
        assert_refused(self.ended, gone, what);
    }

    /// Asserts that nothing stale was read and the kernel ran to its end.
    fn assert_done(self, what: &dyn Debug) {
        assert_eq!(self.stale, 0, "{what:?}: the device read what was gone");
        assert_eq!(self.ended, Ok(()), "{what:?}");
    }
}

/// Runs a watching kernel over `span` while `change` takes the content of `gone` away.
fn watch_while(
    machine: &Machine,
    span: Range<u64>,
    gone: Range<u64>,
    change: impl FnOnce(),
) -> Watched {
    let (changed, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let (reads, stale) = (AtomicU64::new(0), AtomicU64::new(0));
    let kernel = Watch {
        span,
        gone,
        changed: &changed,
        stop: &stop,
        reads: &reads,
        stale: &stale,
    };
    let ended = thread::scope(|scope| {
        let device = scope.spawn(|| machine.launch(&kernel, 2));
        let wait_for = |count: u64| {
            let from = reads.load(Ordering::Relaxed);
            while reads.load(Ordering::Relaxed) < from + count && !device.is_finished() {
                thread::yield_now();
            }
        };
        wait_for(10_000);
        assert!(
            !device.is_finished(),
            "the kernel runs when the change comes"
        );
        change();
        changed.store(true, Ordering::SeqCst);
        wait_for(10_000);
        stop.store(true, Ordering::SeqCst);
        device.join().expect("the launch returns")
    });
    let stale = stale.load(Ordering::Relaxed);
    Watched { ended, stale }
}

/// Asserts that a kernel ended with a refused access in `gone`.
fn assert_refused(ended: Result<(), Stop>, gone: &Range<u64>, what: &dyn Debug) {
    let Err(Stop::Fault(fault)) = ended else {
        panic!("{what:?}: {ended:?}")
    };
    assert!(gone.contains(&fault.address), "{what:?}: {fault:?}");
}

/// Adds one to a word of every page, again and again, until told to stop.
struct Count<'a> {
    span: Range<u64>,
    stop: &'a AtomicBool,
    rounds: &'a AtomicU64,
}

impl Kernel for Count<'_> {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        while !self.stop.load(Ordering::SeqCst) {
            for at in self.span.clone().step_by(4096) {
                let word: u64 = tile.load_one(at)?;
                tile.store_one(at, word + 1)?;
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[test]
fn oversubscribed_memory_is_computed_on_in_every_mode() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let map = filled(64 * MIB, 10);
        for round in 0..3 {
            machine
                .launch(
                    &Add {
                        at: map.address(),
                        by: 1,
                    },
                    64,
                )
                .expect("memory is there");
            assert!(
                map.words().iter().all(|word| *word == 11 + round),
                "{mode:?}"
            );
        }
        let stats = machine.stats();
        assert!(stats.total(Counter::EvictCount) > 0, "{mode:?}");
        assert!(stats.total(Counter::CpuFaultCount) > 0, "{mode:?}");
        assert_eq!(stats.total(Counter::LateInvalidationCount), 0, "{mode:?}");
        assert_eq!(stats.total(Counter::HostConflictCount), 0, "{mode:?}");
        let copied = stats.total(Counter::SvmDeviceCopyKb) > 0;
        assert_eq!(copied, mode.migration == VramMode::Copy, "{mode:?}");
    }
}

#[test]
fn what_came_home_is_the_sum_of_all_reasons() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let get = |counter| machine.stats().total(counter);
        let map = filled(24 * MIB, 0);
        let add = |at, groups| machine.launch(&Add { at, by: 1 }, groups).expect("mapped");
        // More than there is, a touch, and a mapping that moves.
        add(map.address(), 24);
        assert!(map.words().iter().all(|word| *word == 1), "{mode:?}");
        let land = Territory::reserve(8 << 20).expect("there is room");
        let from = HostSpan::at(land.span().start(), 2 << 20);
        land.map(from, Huge::Never).expect("memory");
        add(from.start().get(), 1);
        let moved = land.relocate(from, from.start().plus(4 << 20), Leave::Hole);
        moved.expect("nothing is there");
        let reasons = [
            Counter::HomeCpuFaultKb,
            Counter::HomePressureKb,
            Counter::HomeSpaceChangeKb,
        ];
        assert!(reasons.iter().all(|reason| get(*reason) > 0), "{mode:?}");
        let others = get(Counter::HomeMixedKb) + get(Counter::HomeTeardownKb);
        let sum = reasons.map(get).iter().sum::<u64>() + others;
        let all = get(Counter::SvmCpuCopyKb) + get(Counter::AdoptedToSystemKb);
        assert_eq!(sum, all, "{mode:?}");
    }
}

#[test]
fn discarded_memory_reads_as_zero_on_the_device() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let mut map = filled(8 * MIB, OLD);
        let span = span_of(&map);
        let watched = watch_while(&machine, span.clone(), span, || {
            map.discard(0, 8 * MIB).expect("content can go");
        });
        watched.assert_done(&mode);
        assert!(map.words().iter().all(|word| *word == 0), "{mode:?}");
        assert_eq!(
            machine.stats().total(Counter::LateInvalidationCount),
            0,
            "{mode:?}"
        );
        assert_goes_on(&machine);
    }
}

#[test]
fn planted_stale_tlb_is_caught() {
    let _turn = turn();
    let mode = MachineConfig {
        vram: 16 << 20,
        plant_stale_tlb: true,
        ..Default::default()
    };
    let Some(machine) = start(mode) else { return };
    let mut map = filled(8 * MIB, OLD);
    let span = span_of(&map);
    let watched = watch_while(&machine, span.clone(), span, || {
        map.discard(0, 8 * MIB).expect("content can go");
    });
    assert!(
        watched.stale > 0,
        "without TLB flushes the device must be caught reading old content"
    );
}

#[test]
fn unmapped_memory_is_a_clean_device_fault() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let mut map = filled(8 * MIB, OLD);
        let span = span_of(&map);
        let gone = span.start + (3 << 20) + 4096..span.end;
        let watched = watch_while(&machine, span.clone(), gone.clone(), || {
            map.unmap_tail(3 * MIB + 4096);
        });
        watched.assert_refused(&gone, &mode);
        // The part that stayed is intact, on the CPU and on the device.
        assert!(map.words().iter().all(|word| *word == OLD), "{mode:?}");
        machine
            .launch(
                &Add {
                    at: span.start,
                    by: 1,
                },
                3,
            )
            .expect("what stayed is usable");
        assert!(
            map.words()[..3 * MIB / 8]
                .iter()
                .all(|word| *word == OLD + 1),
            "{mode:?}"
        );
        assert_goes_on(&machine);
    }
}

#[test]
fn freed_memory_is_a_clean_device_fault() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        // So large that the allocator unmaps it, always: the call comes from inside `free()`.
        let block = vec![OLD; 40 * MIB / 8];
        let at = u64::try_from(block.as_ptr().expose_provenance()).expect("64-bit");
        let span = at..at + (40 << 20);
        let watched = watch_while(&machine, span.clone(), span.clone(), || drop(block));
        watched.assert_refused(&span, &mode);
        let later = machine.launch(&Add { at, by: 0 }, 39);
        assert_refused(later, &span, &mode);
        let stats = machine.stats();
        assert_eq!(stats.total(Counter::LateInvalidationCount), 0, "{mode:?}");
        assert_goes_on(&machine);
    }
}

#[test]
fn moved_memory_faults_at_its_old_place_and_works_at_the_new_one() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let mut map = filled(8 * MIB, OLD);
        let span = span_of(&map);
        let watched = watch_while(&machine, span.clone(), span.clone(), || {
            map.relocate().expect("the system moves it");
        });
        watched.assert_refused(&span, &mode);
        assert!(map.words().iter().all(|word| *word == OLD), "{mode:?}");
        machine
            .launch(
                &Add {
                    at: map.address(),
                    by: 1,
                },
                8,
            )
            .expect("the new place works");
        assert!(map.words().iter().all(|word| *word == OLD + 1), "{mode:?}");
        assert_eq!(
            machine.stats().total(Counter::LateInvalidationCount),
            0,
            "{mode:?}"
        );
        assert_goes_on(&machine);
    }
}

#[test]
fn protected_memory_refuses_the_device_until_it_is_given_back() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let mut map = filled(8 * MIB, OLD);
        let span = span_of(&map);
        let part = span.start + (2 << 20)..span.start + (4 << 20);
        let watched = watch_while(&machine, span.clone(), part.clone(), || {
            map.protect(2 * MIB, 2 * MIB, Protect::None)
                .expect("rights can change");
        });
        watched.assert_refused(&part, &mode);
        map.protect(2 * MIB, 2 * MIB, Protect::ReadWrite)
            .expect("rights can change");
        assert!(map.words().iter().all(|word| *word == OLD), "{mode:?}");
        machine
            .launch(
                &Add {
                    at: span.start,
                    by: 1,
                },
                8,
            )
            .expect("given back");
        assert!(map.words().iter().all(|word| *word == OLD + 1), "{mode:?}");
    }
}

#[test]
fn no_store_lands_after_memory_became_read_only() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let mut map = filled(8 * MIB, 0);
        let span = span_of(&map);
        let part = span.start + (2 << 20)..span.start + (4 << 20);
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let kernel = Count {
            span: span.clone(),
            stop: &stop,
            rounds: &rounds,
        };
        let (ended, kept) = thread::scope(|scope| {
            let device = scope.spawn(|| machine.launch(&kernel, 1));
            while rounds.load(Ordering::Relaxed) < 3 && !device.is_finished() {
                thread::yield_now();
            }
            map.protect(2 * MIB, 2 * MIB, Protect::Read)
                .expect("rights can change");
            let kept = map.words()[2 * MIB / 8..4 * MIB / 8].to_vec();
            let ended = device.join().expect("the launch returns");
            (ended, kept)
        });
        assert_refused(ended, &part, &mode);
        assert!(kept[0] >= 3, "{mode:?}: the kernel wrote before");
        assert!(
            map.words()[2 * MIB / 8..4 * MIB / 8] == kept,
            "{mode:?}: a refused store landed"
        );
        map.protect(2 * MIB, 2 * MIB, Protect::ReadWrite)
            .expect("rights can change");
        assert_goes_on(&machine);
        let at = part.start;
        machine.launch(&Add { at, by: 1 }, 2).expect("given back");
        assert_eq!(map.words()[2 * MIB / 8], kept[0] + 1, "{mode:?}");
    }
}

#[test]
fn changes_are_followed_by_events_where_sites_are_not_patched() {
    let _turn = turn();
    let live = LiveConfig {
        brackets: BracketChoice::Events,
        ..LiveConfig::default()
    };
    let Some(machine) = start(MachineConfig {
        live,
        vram: 16 << 20,
        ..Default::default()
    }) else {
        return;
    };
    let mut map = filled(8 * MIB, OLD);
    machine
        .launch(
            &Add {
                at: map.address(),
                by: 0,
            },
            8,
        )
        .expect("memory is there");
    map.discard(0, 4 * MIB).expect("content can go");
    assert!(map.words()[..4 * MIB / 8].iter().all(|word| *word == 0));
    assert!(map.words()[4 * MIB / 8..].iter().all(|word| *word == OLD));
    // Late by nature: also the count may come after the call has returned.
    while machine.stats().total(Counter::LateInvalidationCount) == 0 {
        thread::yield_now();
    }
    drop(map);
    assert_goes_on(&machine);
}

#[test]
fn device_memory_of_unmapped_pages_leaves_the_timeline() {
    let _turn = turn();
    for mode in modes() {
        let timeline = true;
        let Some(machine) = start(MachineConfig { timeline, ..mode }) else {
            return;
        };
        let map = filled(8 * MIB, OLD);
        let at = map.address();
        machine
            .launch(&Add { at, by: 1 }, 8)
            .expect("memory is there");
        let timeline = machine.timeline().expect("asked for");
        let resident = timeline.in_use();
        assert!((8 << 20..=mode.vram).contains(&resident), "{mode:?}");
        drop(map);
        assert_eq!(timeline.in_use(), resident - (8 << 20), "{mode:?}");
    }
}

#[test]
fn threads_write_while_the_device_computes_next_to_them() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let map = filled(32 * MIB, 0);
        let at = map.address();
        thread::scope(|scope| {
            let writer = scope.spawn(|| write_odd_mibs(at));
            for _round in 0..5 {
                machine
                    .launch(&AddEven { at }, 16)
                    .expect("memory is there");
            }
            writer.join().expect("the writer ends");
        });
        for (mib, words) in map.words().chunks(MIB / 8).enumerate() {
            if mib % 2 == 0 {
                assert!(words.iter().all(|word| *word == 5), "{mode:?}: MiB {mib}");
            } else {
                let written = words[1..=20]
                    .iter()
                    .zip(1..)
                    .all(|(word, round)| *word == round);
                assert!(written, "{mode:?}: MiB {mib}");
            }
        }
    }
}

/// Writes numbers to the odd MiBs, through the bus that the device uses as well.
fn write_odd_mibs(at: u64) {
    let bus = gpusvm_live::LiveBus::new();
    for round in 1..=20_u64 {
        for mib in (1..32).step_by(2) {
            let word = at + mib * (1 << 20) + round * 8;
            gpusvm_abi::bus::SystemBus::write(&bus, word, &round.to_ne_bytes())
                .expect("the memory is mapped");
        }
    }
}

/// Adds one to the even MiBs.
struct AddEven {
    at: u64,
}

impl Kernel for AddEven {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        Add {
            at: self.at + u64::from(group) * (1 << 20),
            by: 1,
        }
        .run(group, tile)
    }
}

#[test]
fn devices_and_vms_share_memory_and_exhaust_their_vram() {
    let _turn = turn();
    for migration in [VramMode::Adopt, VramMode::Copy] {
        let config = MachineConfig {
            devices: 2,
            vms: 2,
            vram: 8 << 20,
            migration,
            ..Default::default()
        };
        let Some(machine) = start(config) else { return };
        let map = filled(32 * MIB, 0);
        let at = map.address();
        for vm in 0..2 {
            // Both devices at the same time: on halves of their own, and on a word that both add to.
            thread::scope(|scope| {
                for device in 0..2_usize {
                    let place = Place { device, vm };
                    let half = u64::try_from(device).expect("small") * (16 << 20);
                    let kernel = AddAndCount {
                        add: Add {
                            at: at + half,
                            by: 1,
                        },
                        shared: at,
                    };
                    let machine = &machine;
                    scope.spawn(move || machine.launch_at(place, &kernel, 15).expect("mapped"));
                }
            });
            // And the same piece on one device after the other.
            for device in 0..2 {
                let kernel = Add {
                    at: at + (31 << 20),
                    by: 1,
                };
                machine
                    .launch_at(Place { device, vm }, &kernel, 1)
                    .expect("mapped");
            }
        }
        let word = |mib: usize| map.words()[mib * MIB / 8 + 9];
        assert!(
            (0..15).chain(16..31).all(|mib| word(mib) == 2),
            "{migration:?}"
        );
        assert_eq!(word(31), 4, "{migration:?}");
        assert_eq!(map.words()[15 * MIB / 8], 2 * 2 * 15 * 256, "{migration:?}");
        let stats = machine.stats();
        assert!(stats.total(Counter::EvictCount) > 0, "{migration:?}");
        assert_eq!(stats.total(Counter::HostConflictCount), 0, "{migration:?}");
        drop(map);
        assert_nothing_leaks(&machine);
    }
}

/// As [`Add`]; every group also adds 256 to the first word of the MiB 15, by atomics.
struct AddAndCount {
    add: Add,
    shared: u64,
}

impl Kernel for AddAndCount {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        self.add.run(group, tile)?;
        (0..256).try_for_each(|_| {
            tile.atomic(self.shared + (15 << 20), AtomicOp::Add(1))
                .map(|_former| ())
        })
    }
}

/// Adds one to the first word of every page of a span.
struct AddPages {
    span: Range<u64>,
}

impl Kernel for AddPages {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        for at in self.span.clone().step_by(4096) {
            let word: u64 = tile.load_one(at)?;
            tile.store_one(at, word + 1)?;
        }
        Ok(())
    }
}

#[test]
fn stack_of_the_thread_that_launches_is_memory_like_any_other() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let work = || {
            let mut frame = [OLD; 16 << 10];
            let at = u64::try_from(frame.as_mut_ptr().expose_provenance()).expect("64-bit");
            let kernel = AddPages {
                span: at..at + (128 << 10),
            };
            machine.launch(&kernel, 1).expect("the stack is there");
            let frame = std::hint::black_box(&frame);
            assert!(frame.iter().step_by(512).all(|word| *word == OLD + 1));
        };
        // Large, so that it has a block of 2 MiB that goes as a whole.
        let builder = thread::Builder::new().stack_size(8 << 20);
        thread::scope(|scope| {
            let thread = builder.spawn_scoped(scope, work).expect("one more thread");
            thread.join().expect("the kernel ran");
        });
        let faults = machine.stats().total(Counter::SvmPagefaultCount);
        assert!(faults < 2000, "{mode:?}: {faults} faults for 32 pages");
    }
}

#[test]
fn prefetch_to_where_pages_are_moves_nothing_and_binds_nothing() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let map = filled(4 * MIB, 0);
        let span = span_of(&map);
        let all = HostSpan::new(HostVa::new(span.start), HostVa::new(span.end));
        let prefetch = || gpusvm_live::thread::run(|| machine.vm().prefetch(all));
        let add = Add {
            at: span.start,
            by: 1,
        };
        let first = prefetch();
        assert_eq!(first, Ok(all.pages()));
        machine.launch(&add, 4).expect("mapped");
        let counters = || {
            let stats = machine.stats();
            let counted = [
                Counter::SvmPagefaultCount,
                Counter::TlbInvalCount,
                Counter::SvmTlbInvalCount,
            ];
            let moves = (stats.migrations_to_device(), stats.migrations_home());
            (counted.map(|counter| stats.total(counter)), moves)
        };
        let before = counters();
        assert_eq!(prefetch(), first, "they are there");
        machine.launch(&add, 4).expect("mapped");
        assert_eq!(counters(), before, "{mode:?}");
        assert!(map.words().iter().all(|word| *word == 2), "{mode:?}");
    }
}

#[test]
fn half_of_device_memory_goes_offline_under_load_and_no_word_is_lost() {
    let _turn = turn();
    for mode in modes() {
        let Some(machine) = start(mode) else { return };
        let map = filled(12 * MIB, 0);
        let add = Add {
            at: map.address(),
            by: 1,
        };
        machine.launch(&add, 12).expect("mapped");
        // Page tables are in the other half.
        let half = VramSpan::at(VramAddr::new(0), 8 << 20);
        let vram = machine.device().pagemap().vram();
        let offline = thread::scope(|scope| {
            scope.spawn(|| {
                for _round in 0..3 {
                    machine.launch(&add, 12).expect("mapped");
                }
            });
            gpusvm_live::thread::run(|| {
                // Refused while a migration to the block does not end.
                let tries = core::iter::repeat_with(|| vram.take_offline(half));
                tries.take(1000).find_map(Result::ok)
            })
        });
        let offline = offline.expect("nothing stays there");
        assert_eq!(vram.usage().withdrawn, half.bytes(), "{mode:?}");
        machine.launch(&add, 12).expect("half is enough");
        assert!(vram.usage().used <= half.bytes(), "{mode:?}");
        assert!(map.words().iter().all(|word| *word == 5), "{mode:?}");
        gpusvm_live::thread::run(|| drop(offline));
        assert_eq!(vram.usage().withdrawn, 0, "{mode:?}");
        machine.launch(&add, 12).expect("mapped");
        assert!(map.words().iter().all(|word| *word == 6), "{mode:?}");
    }
}

#[test]
fn area_that_a_device_uses_is_neither_mirrored_anew_nor_taken_away() {
    let _turn = turn();
    let Some(machine) = start(MachineConfig::default()) else {
        return;
    };
    let map = filled(4 * MIB, 0);
    let words = span_of(&map);
    let add = Add {
        at: words.start,
        by: 1,
    };
    machine.launch(&add, 4).expect("mapped");
    let span = HostSpan::new(HostVa::new(words.start), HostVa::new(words.end));
    let area = |rights| MirrorArea { span, rights };
    let mirror = |rights| gpusvm_live::thread::run(|| machine.vm().mirror(area(rights)));
    let unmirror = |span| gpusvm_live::thread::run(|| machine.vm().unmirror(span));
    let in_use = |at| Err(Failed::Permission(at));
    assert_eq!(mirror(Rights::ReadOnly), in_use(span.start()));
    assert_eq!(unmirror(span), in_use(span.start()));
    let page = HostSpan::at(span.start().plus(2 << 20), 4096);
    assert_eq!(unmirror(page), in_use(page.start()), "nor a part of it");
    machine.launch(&add, 4).expect("as before");
    drop(map);
    assert_eq!(unmirror(span), Ok(()), "its ranges are dead, and collected");
    assert_eq!(mirror(Rights::ReadOnly), Ok(()));
    assert_eq!(mirror(Rights::ReadWrite), Ok(()), "nobody uses it yet");
    assert_nothing_leaks(&machine);
}

#[test]
fn memory_that_is_not_mirrored_is_out_of_reach() {
    let _turn = turn();
    let Some(machine) = start(MachineConfig::default()) else {
        return;
    };
    let map = filled(4 * MIB, OLD);
    let words = span_of(&map);
    let span = HostSpan::new(HostVa::new(words.start), HostVa::new(words.end));
    let rest = HostSpan::new(span.start().plus(2 << 20), span.end());
    let unmirrored = gpusvm_live::thread::run(|| machine.vm().unmirror(rest));
    unmirrored.expect("no device has used it");
    let add = |at: HostVa| {
        let at = at.get();
        machine.launch(&Add { at, by: 1 }, 1)
    };
    add(span.start()).expect("what sticks out stays");
    assert!(add(rest.start()).is_err(), "the device has no right there");
    assert_eq!(map.words()[2 * MIB / 8], OLD);
    assert_eq!(map.words()[0], OLD + 1);
}

/// A closure as a kernel.
struct On<F>(F);

impl<F: Fn(&mut Tile<'_>) -> Result<(), Stop> + Sync> Kernel for On<F> {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        (self.0)(tile)
    }
}

#[test]
fn large_range_that_makes_room_for_an_exclusive_page_leaves_no_translation() {
    let _turn = turn();
    let config = MachineConfig {
        atomics: Atomics::Exclusive,
        ..Default::default()
    };
    let has_uffd = |machine: &Machine| machine.space().level().faults != FaultLevel::Mprotect;
    let Some(machine) = start(config).filter(has_uffd) else {
        return;
    };
    let map = filled(4 * MIB, 5);
    let at = span_of(&map).start;
    let vram = machine.device().pagemap().vram();
    // Both blocks stay where they are, each in one entry of the same table.
    let mut balloons = Vec::new();
    while vram.usage().free > 256 << 10 {
        balloons.push(vram.inflate(64 << 10).expect("memory that nobody has"));
    }
    let store = On(|tile: &mut Tile<'_>| {
        tile.store_one(at, 6_u64)?;
        tile.store_one(at + (2 << 20), 6_u64)
    });
    assert_eq!(machine.launch_on(0, &store), Ok(()));
    let flushes = || machine.stats().total(Counter::TlbInvalCount);
    let before = flushes();
    let add = On(|tile: &mut Tile<'_>| tile.atomic(at + (1 << 20), AtomicOp::Add(1)).map(drop));
    assert_eq!(machine.launch_on(0, &add), Ok(()));
    assert!(flushes() > before, "the unit has the large range by heart");
    assert_eq!(map.words()[(1 << 20) / 8], 6);
    drop((balloons, map));
    machine.close();
}
