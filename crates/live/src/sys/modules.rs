//! What is loaded into this process, and the variables of the libraries that the runtime cannot work
//! without.
//!
//! A library's variables that begin as zero are anonymous memory. `memcpy` itself looks at some of the
//! C library's, so a thread that serves a fault would wait for itself there.

use core::ffi::{CStr, c_int, c_void};
use core::slice;

use gpusvm::addr::{HostSpan, HostVa, PAGE};

/// A program or library that is loaded.
pub(super) struct Module<'a> {
    /// Path; empty for the program itself.
    pub(super) name: &'a [u8],
    /// What is added to the addresses in its file.
    pub(super) base: u64,
    headers: &'a [libc::Elf64_Phdr],
}

impl Module<'_> {
    pub(super) fn is_libc(&self) -> bool {
        self.name.ends_with(b"/libc.so.6")
    }

    pub(super) fn is_linker(&self) -> bool {
        self.name.ends_with(b"/ld-linux-x86-64.so.2")
    }

    /// Addresses of the loaded segments that have the rights `rights` (`PF_*`), and how many of their
    /// bytes are of the file.
    pub(super) fn segments(&self, rights: u32) -> impl Iterator<Item = (HostSpan, u64)> {
        let wanted = move |header: &&libc::Elf64_Phdr| {
            header.p_type == libc::PT_LOAD && header.p_flags & rights == rights
        };
        let place = |header| (self.place(header), header.p_filesz);
        self.headers.iter().filter(wanted).map(place)
    }

    /// What became read-only when it was linked.
    pub(super) fn sealed(&self) -> Option<HostSpan> {
        let mut headers = self.headers.iter();
        let sealed = headers.find(|header| header.p_type == libc::PT_GNU_RELRO);
        sealed.map(|header| self.place(header))
    }

    fn place(&self, header: &libc::Elf64_Phdr) -> HostSpan {
        HostSpan::at(HostVa::new(self.base + header.p_vaddr), header.p_memsz)
    }
}

/// Shows everything that is loaded to `see`, which must not load or unload anything.
pub(super) fn each<F: FnMut(&Module<'_>)>(mut see: F) {
    // SAFETY: the callback gets the closure it is made for, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(show::<F>), (&raw mut see).cast()) };
}

unsafe extern "C" fn show<F: FnMut(&Module<'_>)>(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    see: *mut c_void,
) -> c_int {
    // SAFETY: the linker passes a valid description.
    let info = unsafe { &*info };
    if info.dlpi_name.is_null() {
        return 0;
    }
    let module = Module {
        // SAFETY: a module's name is a C string.
        name: unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes(),
        base: info.dlpi_addr,
        // SAFETY: the description has this many program headers.
        headers: unsafe { slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) },
    };
    // SAFETY: `each` passes its closure, and calls nobody else meanwhile.
    let see = unsafe { &mut *see.cast::<F>() };
    see(&module);
    0
}

/// Writable memory of the C library, the dynamic linker, and the library that this code is in, where
/// it is not in the program itself: a program's own variables migrate. Called at set-up.
pub(crate) fn variables() -> Vec<HostSpan> {
    let here = HostVa::new(u64::try_from(variables as fn() -> Vec<HostSpan> as usize).unwrap_or(0));
    let mut found: Vec<HostSpan> = Vec::new();
    each(|module| {
        let has_this_code = || module.segments(0).any(|(span, _)| span.contains(here));
        let ours = !module.name.is_empty() && has_this_code();
        if ours || module.is_libc() || module.is_linker() {
            let writable = module.segments(libc::PF_W);
            found.extend(writable.map(|(span, _)| span.align_outward(PAGE)));
        }
    });
    found
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
