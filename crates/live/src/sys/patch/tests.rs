use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use gpusvm::addr::HostVa;
use lock_api::Mutex;

use super::*;
use crate::sys::arena;
use crate::sys::child::{By, Child};
use crate::sys::futex::RawFutexMutex;
use crate::sys::mapping::{AnonMapping, Huge, Protect};

/// Calls that the hook has seen.
struct Recorder {
    seen: Mutex<RawFutexMutex, [(usize, [usize; 6]); 64]>,
    count: AtomicUsize,
}

static RECORDER: Recorder = Recorder {
    seen: Mutex::from_raw(lock_api::RawMutex::INIT, [(0, [0; 6]); 64]),
    count: AtomicUsize::new(0),
};

impl BracketHook for Recorder {
    fn call(&self, call: &SysCall) -> isize {
        let at = self.count.fetch_add(1, Ordering::SeqCst);
        self.seen.lock()[at % 64] = (call.number, call.args);
        clobber_vector_registers();
        if RAISE.load(Ordering::SeqCst) {
            // SAFETY: the test handles it.
            let _sent = unsafe { libc::raise(libc::SIGUSR2) };
        }
        if call.call() == Some(Call::ProcessMadvise) {
            let _hull = iovec_hull(call.args[1], call.args[2]);
        }
        call.raw()
    }
}

/// The hook sends a signal to its thread.
static RAISE: AtomicBool = AtomicBool::new(false);
/// Where the handler ran.
static HANDLED_AT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_place(_signal: i32) {
    let local = 0_u8;
    HANDLED_AT.store((&raw const local).addr(), Ordering::SeqCst);
}

fn clobber_vector_registers() {
    // SAFETY: declares what it changes.
    unsafe {
        core::arch::asm!(
            "pcmpeqd xmm0, xmm0",
            "pcmpeqd xmm7, xmm7",
            "pcmpeqd xmm15, xmm15",
            out("xmm0") _, out("xmm7") _, out("xmm15") _,
        );
    }
}

/// Runs `test` with everything patched, or says why not.
fn patched(test: impl FnOnce()) {
    let _alone = crate::toy::alone();
    match install(&RECORDER) {
        Ok(patches) => {
            assert!(patches.sites().len() >= 14, "{:?}", patches.sites());
            let before = RECORDER.count.load(Ordering::SeqCst);
            test();
            set_hull(u64::MAX, 0);
            RECORDER.count.store(before, Ordering::SeqCst);
            patches.restore();
        }
        Err(error) => println!("skipped: {error}"),
    }
}

/// Calls that `work` makes on memory inside the hull of `map`.
fn seen_during(address: u64, bytes: u64, work: impl FnOnce()) -> Vec<(usize, [usize; 6])> {
    let from = RECORDER.count.load(Ordering::SeqCst);
    set_hull(address, address + bytes);
    wait_for_unwatched_calls();
    work();
    set_hull(u64::MAX, 0);
    let to = RECORDER.count.load(Ordering::SeqCst);
    let seen = RECORDER.seen.lock();
    (from..to).map(|n| seen[n % 64]).collect()
}

fn numbers(calls: &[(usize, [usize; 6])]) -> Vec<usize> {
    calls.iter().map(|call| call.0).collect()
}

#[test]
fn each_call_is_seen_with_its_arguments_and_keeps_its_result() {
    patched(|| {
        let mut map = AnonMapping::new(1 << 20, Huge::Never).expect("a megabyte can be mapped");
        let address = map.address();
        map.bytes_mut()[5000] = 1;
        let calls = seen_during(address, 1 << 20, || {
            map.protect(0, 4096, Protect::Read)
                .expect("rights can change");
            map.protect(0, 4096, Protect::ReadWrite)
                .expect("rights can change");
            map.discard(4096, 8192).expect("content can go");
            assert_eq!(map.bytes()[5000], 0);
            map.unmap_tail(64 << 10);
        });
        assert_eq!(numbers(&calls), [10, 10, 28, 11]);
        let start = usize::try_from(address).expect("64-bit");
        assert_eq!(calls[0].1[..3], [start, 4096, 1]);
        assert_eq!(calls[2].1[..3], [start + 4096, 8192, 4]);
        assert_eq!(calls[3].1[0], start + (64 << 10));
    });
}

