//! Signals of faults and of the end: what the runtime does with them.
//!
//! The handler first asks whether the fault is at memory whose pages the runtime has taken away: then
//! it is served right here ([`in_thread`](super::in_thread)), and the access is made again. Next,
//! whether the interrupted instruction is one of a copy that may fault
//! ([`fault_copy`](super::fault_copy)): then the copy ends there. Anything else goes to whoever had
//! the signal before, as the kernel would have passed it on. Where that is the default action, which
//! ends the process, its data comes home first ([`last_wish`](super::last_wish)), so that a core dump
//! shows it.
//!
//! A program that installs a handler of its own afterwards gets the signal as ever, and has to pass
//! SIGSEGV and SIGBUS on as good handlers do.

use core::ffi::c_void;
use core::ptr;
use std::sync::OnceLock;

use gpusvm::addr::HostVa;
use gpusvm::seam::mm::Access;

use crate::sys::fault_copy::fixup_for;
use crate::sys::in_thread::{self, Fault};
use crate::sys::last_wish;
use crate::sys::process_lock::ProcessLock;

/// Signals whose default action dumps core, and which a process gets by its own doing.
const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGABRT,
    libc::SIGILL,
    libc::SIGFPE,
];

/// What had the signals before, in the order of [`SIGNALS`].
#[unsafe(link_section = ".data")] // See `owned`: the handler must find it in its place.
static FORMER: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();
pub(super) static TAKEN_OVER: ProcessLock<bool> = ProcessLock::new(false);

/// Installs the handler, once per process.
pub(crate) fn install() {
    // Two steps, so that the former actions can be found before the handler can run.
    FORMER.get_or_init(|| SIGNALS.map(current));
    let mut taken_over = TAKEN_OVER.lock();
    if !core::mem::replace(&mut *taken_over, true) {
        SIGNALS.into_iter().for_each(take_over);
    }
}

fn current(signal: i32) -> libc::sigaction {
    // SAFETY: all-zero is a valid `sigaction`: the default action, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    // SAFETY: asks only; `action` is a valid place for the answer.
    let _answered = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    action
}

fn take_over(signal: i32) {
    // SAFETY: as in `current`.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    if is_of_faults(signal) {
        // Faults are served in the handler, which must not be interrupted. Blocking from the start
        // saves two system calls.
        action.sa_mask = all_but_faults();
    }
    // SAFETY: the handler is async-signal-safe: it reads a table and changes a register, or hands
    // the signal to the former action.
    let _installed = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
}

/// Whether accesses to memory raise `signal`.
const fn is_of_faults(signal: i32) -> bool {
    matches!(signal, libc::SIGSEGV | libc::SIGBUS)
}

/// All signals but SIGBUS (7) and SIGSEGV (11), those of the C library included.
fn all_but_faults() -> libc::sigset_t {
    set_of(!(1 << 6 | 1 << 10))
}

/// A set as the kernel has it: one word.
fn set_of(word: u64) -> libc::sigset_t {
    // SAFETY: all-zero is a valid set.
    let mut set: libc::sigset_t = unsafe { core::mem::zeroed() };
    // SAFETY: a set begins with its first word.
    unsafe { (&raw mut set).cast::<u64>().write(word) };
    set
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    let user = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes the interrupted thread's context, which is ours to change until
    // the handler returns.
    let registers = unsafe { &mut (*user).uc_mcontext.gregs };
    // SAFETY: the kernel passes a valid description of the signal.
    if let Some(fault) = fault_of(signal, unsafe { &*info }, registers)
        && in_thread::serve(&fault)
    {
        return;
    }
    let rip = libc::REG_RIP as usize;
    let at = usize::try_from(registers[rip]).unwrap_or(0);
    match fixup_for(at) {
        Some(fix) => registers[rip] = i64::try_from(fix).unwrap_or(0),
        None => pass_on(signal, info, context),
    }
}

