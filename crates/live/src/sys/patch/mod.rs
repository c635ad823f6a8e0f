//! Patched system-call sites: address-space calls are seen before they happen.
//!
//! userfaultfd tells of an unmapped span after it is gone, and the C library calls its own `munmap`
//! from inside `free`, where no interposed symbol sees it. So the library's system-call
//! instructions themselves are led through here (`livehost.md` sections 3 and 7):
//!
//! ```text
//!   libc:   mov $11,%eax ──▶ jmp stub     the first five of the seven bytes change;
//!           syscall                       a thread between the two still makes the call
//!           cmp ...        ◀─────┐
//!   stub:   eax = 11, rcx = "go back there", jump to the entry
//!   entry:  outside the watched hull?  syscall, back                      (fast path)
//!           else: signals blocked, own stack, all registers saved, hook   (slow path)
//! ```
//!
//! The fast path touches what a system call may change (`rax`, `rcx`, `r11`) and two words below the
//! red zone. The slow path runs on a stack of the runtime's own, because the thread's stack may be
//! memory that can migrate, and touches no thread-local.
//!
//! Verify, then patch; refuse politely; never guess.

mod entry;
mod sites;
mod stub;

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::OnceLock;

use rustix::io::Errno;

use crate::sys::fault_copy;
use crate::sys::futex;

pub(crate) use entry::SysCall;
pub(crate) use sites::Site;

macro_rules! calls {
    ($($id:ident = $number:literal, $name:literal;)*) => {
        /// Address-space calls.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Call {
            $($id,)*
        }

        impl Call {
            /// All of them.
            pub(super) const ALL: &[Self] = &[$(Self::$id,)*];

            /// Number on x86-64.
            pub(crate) const fn number(self) -> u32 {
                match self {
                    $(Self::$id => $number,)*
                }
            }

            const fn from_number(number: usize) -> Option<Self> {
                match number {
                    $($number => Some(Self::$id),)*
                    _ => None,
                }
            }

            /// Name.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$id => $name,)*
                }
            }
        }
    };
}

calls! {
    Mmap = 9, "mmap";
    Mprotect = 10, "mprotect";
    Munmap = 11, "munmap";
    Brk = 12, "brk";
    Mremap = 25, "mremap";
    Madvise = 28, "madvise";
    Mlock = 149, "mlock";
    Mlockall = 151, "mlockall";
    Mlock2 = 325, "mlock2";
    PkeyMprotect = 329, "pkey_mprotect";
    ProcessMadvise = 440, "process_madvise";
}

impl Call {
    /// Whether a C library may be without it: older ones have no wrapper, so nobody makes the
    /// call through them.
    const fn is_optional(self) -> bool {
        matches!(
            self,
            Self::Mlock2 | Self::PkeyMprotect | Self::ProcessMadvise
        )
    }
}

/// Runs instead of a system call that may concern watched memory.
///
/// On any thread, with all signals but faults blocked, on a stack of the runtime. It must touch no
/// thread-local and no memory that can migrate while it holds a lock, and must not panic.
pub(crate) trait BracketHook: Sync {
    /// Makes the call by [`SysCall::raw`], at most once, and returns what the caller gets.
    fn call(&self, call: &SysCall) -> isize;
}

/// Sites cannot be patched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PatchError {
    /// The process has no C library that we know.
    NoLibc,
    /// A call's site was not found, or found too often to be sure.
    Sites {
        /// The call.
        call: &'static str,
        /// How many were found.
        found: usize,
    },
    /// No memory within reach of a jump from the library.
    NoRoom,
    /// A site's bytes straddle cache lines, and other threads may be running them.
    Straddles {
        /// The call.
        call: &'static str,
    },
    /// The processor cannot save all registers.
    NoXsave,
    /// The system refused.
    Os {
        /// What was attempted.
        step: &'static str,
        /// Its answer.
        errno: Errno,
    },
}

impl fmt::Display for PatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot patch system-call sites: ")?;
        match self {
            Self::NoLibc => f.write_str("no glibc in this process; brackets fall back to events"),
            Self::Sites { call, found } => {
                write!(
                    f,
                    "found {found} {} for {call}; this C library is not known",
                    if *found == 1 { "site" } else { "sites" }
                )
            }
            Self::NoRoom => f.write_str("no free address space near the C library"),
            Self::Straddles { call } => {
                write!(
                    f,
                    "the site of {call} cannot be changed while threads run; open earlier"
                )
            }
            Self::NoXsave => f.write_str("this processor has no XSAVE"),
            Self::Os { step, errno } => write!(f, "{step}: {errno}"),
        }
    }
}

impl core::error::Error for PatchError {}

#[unsafe(link_section = ".data")]
static HOOK: OnceLock<&'static dyn BracketHook> = OnceLock::new();

/// Patched sites. They stay patched until [`restore`](Self::restore).
#[derive(Debug)]
pub(crate) struct Patches {
    sites: Vec<Site>,
}

impl Patches {
    /// The sites.
    #[cfg(test)]
    pub(crate) fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Puts the libraries' own bytes back. Stubs stay: a thread may be inside.
    pub(crate) fn restore(self) {
        for site in &self.sites {
            // A refusal leaves the site patched, which works as before with nothing watched.
            let _stays = sites::write(site, &site.original());
        }
        sites::serialize();
    }
}

