//! Children, threads, libraries, signals and the end of a process, with memory on a device: who has
//! what, and that nobody sees what is not theirs.

use std::ffi::CStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_cli::machine::Machine;
use gpusvm_live::program::{Break, By, Child, Ended, Library};
use gpusvm_live::{Advise, FaultLevel, Huge, LiveBus, Territory, VramMode};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::{
    Add, MIB, Resident, assert_goes_on, each_resident, serves_system_calls, turn,
    without_privileges,
};
use gpusvm_xe::stats::Counter;
use signal_hook::consts::{SIGABRT, SIGILL, SIGKILL, SIGUSR1};

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

/// Reads a word as any thread of the process would; `None` where it is refused.
fn load(at: u64) -> Option<u64> {
    let mut word = [0; 8];
    LiveBus.read(at, &mut word).ok()?;
    Some(u64::from_ne_bytes(word))
}

/// Whether word `n` of every page from `at` on, `pages` of them, is as `wanted` says.
fn pages_are(at: u64, pages: u64, wanted: impl Fn(u64) -> Option<u64>) -> bool {
    (0..pages).all(|page| load(at + page * PAGE) == wanted(page))
}

/// The first word of a page, as [`Resident`] fills it.
fn first(page: u64) -> Option<u64> {
    Some(page * (PAGE / 8))
}

/// Writes to the first word of every page; false where it is refused.
fn mark(at: u64, pages: u64, value: u64) -> bool {
    let write = |page: u64| LiveBus.write(at + page * PAGE, &value.to_ne_bytes());
    (0..pages).all(|page| write(page).is_ok())
}

const PAGES: u64 = (4 * MIB) as u64 / PAGE;

#[test]
fn fork_gives_both_sides_what_was_there_and_not_each_others_writes() {
    each_resident(|r| {
        let at = r.map.address();
        let child = Child::make(By::Fork, || {
            pages_are(at, PAGES, first) && mark(at, PAGES, 99) && {
                pages_are(at, PAGES, |_| Some(99))
            }
        });
        let child = child.expect("one more process");
        // The parent and the device write before the child looks.
        r.add(1);
        r.check(1);
        r.send();
        r.add(1);
        assert!(child.passed().expect("ours"), "what was there at the fork");
        r.check(2);
        r.send();
        r.check(2);
        assert!(r.machine.stats().total(Counter::CpuFaultCount) > 0);
    });
}

#[test]
fn child_that_runs_a_program_or_just_goes() {
    each_resident(|r| {
        for by in [By::Fork, By::Vfork] {
            r.send();
            let program = Child::exec(by, c"/bin/true").expect("one more process");
            assert!(program.passed().expect("ours"), "{by:?}");
            r.send();
            let child = Child::make(by, || false).expect("one more process");
            assert_eq!(child.ended().expect("ours"), Ended::Code(1), "{by:?}");
            r.add(0);
        }
        r.check(0);
    });
}

#[test]
fn child_by_vfork_shares_memory_that_is_away() {
    each_resident(|r| {
        let at = r.map.address();
        let child = Child::make(By::Vfork, || {
            pages_are(at, PAGES, first) && mark(at + 8, PAGES, 5)
        });
        let child = child.expect("one more process");
        assert!(child.passed().expect("ours"), "it finds what is away");
        r.send();
        assert!(pages_are(at + 8, PAGES, |_| Some(5)), "and writes it");
        let restored = (0..PAGES).all(|page| {
            let word = page * (PAGE / 8) + 1;
            LiveBus
                .write(at + page * PAGE + 8, &word.to_ne_bytes())
                .is_ok()
        });
        assert!(restored);
        r.check(0);
    });
}

#[test]
fn programs_that_the_standard_library_starts() {
    each_resident(|r| {
        for name in ["true", "false"] {
            r.send();
            // By posix_spawn, with the arguments in memory that may be away.
            let status = Command::new(name).stdin(Stdio::null()).status();
            match status {
                Ok(status) => assert_eq!(status.success(), name == "true"),
                Err(why) => skipped(&format!("{name}: {why}")),
            }
        }
        r.check(0);
    });
}

#[test]
fn raw_clone_gets_copies_of_what_was_away() {
    each_resident(|r| {
        if r.machine.space().level().faults != FaultLevel::Full {
            return skipped(&"children of a raw clone read zeros where pages are away");
        }
        let at = r.map.address();
        let child = Child::make(By::RawClone, || {
            pages_are(at, PAGES, first) && mark(at, PAGES, 99)
        });
        assert!(child.expect("one more process").passed().expect("ours"));
        r.check(0);
        r.send();
        r.add(1);
        r.check(1);
    });
}

