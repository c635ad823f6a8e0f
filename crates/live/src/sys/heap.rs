//! The migratable heap: memory of the program that can migrate without userfaultfd.
//!
//! Its pages are those of one memory file, which two mappings show:
//!
//! ```text
//!   view    │ block │ reserved │ block │ …        the program's addresses; closed while away
//!               │                  │
//!   file    ────┴──────────────────┴──── …        pages
//!               │                  │
//!   alias   ────┴──────────────────┴──── …        the runtime's; always accessible
//! ```
//!
//! The view of a page that is away is closed (`PROT_NONE`), so nobody writes to what is being copied,
//! and after a while the page is taken out of the file. The same offset leads from one to the other, so a look at
//! an address needs no lock.
//!
//! Blocks are whole pages; their owner alone unmaps them. Children have none of this memory; one that
//! [begins anew](begin_anew) makes a heap of its own.

use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect,
};

use crate::spans::SpanSet;
use crate::sys::arena::RuntimeScope;
use crate::sys::atfork;
use crate::sys::futex::RawFutexMutex;
use crate::sys::owned::OwnedSpan;
use crate::sys::patch::{Call, SysCall};
use crate::sys::process_lock::ProcessLock;

/// Address space set aside for each of the two mappings.
const BYTES: u64 = 256 << 30;
/// How closely holes are looked for.
const GRAIN: u64 = 64 << 10;
/// Most spans, of up to 2 MiB each, that keep their pages while they are away.
const KEPT: usize = 32;
/// Smallest allocation of the program that comes from here: below it pages would be wasted, and
/// ranges below 64 KiB do not migrate anyway.
pub(crate) const LEAST: usize = 64 << 10;

// In `.data`: see `owned`.
/// First address of the view; 0 before there is one.
#[unsafe(link_section = ".data")]
static VIEW: AtomicU64 = AtomicU64::new(0);
/// First address of the alias.
#[unsafe(link_section = ".data")]
static ALIAS: AtomicU64 = AtomicU64::new(0);
/// New allocations of the program come from here.
#[unsafe(link_section = ".data")]
static WANTED: AtomicBool = AtomicBool::new(false);
/// Null before there is one.
#[unsafe(link_section = ".data")]
static HEAP: AtomicPtr<Heap> = AtomicPtr::new(ptr::null_mut());
/// First addresses of the views that this process had blocks of as somebody's child; 0 where a place is
/// free.
#[unsafe(link_section = ".data")]
static FORMER: [AtomicU64; GENERATIONS] = [const { AtomicU64::new(0) }; GENERATIONS];
/// Most children of children that have a heap each.
const GENERATIONS: usize = 8;

/// What stays for the life of the process.
struct Heap {
    file: OwnedFd,
    /// Number of the file, by which its mappings are known.
    inode: u64,
    /// Free stretches of the view. Leaf lock.
    free: lock_api::Mutex<RawFutexMutex, SpanSet>,
    /// Spans that are away and still have pages, oldest first. Leaf lock.
    kept: lock_api::Mutex<RawFutexMutex, VecDeque<HostSpan>>,
    _alias: OwnedSpan,
}

/// Held while the heap is set up.
pub(super) static FIRST: ProcessLock<()> = ProcessLock::new(());

/// Sets the heap up, once per process.
///
/// # Errors
/// The system's: no memory file, or no address space.
pub(crate) fn prepare() -> Result<(), Errno> {
    let _first = FIRST.lock();
    if heap().is_some() {
        return Ok(());
    }
    if FORMER.iter().all(|view| view.load(Ordering::Relaxed) != 0) {
        return Err(Errno::NOMEM);
    }
    let _in_runtime = RuntimeScope::enter();
    let file = memfd_create("gpusvm-heap", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, BYTES)?;
    let inode = rustix::fs::fstat(&file)?.st_ino;
    // Blocks of a parent must not pass for this heap's: where they were, nothing comes any more.
    let mut view = reserve()?;
    while FORMER
        .iter()
        .filter_map(view_at)
        .any(|former| former.overlaps(view))
    {
        view = reserve()?;
    }
    let alias = map_alias(file.as_fd())?;
    let mut free = SpanSet::default();
    free.insert(view);
    let heap = Box::new(Heap {
        file,
        inode,
        free: lock_api::Mutex::new(free),
        kept: lock_api::Mutex::new(VecDeque::new()),
        _alias: OwnedSpan::declare(alias).ok_or(Errno::NOMEM)?,
    });
    HEAP.store(Box::leak(heap), Ordering::Release);
    ALIAS.store(alias.start().get(), Ordering::Relaxed);
    VIEW.store(view.start().get(), Ordering::Release);
    Ok(())
}

