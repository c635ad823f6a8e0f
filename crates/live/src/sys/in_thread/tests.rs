use super::*;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Mutex;

use gpusvm::addr::HostSpan;
use gpusvm_abi::bus::SystemBus;

use crate::sys::arena;
use crate::sys::fault_copy::LiveBus;
use crate::sys::mapping::{AnonMapping, Huge, Protect};

/// Opens the pages of one span, each after as many announcements as it is told.
struct Opener {
    start: AtomicU64,
    end: AtomicU64,
    put_off: AtomicBool,
    served: AtomicU32,
    off_stack: AtomicU32,
}

static OPENER: Opener = Opener {
    start: AtomicU64::new(0),
    end: AtomicU64::new(0),
    put_off: AtomicBool::new(false),
    served: AtomicU32::new(0),
    off_stack: AtomicU32::new(0),
};
/// There is one hook for all tests.
static ALONE: Mutex<()> = Mutex::new(());

impl Opener {
    fn watch(&self, span: HostSpan) {
        self.served.store(0, Ordering::SeqCst);
        self.start.store(span.start().get(), Ordering::SeqCst);
        self.end.store(span.end().get(), Ordering::SeqCst);
    }
}

impl FaultHook for Opener {
    fn may_serve(&self, at: HostVa) -> bool {
        (self.start.load(Ordering::SeqCst)..self.end.load(Ordering::SeqCst)).contains(&at.get())
    }

    fn serve(&self, fault: &Fault) -> Served {
        let here = 0_u8;
        let here = HostVa::new((&raw const here).addr() as u64);
        if !arena::bracket_stacks().contains(here) {
            self.off_stack.fetch_add(1, Ordering::SeqCst);
        }
        self.served.fetch_add(1, Ordering::SeqCst);
        if self.put_off.load(Ordering::SeqCst) {
            return Served::Later(None);
        }
        // What a service may do: allocate runtime memory, lose errno.
        let grown: Vec<u64> = (0..100).collect();
        let page = fault.at.align_down(gpusvm::addr::PAGE);
        let at = core::ptr::with_exposed_provenance_mut(usize::try_from(page.get()).unwrap_or(0));
        // SAFETY: a page of the test's mapping, whose owner waits for it.
        let opened = unsafe { libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_WRITE) };
        // SAFETY: always valid.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: this thread's.
        unsafe { errno.write(libc::EBADF) };
        if opened == 0 && grown.len() == 100 {
            Served::Retry
        } else {
            Served::NotOurs
        }
    }
}

const PAGES: usize = 64;

/// Memory that nobody may access, and that the hook opens page by page. Whatever is mapped there later
/// is nobody's business.
struct Closed(AnonMapping);

impl Drop for Closed {
    fn drop(&mut self) {
        OPENER.watch(HostSpan::at(HostVa::new(0), 0));
    }
}

fn closed() -> Closed {
    install(&OPENER).expect("there is room for a hook");
    let mut map = AnonMapping::new(PAGES * 4096, Huge::Never).expect("memory can be mapped");
    map.bytes_mut().fill(7);
    (map.protect(0, PAGES * 4096, Protect::None)).expect("the system closes it");
    OPENER.watch(HostSpan::at(HostVa::new(map.address()), 4096 * 64));
    Closed(map)
}

#[test]
fn faults_are_served_on_a_runtime_stack_and_errno_is_kept() {
    let _alone = ALONE.lock();
    let map = closed();
    // SAFETY: always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: this thread's.
    unsafe { errno.write(libc::EDOM) };
    let sum: u64 = map.0.bytes().iter().map(|byte| u64::from(*byte)).sum();
    // SAFETY: as above.
    assert_eq!(unsafe { errno.read() }, libc::EDOM);
    assert_eq!(sum, 7 * 4096 * 64);
    assert_eq!(OPENER.served.load(Ordering::SeqCst), 64);
    assert_eq!(OPENER.off_stack.load(Ordering::SeqCst), 0);
}

#[test]
fn more_threads_than_stacks_wait_for_one_announcement() {
    let _alone = ALONE.lock();
    let map = closed();
    OPENER.put_off.store(true, Ordering::SeqCst);
    let sum = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for n in 0..100 {
            let (map, sum) = (&map, &sum);
            scope.spawn(move || {
                let byte = map.0.bytes()[n % PAGES * 4096];
                sum.fetch_add(u64::from(byte), Ordering::SeqCst);
            });
        }
        while OPENER.served.load(Ordering::SeqCst) < 100 {
            std::thread::yield_now();
        }
        assert_eq!(sum.load(Ordering::SeqCst), 0, "nobody has come through");
        OPENER.put_off.store(false, Ordering::SeqCst);
        // A thread may be on its way to sleep: it is counted, so one announcement is enough.
        announce();
    });
    assert_eq!(sum.load(Ordering::SeqCst), 700);
}

#[test]
fn fault_elsewhere_is_left_to_the_next_and_copies_are_served_as_well() {
    let _alone = ALONE.lock();
    let map = closed();
    let mut word = [0; 8];
    let whole = HostSpan::at(HostVa::new(map.0.address()), 4096 * 64);
    OPENER.watch(HostSpan::at(HostVa::new(0), 0));
    assert!(LiveBus.read(map.0.address(), &mut word).is_err());
    assert_eq!(OPENER.served.load(Ordering::SeqCst), 0);
    OPENER.watch(whole);
    assert!(LiveBus.read(map.0.address(), &mut word).is_ok());
    assert_eq!((word, OPENER.served.load(Ordering::SeqCst)), ([7; 8], 1));
}
