//! The runtime's own memory: an arena that never migrates, and the allocator over it.
//!
//! The framework keeps its ranges, notifiers and tables in memory of the very process whose memory
//! it moves. Were they on the C library's heap, a migration could take away the page on which the
//! lock of that migration lies. So whatever the runtime allocates comes from an arena that no
//! device may map ([`thread::runtime_owns`](super::thread::runtime_owns)).
//!
//! A thread allocates here while it is *in the runtime*: inside a [`RuntimeScope`], as all threads
//! of the runtime always are, or on a bracket's stack. Everybody else allocates as before, or from the
//! [migratable heap](super::heap) where the level in use needs it. Freeing goes by address, from any
//! thread.
//!
//! In a child after a fork the arena is out of use: its blocks stay readable, and leak.
//!
//! Blocks have four size classes per doubling; a freed block goes to its class's list and is
//! never split or merged. Why the variables lie in `.data`: see [`owned`](super::owned).
//!
//! **There is no lock.** A thread of the program allocates and frees here on its own stack, which may
//! be away: did it wait for a page while it held a lock, the thread that is to bring the page home
//! would wait for the lock. So a list's top changes in one step, and carries a count of its changes
//! against being mistaken for a former one; links lie apart from the blocks, so that reading one is
//! never a race with a block's user.
//!
//! ```text
//!  reserved  │ no access │ blocks ────────── │ links ──── │ no access │
//!            └ >= 1 page ┘ aligned to 2 MiB               └ >= 1 page ┘
//! ```
//!
//! The margins keep the system from joining the arena with a neighbour's mapping, which would then
//! pass for the runtime's own.

use core::alloc::{GlobalAlloc, Layout};
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::alloc::System;

use gpusvm::addr::{HostSpan, HostVa};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::sys::atfork;
use crate::sys::depth;
use crate::sys::heap;

/// Address space set aside; pages are used as they are needed.
const BYTES: usize = 16 << 30;
/// Bytes of it for blocks. Behind them is a link of four bytes for each [`MIN`] bytes.
const BLOCKS: usize = 12 << 30;
const _: () = assert!(BLOCKS + BLOCKS / MIN * 4 <= BYTES, "the links fit");
/// Smallest block.
const MIN: usize = 16;
/// Classes: four per doubling, from 16 bytes up.
const CLASSES: usize = 4 * 30;

/// The allocator: declare it as the global allocator of a program that opens a live space (see the
/// crate's front page).
#[derive(Clone, Copy, Debug, Default)]
pub struct RuntimeAlloc;

/// First address of the arena, 0 before the first use.
#[unsafe(link_section = ".data")]
static BASE: AtomicUsize = AtomicUsize::new(0);
/// Bracket stacks: a thread on one of them is in the runtime.
#[unsafe(link_section = ".data")]
static STACKS: (AtomicUsize, AtomicUsize) = (AtomicUsize::new(0), AtomicUsize::new(0));
/// Bytes handed out so far, used or free again.
#[unsafe(link_section = ".data")]
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// The top of each class's list of free blocks.
#[unsafe(link_section = ".data")]
static FREE: [AtomicU64; CLASSES] = [const { AtomicU64::new(0) }; CLASSES];

/// While it lives, this thread allocates the runtime's memory.
#[derive(Debug)]
#[must_use = "the scope ends when this is dropped"]
pub struct RuntimeScope(());

impl RuntimeScope {
    /// Enters the runtime; scopes nest.
    pub fn enter() -> Self {
        depth::add(1);
        Self(())
    }
}

impl Drop for RuntimeScope {
    fn drop(&mut self) {
        depth::add(-1);
    }
}

/// Whether this thread is in the runtime. The stack is asked first: on a bracket's stack the
/// thread's own memory, thread-locals included, must not be touched.
fn in_runtime() -> bool {
    // A child has given the runtime up, and the arena with it.
    if atfork::is_child() {
        return false;
    }
    let marker = 0_u8;
    let stack = (&raw const marker).addr();
    let (low, high) = (
        STACKS.0.load(Ordering::Relaxed),
        STACKS.1.load(Ordering::Relaxed),
    );
    (low..high).contains(&stack) || depth::get() > 0
}

/// Threads whose stack lies in `span` are in the runtime. Called once, at set-up.
pub(crate) fn set_bracket_stacks(low: usize, high: usize) {
    STACKS.1.store(high, Ordering::Relaxed);
    STACKS.0.store(low, Ordering::Relaxed);
}