/// Leads calls to `hook` that are made by [`SysCall::bracketed`], until [`lead_no_calls`], as patching
/// does. The first hook that is given stays for the life of the process.
///
/// # Errors
/// [`PatchError`]: no stacks to run it on.
pub(crate) fn lead_calls(hook: &'static dyn BracketHook) -> Result<(), PatchError> {
    let _first = HOOK.set(hook);
    entry::prepare()?;
    LED.store(true, Ordering::Release);
    Ok(())
}

/// Such calls go straight to the system.
pub(crate) fn lead_no_calls() {
    LED.store(false, Ordering::Release);
}

/// Patches the sites of all calls in the C library and the dynamic linker. The first hook that is
/// given stays for the life of the process.
///
/// # Errors
/// [`PatchError`]; nothing is patched then.
pub(crate) fn install(hook: &'static dyn BracketHook) -> Result<Patches, PatchError> {
    let _first = HOOK.set(hook);
    entry::prepare()?;
    // A program that exports the calls as symbols makes them past the library.
    LED.store(true, Ordering::Release);
    let sites = sites::find(Call::ALL)?;
    let mut patches = Patches { sites: Vec::new() };
    for site in sites {
        let patched = stub::make(&site).and_then(|jump| sites::write(&site, &jump));
        match patched {
            Ok(()) => patches.sites.push(site),
            Err(error) => {
                patches.restore();
                return Err(error);
            }
        }
    }
    sites::serialize();
    Ok(patches)
}

// In `.data`, as all that fault service and brackets read: see `owned`.
/// Calls that are made by the runtime and by symbols go to the hook.
#[unsafe(link_section = ".data")]
static LED: AtomicBool = AtomicBool::new(false);
/// The hull of watched memory; empty while `LOW > HIGH`.
#[unsafe(link_section = ".data")]
static LOW: AtomicU64 = AtomicU64::new(u64::MAX);
#[unsafe(link_section = ".data")]
static HIGH: AtomicU64 = AtomicU64::new(0);
/// Calls on the fast path, per parity.
#[unsafe(link_section = ".data")]
static IN_FLIGHT: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// Those of them that nobody waits for any more.
#[unsafe(link_section = ".data")]
static GIVEN_UP: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// Longest wait for calls on the fast path: far longer than a busy system leaves a thread without a
/// processor.
const PATIENCE_NS: u64 = 250_000_000;
/// Byte offset into [`IN_FLIGHT`] for calls that begin now: 0 or 8.
#[unsafe(link_section = ".data")]
static PARITY: AtomicU64 = AtomicU64::new(0);

/// Calls that touch `[low, high)` go to the hook from now on.
pub(crate) fn set_hull(low: u64, high: u64) {
    // Grow before shrinking, so that no moment has a smaller hull than both.
    HIGH.fetch_max(high, Ordering::SeqCst);
    LOW.store(low, Ordering::SeqCst);
    HIGH.store(high, Ordering::SeqCst);
}

/// Waits until every call that began under a former, smaller hull is over. One caller at a time,
/// who holds nothing that fault service wants.
///
/// A signal's handler runs at the end of the call that it interrupts, while that call still counts;
/// it may need a page that is away, take long, or jump out and never come back. So the wait is
/// bounded: calls that take longer are given up. One of those that is still at work is seen by
/// events, as a raw call is.
pub(crate) fn wait_for_unwatched_calls() {
    fence(Ordering::SeqCst);
    for _parity in 0..2 {
        let former = PARITY.fetch_xor(8, Ordering::SeqCst);
        let parity = usize::from(former != 0);
        let deadline = futex::now_ns() + PATIENCE_NS;
        while !is_quiet(parity, deadline) {
            rustix::thread::sched_yield();
        }
    }
}

/// Whether the calls of a parity are over, but for those that were given up or are given up now.
fn is_quiet(parity: usize, deadline: u64) -> bool {
    let (calls, given_up) = (&IN_FLIGHT[parity], &GIVEN_UP[parity]);
    let running = calls.load(Ordering::SeqCst);
    let quiet = running <= given_up.load(Ordering::Relaxed) || futex::now_ns() > deadline;
    if quiet {
        // Fewer than before: some have come to their end after all.
        given_up.store(running, Ordering::Relaxed);
    }
    quiet
}

/// What `brk(to)` is about to unmap.
pub(crate) fn brk_shrinks(to: usize) -> Option<Range<u64>> {
    let now = SysCall {
        number: 12,
        args: [0; 6],
    }
    .raw();
    let (now, to) = (u64::try_from(now).ok()?, u64::try_from(to).ok()?);
    (to != 0 && to < now).then_some(to..now)
}

/// The smallest span around all parts of an array of `count` `iovec`s at `at`.
pub(crate) fn iovec_hull(at: usize, count: usize) -> Option<Range<u64>> {
    /// As many as the system takes.
    const MOST: usize = 1024;
    let mut hull: Option<Range<u64>> = None;
    for n in 0..count.min(MOST) {
        let mut pair = [0_u64; 2];
        let from = core::ptr::with_exposed_provenance(at.checked_add(n * 16)?);
        // SAFETY: `pair` is ours; a fault in the array ends the walk, as it would end the call.
        unsafe { fault_copy::copy(pair.as_mut_ptr().cast(), from, 16) }.ok()?;
        let part = pair[0]..pair[0].checked_add(pair[1])?;
        hull = Some(match hull {
            Some(old) => old.start.min(part.start)..old.end.max(part.end),
            None => part,
        });
    }
    hull
}

#[cfg(test)]
mod tests;