#[test]
fn memory_that_children_do_not_get_or_get_empty() {
    const LAND: u64 = 2 * PAGE_2M;
    each_resident(|r| {
        let land = Territory::reserve(LAND).expect("there is address space");
        let halves = [0, PAGE_2M].map(|n| HostSpan::at(land.span().start().plus(n), PAGE_2M));
        for (half, advice) in halves
            .into_iter()
            .zip([Advise::DontFork, Advise::WipeOnFork])
        {
            land.map(half, Huge::Advise).expect("a hole");
            assert!(mark(half.start().get(), 512, 7));
            let send = || Add {
                at: half.start().get(),
                by: 0,
            };
            r.machine.launch(&send(), 2).expect("mapped");
            land.advise(half, advice).expect("anonymous memory");
            r.machine.launch(&send(), 2).expect("mapped");
        }
        let [left_out, wiped] = halves.map(|half| half.start().get());
        let child = Child::make(By::Fork, || {
            let absent = pages_are(left_out, 512, |_| None);
            absent && pages_are(wiped, 512, |_| Some(0)) && mark(wiped, 512, 3)
        });
        assert!(child.expect("one more process").passed().expect("ours"));
        for half in halves {
            let at = half.start().get();
            r.machine.launch(&Add { at, by: 1 }, 2).expect("mapped");
            assert!(pages_are(at, 512, |_| Some(8)), "the parent's own");
        }
        r.check(0);
    });
}

#[test]
fn threads_come_and_go_while_the_device_uses_their_stacks() {
    each_resident(|r| {
        for round in 0..20_u64 {
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| use_own_stack(&r.machine, round));
                }
            });
        }
        r.check(0);
    });
}

/// Lets the device change this thread's frame.
fn use_own_stack(machine: &Machine, round: u64) {
    let mut frame = [round; 40 << 10];
    let at = frame.as_mut_ptr().expose_provenance() as u64;
    // One at a time: another thread may have the unit.
    while machine
        .launch_on(0, &Bump(at, 80))
        .map_err(is_busy)
        .is_err()
    {
        thread::yield_now();
    }
    let frame = std::hint::black_box(&frame);
    let wrong = frame.iter().step_by(512).filter(|w| **w != round + 1);
    assert_eq!(wrong.count(), 0);
}

/// Panics where a kernel ended for any other reason than that its unit computes already.
fn is_busy(stop: Stop) {
    assert_eq!(stop, Stop::UnitBusy);
}

/// Adds one to the first word of each of some pages.
struct Bump(u64, u64);

impl Kernel for Bump {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        (0..self.1).try_for_each(|page| {
            tile.atomic(self.0 + page * PAGE, AtomicOp::Add(1))
                .map(|_former| ())
        })
    }
}

/// Libraries that programs rarely have loaded; all come with the C library.
const LIBRARIES: [&CStr; 4] = [
    c"libresolv.so.2",
    c"libnss_hesiod.so.2",
    c"libanl.so.1",
    c"libBrokenLocale.so.1",
];

#[test]
fn data_of_a_library_until_it_is_unloaded() {
    each_resident(|r| {
        let found = LIBRARIES.iter().find_map(|name| Library::load(name).ok());
        let Some(library) = found else {
            return skipped(&"no library that can be loaded");
        };
        let data = library.data();
        let at = data.start().get().next_multiple_of(8);
        let last = (data.end().get() - 8) & !7;
        let before = [load(at), load(last)];
        // Used as it is, and left as it is.
        for word in [at, last] {
            r.machine.launch(&Same(word), 1).expect("mapped");
        }
        assert_eq!([load(at), load(last)], before);
        drop(library);
        let ended = r.machine.launch(&Same(at), 1);
        assert!(
            matches!(ended, Err(Stop::Fault(_))),
            "{ended:?}: it is gone"
        );
        assert_eq!(load(at), None);
        // In the same place again, as often as not.
        let again = LIBRARIES.iter().find_map(|name| Library::load(name).ok());
        let again = again.expect("as before");
        let at = again.data().start().get().next_multiple_of(8);
        r.machine.launch(&Same(at), 1).expect("mapped");
        r.check(0);
    });
}

/// Stores what is there.
struct Same(u64);

