//! Advice about memory, by raw system calls that no bracket sees.

use core::ptr;

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm::seam::mm::Vma;
use rustix::io::Errno;
use rustix::mm::{Advice, MprotectFlags, madvise, mprotect};

/// Faults every page of `span` in for writing, which makes pages shared after a fork exclusive.
///
/// # Errors
/// The system's: no mapping, no right to write, no memory.
pub(crate) fn populate_write(span: HostSpan) -> Result<(), Errno> {
    // SAFETY: populating changes no content.
    unsafe { madvise(pointer(span), length(span), Advice::LinuxPopulateWrite) }
}

/// Whether a mapping grows downwards when memory below it is touched.
///
/// The system tells nobody cheaply. But it refuses to change the rights "from here down to where the
/// stack ends" of any other mapping, and to set the rights that a mapping has changes nothing.
pub(crate) fn grows_down(mapping: &Vma) -> bool {
    let page = HostSpan::at(mapping.span.start(), PAGE);
    let mut rights = MprotectFlags::GROWSDOWN;
    rights.set(MprotectFlags::READ, mapping.read);
    rights.set(MprotectFlags::WRITE, mapping.write);
    // SAFETY: the rights are those that the mapping has, so no access is allowed or refused by it.
    unsafe { mprotect(pointer(page), length(page), rights) }.is_ok()
}

/// Gives the right to store to a mapping that may be read.
///
/// # Errors
/// The system's: too many mappings, or no memory.
pub(crate) fn allow_stores(span: HostSpan) -> Result<(), Errno> {
    let rights = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: no access becomes an error by it. The caller has write-protected the span, so that no
    // store that was one goes through.
    unsafe { mprotect(pointer(span), length(span), rights) }
}

/// Takes back what [`allow_stores`] gave.
///
/// # Errors
/// As for [`allow_stores`].
pub(crate) fn forbid_stores(span: HostSpan) -> Result<(), Errno> {
    // SAFETY: these are the rights that the program gave the mapping.
    unsafe { mprotect(pointer(span), length(span), MprotectFlags::READ) }
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
