//! What runs around `fork()`: handlers of the C library, and what a child gives up.
//!
//! A child is a copy of this process with one thread. Nothing of the runtime works in it: the
//! threads are gone, locks may be held by them, and the descriptors speak of the parent's memory.
//! So a child keeps its memory, which the parent has made whole before, and gives everything else
//! up: see [`become_child`].
//!
//! A clone that bypasses the C library runs no handlers. Its child knows itself by a page that the system
//! empties in copies of a process, and keeps its hands off what is the parent's: a request to a
//! userfaultfd would change the parent's memory.

use core::ffi::c_int;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use crate::sys::heap;
use crate::sys::owned::OwnedSpan;
use crate::sys::patch;
use crate::sys::process_lock::{Alone, Freed, ProcessLock};
use crate::sys::signals;

/// Called around every `fork()` of the C library, on the forking thread and on its own stack.
pub(crate) trait ForkHook: Sync {
    /// Before: on return the process's memory is whole, and stays so until
    /// [`parent`](Self::parent).
    fn prepare(&self);
    /// After, in the parent, also when there is no child after all.
    fn parent(&self);
    /// Locks of the whole process that other threads may hold at the fork: the child finds them free.
    fn locks(&self) -> [&'static dyn Freed; 2];
}

#[unsafe(link_section = ".data")] // See `owned`.
static HOOK: OnceLock<&'static dyn ForkHook> = OnceLock::new();
static INSTALLED: ProcessLock<bool> = ProcessLock::new(false);

/// This process is a child of one that had a live space.
#[unsafe(link_section = ".data")]
static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// A word that is not zero in this process and in those that share its memory, and zero in copies of it.
/// Null where there is none.
#[unsafe(link_section = ".data")]
static MARK: AtomicPtr<AtomicU32> = AtomicPtr::new(core::ptr::null_mut());
/// No device may use the page of [`MARK`].
static MARK_OWNED: OnceLock<OwnedSpan> = OnceLock::new();
static MARKED: ProcessLock<bool> = ProcessLock::new(false);

/// Descriptors that a child gives up.
const PLACES: usize = 16;
/// No descriptor.
const NONE: i32 = -1;
#[unsafe(link_section = ".data")]
static DESCRIPTORS: [AtomicI32; PLACES] = [const { AtomicI32::new(NONE) }; PLACES];

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

/// Installs the handlers. Only the first call in a process does anything: they stay for good.
pub(crate) fn install(hook: &'static dyn ForkHook) {
    let _first = HOOK.set(hook);
    tell_copies_apart();
    let mut installed = INSTALLED.lock();
    if !core::mem::replace(&mut *installed, true) {
        // SAFETY: the handlers are functions of this library, which is never unloaded.
        let _out_of_memory = unsafe { pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    }
}

extern "C" fn prepare() {
    if let Some(hook) = HOOK.get().filter(|_| !is_child()) {
        hook.prepare();
    }
}

extern "C" fn parent() {
    if let Some(hook) = HOOK.get().filter(|_| !is_child()) {
        hook.parent();
    }
}

extern "C" fn child() {
    become_child();
    // SAFETY: a child of `fork()` has one thread, and this is it. It does not fork while it holds one
    // of these locks.
    let alone = unsafe { Alone::new() };
    for lock in [&INSTALLED, &MARKED, &signals::TAKEN_OVER] {
        lock.free(&alone);
    }
    heap::FIRST.free(&alone);
    for lock in HOOK.get().into_iter().flat_map(|hook| hook.locks()) {
        lock.free(&alone);
    }
}

/// From now on [`is_child`] also knows children of raw clones. Once per process.
pub(crate) fn tell_copies_apart() {
    let mut marked = MARKED.lock();
    if !core::mem::replace(&mut *marked, true) {
        // Without it they are not told apart.
        let _unmarked = make_mark();
    }
}

/// Maps the page of [`MARK`].
fn make_mark() -> Result<(), Errno> {
    let bytes = usize::try_from(PAGE).map_err(|_wide| Errno::NOMEM)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, which overlaps nothing.
    let page = unsafe { mmap_anonymous(core::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }?;
    let at = u64::try_from(page.expose_provenance()).map_err(|_wide| Errno::NOMEM)?;
    let owned = OwnedSpan::declare(HostSpan::at(HostVa::new(at), PAGE)).ok_or(Errno::NOMEM)?;
    // SAFETY: the page is ours, and copies of this process do not need its content.
    unsafe { madvise(page, bytes, Advice::LinuxWipeOnFork) }?;
    let _once = MARK_OWNED.set(owned);
    MARK.store(page.cast(), Ordering::Release);
    set_mark();
    Ok(())
}

/// The word of [`MARK`], where there is one.
fn mark() -> Option<&'static AtomicU32> {
    // SAFETY: null, or a word at the start of a page that stays mapped for good, and that nothing else
    // is in.
    unsafe { MARK.load(Ordering::Acquire).as_ref() }
}

/// This process is no copy any more.
fn set_mark() {
    if let Some(mark) = mark() {
        mark.store(1, Ordering::Relaxed);
    }
}

/// Whether this process was forked from one with a live space: then it has none, and cannot open
/// one before it [begins anew](crate::begin_anew).
#[must_use]
pub fn is_child() -> bool {
    let is_copy = || mark().is_some_and(|mark| mark.load(Ordering::Relaxed) == 0);
    IS_CHILD.load(Ordering::Relaxed) || is_copy()
}

/// The process may have a live space again. Whether it was a child of `fork()`.
pub(crate) fn begin_anew() -> bool {
    let was_child = IS_CHILD.swap(false, Ordering::Relaxed);
    if was_child {
        set_mark();
    }
    was_child
}

/// Gives the runtime up. Async-signal-safe: takes no lock and allocates nothing.
fn become_child() {
    IS_CHILD.store(true, Ordering::Relaxed);
    // Address-space calls of the child concern nobody.
    patch::set_hull(u64::MAX, 0);
    for place in &DESCRIPTORS {
        let descriptor = place.swap(NONE, Ordering::Relaxed);
        if descriptor != NONE {
            give_up(descriptor);
        }
    }
}

/// Puts something harmless in a descriptor's place. Not just closing it keeps the number taken:
/// its owner object still lives, and may close it once more.
fn give_up(descriptor: i32) {
    // SAFETY: the path is a string; a new descriptor is made.
    let nothing = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if nothing < 0 {
        return;
    }
    // SAFETY: replaces a descriptor that is the runtime's.
    let _replaced = unsafe { libc::dup3(nothing, descriptor, libc::O_CLOEXEC) };
    // SAFETY: opened above.
    let _closed = unsafe { libc::close(nothing) };
}

/// A descriptor that a child gives up, until this is dropped. With no place left for it, a child
/// inherits it, and keeps what it speaks of alive for as long as it lives.
#[derive(Debug)]
pub(crate) struct NotForChildren(Option<usize>);

impl NotForChildren {
    /// Declares `descriptor` as the runtime's.
    pub(crate) fn declare(descriptor: BorrowedFd<'_>) -> Self {
        let raw = descriptor.as_raw_fd();
        let take = |place: &AtomicI32| {
            place
                .compare_exchange(NONE, raw, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        };
        Self(DESCRIPTORS.iter().position(take))
    }
}

impl Drop for NotForChildren {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            DESCRIPTORS[place].store(NONE, Ordering::Relaxed);
        }
    }
}
