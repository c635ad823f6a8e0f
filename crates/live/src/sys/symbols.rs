//! The C library's address-space calls as symbols of this program, for processes whose C library
//! cannot be patched.
//!
//! The dynamic linker gives the program's symbols to every library that asks for them by name, so
//! their calls come by here: `munmap` of a library, not the one inside the C library's own `free`,
//! which asks for nothing. Those are seen late, by events.
//!
//! A library that exports such names unasked would be rude: they are there with the feature
//! `symbols` only. Where calls are not led to a bracket, they are plain system calls.

/// Whether this program's symbols are the ones that its libraries find.
#[cfg(not(feature = "symbols"))]
pub(crate) const fn are_exported() -> bool {
    false
}

#[cfg(feature = "symbols")]
pub(crate) use exported::are_exported;

#[cfg(feature = "symbols")]
mod exported {
    use core::ffi::{c_int, c_uint, c_void};

    use crate::sys::patch::{Call, SysCall};

    pub(crate) fn are_exported() -> bool {
        // SAFETY: the name is a C string; every library is searched in the linker's order.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"munmap".as_ptr()) };
        let ours: unsafe extern "C" fn(*mut c_void, usize) -> c_int = munmap;
        found.addr() == ours as usize
    }

    /// Makes a call as the C library would; negative results are errors.
    fn answer(call: Call, args: [usize; 6]) -> isize {
        let result = SysCall::make(call, args).bracketed();
        /// Results from here up are errors.
        const ERRORS: isize = -4095;
        if !(ERRORS..0).contains(&result) {
            return result;
        }
        // SAFETY: always valid.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: this thread's, where C functions leave it.
        unsafe { errno.write(i32::try_from(-result).unwrap_or(libc::EINVAL)) };
        -1
    }

    /// An argument as a register has it.
    trait Register {
        fn register(self) -> usize;
    }

    impl<T> Register for *mut T {
        fn register(self) -> usize {
            self.expose_provenance()
        }
    }

    impl<T> Register for *const T {
        fn register(self) -> usize {
            self.expose_provenance()
        }
    }

    impl Register for usize {
        fn register(self) -> usize {
            self
        }
    }

    impl Register for c_int {
        fn register(self) -> usize {
            // The kernel looks at the lower half.
            usize::try_from(self.cast_unsigned()).unwrap_or(0)
        }
    }

    impl Register for c_uint {
        fn register(self) -> usize {
            usize::try_from(self).unwrap_or(0)
        }
    }

    impl Register for i64 {
        fn register(self) -> usize {
            usize::try_from(self.cast_unsigned()).unwrap_or(0)
        }
    }

    /// The registers of a call of fewer than six arguments.
    fn registers<const N: usize>(given: [usize; N]) -> [usize; 6] {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&given);
        all
    }

    fn status(result: isize) -> c_int {
        c_int::try_from(result).unwrap_or(-1)
    }

    fn place(result: isize) -> *mut c_void {
        core::ptr::with_exposed_provenance_mut(result.cast_unsigned())
    }

    macro_rules! symbols {
        ($($call:ident, $name:ident($($arg:ident: $type:ty),*) -> $result:ty, $as:ident;)*) => {
            $(
                // Stands for the C library's function of this name and signature, whose only
                // effect is the system call; libraries are entitled to find it.
                #[unsafe(no_mangle)]
                unsafe extern "C" fn $name($($arg: $type),*) -> $result {
                    $as(answer(Call::$call, registers([$($arg.register()),*])))
                }
            )*
        };
    }

    symbols! {
        Munmap, munmap(at: *mut c_void, len: usize) -> c_int, status;
        Mprotect, mprotect(at: *mut c_void, len: usize, rights: c_int) -> c_int, status;
        PkeyMprotect, pkey_mprotect(at: *mut c_void, len: usize, rights: c_int, key: c_int) -> c_int,
            status;
        Madvise, madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int, status;
        ProcessMadvise, process_madvise(process: c_int, parts: *const c_void, count: usize,
            advice: c_int, flags: c_uint) -> isize, size;
        Mlock, mlock(at: *const c_void, len: usize) -> c_int, status;
        Mlock2, mlock2(at: *const c_void, len: usize, flags: c_uint) -> c_int, status;
        Mlockall, mlockall(flags: c_int) -> c_int, status;
        Mmap, mmap(at: *mut c_void, len: usize, rights: c_int, flags: c_int, file: c_int,
            offset: i64) -> *mut c_void, place;
        Mmap, mmap64(at: *mut c_void, len: usize, rights: c_int, flags: c_int, file: c_int,
            offset: i64) -> *mut c_void, place;
        // The last one is optional in C. It comes in the same register, and the system looks at it
        // where a flag says so.
        Mremap, mremap(at: *mut c_void, len: usize, new_len: usize, flags: c_int,
            to: *mut c_void) -> *mut c_void, place;
    }

    const fn size(result: isize) -> isize {
        result
    }
}