#[test]
fn failing_calls_keep_their_errno() {
    patched(|| {
        let map = AnonMapping::new(4096, Huge::Never).expect("a page can be mapped");
        let at: *mut core::ffi::c_void =
            core::ptr::with_exposed_provenance_mut(usize::try_from(map.address()).expect("64-bit"));
        let calls = seen_during(map.address(), 4096, || {
            // SAFETY: an advice that does not exist changes nothing.
            let result = unsafe { libc::madvise(at, 4096, 12345) };
            assert_eq!(result, -1);
            assert_eq!(
                std::io::Error::last_os_error().raw_os_error(),
                Some(libc::EINVAL)
            );
            // SAFETY: as above; this wrapper returns the error.
            let result = unsafe { libc::posix_madvise(at, 4096, 12345) };
            assert_eq!(result, libc::EINVAL);
        });
        assert_eq!(numbers(&calls), [28, 28]);
    });
}

#[test]
fn free_is_seen_and_memory_outside_the_hull_is_not() {
    patched(|| {
        // SAFETY: allocates.
        let block = unsafe { libc::malloc(4 << 20) };
        let other = AnonMapping::new(1 << 20, Huge::Never).expect("a megabyte can be mapped");
        let address = u64::try_from(block.addr()).expect("64-bit");
        let calls = seen_during(address, 4 << 20, || {
            drop(other);
            // SAFETY: allocated above, freed once.
            unsafe { libc::free(block) };
        });
        assert_eq!(numbers(&calls), [11], "{calls:x?}");
    });
}

