//! Shared libraries that a program loads and unloads while it runs.

use core::ffi::{CStr, c_void};
use core::ptr;
use std::io;

use gpusvm::addr::{HostSpan, HostVa};

use crate::sys::modules::{self, Module};

/// A library that this value loaded, and nobody else.
#[derive(Debug)]
pub struct Library {
    handle: *mut c_void,
    data: HostSpan,
}

// SAFETY: the handle is only given to `dlclose`, which any thread may call.
unsafe impl Send for Library {}

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
    let base = base_of(handle)?;
    let mut data = None;
    modules::each(|module| {
        if module.base == base {
            data = writable(module);
        }
    });
    data
}

/// The first writable segment, without what became read-only when the library was linked.
fn writable(module: &Module<'_>) -> Option<HostSpan> {
    let (data, _) = module.segments(libc::PF_W).next()?;
    let sealed = module.sealed().map(HostSpan::end);
    let start = sealed.map_or(data.start(), |sealed| sealed.max(data.start()));
    let start = HostVa::new(start.get().next_multiple_of(8));
    (start.plus(8) <= data.end()).then(|| HostSpan::new(start, data.end()))
}
