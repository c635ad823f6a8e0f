//! Whole machines on this process's own memory: what the program does to its address space while a
//! device kernel uses it (`svm-design.md` section 7.3).
//!
//! A process has one live space, so the tests take turns.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use gpusvm_cli::machine::{Machine, MachineConfig, ServiceMode};
use gpusvm_live::{AnonMapping, BracketChoice, Huge, LiveConfig, Protect, VramMode};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_tests::skipped;
use gpusvm_xe::stats::Counter;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

static TURN: Mutex<()> = Mutex::new(());
const MIB: usize = 1 << 20;
const OLD: u64 = 7;

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine, or nothing and the reason.
fn start(config: MachineConfig) -> Option<Machine> {
    Machine::start(config).map_err(|error| skipped(&error)).ok()
}

/// Every way in which pages move and faults are served.
fn modes() -> Vec<MachineConfig> {
    let mut modes = Vec::new();
    for migration in [VramMode::Adopt, VramMode::Copy] {
        for service in [ServiceMode::Inline, ServiceMode::Queue] {
            modes.push(MachineConfig {
                vram: 16 << 20,
                migration,
                service,
                ..Default::default()
            });
        }
    }
    modes
}

fn filled(bytes: usize, value: u64) -> AnonMapping {
    let mut map = AnonMapping::new(bytes, Huge::Advise).expect("memory can be mapped");
    map.words_mut().fill(value);
    map
}

fn span_of(map: &AnonMapping) -> Range<u64> {
    let bytes = u64::try_from(map.bytes().len()).expect("64-bit");
    map.address()..map.address() + bytes
}

fn words(bytes: usize) -> u64 {
    u64::try_from(bytes / 8).expect("64-bit")
}

/// Adds to every word of a span; one group per MiB.
struct Add {
    at: u64,
    by: u64,
}

impl Kernel for Add {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let mut buffer = vec![0_u64; 4096];
        for block in 0..words(MIB) / 4096 {
            let at = self.at + (u64::from(group) * words(MIB) + block * 4096) * 8;
            tile.load(at, &mut buffer[..])?;
            buffer.iter_mut().for_each(|word| *word += self.by);
            tile.store(at, &buffer[..])?;
        }
        Ok(())
    }
}

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

/// The machine still works: a kernel on fresh memory gives the right answer.
fn assert_goes_on(machine: &Machine) {
    let mut map = filled(4 * MIB, 1);
    let at = map.address();
    machine
        .launch(&Add { at, by: 5 }, 4)
        .expect("later kernels go on");
    assert!(map.words_mut().iter().all(|word| *word == 6));
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
    assert!(
        machine.stats().total(Counter::LateInvalidationCount) > 0,
        "late by nature"
    );
    drop(map);
    assert_goes_on(&machine);
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
