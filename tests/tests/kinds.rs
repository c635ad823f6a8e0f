//! Kinds of memory that a program may have: each migrates, is used in place, or is refused, as the
//! system's own rules say; and what changes it later.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::event::{Event, EventSink};
use gpusvm::seam::env::Ns;
use gpusvm::seam::mm::{AddressSpace, Owner};
use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_live::program::Claim;
use gpusvm_live::{
    Advise, Backing, Huge, LiveBus, LiveConfig, LiveEnv, LiveSpace, Protect, Territory,
};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::{Resident, away, each_resident, filled, turn, without_privileges};

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

fn load(at: u64) -> Option<u64> {
    let mut word = [0; 8];
    LiveBus.read(at, &mut word).ok()?;
    Some(u64::from_ne_bytes(word))
}

/// Whether the first word of every page is this.
fn holds(span: HostSpan, wanted: u64) -> bool {
    let (start, end) = (span.start().get(), span.end().get());
    (start..end)
        .step_by(4096)
        .all(|at| load(at) == Some(wanted))
}

/// Fills every page with one word; false where that is refused.
fn fill(span: HostSpan, value: u64) -> bool {
    let page: Vec<u8> = (0..PAGE / 8).flat_map(|_| value.to_ne_bytes()).collect();
    let (start, end) = (span.start().get(), span.end().get());
    (start..end)
        .step_by(4096)
        .all(|at| LiveBus.write(at, &page).is_ok())
}

/// Adds to the first word of every page.
struct Each {
    span: HostSpan,
    by: u64,
}

impl Kernel for Each {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let (start, end) = (self.span.start().get(), self.span.end().get());
        (start..end)
            .step_by(4096)
            .try_for_each(|at| tile.atomic(at, AtomicOp::Add(self.by)).map(|_former| ()))
    }
}

/// Lets the device add to the first word of every page.
fn add(r: &Resident, span: HostSpan, by: u64) -> Result<(), Stop> {
    r.machine.launch(&Each { span, by }, 1)
}

/// Asserts that the device is refused.
fn assert_refused(r: &Resident, span: HostSpan) {
    let ended = add(r, span, 1);
    assert!(matches!(ended, Err(Stop::Fault(_))), "{ended:?}");
}

/// A territory of 4 MiB and its second half, empty.
fn land() -> (Territory, HostSpan) {
    let land = Territory::reserve(2 * PAGE_2M).expect("there is address space");
    let span = HostSpan::at(land.span().start().plus(PAGE_2M), PAGE_2M);
    (land, span)
}

#[test]
fn stack_that_grows_while_a_device_uses_it() {
    each_resident(|r| {
        let (land, whole) = land();
        let top = HostSpan::at(whole.start().plus(PAGE_2M - 64 * PAGE), 64 * PAGE);
        if let Err(why) = land.map_growing(top) {
            return skipped(&format!("MAP_GROWSDOWN: {why}"));
        }
        assert!(fill(top, 5));
        let before = away(&r.machine);
        add(r, top, 1).expect("mapped");
        assert_eq!(away(&r.machine), before, "it is used in place");
        let lower = HostVa::new(top.start().get() - 32 * PAGE);
        let below = HostSpan::new(lower, top.start());
        // Devices grow no stacks.
        assert_refused(r, below);
        // The CPU does: page by page, as calls do.
        let down = (1..=32).map(|n| top.start().get() - n * PAGE);
        let grown = down.map(|at| LiveBus.write(at, &5_u64.to_ne_bytes()));
        assert!(grown.into_iter().all(|written| written.is_ok()));
        let all = HostSpan::new(below.start(), top.end());
        add(r, all, 1).expect("mapped");
        assert!(holds(below, 6) && holds(top, 7));
        add(r, all, 1).expect("mapped");
        land.unmap(all).expect("ours");
        assert_refused(r, all);
        r.check(0);
    });
}

#[test]
fn sealed_memory_leaves_and_returns() {
    each_resident(|r| {
        let (land, span) = land();
        land.map(span, Huge::Advise).expect("a hole");
        assert!(fill(span, 5));
        add(r, span, 1).expect("mapped");
        if let Err(why) = land.seal(span) {
            return skipped(&format!("mseal: {why}"));
        }
        add(r, span, 1).expect("mapped");
        // What the seal forbids stays forbidden, with data away and at home.
        assert!(land.unmap(span).is_err());
        assert!(land.protect(span, Protect::Read).is_err());
        assert!(holds(span, 7));
        assert!(land.map_over(span, Huge::Never).is_err());
        add(r, span, 1).expect("mapped");
        assert!(holds(span, 8));
        r.check(0);
    });
}