fn heap() -> Option<&'static Heap> {
    // SAFETY: null, or a heap that is never freed.
    unsafe { HEAP.load(Ordering::Acquire).as_ref() }
}

/// In a child: from now on it may have a heap of its own. The one before is its parent's, whose pages it
/// must not map: both would have them. Blocks that it still has pointers to are never given back.
pub(crate) fn begin_anew() {
    HEAP.store(ptr::null_mut(), Ordering::Release);
    let view = VIEW.swap(0, Ordering::AcqRel);
    let free = |place: &&AtomicU64| place.load(Ordering::Relaxed) == 0;
    if view != 0
        && let Some(place) = FORMER.iter().find(free)
    {
        place.store(view, Ordering::Relaxed);
    }
}

/// Allocations of the program come from here from now on. The heap is [prepared](prepare).
pub(crate) fn start_allocating() {
    WANTED.store(heap().is_some(), Ordering::Relaxed);
}

/// New ones come from elsewhere again.
pub(crate) fn stop_allocating() {
    WANTED.store(false, Ordering::Relaxed);
}

/// Whether allocations of the program come from here.
pub(crate) fn is_wanted() -> bool {
    WANTED.load(Ordering::Relaxed) && !atfork::is_child()
}

/// Address space for the view, inaccessible and aligned to 2 MiB.
fn reserve() -> Result<HostSpan, Errno> {
    let room = length(BYTES + PAGE_2M);
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping, which overlaps nothing.
    let at = unsafe { mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags) }?;
    // SAFETY: advice about children changes no content.
    unsafe { madvise(at, room, Advice::LinuxDontFork) }?;
    let start = at.expose_provenance() as u64;
    Ok(HostSpan::at(
        HostVa::new(start.next_multiple_of(PAGE_2M)),
        BYTES,
    ))
}

/// The runtime's mapping of the whole file.
fn map_alias(file: BorrowedFd<'_>) -> Result<HostSpan, Errno> {
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, which overlaps nothing.
    let at = unsafe { mmap(ptr::null_mut(), length(BYTES), access, flags, file, 0) }?;
    // SAFETY: advice about children changes no content.
    unsafe { madvise(at, length(BYTES), Advice::LinuxDontFork) }?;
    let start = HostVa::new(at.expose_provenance() as u64);
    Ok(HostSpan::at(start, BYTES))
}

/// Whether `block` is one of this heap's, or of a parent's.
pub(crate) fn holds(block: *mut u8) -> bool {
    let at = HostVa::new(block.addr() as u64);
    contains(at)
        || FORMER
            .iter()
            .filter_map(view_at)
            .any(|view| view.contains(at))
}

/// The view that begins at an address, if that is one.
fn view_at(start: &AtomicU64) -> Option<HostSpan> {
    let start = start.load(Ordering::Relaxed);
    (start != 0).then(|| HostSpan::at(HostVa::new(start), BYTES))
}

/// Whether requests of both sizes get as many pages.
pub(crate) fn is_same(one: usize, other: usize) -> bool {
    pages(one) == pages(other)
}

/// Whether `at` is an address of the view, of a block or not. Atomics only.
pub(crate) fn contains(at: HostVa) -> bool {
    let view = VIEW.load(Ordering::Acquire);
    view != 0 && (view..view + BYTES).contains(&at.get())
}

/// Whether part of `span` lies in the view.
pub(crate) fn overlaps(span: HostSpan) -> bool {
    let view = VIEW.load(Ordering::Acquire);
    view != 0 && HostSpan::at(HostVa::new(view), BYTES).overlaps(span)
}

