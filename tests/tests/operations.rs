//! Every operation on the address space, on memory that is on the device at that moment: what the
//! CPU finds afterwards, what the device finds, and that nothing is left behind.
//!
//! Each case has 8 MiB of territory: *main*, 4 MiB that are on the device when the operation comes,
//! and *spare*, 4 MiB with nothing mapped. Word `n` of page `p` of main holds `p * 1000 + n`.

use std::io;
use std::sync::Mutex;

use gpusvm::addr::{HostSpan, PAGE, PAGE_2M};
use gpusvm_abi::bus::SystemBus;
use gpusvm_cli::machine::{Machine, MachineConfig};
use gpusvm_live::{
    Advise, Backing, BracketChoice, Huge, Leave, LiveBus, LiveConfig, Protect, Territory, VramMode,
};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::{
    assert_goes_on, assert_nothing_leaks, assert_nothing_went_wrong, start, turn,
    without_privileges,
};
use gpusvm_xe::stats::Counter;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

const MAIN: u64 = 2 * PAGE_2M;
const PAGES: u64 = MAIN / PAGE;

/// What a page must be after an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// The content of this page of main.
    Content(u64),
    /// Zeros.
    Zero,
    /// Either of the two above.
    ContentOrZero(u64),
    /// Nobody may access it.
    Nothing,
    /// The content of this page, for the CPU alone: it may not be written.
    CpuOnly(u64),
}

/// A machine, and a territory whose main part is on its device.
struct Stage {
    machine: Machine,
    land: Territory,
}

impl Stage {
    /// The `pages` pages of main from `first` on.
    fn main(&self, first: u64, pages: u64) -> HostSpan {
        HostSpan::at(self.land.span().start().plus(first * PAGE), pages * PAGE)
    }

    fn whole(&self) -> HostSpan {
        self.main(0, PAGES)
    }

    /// Where nothing is mapped, and main could be.
    fn spare(&self) -> HostSpan {
        HostSpan::at(self.whole().end(), MAIN)
    }

    /// Fills main and sends it to the device.
    fn new(config: MachineConfig, huge: Huge) -> Option<Self> {
        let machine = start(config)?;
        let land = Territory::reserve(2 * MAIN).expect("there is address space");
        let stage = Self { machine, land };
        stage.land.map(stage.whole(), huge).expect("memory");
        for page in 0..PAGES {
            let at = stage.main(page, 1).start().get();
            let content: Vec<u8> = (0..PAGE / 8)
                .flat_map(|n| word(page, n).to_ne_bytes())
                .collect();
            LiveBus.write(at, &content).expect("the page is mapped");
        }
        stage.send();
        Some(stage)
    }

    /// Lets the device write to every page of main, which brings them there.
    fn send(&self) {
        let kernel = Rewrite(self.whole().start().get());
        let groups = u32::try_from(PAGES).expect("small");
        self.machine.launch(&kernel, groups).expect("mapped");
        let stats = self.machine.stats();
        let moved = [Counter::AdoptedToDeviceKb, Counter::SvmDeviceCopyKb]
            .map(|counter| stats.total(counter));
        assert!(
            moved.iter().sum::<u64>() >= MAIN / 1024,
            "{moved:?} KiB moved"
        );
    }

    /// As [`send`](Self::send), without the `pages` pages from `first` on, which are gone.
    fn send_around(&self, first: u64, pages: u64) {
        let run = |from: u64, count: u64| {
            let kernel = Rewrite(self.main(from, 1).start().get());
            let groups = u32::try_from(count).expect("small");
            self.machine.launch(&kernel, groups).expect("mapped");
        };
        run(0, first);
        run(first + pages, PAGES - first - pages);
    }