/// The bracket stacks; empty before they are set.
pub(crate) fn bracket_stacks() -> HostSpan {
    let at =
        |word: &AtomicUsize| HostVa::new(u64::try_from(word.load(Ordering::Relaxed)).unwrap_or(0));
    HostSpan::new(at(&STACKS.0), at(&STACKS.1))
}

/// The arena; empty before its first use.
pub(crate) fn arena_span() -> HostSpan {
    let base = u64::try_from(BASE.load(Ordering::Relaxed)).unwrap_or(0);
    if base == 0 {
        return HostSpan::at(HostVa::new(0), 0);
    }
    HostSpan::at(HostVa::new(base), u64::try_from(BYTES).unwrap_or(0))
}

/// Whether [`RuntimeAlloc`] is this program's global allocator.
#[must_use]
pub fn is_installed() -> bool {
    let _inside = RuntimeScope::enter();
    let probe = Box::new(0_u64);
    contains(ptr::from_ref(&*probe).addr())
}

fn contains(address: usize) -> bool {
    let base = BASE.load(Ordering::Relaxed);
    base != 0 && (base..base + BYTES).contains(&address)
}

// SAFETY: blocks come from a private mapping that is never unmapped; a class's blocks are at least
// as large as the request and aligned for it; a block is handed out once until it is freed.
unsafe impl GlobalAlloc for RuntimeAlloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if in_runtime() {
            return class_of(layout).map_or(ptr::null_mut(), take);
        }
        if migrates(layout.size())
            && let Some(block) = heap::take(layout)
        {
            return block;
        }
        // SAFETY: the caller's promises about `layout` are System's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if contains(block.addr()) {
            if atfork::is_child() {
                return;
            }
            if let Some(class) = class_of(layout) {
                give(class, block.addr());
            }
            return;
        }
        if heap::holds(block) {
            return heap::give(block, layout.size());
        }
        // SAFETY: neither from the arena nor from the heap, so it is System's block.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let foreign = contains(block.addr()) || heap::holds(block);
        if !foreign && !in_runtime() && !migrates(size) {
            // SAFETY: System's block, and it stays there.
            return unsafe { System.realloc(block, layout, size) };
        }
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return ptr::null_mut();
        };
        if contains(block.addr()) && class_of(wanted) == class_of(layout) {
            return block;
        }
        if heap::holds(block) && heap::is_same(layout.size(), size) {
            return block;
        }
        // SAFETY: `wanted` has a valid size and alignment, and a size that is not zero, as the
        // caller promises for `size`.
        let fresh = unsafe { self.alloc(wanted) };
        if !fresh.is_null() {
            // SAFETY: both blocks hold the smaller of the two sizes, and are different blocks.
            unsafe { ptr::copy_nonoverlapping(block, fresh, layout.size().min(size)) };
            // SAFETY: the caller gives the old block up.
            unsafe { self.dealloc(block, layout) };
        }
        fresh
    }
}

/// Whether a request of the program of this size gets memory that can migrate without userfaultfd.
fn migrates(size: usize) -> bool {
    size >= heap::LEAST && heap::is_wanted()
}

/// The class for a request: the smallest whose blocks are large enough, and aligned enough.
/// `None` where no block is, which is an allocation that fails.
fn class_of(layout: Layout) -> Option<usize> {
    if layout.align() > HUGE {
        return None;
    }
    let size = layout.size().max(MIN);
    if layout.align() <= MIN || layout.align() <= size / 8 {
        let class = class_for(size);
        if block_align(class) >= layout.align() {
            return (class < CLASSES).then_some(class);
        }
    }
    let class = class_for(size.max(layout.align()).checked_next_power_of_two()?);
    (class < CLASSES).then_some(class)
}

/// The smallest class of at least `size` bytes.
fn class_for(size: usize) -> usize {
    let size = size.max(MIN);
    let doubling = usize::try_from((size - 1).max(1).ilog2())
        .unwrap_or(0)
        .max(4)
        - 4;
    let base = MIN << doubling;
    let quarter = base / 4;
    let step = (size.saturating_sub(base)).div_ceil(quarter);
    if size <= base {
        doubling * 4
    } else {
        doubling * 4 + step
    }
}

/// Bytes of a block of `class`.
const fn class_bytes(class: usize) -> usize {
    let base = MIN << (class / 4);
    base + base / 4 * (class % 4)
}

/// Alignment that every block of `class` has.
const fn block_align(class: usize) -> usize {
    let bytes = class_bytes(class);
    let natural = 1 << bytes.trailing_zeros();
    if natural < MIN { MIN } else { natural }
}

