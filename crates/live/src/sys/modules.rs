//! The variables of the libraries that the runtime cannot work without.
//!
//! A library's variables that begin as zero are anonymous memory. `memcpy` itself looks at some of the
//! C library's, so a thread that serves a fault would wait for itself there.

use core::ffi::{CStr, c_int, c_void};
use core::slice;

use gpusvm::addr::{HostSpan, HostVa, PAGE};

/// Writable memory of the C library, the dynamic linker, and the library that this code is in, where
/// it is not in the program itself: a program's own variables migrate. Called at set-up.
pub(crate) fn variables() -> Vec<HostSpan> {
    let mut found: Vec<HostSpan> = Vec::new();
    // SAFETY: the callback gets the vector it is made for, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(note_module), (&raw mut found).cast()) };
    found
}

unsafe extern "C" fn note_module(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    out: *mut c_void,
) -> c_int {
    // SAFETY: the linker passes a valid description.
    let info = unsafe { &*info };
    if info.dlpi_name.is_null() {
        return 0;
    }
    // SAFETY: a module's name is a C string; the program's own is empty.
    let name = unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes();
    // SAFETY: the description has this many program headers.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let span = |header: &libc::Elf64_Phdr| {
        HostSpan::at(HostVa::new(info.dlpi_addr + header.p_vaddr), header.p_memsz)
    };
    let loaded = || {
        headers
            .iter()
            .filter(|header| header.p_type == libc::PT_LOAD)
    };
    let here = HostVa::new(u64::try_from(variables as fn() -> Vec<HostSpan> as usize).unwrap_or(0));
    let ours = !name.is_empty() && loaded().any(|header| span(header).contains(here));
    if !ours && !name.ends_with(b"/libc.so.6") && !name.ends_with(b"/ld-linux-x86-64.so.2") {
        return 0;
    }
    // SAFETY: `variables` passes its vector.
    let found = unsafe { &mut *out.cast::<Vec<HostSpan>>() };
    let writable = loaded().filter(|header| header.p_flags & libc::PF_W != 0);
    found.extend(writable.map(|header| span(header).align_outward(PAGE)));
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    static MINE: core::sync::atomic::AtomicU8 = core::sync::atomic::AtomicU8::new(0);

    #[test]
    fn variables_of_the_c_library_are_found_and_the_programs_are_not() {
        let found = variables();
        let has = |at: usize| {
            let at = HostVa::new(u64::try_from(at).expect("64-bit"));
            found.iter().any(|span| span.contains(at))
        };
        assert!(found.len() >= 2, "{found:?}");
        unsafe extern "C" {
            static environ: *const *const u8;
        }
        assert!(has((&raw const environ).addr()));
        assert!(!has((&raw const MINE).addr()));
    }
}
