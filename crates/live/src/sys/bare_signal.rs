//! The least that a signal handler does to serve a fault: for the [yardstick](crate::yardstick).

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};
use std::sync::OnceLock;

use gpusvm::addr::HostSpan;
use rustix::io::Errno;

use crate::sys::mapping::RuntimeMapping;
use crate::sys::uffd::Uffd;

/// A page that is copied in when it is touched. It lives as long as the process, as the handler may
/// run at any time.
#[derive(Debug)]
pub(crate) struct BarePage {
    /// Faults there are signals.
    pub(crate) uffd: Uffd,
    /// Where both pages are.
    pub(crate) _memory: RuntimeMapping,
    /// The page that faults.
    pub(crate) page: HostSpan,
    /// What is copied in.
    pub(crate) source: HostSpan,
}

/// Who is served.
static BARE: AtomicPtr<BarePage> = AtomicPtr::new(ptr::null_mut());
/// Who had the signal when it was first taken over.
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();

/// SIGBUS belongs to a `BarePage` until this is dropped.
#[must_use = "dropping it gives the signal back"]
pub struct TakenOver(libc::sigaction);

impl core::fmt::Debug for TakenOver {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("TakenOver").finish_non_exhaustive()
    }
}

impl Drop for TakenOver {
    fn drop(&mut self) {
        set(&self.0);
    }
}

/// Installs the handler, with the flags that the runtime's own has.
pub(crate) fn take_over(page: &'static BarePage) -> TakenOver {
    BARE.store(ptr::from_ref(page).cast_mut(), Ordering::Release);
    // SAFETY: all-zero is a valid `sigaction`: the default action, no flags, an empty mask.
    let mut former: libc::sigaction = unsafe { core::mem::zeroed() };
    // SAFETY: asks only; `former` is a valid place for the answer.
    let _asked = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut former) };
    // Known before the handler can run.
    let _known = FORMER.get_or_init(|| former);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    set(&action);
    TakenOver(former)
}

fn set(action: &libc::sigaction) {
    // SAFETY: the action was the signal's already, or its handler is async-signal-safe: it makes
    // system calls and reads what lives as long as the process.
    let _set = unsafe { libc::sigaction(libc::SIGBUS, action, ptr::null_mut()) };
}

extern "C" fn handle(_signal: i32, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid description of the signal.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS has an address, or is one that was sent, whose value is not used as one.
    let at = unsafe { info.si_addr() }.addr();
    // SAFETY: null, or a page that lives as long as the process.
    let bare = unsafe { BARE.load(Ordering::Acquire).as_ref() };
    let start = |bare: &BarePage| usize::try_from(bare.page.start().get()).unwrap_or(0);
    match bare.filter(|bare| at & !0xFFF == start(bare)) {
        Some(bare) => {
            while bare.uffd.copy(bare.page.start(), bare.source).error == Some(Errno::AGAIN) {}
        }
        // Somebody else's fault: it is raised again, for whoever it was meant for.
        None => FORMER.get().map_or((), set),
    }
}
