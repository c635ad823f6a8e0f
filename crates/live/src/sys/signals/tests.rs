//! What signals do to a process that has the handler. Each case runs in a child: this test binary,
//! started again with the case's name.

use super::*;
use core::sync::atomic::{AtomicI32, Ordering};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Output};

use gpusvm_abi::bus::SystemBus;

use crate::sys::fault_copy::LiveBus;

const CASE: &str = "GPUSVM_SIGNAL_CASE";
/// Exit code of a child that lived to its end.
const SURVIVED: i32 = 7;
/// Exit code of a child whose own handler was called.
const HANDLED: i32 = 8;

/// Runs `body` in a child and returns how that ended. `name` is the test's own.
fn in_child(name: &str, body: impl FnOnce()) -> Output {
    if std::env::var(CASE).is_ok_and(|case| case == name) {
        body();
        end(SURVIVED);
    }
    let module = module_path!().split_once("::").map_or("", |m| m.1);
    let program = std::env::current_exe().expect("the test binary");
    let mut command = Command::new(program);
    command.args(["--exact", &format!("{module}::{name}"), "--nocapture"]);
    command.env(CASE, name).output().expect("the child runs")
}

fn status(name: &str, body: impl FnOnce()) -> ExitStatus {
    in_child(name, body).status
}

fn end(code: i32) -> ! {
    // SAFETY: ends the child without running anything else of it.
    unsafe { libc::_exit(code) }
}

fn set_action(signal: i32, handler: usize, flags: i32) {
    // SAFETY: all-zero is a valid action with an empty mask.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    (action.sa_sigaction, action.sa_flags) = (handler, flags);
    // SAFETY: the callers pass a handler of the kind that the flags say.
    let done = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    assert_eq!(done, 0);
}

fn send(signal: i32) {
    // SAFETY: a signal to this thread.
    let sent = unsafe { libc::raise(signal) };
    assert_eq!(sent, 0);
}

fn fault() {
    let nowhere: *mut u8 = ptr::without_provenance_mut(64);
    // SAFETY: none: that is the test. The child that does it dies of it or leaves in its handler.
    unsafe { nowhere.write_volatile(1) };
}

#[test]
fn fault_outside_the_copies_kills_under_the_default_action() {
    let status = status(
        "fault_outside_the_copies_kills_under_the_default_action",
        || {
            set_action(libc::SIGSEGV, libc::SIG_DFL, 0);
            install();
            fault();
        },
    );
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status:?}");
}

#[test]
fn fault_outside_the_copies_kills_after_rusts_own_handler() {
    let status = status(
        "fault_outside_the_copies_kills_after_rusts_own_handler",
        || {
            install();
            fault();
        },
    );
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status:?}");
}

#[test]
fn fault_kills_even_where_the_signal_is_ignored() {
    let status = status("fault_kills_even_where_the_signal_is_ignored", || {
        set_action(libc::SIGSEGV, libc::SIG_IGN, 0);
        install();
        fault();
    });
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status:?}");
}

#[test]
fn stack_overflow_is_still_told_apart() {
    fn deep(n: u64) -> u64 {
        let frame = core::hint::black_box([n; 256]);
        if n == u64::MAX {
            return 0;
        }
        deep(n + 1) + frame[3]
    }
    let output = in_child("stack_overflow_is_still_told_apart", || {
        install();
        core::hint::black_box(deep(0));
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("has overflowed its stack"), "{said}");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT));
}

#[test]
fn sent_signal_kills_under_the_default_action() {
    let status = status("sent_signal_kills_under_the_default_action", || {
        set_action(libc::SIGBUS, libc::SIG_DFL, 0);
        install();
        send(libc::SIGBUS);
    });
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status:?}");
}

#[test]
fn abort_still_ends_the_process_by_its_signal() {
    let status = status("abort_still_ends_the_process_by_its_signal", || {
        install();
        std::process::abort();
    });
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status:?}");
}

#[test]
fn sent_signal_stays_ignored_and_copies_go_on() {
    let status = status("sent_signal_stays_ignored_and_copies_go_on", || {
        set_action(libc::SIGSEGV, libc::SIG_IGN, 0);
        let bus = LiveBus::new();
        send(libc::SIGSEGV);
        send(libc::SIGSEGV);
        assert!(bus.read(4096, &mut [0; 64]).is_err());
    });
    assert_eq!(status.code(), Some(SURVIVED), "{status:?}");
}

#[test]
fn former_handlers_of_both_kinds_get_what_they_expect() {
    static SEEN: AtomicI32 = AtomicI32::new(0);
    extern "C" fn short(signal: i32) {
        SEEN.store(signal, Ordering::Relaxed);
    }
    extern "C" fn long(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the signal's own description.
        let info = unsafe { &*info };
        // SAFETY: the signal is one that carries an address.
        let at = unsafe { info.si_addr() };
        let told = signal == libc::SIGSEGV && at.addr() == 64 && !context.is_null();
        let both = told && SEEN.load(Ordering::Relaxed) == libc::SIGBUS && is_blocked(signal);
        end(if both { HANDLED } else { 1 });
    }
    let status = status("former_handlers_of_both_kinds_get_what_they_expect", || {
        set_action(libc::SIGBUS, short as extern "C" fn(i32) as usize, 0);
        let long = long as extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) as usize;
        set_action(libc::SIGSEGV, long, libc::SA_SIGINFO);
        install();
        send(libc::SIGBUS);
        assert!(!is_blocked(libc::SIGBUS), "returning unblocks it");
        fault();
    });
    assert_eq!(status.code(), Some(HANDLED), "{status:?}");
}

#[test]
fn handler_that_resets_itself_is_called_once() {
    extern "C" fn once(signal: i32) {
        // Returning repeats the fault, which the default action now gets.
        static CALLS: AtomicI32 = AtomicI32::new(0);
        if CALLS.fetch_add(1, Ordering::Relaxed) == 1 {
            end(signal);
        }
    }
    let status = status("handler_that_resets_itself_is_called_once", || {
        let once = once as extern "C" fn(i32) as usize;
        set_action(libc::SIGSEGV, once, libc::SA_RESETHAND);
        install();
        fault();
    });
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status:?}");
}

fn is_blocked(signal: i32) -> bool {
    // SAFETY: all-zero is a valid set: empty.
    let mut mask: libc::sigset_t = unsafe { core::mem::zeroed() };
    // SAFETY: asks only; `mask` is a valid place for the answer.
    let asked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut mask) };
    assert_eq!(asked, 0);
    // SAFETY: `mask` is a valid set, the signal is valid.
    unsafe { libc::sigismember(&raw const mask, signal) == 1 }
}