impl Kernel for Same {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        tile.atomic(self.0, AtomicOp::Add(0)).map(|_former| ())
    }
}

#[test]
fn end_of_the_heap_moves_up_and_down() {
    each_resident(|r| {
        let Ok(more) = Break::grow(4 * MIB) else {
            return skipped(&"the program break cannot be moved");
        };
        let at = more.span().start().get();
        let add = Add { at, by: 3 };
        assert!(pages_are(at, PAGES, |_| Some(0)));
        r.machine.launch(&add, 4).expect("mapped");
        assert!(pages_are(at, PAGES, |_| Some(3)));
        r.machine.launch(&add, 4).expect("mapped");
        if !more.shrink() {
            return skipped(&"somebody else has moved the program break");
        }
        let ended = r.machine.launch(&add, 4);
        assert!(matches!(ended, Err(Stop::Fault(_))), "{ended:?}");
        let again = Break::grow(4 * MIB).expect("as before");
        let at = again.span().start().get();
        assert!(pages_are(at, PAGES, |_| Some(0)), "fresh memory");
        r.machine.launch(&Add { at, by: 1 }, 4).expect("mapped");
        assert!(pages_are(at, PAGES, |_| Some(1)));
        let _shrunk = again.shrink();
        r.check(0);
    });
}

#[test]
fn signal_handler_writes_memory_that_is_away() {
    each_resident(|r| {
        // In a block of its own, so that it can be sent.
        let block: Vec<Arc<AtomicUsize>> = (0..64 << 10).map(|_| Arc::default()).collect();
        let flag = Arc::clone(&block[32 << 10]);
        let at = Arc::as_ptr(&flag).expose_provenance() as u64;
        let around = HostSpan::at(HostVa::new(at & !(PAGE_2M - 1)), PAGE_2M);
        let id = signal_hook::flag::register_usize(SIGUSR1, Arc::clone(&flag), 7);
        let id = id.expect("a signal that programs may have");
        let mut away = 0;
        for _ in 0..20 {
            flag.store(0, Ordering::SeqCst);
            let sent = gpusvm_live::thread::run(|| r.machine.send(around));
            away += u64::from(sent.is_ok());
            r.machine.launch(&Same(at), 1).expect("mapped");
            signal_hook::low_level::raise(SIGUSR1).expect("it can be raised");
            assert_eq!(flag.load(Ordering::SeqCst), 7);
        }
        signal_hook::low_level::unregister(id);
        if away == 0 {
            skipped(&"the heap of the C library did not migrate");
        }
        r.check(0);
    });
}

/// What the other process does, if this is one.
const ROLE: &str = "GPUSVM_ROLE";

/// A test of this program in a process of its own that plays a role.
fn play(test: &str, role: &str) -> std::process::Output {
    let this = std::env::current_exe().expect("a test is a program");
    let mut command = Command::new(this);
    command
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, role);
    command.output().expect("it runs")
}

/// A machine whose data is on the device, in a process that is about to end.
fn about_to_end() -> Option<Resident> {
    let r = Resident::new(VramMode::Copy, Huge::Advise)?;
    r.add(5);
    Some(r)
}

#[test]
fn process_ends_in_any_way_with_data_on_the_device() {
    const NAME: &str = "process_ends_in_any_way_with_data_on_the_device";
    if let Ok(role) = std::env::var(ROLE) {
        return end_as(&role);
    }
    let _turn = turn();
    for (role, code, signal) in [
        ("exit", Some(7), None),
        ("return", Some(0), None),
        ("abort", None, Some(SIGABRT)),
        ("overflow", None, Some(SIGABRT)),
        ("illegal", None, Some(SIGILL)),
        ("kill", None, Some(SIGKILL)),
        ("handler", Some(9), None),
    ] {
        let output = play(NAME, role);
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        if let Some(line) = said.lines().find(|line| line.starts_with("skipped")) {
            return skipped(&line);
        }
        assert_eq!(output.status.code(), code, "{role}: {said}");
        assert_eq!(output.status.signal(), signal, "{role}: {said}");
    }
}

#[expect(clippy::exit, reason = "a role is to end the process")]
fn end_as(role: &str) {
    let Some(r) = about_to_end() else { return };
    match role {
        "exit" => std::process::exit(7),
        "abort" => std::process::abort(),
        "overflow" => {
            let deep = overflow(std::hint::black_box(1));
            assert_eq!(deep, 0, "no stack is as deep");
        }
        "illegal" | "kill" => {
            let signal = if role == "kill" { SIGKILL } else { SIGILL };
            signal_hook::low_level::raise(signal).expect("it can be raised");
        }
        "handler" => {
            // A panic unwinds over a machine that is in use; the data is read afterwards.
            let map = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _machine = r.machine;
                std::panic::panic_any(r.map.address());
            }));
            drop(map);
            std::process::exit(9);
        }
        _ => r.check(5),
    }
}