/// Where the system's merger of identical pages is steered.
const KSM: &str = "/sys/kernel/mm/ksm";

/// The merger at work, and as it was when this is dropped.
struct Merger {
    former: Vec<(&'static str, String)>,
}

impl Merger {
    fn start() -> Option<Self> {
        let mut this = Self { former: Vec::new() };
        for (name, value) in [
            ("sleep_millisecs", "1"),
            ("pages_to_scan", "5000"),
            ("run", "1"),
        ] {
            let path = Path::new(KSM).join(name);
            let former = fs::read_to_string(&path).ok()?;
            if fs::write(&path, value).is_err() {
                skipped(&"the merger of pages cannot be started: needs root");
                return None;
            }
            this.former.insert(0, (name, former));
        }
        Some(this)
    }

    /// Waits until all memory was looked at that many times.
    fn rounds(count: u64) -> Option<()> {
        let scans = || -> Option<u64> {
            let text = fs::read_to_string(Path::new(KSM).join("full_scans")).ok()?;
            text.trim().parse().ok()
        };
        let first = scans()?;
        while scans()? < first + count {
            thread::yield_now();
        }
        Some(())
    }
}

impl Drop for Merger {
    fn drop(&mut self) {
        for (name, former) in &self.former {
            let _as_it_was = fs::write(Path::new(KSM).join(name), former.trim());
        }
    }
}

/// Pages of this process that were merged.
fn merged() -> u64 {
    let text = fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("ksm_merging_pages "));
    count
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

#[test]
fn merged_pages_are_made_exclusive_before_they_leave() {
    each_resident(|r| {
        let Some(merger) = Merger::start() else {
            return skipped(&"no merger of pages");
        };
        let (land, span) = land();
        land.map(span, Huge::Never).expect("a hole");
        assert!(fill(span, 5));
        if let Err(why) = land.advise(span, Advise::Merge) {
            return skipped(&format!("MADV_MERGEABLE: {why}"));
        }
        for _ in 0..2 {
            // Content must stay the same for a while to be merged.
            assert!(fill(span, 5));
            if Merger::rounds(3).is_none() || merged() == 0 {
                return skipped(&"nothing was merged");
            }
            // They leave, or are used in place where they are merged again at once.
            add(r, span, 1).expect("mapped");
            assert!(holds(span, 6), "each page is its own");
        }
        drop(merger);
        assert!(fill(span, 5));
        // What is used in place stays there until it changes.
        for rights in [Protect::None, Protect::ReadWrite] {
            land.protect(span, rights).expect("rights can change");
        }
        let before = r.machine.stats().migrations_to_device();
        add(r, span, 1).expect("mapped");
        let after = r.machine.stats().migrations_to_device();
        assert!(after > before, "what nobody merges leaves");
        assert!(holds(span, 6), "each page is its own");
        r.check(0);
    });
}

#[test]
fn memory_of_another_user_of_userfaultfd() {
    each_resident(|r| {
        let (land, span) = land();
        land.map(span, Huge::Never).expect("a hole");
        let half = HostSpan::at(span.start(), PAGE_2M / 2);
        let claim = match Claim::take(span, 40) {
            Ok(claim) => claim,
            Err(why) => return skipped(&format!("another userfaultfd: {why}")),
        };
        // Half of it is there, the other half comes from the other user: in place, all of it.
        assert!(holds(half, 40));
        let before = away(&r.machine);
        add(r, span, 1).expect("served by the other user");
        assert!(away(&r.machine) <= before, "it stays where it is");
        assert!(holds(span, 41));
        // Changes are seen all the same.
        land.advise(half, Advise::Discard).expect("content can go");
        assert!(holds(half, 40), "from the other user again");
        add(r, half, 2).expect("mapped");
        assert!(holds(half, 42));
        land.unmap(half).expect("ours");
        assert_refused(r, half);
        drop(claim);
        // Nobody has it any more.
        let rest = HostSpan::new(half.end(), span.end());
        land.protect(rest, Protect::None)
            .expect("rights can change");
        land.protect(rest, Protect::ReadWrite)
            .expect("rights can change");
        add(r, rest, 1).expect("mapped");
        assert!(holds(rest, 42));
        r.check(0);
    });
}

#[test]
fn memory_that_a_device_uses_is_not_given_to_another_user_of_userfaultfd() {
    each_resident(|r| {
        let (land, span) = land();
        land.map(span, Huge::Advise).expect("a hole");
        assert!(fill(span, 5));
        add(r, span, 1).expect("mapped");
        let refused = Claim::take(span, 40);
        assert!(refused.is_err(), "a mapping has one");
        assert!(holds(span, 6));
        // What is mapped anew belongs to who comes first.
        land.map_over(span, Huge::Never).expect("memory");
        let claim = Claim::take(span, 40).expect("nobody has it");
        add(r, span, 1).expect("served by the other user");
        assert!(holds(span, 41));
        drop(claim);
        r.check(0);
    });
}

#[test]
fn private_file_that_was_written_keeps_both_contents() {
    each_resident(|r| {
        let (land, span) = land();
        land.map_backed(span, Backing::PrivateFile)
            .expect("a memory file");
        let half = HostSpan::at(span.start(), PAGE_2M / 2);
        assert!(fill(half, 5));
        let before = away(&r.machine);
        add(r, span, 1).expect("in place");
        assert_eq!(away(&r.machine), before, "files stay where they are");
        assert!(holds(half, 6));
        let rest = HostSpan::new(half.end(), span.end());
        assert!(holds(rest, 1));
        // The private pages go, the file's content is found again: it was never written.
        land.advise(span, Advise::Discard).expect("content can go");
        assert!(holds(span, 0));
        add(r, span, 2).expect("in place");
        assert!(holds(span, 2));
        r.check(0);
    });
}

#[test]
fn huge_zero_pages_and_memory_that_nobody_has_touched() {
    each_resident(|r| {
        let (land, span) = land();
        for huge in [Huge::Advise, Huge::Never] {
            land.map(span, huge).expect("a hole");
            // Reads alone: the system's own zero page stands in.
            assert!(holds(span, 0));
            add(r, span, 3).expect("mapped");
            assert!(holds(span, 3));
            land.unmap(span).expect("ours");
            land.map(span, huge).expect("a hole");
            add(r, span, 4).expect("mapped");
            assert!(holds(span, 4));
            add(r, span, 1).expect("mapped");
            land.unmap(span).expect("ours");
            assert_refused(r, span);
        }
        r.check(0);
    });
}

#[test]
fn all_of_it_without_privileges() {
    without_privileges("all_of_it_without_privileges");
}

/// Hears nothing.
struct Deaf;

impl EventSink for Deaf {
    fn record(&self, _now: Ns, _event: &Event) {}
}

/// A device would write to a page that it has for itself.
#[test]
fn page_that_became_read_only_is_given_to_no_device() {
    let _turn = turn();
    let space = LiveSpace::open(&LiveConfig::default(), LiveEnv::new(1), Arc::new(Deaf));
    let space = match space {
        Ok(space) => space,
        Err(why) => return println!("skipped: {why}"),
    };
    if !space.level().is_patched() {
        return space.close();
    }
    let mut map = filled(2 << 20, 5);
    let at = HostVa::new(map.address());
    let [stop, read_only] = [const { AtomicBool::new(false) }; 2];
    let wrong = AtomicU64::new(0);
    let take = || {
        let _busy_or_refused = space.make_exclusive(at, Owner(1), &mut |_bus| {
            wrong.fetch_add(read_only.load(Ordering::SeqCst).into(), Ordering::SeqCst);
        });
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                gpusvm_live::thread::run(take);
            }
        });
        for _round in 0..10_000 {
            map.protect(0, 4096, Protect::Read).expect("it changes");
            read_only.store(true, Ordering::SeqCst);
            thread::yield_now();
            read_only.store(false, Ordering::SeqCst);
            let given_back = map.protect(0, 4096, Protect::ReadWrite);
            given_back.expect("it changes");
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
    assert_eq!(map.words()[0], 5);
    space.close();
}
