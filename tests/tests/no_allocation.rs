//! Nobody allocates inside an invalidation: neither the framework, nor the driver, nor the device, nor
//! who listens to them, on either host.
//!
//! The allocator of this program asks the host whether the caller is inside of one, and keeps the first
//! offence with where it came from.

use std::alloc::{GlobalAlloc, Layout};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Parser;
use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::mm::{AddressSpace, InvalidateReason, InvalidationSink};
use gpusvm_cli::args::{Cli, Command};
use gpusvm_cli::machine::MachineConfig;
use gpusvm_cli::{conformance, explore, run};
use gpusvm_live::{Huge, Protect, RuntimeAlloc, VramMode};
use gpusvm_model::kernel::{Kernel, ModelSpace};
use gpusvm_model::mm::Shape;
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::sched::{self, ModelEnv, Options, Picker};
use gpusvm_tests::stage::{Resident, start, turn};

#[global_allocator]
static ALLOCATOR: Watchful = Watchful;

/// The runtime's allocator, watched.
struct Watchful;

/// Nobody watches.
const NOBODY: u8 = 0;
/// The model host says who is inside.
const MODEL: u8 = 1;
/// The live host says it.
const LIVE: u8 = 2;

static ASKED: AtomicU8 = AtomicU8::new(NOBODY);
static FIRST: Mutex<Option<Backtrace>> = Mutex::new(None);

/// Keeps the first offence. Looking where it comes from allocates, too: nobody watches any more then.
fn look() {
    let host = ASKED.load(Ordering::Relaxed);
    let inside = match host {
        MODEL => ModelEnv.is_invalidating(),
        LIVE => gpusvm_live::is_invalidating(),
        _ => false,
    };
    let nobody = |host| ASKED.compare_exchange(host, NOBODY, Ordering::SeqCst, Ordering::SeqCst);
    if inside
        && nobody(host).is_ok()
        && let Ok(mut first) = FIRST.try_lock()
    {
        *first = Some(Backtrace::force_capture());
    }
}

// SAFETY: every call is passed on as it is to an allocator that keeps the rules; `look` touches no
// block of it.
unsafe impl GlobalAlloc for Watchful {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        look();
        // SAFETY: the caller keeps the rules of this very call.
        unsafe { RuntimeAlloc.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        look();
        // SAFETY: as above.
        unsafe { RuntimeAlloc.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        look();
        // SAFETY: as above.
        unsafe { RuntimeAlloc.realloc(block, layout, size) }
    }
}

/// Watches while `act` runs; where memory was first allocated or freed inside an invalidation.
fn watched(host: u8, act: impl FnOnce()) -> Option<String> {
    ASKED.store(host, Ordering::SeqCst);
    act();
    ASKED.store(NOBODY, Ordering::SeqCst);
    let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner).take();
    first.map(|first| first.to_string())
}

fn assert_nobody_allocates(host: u8, act: impl FnOnce()) {
    if let Some(place) = watched(host, act) {
        panic!("memory is allocated or freed inside an invalidation, at\n{place}");
    }
}

/// Runs the program with these words; it must succeed.
fn gpusvm(words: &str) {
    let words = std::iter::once("gpusvm").chain(words.split_whitespace());
    let cli = Cli::try_parse_from(words).expect("the command line is right");
    let out = &mut Vec::new();
    let ended = match cli.command {
        Some(Command::Explore(args)) => explore::explore(&args, out).map_err(|why| why.to_string()),
        Some(Command::Conformance(args)) => {
            conformance::conformance(&args, out).map_err(|why| why.to_string())
        }
        Some(Command::Run(args)) => {
            run::run(&args, &Arc::default(), out).map_err(|why| why.to_string())
        }
        _ => Err("not for this test".to_owned()),
    };
    let said = String::from_utf8_lossy(out).into_owned();
    assert_eq!(ended, Ok(()), "{said}");
}

#[test]
fn not_in_worlds_of_any_kind() {
    let _turn = turn();
    assert_nobody_allocates(MODEL, || {
        gpusvm("explore --scenario all --seeds 8");
        gpusvm("conformance hmm --host model");
    });
}

#[test]
fn not_while_this_process_does_what_it_can() {
    let _turn = turn();
    if start(MachineConfig::default()).is_none() {
        return;
    }
    for migration in ["remap", "copy"] {
        assert_nobody_allocates(LIVE, || {
            gpusvm(&format!("run torture --seconds 2 --migration {migration}"));
        });
    }
}

/// A subscriber that does what it must not.
struct Careless;

impl InvalidationSink for Careless {
    fn start(&self, interval: &Interval, _span: HostSpan, _reason: InvalidateReason, seq: Seq) {
        interval.set_seq(seq);
        drop(std::hint::black_box(Box::new(seq)));
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

fn assert_caught(place: Option<&str>) {
    let place = place.expect("it is caught");
    assert!(place.contains("Careless"), "it says where: {place}");
}

#[test]
fn who_does_is_caught_in_a_world() {
    let _turn = turn();
    let base = HostVa::new(1 << 30);
    let shape = Shape {
        base,
        ..Shape::default()
    };
    let body = move || {
        let kernel = Kernel::new(Arc::new(ModelEnv), shape);
        let space = ModelSpace::first(&kernel);
        let map = Map {
            place: Place::Fixed(base),
            len: PAGE,
            prot: Prot::READ.with(Prot::WRITE),
            what: What::Private,
            extra: VmFlags::NONE,
        };
        space.mmap(&map).expect("there is room");
        let window = HostSpan::at(base, PAGE);
        let interval = space.subscribe(window, Arc::new(Careless));
        let interval = interval.expect("the process is alive");
        space.munmap(base, PAGE).expect("it is mapped");
        space.unsubscribe(&interval);
    };
    let place = watched(MODEL, || {
        let mut picker = Picker::uniform(1);
        let outcome = sched::run(&Options::default(), &mut picker, |sim| {
            sim.spawn("careless", body);
        });
        assert!(outcome.trouble.is_none(), "{:?}", outcome.trouble);
    });
    assert_caught(place.as_deref());
}

#[test]
fn who_does_is_caught_in_this_process() {
    let _turn = turn();
    let Some(mut resident) = Resident::new(VramMode::Adopt, Huge::Never) else {
        return;
    };
    let window = HostSpan::at(HostVa::new(resident.map.address()), PAGE);
    let space = resident.machine.space();
    let interval = space.subscribe(window, Arc::new(Careless));
    let interval = interval.expect("the space is open");
    let place = watched(LIVE, || {
        let protected = resident.map.protect(0, 4096, Protect::Read);
        protected.expect("it is mapped");
    });
    resident.machine.space().unsubscribe(&interval);
    assert_caught(place.as_deref());
}