/// Whether a mapping of file `inode` is part of a block.
pub(crate) fn is_block(at: HostVa, inode: u64) -> bool {
    contains(at) && heap().is_some_and(|heap| heap.inode == inode)
}

/// Where the runtime finds the byte at `at`, an address of the view.
pub(crate) fn alias_of(at: HostVa) -> HostVa {
    let view = VIEW.load(Ordering::Acquire);
    HostVa::new(at.get() - view + ALIAS.load(Ordering::Relaxed))
}

/// A block of zeros for a request of the program; `None` where there is none.
pub(crate) fn take(layout: Layout) -> Option<*mut u8> {
    let heap = heap()?;
    let _in_runtime = RuntimeScope::enter();
    let bytes = pages(layout.size())?;
    let align = u64::try_from(layout.align()).ok()?;
    let align = if bytes >= PAGE_2M { PAGE_2M } else { PAGE }.max(align);
    let span = heap.free.lock().take_first(bytes, align)?;
    let offset = span.start().get() - VIEW.load(Ordering::Acquire);
    let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let (at, len) = (pointer(span.start()), length(bytes));
    // SAFETY: replaces a reserved part of the view, which is nobody's.
    let mapped = unsafe { mmap(at, len, access, flags, &heap.file, offset) };
    // SAFETY: advice about children changes no content.
    let mapped = mapped.and_then(|_| unsafe { madvise(at, len, Advice::LinuxDontFork) });
    if mapped.is_err() {
        // Reserved as before, or mapped to pages that nobody has touched: a later owner maps it anew.
        heap.free.lock().insert(span);
        return None;
    }
    Some(at.cast())
}

/// Takes a block back, or its part from `start` on.
pub(crate) fn give(start: *mut u8, size: usize) {
    let (Some(heap), Some(bytes)) = (heap(), pages(size)) else {
        return;
    };
    let span = HostSpan::at(HostVa::new(start.expose_provenance() as u64), bytes);
    if atfork::is_child() || !contains(span.start()) {
        return;
    }
    let _in_runtime = RuntimeScope::enter();
    let unmapped = unmap(span);
    occupy(span);
    punch(span);
    // Otherwise devices still have what was away, which would pass for the next block's.
    if unmapped.is_ok() {
        heap.free.lock().insert(span);
    }
}

/// Reserves the addresses of a block again, in a bracket: a device may be using it.
///
/// # Errors
/// For want of mappings, or where the program has sealed it: then the block stays mapped.
fn unmap(span: HostSpan) -> Result<(), Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let call = SysCall::make(
        Call::Mmap,
        [
            length(span.start().get()),
            length(span.bytes()),
            0,
            usize::try_from(flags).unwrap_or(0),
            usize::MAX,
            0,
        ],
    );
    let reserved = call.bracketed();
    if reserved < 0 {
        let errno = i32::try_from(reserved.unsigned_abs()).unwrap_or(libc::ENOMEM);
        return Err(Errno::from_raw_os_error(errno));
    }
    // SAFETY: advice about children changes no content.
    let _kept = unsafe {
        madvise(
            pointer(span.start()),
            length(span.bytes()),
            Advice::LinuxDontFork,
        )
    };
    Ok(())
}

/// Takes every access to `span` away from the program.
///
/// # Errors
/// `ENOMEM`: too many mappings. Part of the span may be closed then.
pub(crate) fn close(span: HostSpan) -> Result<(), Errno> {
    protect(span, MprotectFlags::empty())
}

/// Gives the access back. Pages that are not in the file are zeros.
///
/// # Errors
/// As [`close`], and for addresses that are no block any more.
pub(crate) fn open(span: HostSpan) -> Result<(), Errno> {
    protect(span, MprotectFlags::READ | MprotectFlags::WRITE)
}

fn protect(span: HostSpan, access: MprotectFlags) -> Result<(), Errno> {
    // SAFETY: a block of the program, whose accesses the caller serves meanwhile; content stays.
    unsafe { mprotect(pointer(span.start()), length(span.bytes()), access) }
}

