//! Stubs: the few instructions between a site and the entry, within reach of a five-byte jump.

use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

use crate::sys::patch::sites::{PATCHED, Site};
use crate::sys::patch::{PatchError, entry};

/// Bytes of one stub.
const STUB: usize = 64;
const PAGE: usize = 4096;
/// Farthest that a jump reaches, less a margin for the library's own size.
const REACH: usize = (1 << 31) - (64 << 20);
/// Distance between addresses that are tried.
const STEP: usize = 4 << 20;

/// Makes the stub of a site and returns the jump to it, for the site's first five bytes. Stubs
/// are never unmapped: a thread may be inside.
///
/// # Errors
/// [`PatchError::NoRoom`], or the system's.
pub(super) fn make(site: &Site) -> Result<[u8; PATCHED], PatchError> {
    let at = place(site)?;
    let code = code(site);
    let to: *mut u8 = ptr::with_exposed_provenance_mut(at);
    let page: *mut core::ffi::c_void = ptr::with_exposed_provenance_mut(at / PAGE * PAGE);
    let os = |errno| PatchError::Os {
        step: "write a stub",
        errno,
    };
    // SAFETY: the page is ours; other stubs in it stay executable.
    unsafe {
        mprotect(
            page,
            PAGE,
            MprotectFlags::READ | MprotectFlags::WRITE | MprotectFlags::EXEC,
        )
    }
    .map_err(os)?;
    // SAFETY: the stub's place is ours, and no site leads to it yet.
    unsafe { ptr::copy_nonoverlapping(code.as_ptr(), to, STUB) };
    // SAFETY: as above.
    unsafe { mprotect(page, PAGE, MprotectFlags::READ | MprotectFlags::EXEC) }.map_err(os)?;
    let distance =
        i64::try_from(at).unwrap_or(0) - i64::try_from(site.address + PATCHED).unwrap_or(0);
    let distance = i32::try_from(distance)
        .map_err(|_far| PatchError::NoRoom)?
        .to_le_bytes();
    Ok([0xe9, distance[0], distance[1], distance[2], distance[3]])
}

/// The stub: number, way back, and the jump to the entry.
fn code(site: &Site) -> [u8; STUB] {
    let mut code = [0xcc; STUB];
    let after = u64::try_from(site.after()).unwrap_or(0);
    let parts: [&[u8]; 7] = [
        &site.original(), // mov  $number, %eax
        &[0x49, 0xbb],    // movabs $entry, %r11
        &entry::address().to_le_bytes(),
        &[0x48, 0xb9], // movabs $after, %rcx
        &after.to_le_bytes(),
        &[0x41, 0xff, 0xe3], // jmp  *%r11
        &[],
    ];
    let mut at = 0;
    for part in parts {
        code[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    code
}

/// Pages of stubs so far: where the next stub goes, per neighbourhood. Two libraries, at most two
/// neighbourhoods; a site out of reach of all opens another.
#[unsafe(link_section = ".data")]
static NEXT: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];

/// A free place within reach of the site.
fn place(site: &Site) -> Result<usize, PatchError> {
    for slot in &NEXT {
        let next = slot.load(Ordering::Relaxed);
        let at = if next == 0 {
            map_near(site.address)?
        } else {
            next
        };
        if at.abs_diff(site.address) < REACH {
            let behind = at + STUB;
            // A full page is forgotten; the next stub opens another.
            slot.store(
                if behind.is_multiple_of(PAGE) {
                    0
                } else {
                    behind
                },
                Ordering::Relaxed,
            );
            return Ok(at);
        }
    }
    Err(PatchError::NoRoom)
}

/// Maps a page as near as there is room.
fn map_near(address: usize) -> Result<usize, PatchError> {
    let base = address / STEP * STEP;
    for away in (STEP..REACH).step_by(STEP) {
        for at in [base.saturating_add(away), base.saturating_sub(away)] {
            match map_at(at) {
                Ok(mapped) => return Ok(mapped),
                Err(Errno::EXIST) => {}
                Err(errno) => {
                    return Err(PatchError::Os {
                        step: "map a stub",
                        errno,
                    });
                }
            }
        }
    }
    Err(PatchError::NoRoom)
}

fn map_at(at: usize) -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    let hint = ptr::with_exposed_provenance_mut(at);
    // SAFETY: FIXED_NOREPLACE replaces nothing.
    let mapped = unsafe { mmap_anonymous(hint, PAGE, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    Ok(mapped.expose_provenance())
}