/// The top of a list: in the low half the number of its first block, plus one, in units of [`MIN`];
/// in the high half how often it has changed.
fn top(unit: u32, former: u64) -> u64 {
    let changes = (former >> 32).wrapping_add(1);
    changes << 32 | u64::from(unit)
}

/// The low half of a top; 0 for an empty list.
fn low(top: u64) -> u32 {
    u32::try_from(top & u64::from(u32::MAX)).unwrap_or(0)
}

/// Address of a block, from its number plus one.
fn block_at(unit: u32) -> usize {
    let index = usize::try_from(unit - 1).unwrap_or(0);
    BASE.load(Ordering::Relaxed) + index * MIN
}

/// The link of a block, from its number plus one.
fn link(unit: u32) -> &'static AtomicU32 {
    let index = usize::try_from(unit - 1).unwrap_or(0);
    let at = BASE.load(Ordering::Relaxed) + BLOCKS + index * 4;
    // SAFETY: one of the arena's links, which are aligned, mapped for good, and used as atomics
    // only.
    unsafe { AtomicU32::from_ptr(ptr::with_exposed_provenance_mut(at)) }
}

/// A free block of a class, or one that was never used; null where there is none left.
fn take(class: usize) -> *mut u8 {
    let list = &FREE[class];
    // Pairs with `give`: the link of what is on top is the one written there.
    let mut seen = list.load(Ordering::Acquire);
    loop {
        let first = low(seen);
        if first == 0 {
            return fresh(class);
        }
        // Another thread may have taken the block meanwhile: then the exchange fails.
        let next = top(link(first).load(Ordering::Relaxed), seen);
        match list.compare_exchange_weak(seen, next, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => return ptr::with_exposed_provenance_mut(block_at(first)),
            Err(now) => seen = now,
        }
    }
}