    /// Asserts what is found at `span`, whose page `n` must be `expected(n)`: first by the device,
    /// then by the CPU.
    fn check(&self, span: HostSpan, expected: impl Fn(u64) -> Found) {
        let start = span.start().get();
        let wanted: Vec<_> = (0..span.pages().get()).map(expected).collect();
        let compare = Compare {
            start,
            wanted: &wanted,
            wrong: Mutex::new(None),
        };
        let groups = u32::try_from(wanted.len()).expect("small");
        self.machine
            .launch(&compare, groups)
            .expect("groups compare, and go on");
        let wrong = compare.wrong.into_inner().expect("no group panics");
        assert_eq!(wrong, None, "device");
        let bus = LiveBus::new();
        for (at, wanted) in (start..).step_by(4096).zip(&wanted) {
            let mut words = [0; 4096];
            let read = bus.read(at, &mut words);
            let right = match wanted {
                Found::Nothing => read.is_err(),
                wanted => read.is_ok() && is_as(&words, *wanted),
            };
            assert!(right, "CPU, page {}: {wanted:?}", (at - start) / PAGE);
        }
    }

    /// Asserts the counters, takes the territory back, and asserts that nothing is left.
    fn end(self) {
        assert_nothing_went_wrong(&self.machine);
        drop(self.land);
        assert_goes_on(&self.machine);
        assert_nothing_leaks(&self.machine);
    }
}

fn word(page: u64, n: u64) -> u64 {
    page * 1000 + n
}

fn is_as(bytes: &[u8; 4096], wanted: Found) -> bool {
    let words = || {
        bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
    };
    let content = |page| words().zip(0..).all(|(found, n)| found == word(page, n));
    let zero = || words().all(|word| word == 0);
    match wanted {
        Found::Content(page) | Found::CpuOnly(page) => content(page),
        Found::Zero => zero(),
        Found::ContentOrZero(page) => zero() || content(page),
        Found::Nothing => false,
    }
}

/// Stores what is there, a page per group.
struct Rewrite(u64);

impl Kernel for Rewrite {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let at = self.0 + u64::from(group) * PAGE;
        let first: u64 = tile.load_one(at)?;
        tile.store_one(at, first)
    }
}

/// Compares what the device finds with what is wanted, a page per group.
struct Compare<'a> {
    start: u64,
    wanted: &'a [Found],
    wrong: Mutex<Option<Wrong>>,
}

/// A page that is wrong: its number, what is wanted, and how the access ended.
type Wrong = (u32, Found, Result<(), Stop>);

impl Kernel for Compare<'_> {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let wanted = self.wanted[usize::try_from(group).expect("64-bit")];
        let mut bytes = [0_u8; 4096];
        let read = tile.load(self.start + u64::from(group) * PAGE, &mut bytes);
        let right = match wanted {
            Found::Nothing | Found::CpuOnly(_) => matches!(read, Err(Stop::Fault(_))),
            wanted => read.is_ok() && is_as(&bytes, wanted),
        };
        if !right {
            let mut wrong = self.wrong.lock().expect("no group panics");
            wrong.get_or_insert((group, wanted, read));
        }
        Ok(())
    }
}

/// Runs a scenario in both migration modes and with both sizes of pages.
fn each(scenario: impl Fn(&Stage)) {
    let _turn = turn();
    for migration in [VramMode::Adopt, VramMode::Copy] {
        for huge in [Huge::Advise, Huge::Never] {
            let config = MachineConfig {
                vram: 16 << 20,
                migration,
                live: LiveConfig {
                    brackets: BracketChoice::Patched,
                    ..LiveConfig::default()
                },
                ..Default::default()
            };
            let Some(stage) = Stage::new(config, huge) else {
                return;
            };
            scenario(&stage);
            stage.end();
        }
    }
}

/// Says why an operation that this kernel does not have is left out; false then.
fn has(done: &io::Result<()>) -> bool {
    match done {
        Ok(()) => true,
        Err(why) => {
            skipped(&format!("this kernel does not: {why}"));
            false
        }
    }
}

#[test]
fn munmap_of_all_and_a_new_mapping_in_its_place() {
    each(|s| {
        s.land.unmap(s.whole()).expect("it is mapped");
        s.check(s.main(0, 8), |_| Found::Nothing);
        s.land
            .map(s.whole(), Huge::Advise)
            .expect("the hole is free");
        s.check(s.whole(), |_| Found::Zero);
    });
}

#[test]
fn munmap_of_pieces_of_huge_ranges() {
    each(|s| {
        for (first, pages) in [(0, 1), (100, 7), (500, 24)] {
            s.land.unmap(s.main(first, pages)).expect("it is mapped");
        }
        s.check(s.whole(), |page| match page {
            0 | 100..107 | 500..524 => Found::Nothing,
            _ => Found::Content(page),
        });
    });
}

