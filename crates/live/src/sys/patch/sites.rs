//! Finding system-call sites, and changing their bytes while threads may run them.

use core::arch::asm;
use core::ffi::c_void;
use core::{ptr, slice};

use rustix::mm::{MprotectFlags, mprotect};

use crate::sys::modules;
use crate::sys::patch::{Call, PatchError};

/// Most sites that one call may have in one module before we doubt that they are sites.
const MOST: usize = 4;
/// Bytes that a patch replaces: the `mov`.
pub(super) const PATCHED: usize = 5;
const PAGE: usize = 4096;
const CACHE_LINE: usize = 64;

/// A `mov $number,%eax; syscall` in a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    /// The call.
    pub(crate) call: Call,
    /// Address of the `mov`.
    pub(crate) address: usize,
}

impl Site {
    /// The bytes of the `mov`.
    pub(super) fn original(&self) -> [u8; PATCHED] {
        let n = self.call.number().to_le_bytes();
        [0xb8, n[0], n[1], n[2], n[3]]
    }

    /// Behind the `syscall`.
    pub(super) const fn after(&self) -> usize {
        self.address + 7
    }
}

/// An executable stretch of a library.
struct Text {
    start: usize,
    len: usize,
    /// The C library itself, which must have all calls; the linker has some.
    is_libc: bool,
}

/// All sites of `calls`.
///
/// # Errors
/// [`PatchError::NoLibc`], or [`PatchError::Sites`] where a call is not where it should be.
pub(super) fn find(calls: &[Call]) -> Result<Vec<Site>, PatchError> {
    let texts = texts();
    if !texts.iter().any(|text| text.is_libc) {
        return Err(PatchError::NoLibc);
    }
    let mut found = Vec::new();
    for call in calls {
        for text in &texts {
            let before = found.len();
            scan(text, *call, &mut found);
            let count = found.len() - before;
            let optional = !text.is_libc || call.is_optional();
            if count > MOST || (count == 0 && !optional) {
                return Err(PatchError::Sites {
                    call: call.name(),
                    found: count,
                });
            }
        }
    }
    Ok(found)
}

/// The executable memory of the C library and the dynamic linker.
fn texts() -> Vec<Text> {
    let mut texts = Vec::new();
    modules::each(|module| {
        let is_libc = module.is_libc();
        if is_libc || module.is_linker() {
            let executable = module.segments(libc::PF_X);
            texts.extend(executable.map(|(span, in_file)| Text {
                start: usize::try_from(span.start().get()).unwrap_or(0),
                len: usize::try_from(in_file).unwrap_or(0),
                is_libc,
            }));
        }
    });
    texts
}

fn scan(text: &Text, call: Call, found: &mut Vec<Site>) {
    let n = call.number().to_le_bytes();
    let pattern = [0xb8, n[0], n[1], n[2], n[3], 0x0f, 0x05];
    let start: *const u8 = ptr::with_exposed_provenance(text.start);
    // SAFETY: a loaded, readable segment of a library that stays loaded; nobody but us writes it,
    // and `install` runs one at a time.
    let bytes = unsafe { slice::from_raw_parts(start, text.len) };
    for (at, window) in bytes.windows(pattern.len()).enumerate() {
        if window == pattern {
            found.push(Site {
                call,
                address: text.start + at,
            });
        }
    }
}

/// Replaces the first five bytes of a site, in one step for whoever runs it.
///
/// # Errors
/// [`PatchError::Straddles`] where one step is impossible and other threads exist, or the
/// system's. The bytes are as before then.
pub(super) fn write(site: &Site, new: &[u8; PATCHED]) -> Result<(), PatchError> {
    let line = site.address / CACHE_LINE * CACHE_LINE;
    let straddles = site.address + PATCHED > line + CACHE_LINE;
    if straddles && thread_count() != Some(1) {
        return Err(PatchError::Straddles {
            call: site.call.name(),
        });
    }
    let first = site.address / PAGE * PAGE;
    let bytes = (site.address + PATCHED).next_multiple_of(PAGE) - first;
    let page: *mut c_void = ptr::with_exposed_provenance_mut(first);
    let open = MprotectFlags::READ | MprotectFlags::WRITE | MprotectFlags::EXEC;
    let os = |errno| PatchError::Os {
        step: "make the C library's text writable",
        errno,
    };
    // SAFETY: the pages stay readable and executable throughout, so running threads go on.
    unsafe { mprotect(page, bytes, open) }.map_err(os)?;
    if straddles {
        let to: *mut u8 = ptr::with_exposed_provenance_mut(site.address);
        // SAFETY: the site's five bytes, writable now; no other thread exists.
        unsafe { ptr::copy_nonoverlapping(new.as_ptr(), to, PATCHED) };
    } else {
        replace_in_line(site.address, line, new);
    }
    // SAFETY: as the segment was before.
    unsafe { mprotect(page, bytes, MprotectFlags::READ | MprotectFlags::EXEC) }.map_err(os)
}

/// Replaces five bytes inside one cache line by one locked exchange of eight.
fn replace_in_line(address: usize, line: usize, new: &[u8; PATCHED]) {
    let at = address.min(line + CACHE_LINE - 8);
    let word: *mut u64 = ptr::with_exposed_provenance_mut(at);
    // SAFETY: eight bytes of a mapped line of text.
    let former = unsafe { word.read_unaligned() };
    let mut bytes = former.to_le_bytes();
    bytes[address - at..address - at + PATCHED].copy_from_slice(new);
    let wanted = u64::from_le_bytes(bytes);
    // SAFETY: a locked exchange inside one line is one step, aligned or not; the line is writable.
    unsafe {
        asm!(
            "lock cmpxchg [{word}], {wanted}",
            word = in(reg) word,
            wanted = in(reg) wanted,
            inout("rax") former => _,
            options(nostack),
        );
    }
}

fn thread_count() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// Makes every processor that runs this process fetch its instructions anew.
pub(super) fn serialize() {
    use rustix::thread::{MembarrierCommand, membarrier};
    // Without it, processors notice at their next serializing event; they run old or new bytes
    // until then, and both are right.
    let _registered = membarrier(MembarrierCommand::RegisterPrivateExpeditedSyncCore);
    let _done = membarrier(MembarrierCommand::PrivateExpeditedSyncCore);
}