#[test]
fn moving_and_fixed_mappings_are_seen() {
    patched(|| {
        let mut map = AnonMapping::new(2 << 20, Huge::Advise).expect("2M can be mapped");
        map.words_mut()[3] = 77;
        let address = map.address();
        let calls = seen_during(address, 2 << 20, || map.relocate().expect("it moves"));
        assert!(numbers(&calls).contains(&25), "{calls:x?}");
        assert_eq!(map.words()[3], 77);
        let at =
            core::ptr::with_exposed_provenance_mut(usize::try_from(map.address()).expect("64-bit"));
        let calls = seen_during(map.address(), 2 << 20, || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            // SAFETY: replaces a part of our own mapping.
            let got =
                unsafe { libc::mmap(at, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
            assert_eq!(got, at);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a fresh mapping.
            let fresh = unsafe { libc::mmap(at, 4096, libc::PROT_READ, flags, -1, 0) };
            assert_ne!(fresh, at);
        });
        assert_eq!(numbers(&calls), [9], "only the fixed one");
        assert_eq!(map.words()[3], 0);
    });
}

#[test]
fn registers_and_red_zone_survive_the_slow_path() {
    patched(|| {
        let map = AnonMapping::new(8192, Huge::Never).expect("two pages can be mapped");
        // The library's own: a symbol of this program is ordinary code.
        // SAFETY: the name is a C string; the libraries behind this program are searched.
        let munmap = unsafe { libc::dlsym(libc::RTLD_NEXT, c"munmap".as_ptr()) };
        assert!(!munmap.is_null());
        let address = usize::try_from(map.address()).expect("64-bit");
        let (mut x0, mut x15, mut callee) = (0x1111_2222_u64, 0x3333_4444_u64, 0x5555_u64);
        let calls = seen_during(map.address(), 8192, || {
            // Unaligned, so the call fails and changes nothing; the bracket runs all the same.
            // SAFETY: declares what a call may change, and checks what it must not.
            unsafe {
                core::arch::asm!(
                    "movq xmm0, {x0}",
                    "movq xmm15, {x15}",
                    "mov r12, {callee}",
                    "call {munmap}",
                    "movq {x0}, xmm0",
                    "movq {x15}, xmm15",
                    "mov {callee}, r12",
                    munmap = in(reg) munmap,
                    x0 = inout(reg) x0,
                    x15 = inout(reg) x15,
                    callee = inout(reg) callee,
                    inout("rdi") address + 1 => _,
                    inout("rsi") 4096_usize => _,
                    out("r12") _,
                    out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _,
                    out("r10") _, out("r11") _, out("xmm0") _, out("xmm15") _,
                );
            }
        });
        assert_eq!(numbers(&calls), [11]);
        assert_eq!((x0, x15, callee), (0x1111_2222, 0x3333_4444, 0x5555));
    });
}

#[test]
fn brk_and_process_madvise_tell_their_spans() {
    patched(|| {
        let here = SysCall {
            number: 12,
            args: [0; 6],
        }
        .raw();
        let here = usize::try_from(here).expect("an address");
        assert_eq!(brk_shrinks(here + 4096), None);
        assert_eq!(brk_shrinks(0), None);
        let low = u64::try_from(here - 4096).expect("64-bit");
        assert_eq!(brk_shrinks(here - 4096), Some(low..low + 4096));
        let parts = [[0x5000_u64, 0x1000], [0x2000, 0x1000]];
        let at = parts.as_ptr().expose_provenance();
        assert_eq!(iovec_hull(at, 2), Some(0x2000..0x6000));
        assert_eq!(iovec_hull(8, 2), None, "unreadable");
    });
}

#[test]
fn array_that_cannot_be_read_is_an_errno_and_not_the_end() {
    type ProcessMadvise = extern "C" fn(i32, usize, usize, i32, u32) -> isize;
    // SAFETY: looks a name up.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"process_madvise".as_ptr()) };
    if found.is_null() {
        println!("skipped: this C library has no process_madvise");
        return;
    }
    // SAFETY: the function of that name has this signature.
    let process_madvise: ProcessMadvise = unsafe { core::mem::transmute(found) };
    patched(|| {
        let calls = seen_during(4096, 1 << 46, || {
            assert_eq!(process_madvise(-1, 8, 1, libc::MADV_COLD, 0), -1);
        });
        assert!(numbers(&calls).contains(&440), "{calls:?}");
    });
}

/// What the hook would ask of descriptors that a child has inherited would be done to the parent's memory.
#[test]
fn calls_of_a_child_concern_nobody_however_it_was_made() {
    patched(|| {
        let map = AnonMapping::new(8192, Huge::Never).expect("two pages can be mapped");
        let address = map.address();
        for (by, seen) in [(By::Fork, 0), (By::RawClone, 0), (By::Vfork, 1)] {
            let _calls = seen_during(address, 8192, || {
                let child = Child::make(by, || {
                    // The child's own copy, but for vfork.
                    let before = RECORDER.count.load(Ordering::SeqCst);
                    let done = AnonMapping::borrowed(address, 8192).discard(0, 4096);
                    done.is_ok() && RECORDER.count.load(Ordering::SeqCst) - before == seen
                });
                let child = child.expect("one more process");
                assert!(child.passed().expect("ours"), "{by:?}");
            });
        }
    });
}

#[test]
fn threads_allocate_exit_and_unmap_while_sites_come_and_go() {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut map = AnonMapping::new(1 << 20, Huge::Never).expect("memory");
                    map.bytes_mut()[70_000] = 3;
                    map.discard(0, 1 << 20).expect("content can go");
                    assert_eq!(map.bytes()[70_000], 0);
                    let inner = std::thread::Builder::new().spawn(|| vec![1_u8; 1 << 20]);
                    assert_eq!(
                        inner.expect("a thread").join().expect("it ends")[999_999],
                        1
                    );
                }
            });
        }
        for _round in 0..50 {
            patched(|| {
                // Everything is watched: every call takes the slow path.
                let _calls = seen_during(4096, 1 << 46, rustix::thread::sched_yield);
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn signals_that_waited_are_handled_on_the_threads_own_stack() {
    let handler = note_place as extern "C" fn(i32) as usize;
    // SAFETY: the handler only stores a number.
    let former = unsafe { libc::signal(libc::SIGUSR2, handler) };
    assert_ne!(former, libc::SIG_ERR);
    patched(|| {
        let mut map = AnonMapping::new(8192, Huge::Never).expect("two pages can be mapped");
        RAISE.store(true, Ordering::SeqCst);
        let address = map.address();
        let calls = seen_during(address, 8192, || {
            map.discard(0, 4096).expect("content can go");
            // Delivered by now, and with the mask as it was.
            assert_ne!(HANDLED_AT.load(Ordering::SeqCst), 0);
        });
        RAISE.store(false, Ordering::SeqCst);
        assert_eq!(numbers(&calls), [28]);
        let at = HANDLED_AT.load(Ordering::SeqCst);
        let at = HostVa::new(u64::try_from(at).expect("64-bit"));
        assert!(!arena::bracket_stacks().contains(at), "{at:?}");
    });
}

#[test]
fn call_that_never_comes_back_is_waited_for_once() {
    patched(|| {
        // As a signal's handler leaves it that jumps out of the call that it interrupts. Other
        // tests make calls meanwhile.
        let given_up = || GIVEN_UP[0].load(Ordering::Relaxed);
        let stuck = &IN_FLIGHT[0];
        stuck.fetch_add(1, Ordering::SeqCst);
        wait_for_unwatched_calls();
        assert_ne!(given_up(), 0);
        stuck.fetch_sub(1, Ordering::SeqCst);
        while given_up() != 0 {
            wait_for_unwatched_calls();
        }
    });
}