#[test]
fn mapping_placed_over_part_of_it() {
    each(|s| {
        s.land
            .map_over(s.main(200, 400), Huge::Never)
            .expect("memory");
        s.check(s.whole(), |page| match page {
            200..600 => Found::Zero,
            _ => Found::Content(page),
        });
    });
}

#[test]
fn mremap_to_another_place() {
    each(|s| {
        let to = s.spare();
        s.land
            .relocate(s.whole(), to.start(), Leave::Hole)
            .expect("the place is ours");
        s.check(to, Found::Content);
        s.check(s.main(0, 8), |_| Found::Nothing);
    });
}

#[test]
fn mremap_of_a_piece() {
    each(|s| {
        let to = HostSpan::at(s.spare().start().plus(3 * PAGE), 300 * PAGE);
        s.land
            .relocate(s.main(250, 300), to.start(), Leave::Hole)
            .expect("the place is ours");
        s.check(to, |page| Found::Content(250 + page));
        s.check(s.whole(), |page| match page {
            250..550 => Found::Nothing,
            _ => Found::Content(page),
        });
    });
}

#[test]
fn mremap_that_leaves_an_empty_mapping() {
    each(|s| {
        let to = s.spare();
        let done = s.land.relocate(s.whole(), to.start(), Leave::Empty);
        if has(&done) {
            s.check(to, Found::Content);
            s.check(s.whole(), |_| Found::Zero);
        }
    });
}

#[test]
fn mremap_in_place_larger_and_smaller() {
    each(|s| {
        s.land
            .resize(s.whole(), MAIN + 16 * PAGE)
            .expect("the hole behind is free");
        s.check(s.main(0, PAGES + 16), |page| match page {
            0..PAGES => Found::Content(page),
            _ => Found::Zero,
        });
        s.send();
        s.land
            .resize(s.main(0, PAGES + 16), MAIN - 100 * PAGE)
            .expect("smaller always fits");
        s.check(s.whole(), |page| {
            if page < PAGES - 100 {
                Found::Content(page)
            } else {
                Found::Nothing
            }
        });
    });
}

#[test]
fn madvise_that_drops_content() {
    each(|s| {
        s.land
            .advise(s.main(10, 700), Advise::Discard)
            .expect("content can go");
        s.check(s.whole(), |page| match page {
            10..710 => Found::Zero,
            _ => Found::Content(page),
        });
        s.send();
        s.land
            .advise(s.main(800, 100), Advise::Free)
            .expect("content can go");
        s.check(s.main(800, 100), |page| Found::ContentOrZero(800 + page));
        s.check(s.main(0, 10), Found::Content);
    });
}

#[test]
fn advice_past_a_hole_is_taken_around_it() {
    each(|s| {
        s.land.unmap(s.main(64, 8)).expect("it is mapped");
        s.send_around(64, 8);
        let done = s.land.advise(s.main(0, 512), Advise::Discard);
        assert_eq!(
            done.expect_err("there is a hole").kind(),
            io::ErrorKind::OutOfMemory
        );
        s.check(s.whole(), |page| match page {
            64..72 => Found::Nothing,
            0..512 => Found::Zero,
            _ => Found::Content(page),
        });
    });
}

#[test]
fn process_madvise_of_several_pieces() {
    each(|s| {
        let pieces = [s.main(5, 10), s.main(600, 200)];
        match s.land.advise_all(&pieces, Advise::Discard) {
            Ok(bytes) => {
                assert_eq!(bytes, 210 * PAGE);
                s.check(s.whole(), |page| match page {
                    5..15 | 600..800 => Found::Zero,
                    _ => Found::Content(page),
                });
            }
            Err(why) => skipped(&format!("process_madvise: {why}")),
        }
    });
}

#[test]
fn madvise_that_keeps_content() {
    for advice in [
        Advise::PageOut,
        Advise::Cold,
        Advise::Populate,
        Advise::Collapse,
        Advise::Small,
        Advise::Huge,
        Advise::Merge,
        Advise::DontFork,
        Advise::WipeOnFork,
    ] {
        each(|s| {
            let done = s.land.advise(s.whole(), advice);
            // A huge page may not be had, and a kernel may lack KSM: content stays either way.
            if let Err(why) = &done {
                skipped(&format!("{advice:?}: {why}"));
            }
            s.check(s.whole(), Found::Content);
            s.send();
            s.check(s.whole(), Found::Content);
        });
    }
}