/// The fault behind a signal; `None` for one that was sent or has other reasons.
fn fault_of(signal: i32, info: &libc::siginfo_t, registers: &[libc::greg_t]) -> Option<Fault> {
    /// Bit of a page fault's error code.
    const WRITE: i64 = 1 << 1;
    let broken = matches!(info.si_code, libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO);
    let missing = signal == libc::SIGBUS;
    if !is_of_faults(signal) || (missing && broken) || Origin::of(info.si_code) == Origin::Sent {
        return None;
    }
    // SAFETY: signals of faults have an address.
    let at = unsafe { info.si_addr() }.addr();
    Some(Fault {
        at: HostVa::new(u64::try_from(at).ok()?),
        access: if registers[libc::REG_ERR as usize] & WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        },
        missing,
    })
}

/// Does what would have happened without us.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    let index = SIGNALS.into_iter().position(|other| other == signal);
    let former = FORMER.get().and_then(|former| former.get(index?));
    // SAFETY: the kernel passes a valid description of the signal.
    let origin = Origin::of(unsafe { (*info).si_code });
    match (former.map_or(libc::SIG_DFL, |f| f.sa_sigaction), former) {
        (libc::SIG_IGN, _) if origin == Origin::Sent => {}
        // An ignored fault is fatal all the same.
        (libc::SIG_DFL | libc::SIG_IGN, _) | (_, None) => die_of(signal, origin),
        (_, Some(former)) => call(former, signal, info, context),
    }
}

/// Where a signal comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// An instruction, which raises it again when it is repeated.
    Fault,
    /// A process: nobody raises it again.
    Sent,
}

impl Origin {
    /// Codes above zero are the kernel's (sigaction(2), "The `si_code` field").
    const fn of(code: i32) -> Self {
        if code > 0 { Self::Fault } else { Self::Sent }
    }
}

/// Calls a handler as the kernel would have called it.
fn call(former: &libc::sigaction, signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    if former.sa_flags & libc::SA_RESETHAND != 0 {
        default_action(signal);
    }
    block_for(former, signal, context);
    match former.sa_sigaction {
        handler if former.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: installed with SA_SIGINFO, so this is a handler of three arguments.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) =
                unsafe { core::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: installed without SA_SIGINFO, so this is a handler of one argument.
            let handler: extern "C" fn(i32) = unsafe { core::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// Blocks what `former` wants blocked while it runs, and nothing that only our handler does. Returning
/// from the signal unblocks it: the kernel restores the interrupted mask.
fn block_for(former: &libc::sigaction, signal: i32, context: *mut c_void) {
    let mut mask = former.sa_mask;
    if former.sa_flags & libc::SA_NODEFER == 0 {
        // SAFETY: `mask` is a valid set, the signal is valid.
        let _added = unsafe { libc::sigaddset(&raw mut mask, signal) };
    }
    change_mask(libc::SIG_SETMASK, &interrupted_mask(context));
    change_mask(libc::SIG_BLOCK, &mask);
}

fn change_mask(how: i32, set: &libc::sigset_t) {
    // SAFETY: a valid set; the former one is not asked for.
    let _changed = unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) };
}

/// What the interrupted thread blocked.
fn interrupted_mask(context: *mut c_void) -> libc::sigset_t {
    // SAFETY: the kernel passes the interrupted thread's context.
    let mask = unsafe { &raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask };
    // SAFETY: the kernel's set is one word.
    set_of(unsafe { mask.cast::<u64>().read() })
}

/// The default action, which ends the process: the instruction faults again when this returns, but
/// a signal that was sent has to be sent again.
fn die_of(signal: i32, origin: Origin) {
    last_wish::make();
    default_action(signal);
    if origin == Origin::Sent {
        // SAFETY: raising a signal is always allowed, and safe in a handler.
        let _raised = unsafe { libc::raise(signal) };
    }
}

fn default_action(signal: i32) {
    // SAFETY: as in `current`: all-zero is the default action.
    let action: libc::sigaction = unsafe { core::mem::zeroed() };
    // SAFETY: installs the default action.
    let _installed = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
}

#[cfg(test)]
mod tests;
