//! The lower levels of the live host, forced: what migrates there, what is served, and what a system
//! call or a child meets.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use gpusvm::addr::{HostSpan, HostVa, PageCount};
use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_cli::machine::{Machine, MachineConfig};
use gpusvm_live::thread::run as thread_run;
use gpusvm_live::{AnonMapping, FaultLevel, Huge, LevelChoice, LiveBus, LiveConfig, allocate_for};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::{
    Add, MIB, assert_goes_on, assert_nothing_leaks, filled, span_of, start, turn,
};
use gpusvm_xe::stats::Counter;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

/// A machine at `level`, and allocations from now on that migrate there; or nothing and the reason.
fn machine_at(level: FaultLevel) -> Option<Machine> {
    let live = LiveConfig {
        level: LevelChoice::Forced(level),
        ..LiveConfig::default()
    };
    if let Err(why) = allocate_for(&live) {
        skipped(&why);
        return None;
    }
    start(MachineConfig {
        live,
        vram: 16 << 20,
        ..Default::default()
    })
}

fn sent(machine: &Machine) -> u64 {
    let stats = machine.stats();
    stats.total(Counter::SvmDeviceCopyKb) + stats.total(Counter::AdoptedToDeviceKb)
}

/// Adds one to every word of `map` on the device, which leaves it there.
fn add_one(machine: &Machine, map: &AnonMapping) {
    let span = span_of(map);
    let groups = u32::try_from((span.end - span.start) / MIB as u64).expect("a few");
    let add = Add {
        at: span.start,
        by: 1,
    };
    assert_eq!(machine.launch(&add, groups), Ok(()));
}

#[test]
fn touch_of_away_memory_is_served_in_the_thread() {
    let _turn = turn();
    let Some(machine) = machine_at(FaultLevel::Mprotect) else {
        return;
    };
    let mut map = filled(8 * MIB, 5);
    for round in 0..4 {
        add_one(&machine, &map);
        assert_eq!(map.words()[12_345], 6 + 2 * round);
        assert!(map.words().iter().all(|word| *word == 6 + 2 * round));
        map.words_mut().iter_mut().for_each(|word| *word += 1);
    }
    assert!(sent(&machine) >= 4 * 8 * 1024, "all of it, each time");
    assert!(machine.stats().total(Counter::CpuFaultCount) >= 16);
    drop(map);
    assert_goes_on(&machine);
    assert_nothing_leaks(&machine);
    machine.close();
}

#[test]
fn allocations_that_go_while_they_are_away_are_forgotten() {
    let _turn = turn();
    let Some(machine) = machine_at(FaultLevel::Mprotect) else {
        return;
    };
    for round in 0..20 {
        let mut map = filled(4 * MIB, round);
        add_one(&machine, &map);
        if round % 3 == 0 {
            map.unmap_tail(MIB);
            assert_eq!(map.words()[100], round + 1);
        } else if round % 3 == 1 {
            map.discard(0, MIB).expect("the system drops it");
            assert_eq!(map.words()[0], 0);
            assert_eq!(map.words()[MIB / 8], round + 1);
        }
    }
    assert_goes_on(&machine);
    assert_nothing_leaks(&machine);
    machine.close();
}

/// Adds one to each word of a span, forth and back, until told to stop; counts its rounds.
struct Count<'a> {
    at: u64,
    words: u64,
    stop: &'a AtomicBool,
    rounds: &'a AtomicU64,
}

impl Kernel for Count<'_> {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        while !self.stop.load(Ordering::Relaxed) {
            for word in 0..self.words {
                tile.atomic(self.at + word * 4096, AtomicOp::Add(1))?;
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[test]
fn neither_side_loses_a_write_while_pages_go_back_and_forth() {
    const WORDS: u64 = 512;
    const ROUNDS: u64 = 100;
    let _turn = turn();
    let Some(machine) = machine_at(FaultLevel::Mprotect) else {
        return;
    };
    let map = filled(2 * MIB, 0);
    let at = span_of(&map).start;
    let (stop, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let rounds = AtomicU64::new(0);
    let kernel = Count {
        at,
        words: WORDS,
        stop: &stop,
        rounds: &rounds,
    };
    let is_enough = || rounds.load(Ordering::Relaxed) >= ROUNDS && sent(&machine) > 20 * 2048;
    // Goes over the pages until they have travelled and the device has worked on them often enough;
    // returns how often.
    let go = |index: u64| {
        let mut passes = 0;
        while !over.load(Ordering::Relaxed) && (passes < ROUNDS || !is_enough()) {
            for word in 0..WORDS {
                let done = LiveBus.atomic(at + word * 4096 + 8 * index, AtomicOp::Add(1));
                assert!(done.is_ok(), "page {word}");
            }
            passes += 1;
        }
        passes
    };
    let (ended, passes) = thread::scope(|scope| {
        let device = scope.spawn(|| {
            let ended = machine.launch(&kernel, 1);
            over.store(true, Ordering::Relaxed);
            ended
        });
        // The driver leaves alone what the CPU wants back at once. This does not.
        scope.spawn(|| {
            let whole = HostSpan::at(HostVa::new(at), 2 << 20);
            thread_run(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Refused while the pages are on their way.
                    let _refused = machine.send(whole);
                }
            });
        });
        let cpus = [1, 2].map(|index| scope.spawn(move || go(index)));
        let passes = cpus.map(|cpu| cpu.join().expect("it ends"));
        stop.store(true, Ordering::Relaxed);
        (device.join().expect("it ends"), passes)
    });
    assert_eq!(ended, Ok(()));
    let done = [rounds.load(Ordering::Relaxed), passes[0], passes[1]];
    for (word, page) in map.words().chunks(512).enumerate() {
        assert_eq!(page[..3], done, "the device's and the CPUs', page {word}");
    }
    machine.close();
}