/// Puts a block on its class's list.
fn give(class: usize, block: usize) {
    let index = (block - BASE.load(Ordering::Relaxed)) / MIN;
    let unit = u32::try_from(index + 1).unwrap_or(0);
    let list = &FREE[class];
    let mut seen = list.load(Ordering::Relaxed);
    loop {
        link(unit).store(low(seen), Ordering::Relaxed);
        let next = top(unit, seen);
        // Release: what the block's user wrote, and the link, come before.
        match list.compare_exchange_weak(seen, next, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// A block that was never used.
fn fresh(class: usize) -> *mut u8 {
    let base = arena_base();
    if base == 0 {
        return ptr::null_mut();
    }
    // Rounded up, so that the words and quarter classes below 16 bytes stay aligned.
    let bytes = class_bytes(class).next_multiple_of(MIN);
    let start_after = |next: usize| next.next_multiple_of(block_align(class));
    let end_after = |next| Some(start_after(next) + bytes).filter(|end| *end <= BLOCKS);
    match NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, end_after) {
        Ok(next) => ptr::with_exposed_provenance_mut(base + start_after(next)),
        Err(_full) => ptr::null_mut(),
    }
}

/// The arena's first address; maps it at the first call. 0 where that is refused.
fn arena_base() -> usize {
    let base = BASE.load(Ordering::Relaxed);
    if base != 0 {
        return base;
    }
    let Ok((mapped, base)) = map_arena() else {
        return 0;
    };
    let mine = base.expose_provenance();
    match BASE.compare_exchange(0, mine, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => mine,
        Err(theirs) => {
            // SAFETY: mapped above, and seen by nobody.
            let _unmapped = unsafe { munmap(mapped, ROOM) };
            theirs
        }
    }
}

/// A new mapping, and where an arena begins in it.
fn map_arena() -> Result<(*mut c_void, *mut c_void), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping, which overlaps nothing.
    let mapped = unsafe { mmap_anonymous(ptr::null_mut(), ROOM, ProtFlags::empty(), flags) }?;
    // Aligned, so that blocks can be aligned to anything up to a huge page; never at the very
    // start, so that a margin stays.
    let start = (mapped.addr() + PAGE).next_multiple_of(HUGE);
    let base = mapped.wrapping_byte_add(start - mapped.addr());
    let access = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: inside the mapping, which nobody uses yet.
    unsafe { mprotect(base, BYTES, access) }?;
    Ok((mapped, base))
}

const HUGE: usize = 2 << 20;
/// The arena with its margins.
const ROOM: usize = BYTES + 2 * HUGE;
const PAGE: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::procmap::ProcMap;
    use proptest::prelude::*;

    #[test]
    fn blocks_follow_the_scope_they_were_asked_in() {
        assert!(is_installed(), "the crate's tests run with the allocator");
        let outside = Box::new(1_u64);
        assert!(!contains(ptr::from_ref(&*outside).addr()));
        let scope = RuntimeScope::enter();
        let mut grows = vec![1_u64; 10];
        assert!(contains(grows.as_ptr().addr()));
        drop(scope);
        grows.extend(0..1000);
        assert_eq!(grows[..10], [1; 10]);
        assert_eq!(grows[1009], 999);
        std::thread::scope(|scope| {
            scope.spawn(move || drop(grows));
        });
    }

    #[test]
    fn every_class_holds_what_it_is_asked_for() {
        for size in (1..5000).chain([65_536, 65_537, 1 << 20, (1 << 20) + 1]) {
            for align in [1, 8, 16, 64, 4096] {
                let layout = Layout::from_size_align(size, align).expect("a valid layout");
                let class = class_of(layout).expect("small enough");
                assert!(class_bytes(class) >= size, "{size} in class {class}");
                assert!(
                    block_align(class) >= align,
                    "{size}/{align} in class {class}"
                );
            }
        }
    }

    #[test]
    fn alignment_is_kept_up_to_a_huge_page_and_refused_beyond() {
        let _scope = RuntimeScope::enter();
        for (align, given) in [(HUGE / 2, true), (HUGE, true), (HUGE * 2, false)] {
            let layout = Layout::from_size_align(PAGE, align).expect("a valid layout");
            // SAFETY: the size is not zero.
            let block = unsafe { RuntimeAlloc.alloc(layout) };
            assert_eq!(!block.is_null(), given, "{align:#x}");
            assert!(block.addr().is_multiple_of(align));
            if given {
                // SAFETY: allocated with this layout.
                unsafe { RuntimeAlloc.dealloc(block, layout) };
            }
        }
    }

    #[test]
    fn threads_never_get_the_same_block() {
        let layout = Layout::from_size_align(48, 16).expect("a valid layout");
        let churn = |tag: u64| {
            let _scope = RuntimeScope::enter();
            let mut mine: Vec<*mut u64> = Vec::new();
            for round in 0..40_000_u64 {
                if round % 7 < 4 && mine.len() < 64 {
                    // SAFETY: the size is not zero.
                    let block = unsafe { RuntimeAlloc.alloc(layout) }.cast::<u64>();
                    // SAFETY: the block is this thread's, and holds a word.
                    unsafe { block.write(tag) };
                    mine.push(block);
                } else if let Some(block) = mine.pop() {
                    // SAFETY: as above.
                    assert_eq!(unsafe { block.read() }, tag);
                    // SAFETY: allocated with this layout, and not freed yet.
                    unsafe { RuntimeAlloc.dealloc(block.cast(), layout) };
                }
            }
        };
        std::thread::scope(|scope| {
            (1..5).for_each(|tag| drop(scope.spawn(move || churn(tag))));
        });
    }

    #[test]
    fn no_neighbour_is_joined_with_the_arena() {
        assert!(is_installed(), "the crate's tests run with the allocator");
        let map = ProcMap::open().expect("the kernel answers queries");
        let arena = arena_span();
        let found = map.query(arena.start()).expect("queries do not fail");
        assert_eq!(found.expect("mapped").span, arena);
    }

    proptest! {
        #[test]
        fn live_blocks_never_overlap(ops in prop::collection::vec((1_usize..5000, 0_u32..8, any::<bool>()), 1..200)) {
            let mut live: Vec<(*mut u8, Layout, u8)> = Vec::new();
            for (n, (size, align, take)) in ops.into_iter().enumerate() {
                let _scope = RuntimeScope::enter();
                if take || live.is_empty() {
                    let layout = Layout::from_size_align(size, 1 << align).expect("a valid layout");
                    let tag = u8::try_from(n % 251).expect("below 251");
                    // SAFETY: the size is not zero.
                    let block = unsafe { RuntimeAlloc.alloc(layout) };
                    prop_assert!(block.addr().is_multiple_of(layout.align()));
                    // SAFETY: the block holds `size` bytes.
                    unsafe { block.write_bytes(tag, size) };
                    live.push((block, layout, tag));
                } else {
                    let (block, layout, tag) = live.swap_remove(size % live.len());
                    // SAFETY: the whole block was filled when it was made.
                    let bytes = unsafe { core::slice::from_raw_parts(block, layout.size()) };
                    prop_assert!(bytes.iter().all(|byte| *byte == tag));
                    // SAFETY: allocated with this layout, and not freed yet.
                    unsafe { RuntimeAlloc.dealloc(block, layout) };
                }
            }
        }
    }
}