/// The content of `span` is elsewhere now. Its pages stay for a while: most of what leaves comes back,
/// and making pages anew takes several times as long as filling them.
pub(crate) fn vacate(span: HostSpan) {
    let Some(heap) = heap() else {
        return;
    };
    let mut kept = heap.kept.lock();
    kept.push_back(span);
    if kept.len() > KEPT
        && let Some(oldest) = kept.pop_front()
    {
        // Under the lock: whoever fills the span again asks for it first.
        punch(oldest);
    }
}

/// The pages of `span` are about to be filled, or to go: they are no longer dropped behind one's back.
pub(crate) fn occupy(span: HostSpan) {
    if let Some(heap) = heap() {
        heap.kept.lock().retain(|kept| !kept.overlaps(span));
    }
}

/// Drops the pages of `span`.
fn punch(span: HostSpan) {
    let alias = pointer(alias_of(span.start()));
    // SAFETY: the callers have the content elsewhere, or nobody wants it.
    let _kept = unsafe { madvise(alias, length(span.bytes()), Advice::LinuxRemove) };
}

/// The first stretch of `span` that has pages. Holes in it that are smaller than [`GRAIN`] may count as
/// pages: of zeros, when they are read.
///
/// The file could be asked for the end of the stretch, too, but it would go through all pages up to
/// the next hole, which may be far away.
pub(crate) fn first_data(span: HostSpan) -> Option<HostSpan> {
    let start = data_from(span.start()).filter(|start| *start < span.end())?;
    let mut end = start;
    while end < span.end() && data_from(end) == Some(end) {
        end = end.align_down(GRAIN).plus(GRAIN);
    }
    Some(HostSpan::new(start, end.min(span.end())))
}

/// The first page at `at` or behind it.
fn data_from(at: HostVa) -> Option<HostVa> {
    let view = VIEW.load(Ordering::Acquire);
    let from = SeekFrom::Data(at.get().checked_sub(view)?);
    // ENXIO: there is none up to the end of the file.
    let data = seek(&heap()?.file, from).ok()?;
    Some(HostVa::new(view + data))
}

fn pages(size: usize) -> Option<u64> {
    let bytes = u64::try_from(size).ok()?;
    bytes.max(1).checked_next_multiple_of(PAGE)
}

fn pointer(at: HostVa) -> *mut c_void {
    ptr::with_exposed_provenance_mut(length(at.get()))
}