#[test]
fn guards_over_device_memory() {
    each(|s| {
        let done = s.land.advise(s.main(20, 30), Advise::GuardInstall);
        if !has(&done) {
            return;
        }
        s.check(s.whole(), |page| match page {
            20..50 => Found::Nothing,
            _ => Found::Content(page),
        });
        s.land
            .advise(s.main(20, 30), Advise::GuardRemove)
            .expect("they are there");
        s.check(s.whole(), |page| match page {
            20..50 => Found::Zero,
            _ => Found::Content(page),
        });
    });
}

#[test]
fn mprotect_and_back() {
    each(|s| {
        s.land
            .protect(s.main(100, 600), Protect::None)
            .expect("rights can change");
        s.check(s.whole(), |page| match page {
            100..700 => Found::Nothing,
            _ => Found::Content(page),
        });
        s.land
            .protect(s.main(100, 600), Protect::Read)
            .expect("rights can change");
        s.check(s.whole(), |page| match page {
            // The mirror writes, so the CPU mapping must allow it.
            100..700 => Found::CpuOnly(page),
            _ => Found::Content(page),
        });
        s.land
            .protect(s.main(100, 600), Protect::ReadWrite)
            .expect("rights can change");
        s.send();
        s.check(s.whole(), Found::Content);
    });
}

#[test]
fn locked_memory_stays_and_is_used_in_place() {
    each(|s| {
        match s.land.lock(s.main(0, 512)) {
            Ok(()) => {}
            Err(why) => return skipped(&format!("mlock: {why}")),
        }
        s.check(s.whole(), Found::Content);
        s.machine
            .launch(&Rewrite(s.whole().start().get()), 1024)
            .expect("usable in place");
        s.check(s.whole(), Found::Content);
        s.land.unlock(s.main(0, 512)).expect("it is locked");
        s.send();
        s.check(s.whole(), Found::Content);
    });
}

#[test]
fn other_kinds_of_memory_are_used_in_place() {
    for backing in [
        Backing::SharedAnonymous,
        Backing::SharedFile,
        Backing::PrivateFile,
        Backing::HugeTlb,
        Backing::Secret,
    ] {
        each(|s| {
            let span = HostSpan::at(s.spare().start(), PAGE_2M);
            if let Err(why) = s.land.map_backed(span, backing) {
                return skipped(&format!("{backing:?}: {why}"));
            }
            let content: Vec<u8> = (0..PAGE / 8)
                .flat_map(|n| word(3, n).to_ne_bytes())
                .collect();
            if LiveBus::new().write(span.start().get(), &content).is_err() {
                return skipped(&format!("{backing:?}: none of it is to be had"));
            }
            s.machine
                .launch(&Rewrite(span.start().get()), 512)
                .expect("usable in place");
            let first = HostSpan::at(span.start(), PAGE);
            s.check(first, |_| Found::Content(3));
            s.check(s.whole(), Found::Content);
            if backing == Backing::SharedFile {
                s.land.advise(first, Advise::Remove).expect("shared memory");
                s.check(first, |_| Found::Zero);
            }
            s.land.unmap(span).expect("it is mapped");
            s.check(first, |_| Found::Nothing);
        });
    }
}

#[test]
fn the_runtimes_own_memory_is_refused() {
    each(|s| {
        let scope = gpusvm_live::RuntimeScope::enter();
        let mine = Box::new([7_u64; 512]);
        drop(scope);
        let at = u64::try_from(mine.as_ptr().expose_provenance()).expect("64-bit");
        let ended = s.machine.launch(&Rewrite(at), 1);
        assert!(matches!(ended, Err(Stop::Fault(_))), "{ended:?}");
        assert_eq!(*mine, [7; 512]);
        s.check(s.whole(), Found::Content);
    });
}

#[test]
fn all_of_it_without_privileges() {
    without_privileges("all_of_it_without_privileges");
}
