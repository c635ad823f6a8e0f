//! Brackets by symbols: what they see before it happens, and what they do not.

use gpusvm_cli::machine::{Machine, MachineConfig};
use gpusvm_live::{
    BracketChoice, BracketLevel, FaultLevel, LevelChoice, LiveConfig, OpenError, allocate_for,
};
use gpusvm_tests::stage::{Add, MIB, assert_goes_on, assert_nothing_leaks, filled, start, turn};
use gpusvm_xe::stats::Counter;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

fn machine(level: LevelChoice) -> Option<Machine> {
    let live = LiveConfig {
        level,
        brackets: BracketChoice::Symbols,
        ..LiveConfig::default()
    };
    allocate_for(&live).ok()?;
    let machine = start(MachineConfig {
        live,
        vram: 16 << 20,
        ..Default::default()
    })?;
    let bracket = &machine.space().level().bracket;
    assert!(matches!(bracket, BracketLevel::Symbols { why: None }));
    Some(machine)
}

fn late(machine: &Machine) -> u64 {
    machine.stats().total(Counter::LateInvalidationCount)
}

fn add_one(machine: &Machine, at: u64, bytes: usize) {
    let groups = u32::try_from(bytes / MIB).expect("a few");
    assert_eq!(machine.launch(&Add { at, by: 1 }, groups), Ok(()));
}

#[test]
fn calls_by_name_are_seen_before_they_happen() {
    let _turn = turn();
    let Some(machine) = machine(LevelChoice::Best) else {
        return;
    };
    let mut map = filled(8 * MIB, 7);
    add_one(&machine, map.address(), 8 * MIB);
    map.discard(0, MIB).expect("content can go");
    assert_eq!(map.words()[0], 0);
    map.relocate().expect("the system moves it");
    assert_eq!(map.words()[MIB / 8], 8);
    map.unmap_tail(4 * MIB);
    add_one(&machine, map.address(), 4 * MIB);
    assert_eq!(map.words()[MIB / 8], 9);
    drop(map);
    assert_eq!(late(&machine), 0, "none was seen late");
    assert_goes_on(&machine);
    assert_nothing_leaks(&machine);
    machine.close();
}

#[test]
fn call_inside_free_is_seen_late_and_counted() {
    let _turn = turn();
    let Some(machine) = machine(LevelChoice::Best) else {
        return;
    };
    // So large that the allocator unmaps it, always.
    let mut data = vec![7_u64; 40 * MIB / 8];
    let at = u64::try_from(data.as_mut_ptr().expose_provenance()).expect("64-bit");
    add_one(&machine, at, 8 * MIB);
    drop(data);
    // The count may come after the call has returned.
    while late(&machine) == 0 {
        std::thread::yield_now();
    }
    assert_goes_on(&machine);
    assert_nothing_leaks(&machine);
    machine.close();
}

#[test]
fn memory_of_the_migratable_heap_goes_the_same_way() {
    let _turn = turn();
    let Some(machine) = machine(LevelChoice::Forced(FaultLevel::Mprotect)) else {
        return;
    };
    for round in 0..8 {
        let map = filled(4 * MIB, round);
        add_one(&machine, map.address(), 4 * MIB);
        if round % 2 == 0 {
            assert_eq!(map.words()[77], round + 1);
        }
    }
    assert!(machine.stats().total(Counter::SvmDeviceCopyKb) >= 8 * 4096);
    assert_goes_on(&machine);
    assert_nothing_leaks(&machine);
    machine.close();
}

#[test]
fn errors_say_what_to_do() {
    let said = OpenError::NoSymbols.to_string();
    assert!(said.contains("feature `symbols`"), "{said}");
    let said = OpenError::NoEvents(FaultLevel::Explicit).to_string();
    assert!(said.contains("level explicit"), "{said}");
}