fn length(raw: u64) -> usize {
    usize::try_from(raw).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_abi::bus::SystemBus;

    use crate::sys::child::{By, Child};
    use crate::sys::fault_copy::LiveBus;

    fn taken(bytes: usize) -> (*mut u8, HostSpan) {
        prepare().expect("there is address space");
        let layout = Layout::from_size_align(bytes, 4096).expect("a valid layout");
        let at = take(layout).expect("there is room");
        let span = HostSpan::at(HostVa::new(at.expose_provenance() as u64), bytes as u64);
        (at, span)
    }

    #[test]
    fn block_and_its_alias_are_the_same_pages() {
        let (at, span) = taken(1 << 20);
        assert!(contains(span.start()) && overlaps(span));
        assert_eq!(first_data(span), None, "nothing was written yet");
        // SAFETY: inside the block, which is ours.
        unsafe { at.wrapping_add(8192).write_volatile(5) };
        let page = HostSpan::at(span.start().plus(8192), 4096);
        let found = first_data(span).expect("it was written");
        assert_eq!((found.start(), found.bytes()), (page.start(), GRAIN - 8192));
        assert_eq!(first_data(page), Some(page));
        let alias: *mut u8 = pointer(alias_of(page.start())).cast();
        // SAFETY: the alias of a page of ours.
        assert_eq!(unsafe { alias.read_volatile() }, 5);
        close(span).expect("it closes");
        // SAFETY: the alias stays accessible.
        unsafe { alias.write_volatile(6) };
        open(span).expect("it opens");
        // SAFETY: inside the block.
        assert_eq!(unsafe { at.wrapping_add(8192).read_volatile() }, 6);
        give(at, 1 << 20);
        assert_eq!(first_data(span), None, "its pages are free");
    }

    #[test]
    fn children_have_none_of_it_and_their_frees_are_nothing() {
        let bus = LiveBus::new();
        let (at, span) = taken(1 << 20);
        // SAFETY: inside the block.
        unsafe { at.write_volatile(9) };
        let child = Child::make(By::Fork, || {
            let gone = bus.read(span.start().get(), &mut [0; 8]).is_err();
            give(at, 1 << 20);
            gone
        });
        assert!(child.expect("a child").passed().expect("it ends"));
        // SAFETY: inside the block.
        assert_eq!(unsafe { at.read_volatile() }, 9);
        give(at, 1 << 20);
    }

    #[test]
    fn child_that_begins_anew_has_pages_of_its_own() {
        let (at, span) = taken(1 << 20);
        let layout = Layout::from_size_align(1 << 20, 4096).expect("a valid layout");
        let child = Child::make(By::Fork, || {
            atfork::begin_anew();
            begin_anew();
            let own = prepare().ok().and_then(|()| take(layout));
            // SAFETY: the whole block.
            let filled = own.map(|own| unsafe { own.write_bytes(9, 1 << 20) });
            // The parent's block.
            give(at, 1 << 20);
            filled.is_some() && holds(at) && !contains(span.start())
        });
        assert!(child.expect("a child").passed().expect("it ends"));
        let (next, _) = taken(1 << 20);
        // SAFETY: inside the block.
        assert_eq!(unsafe { next.read_volatile() }, 0);
        give(next, 1 << 20);
        give(at, 1 << 20);
    }

    #[test]
    fn pages_of_what_is_away_are_kept_for_the_latest_only() {
        const PART: u64 = 4096;
        let parts = KEPT + 3;
        let (at, span) = taken(parts * 4096);
        let part = |n: usize| HostSpan::at(span.start().plus(n as u64 * PART), PART);
        // SAFETY: the whole block.
        unsafe { at.write_bytes(3, parts * 4096) };
        (0..parts).for_each(|n| vacate(part(n)));
        // Other tests may have some in between.
        assert!((0..3).all(|n| first_data(part(n)).is_none()), "the oldest");
        assert!(first_data(part(parts - 1)).is_some(), "the latest");
        occupy(part(parts - 1));
        let (other, other_span) = taken(4096);
        // SAFETY: inside the block.
        unsafe { other.write_volatile(1) };
        (0..=KEPT).for_each(|_| vacate(other_span));
        assert!(first_data(part(parts - 1)).is_some(), "in use again");
        assert!(first_data(part(parts - 2)).is_none());
        give(other, 4096);
        give(at, parts * 4096);
    }

    #[test]
    fn block_that_cannot_be_unmapped_is_nobodys_next() {
        const MSEAL: libc::c_long = 462;
        let (at, span) = taken(1 << 20);
        // SAFETY: sealing changes no content.
        let sealed = unsafe { libc::syscall(MSEAL, at, 1 << 20, 0_u64) };
        if sealed != 0 {
            return println!("skipped: mappings cannot be sealed");
        }
        give(at, 1 << 20);
        let heap = heap().expect("it is prepared");
        assert!(!heap.free.lock().overlaps(span));
        assert_eq!(first_data(span), None, "its pages are free");
    }

    #[test]
    fn blocks_do_not_overlap_and_come_back_as_zeros() {
        let blocks: Vec<_> = (1..20).map(|n| taken(n * 100_000)).collect();
        for (n, (at, span)) in blocks.iter().enumerate() {
            let others = blocks.iter().filter(|(_, other)| other.overlaps(*span));
            assert_eq!(others.count(), 1, "{n}");
            // SAFETY: inside the block.
            unsafe { at.write_volatile(1) };
        }
        let ends: Vec<_> = (1..20).zip(blocks).collect();
        for (n, (at, _)) in ends {
            // SAFETY: inside the block.
            assert_eq!(unsafe { at.read_volatile() }, 1);
            give(at, n * 100_000);
        }
        let (at, _) = taken(100_000);
        // SAFETY: inside the block.
        assert_eq!(unsafe { at.read_volatile() }, 0);
        give(at, 100_000);
    }
}
