//! The scenarios of `svm-design.md` section 7, as text in `tests/scenarios`, each on both hosts.
//!
//! A process has one live space, so the tests on the live host take turns.

use std::collections::BTreeMap;

use gpusvm::mutant::Mutant;
use gpusvm_cli::scenario::{HostKind, Scenario, Verdict, library, parse};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::turn;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

macro_rules! scenarios {
    ($($name:ident = $number:literal,)*) => {
        /// Numbers and names of the tests below.
        const TESTS: &[(u32, &str)] = &[$(($number, stringify!($name)),)*];

        mod model {
            $(#[test] fn $name() { super::run($number, super::HostKind::Model); })*
        }

        mod live {
            $(#[test] fn $name() { super::run($number, super::HostKind::Live); })*
        }
    };
}

scenarios! {
    s01_fresh_mapping = 1,
    s02_one_touched_page = 2,
    s03_touched_all_over = 3,
    s04_smaller_beside_smaller = 4,
    s05_last_page_behind_a_boundary = 5,
    s06_part_of_the_device_addresses = 6,
    s07_munmap_over_many_windows = 7,
    s08_last_range_of_a_window = 8,
    s10_rights = 10,
    s11_kinds_of_memory = 11,
    s12_munmap_after_the_walk = 12,
    s15_middle_of_a_huge_page = 15,
    s16_half_on_the_device = 16,
    s17_two_allocations = 17,
    s20_invalidations_without_end = 20,
    s21_neighbour_is_left_alone = 21,
    s22_partial_munmap = 22,
    s23_new_mapping_before_the_collector = 23,
    s24_queued_once = 24,
    s25_munmap_while_the_vm_closes = 25,
    s26_munmap_while_collected = 26,
    s27_munmap_at_the_binding = 27,
    s28_fork = 28,
    s29_mremap = 29,
    s30_mremap_that_leaves_a_mapping = 30,
    s31_dontneed = 31,
    s32_mprotect = 32,
    s34_process_ends = 34,
    s37_atomics_against_a_reader = 37,
    s38_atomic_on_a_file = 38,
    s39_atomics_forbidden = 39,
    s40_atomic_without_room = 40,
    s41_two_devices = 41,
    s42_pinned_page = 42,
    s43_all_or_nothing = 43,
    s44_page_goes_in_the_last_step = 44,
    s45_absent_pages_are_zero = 45,
    s46_memory_of_an_evicted_owner = 46,
    s47_timeslice = 47,
    s49_two_cpus_one_allocation = 49,
    s50_late_eviction = 50,
    s51_partly_unmapped_allocation = 51,
    s52_many_cpus_one_page = 52,
    s53_failing_copy = 53,
    s54_what_cannot_migrate = 54,
    s55_range_over_two_mappings = 55,
    s57_plain_objects = 57,
    s58_busy_victim = 58,
    s59_evict_after_exit = 59,
    s60_more_than_half_each = 60,
    s61_no_victim_while_filled = 61,
    s64_fragmented = 64,
    s65_large_entries = 65,
    s67_invalid_between_plan_and_commit = 67,
    s69_only_entry_of_a_table = 69,
    s70_zapped_before = 70,
    s71_lost_answer = 71,
    s73_many_entries = 73,
    s79_prefetch_over_holes = 79,
    s80_prefetch_without_room = 80,
    s85_vm_closes = 85,
    s88_counters = 88,
    s91_pages_outlive_their_vm = 91,
    s92_exclusive_page = 92,
    s94_flush_covers_all = 94,
    s95_fault_storm = 95,
    s96_entry_without_atomics = 96,
    s97_memory_lacks_a_page = 97,
    s98_close_while_collecting = 98,
}

fn numbered(number: u32) -> Scenario {
    let found = library::numbered(number).unwrap_or_else(|error| panic!("{error}"));
    found.unwrap_or_else(|| panic!("there is no scenario {number}"))
}

fn run(number: u32, host: HostKind) {
    let _turn = (host == HostKind::Live).then(turn);
    match numbered(number).run(host) {
        Verdict::Passed => {}
        Verdict::Skipped(why) => skipped(&why),
        Verdict::Failed(what) => panic!("{what}"),
    }
}

/// Asserts that the one scenario of `text` passes on the model.
fn assert_passes_on_the_model(text: &str) {
    let scenarios = parse("here", text).expect("it can be read");
    let verdicts = scenarios.iter().map(|one| one.run(HostKind::Model));
    assert_eq!(verdicts.collect::<Vec<_>>(), [Verdict::Passed]);
}

#[test]
fn every_scenario_of_the_reference_is_there_or_says_what_it_waits_for() {
    let mut seen: BTreeMap<u32, u32> = BTreeMap::new();
    let present = library::all().unwrap_or_else(|error| panic!("{error}"));
    let absent = library::absent();
    for number in present.iter().map(Scenario::number) {
        *seen.entry(number).or_default() += 1;
    }
    for (number, why) in &absent {
        assert!(!why.is_empty(), "{number} waits for something");
        *seen.entry(*number).or_default() += 1;
    }
    let wanted: BTreeMap<u32, u32> = (1..=98).map(|number| (number, 1)).collect();
    assert_eq!(seen, wanted, "each number once");
    let tests: Vec<u32> = TESTS.iter().map(|(number, _)| *number).collect();
    let numbers: Vec<u32> = present.iter().map(Scenario::number).collect();
    assert_eq!(tests, numbers, "each scenario has its tests");
    for (number, name) in TESTS {
        assert!(name.starts_with(&format!("s{number:02}_")), "{name}");
    }
}

/// What the model can do to pages and no live host.
const BAD_PAGES: &str = "\
scenario 1 pages with errors, and pages that are protected
  map a 64K
  cpu write a 7
  poison a[3]
  cpu read a[3] 7 -> SIGBUS
  advise a[3] dontneed
  cpu read a[3] 0
  write-protect a[8..16]
  cpu read a[8..16] 7
  together
    gpu write a[8..16] 9
    write-allow a[8..16]
  end
  cpu read a[8..16] 9
";

#[test]
fn pages_have_errors_and_are_protected() {
    assert_passes_on_the_model(BAD_PAGES);
}

/// A page that a device gets for itself is a range of its own, and the range that had it is no more.
const TAKEN_OUT: &str = "\
scenario 1 an atomic takes a page out of a range that is bound
  atomics exclusive
  map a 128K
  cpu write a 7
  gpu fill leaving 32K
  gpu read a 7
  gpu add a[0] 1
  advise a[1..16] dontneed
  gpu read a[1..16] 0
  cpu count a[0] 1
";

#[test]
fn range_of_which_a_page_was_taken_is_flushed() {
    let scenarios = parse("here", TAKEN_OUT).expect("it can be read");
    for one in &scenarios {
        assert_eq!(one.run(HostKind::Model), Verdict::Passed);
        let found = one.run_with(Mutant::RemovedUnflushed);
        assert!(matches!(found, Verdict::Failed(_)), "{found:?}");
    }
}

/// What cannot be fetched stays where it is.
const GUARDED: &str = "\
scenario 1 prefetch of pages of which some are there, and one is a guard
  map a 64K
  cpu write a 7
  gpu take a[0..8]
  advise a[12] guard-install
  gpu prefetch a
  cpu read a[0..12] 7
";

#[test]
fn prefetch_of_what_cannot_be_fetched_is_no_error() {
    assert_passes_on_the_model(GUARDED);
}

/// Scenarios are there to find bugs. Each of these finds one that is planted.
#[test]
fn planted_bugs_are_found() {
    let planted = [
        (20, Mutant::SeqTakenLate),
        (22, Mutant::NotBracketed),
        (23, Mutant::CollectorSkipped),
        (28, Mutant::ForkNotBracketed),
        (42, Mutant::PinIgnored),
        (45, Mutant::HolesKeepContent),
        (46, Mutant::FreedTwice),
        (67, Mutant::RecheckDropped),
        (94, Mutant::FlushSpanOverwritten),
        (96, Mutant::AtomicsOnPlainPages),
    ];
    let missed: Vec<_> = planted
        .into_iter()
        .map(|(number, mutant)| (number, mutant, numbered(number).run_with(mutant)))
        .filter(|(.., verdict)| !matches!(verdict, Verdict::Failed(_)))
        .collect();
    assert_eq!(missed, [], "these bugs were not found");
}
