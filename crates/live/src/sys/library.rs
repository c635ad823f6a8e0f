//! Shared libraries that a program loads and unloads while it runs.

use core::ffi::{CStr, c_int, c_void};
use core::ptr;
use std::io;

use gpusvm::addr::{HostSpan, HostVa};

/// A library that this value loaded, and nobody else.
#[derive(Debug)]
pub struct Library {
    handle: *mut c_void,
    data: HostSpan,
}

// SAFETY: the handle is only given to `dlclose`, which any thread may call.
unsafe impl Send for Library {}

/// What is looked for among the loaded libraries.
struct Wanted {
    base: u64,
    data: Option<HostSpan>,
}

impl Library {
    /// Loads a library that is not loaded yet.
    ///
    /// # Errors
    /// `NotFound` where there is none or it has no data; `AlreadyExists` where it is loaded.
    pub fn load(name: &CStr) -> io::Result<Self> {
        // SAFETY: a name; nothing is loaded.
        let there = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        if !there.is_null() {
            // SAFETY: gives back the reference taken just now.
            let _closed = unsafe { libc::dlclose(there) };
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // SAFETY: runs the library's constructors: it is one that the caller trusts.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            return Err(io::ErrorKind::NotFound.into());
        }
        match data_of(handle) {
            Some(data) => Ok(Self { handle, data }),
            None => {
                // SAFETY: ours, and not used again.
                let _closed = unsafe { libc::dlclose(handle) };
                Err(io::ErrorKind::NotFound.into())
            }
        }
    }

    /// Its writable data: from its file, and what begins as zeros. At least a word, and aligned.
    #[must_use]
    pub const fn data(&self) -> HostSpan {
        self.data
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: ours, and not used again. Nothing of it was handed out but addresses.
        let _closed = unsafe { libc::dlclose(self.handle) };
    }
}

/// The first word of the link map, which the C library documents (dlinfo(3)).
fn base_of(handle: *mut c_void) -> Option<u64> {
    let mut map: *const u64 = ptr::null();
    // SAFETY: the request fills a pointer to the library's `struct link_map`.
    let asked = unsafe {
        libc::dlinfo(
            handle,
            libc::RTLD_DI_LINKMAP,
            (&raw mut map).cast::<c_void>(),
        )
    };
    if asked != 0 || map.is_null() {
        return None;
    }
    // SAFETY: the map lives as long as the handle, and begins with the library's address.
    Some(unsafe { map.read() })
}

fn data_of(handle: *mut c_void) -> Option<HostSpan> {
    let mut wanted = Wanted {
        base: base_of(handle)?,
        data: None,
    };
    // SAFETY: the callback gets the value it is made for, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(note_data), (&raw mut wanted).cast()) };
    wanted.data
}

unsafe extern "C" fn note_data(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    out: *mut c_void,
) -> c_int {
    // SAFETY: `data_of` passes this.
    let wanted = unsafe { &mut *out.cast::<Wanted>() };
    // SAFETY: the C library passes a valid description.
    let info = unsafe { &*info };
    if info.dlpi_addr != wanted.base {
        return 0;
    }
    // SAFETY: the table has `dlpi_phnum` entries.
    let headers =
        unsafe { core::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    wanted.data = writable(wanted.base, headers);
    1
}

/// The first writable segment, without what became read-only when the library was linked.
fn writable(base: u64, headers: &[libc::Elf64_Phdr]) -> Option<HostSpan> {
    let end = |header: &libc::Elf64_Phdr| header.p_vaddr + header.p_memsz;
    let is_data = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W != 0
    };
    let data = headers.iter().find(is_data)?;
    let sealed = headers
        .iter()
        .find(|header| header.p_type == libc::PT_GNU_RELRO);
    let start = sealed.map_or(data.p_vaddr, |sealed| end(sealed).max(data.p_vaddr));
    let start = HostVa::new(base + start.next_multiple_of(8));
    let end = HostVa::new(base + end(data));
    (start.plus(8) <= end).then(|| HostSpan::new(start, end))
}
