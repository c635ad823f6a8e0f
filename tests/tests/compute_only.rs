//! Compute-only memory: CPU faults are served on the thread that touches, and system calls on what is
//! away are refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_abi::bus::SystemBus;
use gpusvm_cli::machine::MachineConfig;
use gpusvm_live::{
    Advise, BracketChoice, ComputeOnly, FaultLevel, Huge, LevelChoice, LiveBus, LiveConfig,
    Territory, VramMode,
};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::{
    Add, MIB, RESIDENT, Resident, assert_goes_on, assert_nothing_leaks, each_resident, start, turn,
    without_privileges,
};
use gpusvm_xe::stats::Counter;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

/// Runs a scenario on compute-only memory that is on a device.
fn each_served_in_thread(scenario: impl Fn(&mut Resident, ComputeOnly)) {
    each_resident(|r| {
        let span = HostSpan::at(HostVa::new(r.map.address()), RESIDENT as u64);
        match r.machine.space().compute_only(span) {
            Ok(served) => {
                r.check(0);
                r.send();
                scenario(r, served);
            }
            Err(why) => skipped(&why),
        }
    });
}

/// Whether the system refuses to read the memory into a file.
fn is_refused(r: &Resident) -> bool {
    let path = std::env::temp_dir().join(format!("gpusvm-compute-{}", std::process::id()));
    let file = File::create(&path).expect("a place for files");
    let _removed = std::fs::remove_file(&path);
    let written = file.write_at(r.map.bytes(), 0);
    written.is_err_and(|why| why.raw_os_error() == Some(14))
}

#[test]
fn touches_are_served_and_system_calls_are_refused() {
    each_served_in_thread(|r, _served| {
        let faults = || r.machine.stats().total(Counter::CpuFaultCount);
        let before = faults();
        assert!(is_refused(r), "nobody else serves");
        assert_eq!(faults(), before);
        r.check(0);
        assert!(faults() > before);
        r.add(5);
        r.check(5);
    });
}

#[test]
fn many_threads_touch_the_same_pages_while_they_come_and_go() {
    each_served_in_thread(|r, _served| {
        for round in 1..=8_u64 {
            r.add(1);
            let words = r.map.words();
            thread::scope(|scope| {
                let look = |first: usize| {
                    let mut touched = words.iter().zip(round..).skip(first * 512).step_by(512);
                    assert!(touched.all(|(word, n)| *word == n));
                };
                for first in 0..6 {
                    scope.spawn(move || look(first));
                }
            });
        }
        r.check(8);
    });
}

#[test]
fn holes_read_as_zeros() {
    each_served_in_thread(|r, _served| {
        r.map.discard(MIB, MIB).expect("its own pages");
        assert!(r.map.bytes()[MIB..2 * MIB].iter().all(|byte| *byte == 0));
        let words = r.map.words_mut().iter_mut();
        words.zip(0..).for_each(|(word, n)| *word = n);
        r.send();
        r.check(0);
    });
}

#[test]
fn service_ends_with_its_guard() {
    each_served_in_thread(|r, served| {
        drop(served);
        r.check(0);
        r.send();
        if r.machine.space().level().faults == FaultLevel::Full {
            assert!(!is_refused(r), "a reader serves");
        }
        r.check(0);
    });
}

#[test]
fn what_is_mapped_later_in_the_span_counts_too() {
    let _turn = turn();
    let Some(machine) = start(MachineConfig {
        live: LiveConfig {
            brackets: BracketChoice::Events,
            ..LiveConfig::default()
        },
        ..MachineConfig::default()
    }) else {
        return;
    };
    let land = Territory::reserve(8 << 20).expect("there is address space");
    let served = match machine.space().compute_only(land.span()) {
        Ok(served) => served,
        Err(why) => return skipped(&why),
    };
    let main = HostSpan::at(land.span().start(), 4 << 20);
    let pages = (main.start().get()..main.end().get()).step_by(4096);
    for (value, huge) in [(1, Huge::Never), (2, Huge::Advise)] {
        land.map_over(main, huge).expect("ours");
        for page in pages.clone() {
            LiveBus.write(page, &[value; 4096]).expect("mapped");
        }
        let at = main.start().get();
        machine.launch(&Add { at, by: 0 }, 4).expect("mapped");
        // Past the brackets: the news comes late.
        let hole = HostSpan::at(main.start().plus(PAGE), PAGE);
        land.advise(hole, Advise::Discard).expect("mapped");
        machine.space().settle_events();
        let mut found = [9; 1];
        for (n, page) in pages.clone().enumerate() {
            LiveBus.read(page, &mut found).expect("mapped");
            assert_eq!(found, [if n == 1 { 0 } else { value }], "page {n}");
        }
    }
    drop(served);
    drop(land);
    assert_goes_on(&machine);
    assert_nothing_leaks(&machine);
}

#[test]
fn levels_without_userfaultfd_say_that_they_have_none() {
    let _turn = turn();
    let Some(machine) = start(MachineConfig {
        migration: VramMode::Copy,
        live: LiveConfig {
            level: LevelChoice::Forced(FaultLevel::Mprotect),
            ..LiveConfig::default()
        },
        ..MachineConfig::default()
    }) else {
        return;
    };
    let span = HostSpan::at(HostVa::new(0x1000_0000_0000), PAGE);
    let refused = machine
        .space()
        .compute_only(span)
        .expect_err("no such faults");
    let said = refused.to_string();
    assert!(said.contains("on the thread that faults"), "{said}");
}

#[test]
fn all_of_it_without_privileges() {
    without_privileges("all_of_it_without_privileges");
}