#[test]
fn system_call_on_away_memory_is_an_error_and_loses_nothing() {
    let _turn = turn();
    for level in [FaultLevel::UserModeOnly, FaultLevel::Mprotect] {
        let Some(machine) = machine_at(level) else {
            continue;
        };
        let map = filled(2 * MIB, 1);
        add_one(&machine, &map);
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let refused = writer.write(&map.bytes()[..4096]);
        let errno = refused.map_err(|error| error.raw_os_error());
        assert_eq!(errno, Err(Some(14)), "EFAULT at level {}", level.name());
        assert_eq!(map.words()[0], 2, "a touch brings it home");
        assert!(writer.write(&map.bytes()[..4096]).is_ok());
        drop(reader);
        machine.close();
    }
}

fn whole(map: &AnonMapping) -> HostSpan {
    let span = span_of(map);
    HostSpan::new(HostVa::new(span.start), HostVa::new(span.end))
}

#[test]
fn explicit_migration_goes_out_and_comes_home_by_calls_alone() {
    let _turn = turn();
    let Some(machine) = machine_at(FaultLevel::Explicit) else {
        return;
    };
    let map = filled(4 * MIB, 3);
    add_one(&machine, &map);
    assert_eq!(sent(&machine), 0, "devices use memory where it is");
    assert!(map.words().iter().all(|word| *word == 4));
    for round in 1..4 {
        let there = thread_run(|| machine.vm().prefetch(whole(&map)));
        assert_eq!(there, Ok(whole(&map).pages()));
        assert_eq!(sent(&machine), round * 4096);
        add_one(&machine, &map);
        // Nobody serves a touch: never a wrong byte, but none at all.
        let mut word = [0; 8];
        let touched = LiveBus.read(map.address() + 8192, &mut word);
        assert!(touched.is_err());
        assert_eq!(sent(&machine), round * 4096);
        thread_run(|| machine.space().bring_span_home(whole(&map)));
        assert!(map.words().iter().all(|word| *word == 4 + round));
    }
    assert_eq!(machine.stats().total(Counter::CpuFaultCount), 0);
    drop(map);
    assert_nothing_leaks(&machine);
    machine.close();
}

#[test]
fn prefetch_moves_what_can_move_at_every_level() {
    let _turn = turn();
    let best = FaultLevel::Full;
    for level in [best, FaultLevel::UserModeOnly, FaultLevel::Mprotect] {
        let Some(machine) = machine_at(level) else {
            continue;
        };
        let map = filled(3 * MIB, 3);
        let span = whole(&map);
        let there = thread_run(|| machine.vm().prefetch(span));
        assert_eq!(there, Ok(span.pages()), "{}", level.name());
        add_one(&machine, &map);
        assert!(map.words().iter().all(|word| *word == 4));
        let nowhere = HostSpan::at(HostVa::new(0x1000), 4096);
        assert_eq!(
            thread_run(|| machine.vm().prefetch(nowhere)),
            Ok(PageCount::ZERO),
            "holes are skipped"
        );
        drop(map);
        assert_goes_on(&machine);
        assert_nothing_leaks(&machine);
        machine.close();
    }
}

#[test]
fn memory_that_the_allocator_does_not_own_is_used_in_place() {
    let _turn = turn();
    let live = LiveConfig {
        level: LevelChoice::Forced(FaultLevel::Mprotect),
        ..LiveConfig::default()
    };
    // Allocated before the level is chosen.
    let full = LiveConfig::default();
    let Ok(_level) = allocate_for(&full) else {
        return;
    };
    let map = AnonMapping::new(4 * MIB, Huge::Never).expect("memory");
    let Some(machine) = start(MachineConfig {
        live,
        vram: 16 << 20,
        ..Default::default()
    }) else {
        return;
    };
    add_one(&machine, &map);
    assert!(map.words().iter().all(|word| *word == 1));
    assert_eq!(sent(&machine), 0);
    machine.close();
}

#[test]
fn vectors_of_the_programs_allocator_migrate() {
    let _turn = turn();
    let Some(machine) = machine_at(FaultLevel::Mprotect) else {
        return;
    };
    let mut data: Vec<u64> = (0..MIB as u64 / 2).collect();
    for round in 1..4 {
        let at = u64::try_from(data.as_mut_ptr().expose_provenance()).expect("64-bit");
        assert_eq!(machine.launch(&Add { at, by: 1 }, 4), Ok(()));
        assert!((0..).zip(&data).all(|(n, word)| *word == n + round));
        // Moves to a larger block, with what is there.
        data.reserve_exact(data.capacity() + MIB);
    }
    assert!(sent(&machine) >= 3 * 4 * 1024);
    drop(data);
    assert_nothing_leaks(&machine);
    machine.close();
}