/// Uses the stack up.
fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 512]);
    if depth == u64::MAX {
        return 0;
    }
    overflow(depth + frame[100] - depth + 1).wrapping_add(frame[7])
}

#[test]
fn core_of_an_aborted_process_has_the_data() {
    const NAME: &str = "core_of_an_aborted_process_has_the_data";
    if let Ok(folder) = std::env::var(ROLE) {
        return dump_core(&folder);
    }
    let _turn = turn();
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    if pattern.contains(['/', '|']) || pattern.trim().is_empty() {
        return skipped(&format!("cores go elsewhere: {}", pattern.trim()));
    }
    let folder = std::env::temp_dir().join(format!("gpusvm-core-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let output = play(NAME, folder.to_str().expect("a plain name"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let core = std::fs::read_dir(&folder)
        .expect("made above")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("core"))
        });
    let found = core.map(|core| {
        let at = said.lines().find_map(|line| line.strip_prefix("data at "));
        let at: u64 = at.expect("it says where").parse().expect("a number");
        word_in_core(&File::open(core).expect("ours"), at + 8 * 1000)
    });
    let _removed = std::fs::remove_dir_all(&folder);
    match found {
        Some(word) => assert_eq!(word, Some(1005), "{said}"),
        None => skipped(&format!("no core: {:?} {said}", output.status)),
    }
}

#[expect(clippy::print_stdout, reason = "tells the other process where to look")]
fn dump_core(folder: &str) {
    std::env::set_current_dir(folder).expect("made by the parent");
    let all = rustix::process::Rlimit {
        current: None,
        maximum: None,
    };
    if let Err(why) = rustix::process::setrlimit(rustix::process::Resource::Core, all) {
        return skipped(&why);
    }
    if let Some(r) = about_to_end() {
        println!("\ndata at {}", r.map.address());
        std::process::abort();
    }
}

/// The word at `address` of the process that left a core, by its program headers.
fn word_in_core(core: &File, address: u64) -> Option<u64> {
    let word = |at: u64| -> Option<u64> {
        let mut word = [0; 8];
        core.read_exact_at(&mut word, at).ok()?;
        Some(u64::from_ne_bytes(word))
    };
    let table = word(32)?;
    let entries = word(56)? & 0xffff;
    (0..entries).find_map(|n| {
        let header = table + n * 56;
        let (offset, start, bytes) = (word(header + 8)?, word(header + 16)?, word(header + 32)?);
        let inside = address
            .checked_sub(start)
            .filter(|inside| inside + 8 <= bytes)?;
        word(offset + inside)
    })
}

/// A child has at least what was there before the fork, and what it writes is its own.
fn fork_in_the_middle(at: u64) {
    let look = |page: u64| load(at + page * PAGE).unwrap_or(0);
    let before: Vec<u64> = (0..16).map(look).collect();
    let child = Child::make(By::Fork, || {
        let as_before = |(page, before): (u64, &u64)| look(page) >= *before;
        (0..16).zip(&before).all(as_before) && mark(at, PAGES, 0)
    });
    let passed = child.expect("one more process").passed();
    assert!(passed.expect("ours"));
}

#[test]
fn forks_of_many_threads_at_once_while_the_device_computes() {
    each_resident(|r| {
        let done = AtomicU64::new(0);
        let at = r.map.address();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    (0..5).for_each(|_| fork_in_the_middle(at));
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            let mut rounds = 0;
            while done.load(Ordering::Relaxed) < 2 {
                r.add(1);
                rounds += 1;
            }
            r.check(rounds);
        });
        assert_goes_on(&r.machine);
    });
}

#[test]
fn level_is_told_where_raw_clones_are_not_served() {
    each_resident(|r| {
        let limits = r.machine.space().level().faults.limits();
        let limited = !r.machine.space().level().faults.eq(&FaultLevel::Full);
        assert_eq!(limits.contains("raw clone"), limited);
        let _told = serves_system_calls(&r.machine);
    });
}

#[test]
fn all_of_it_without_privileges() {
    without_privileges("all_of_it_without_privileges");
}
