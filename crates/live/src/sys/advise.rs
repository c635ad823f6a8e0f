//! Advice about memory, by raw system calls that no bracket sees.

use core::ptr;

use gpusvm::addr::HostSpan;
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

/// Faults every page of `span` in for writing, which makes pages shared after a fork exclusive.
///
/// # Errors
/// The system's: no mapping, no right to write, no memory.
pub(crate) fn populate_write(span: HostSpan) -> Result<(), Errno> {
    // SAFETY: populating changes no content.
    unsafe { madvise(pointer(span), length(span), Advice::LinuxPopulateWrite) }
}

/// Drops the pages of `span`, which lies in memory of the runtime's own.
pub(crate) fn drop_pages(span: HostSpan) {
    // SAFETY: the callers own the memory and expect zeros there afterwards. An error leaves the
    // pages, which a MOVE into them will then report.
    let _kept = unsafe { madvise(pointer(span), length(span), Advice::LinuxDontNeed) };
}

/// Keeps huge pages out of `span`, which lies in memory of the runtime's own.
pub(crate) fn no_huge_pages(span: HostSpan) {
    // A kernel without huge pages refuses this and needs it not.
    // SAFETY: advice changes no content.
    let _advised = unsafe { madvise(pointer(span), length(span), Advice::LinuxNoHugepage) };
}

fn pointer(span: HostSpan) -> *mut core::ffi::c_void {
    ptr::with_exposed_provenance_mut(length_of(span.start().get()))
}

fn length(span: HostSpan) -> usize {
    length_of(span.bytes())
}

fn length_of(raw: u64) -> usize {
    usize::try_from(raw).unwrap_or(usize::MAX)
}
