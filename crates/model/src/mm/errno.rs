//! What a system call of the model answers when it fails.

use core::fmt;

/// The error numbers that the modelled calls can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Errno {
    /// `EPERM`.
    Perm,
    /// `ENOENT`.
    NoEnt,
    /// `EIO`.
    Io,
    /// `ENXIO`.
    NxIo,
    /// `EAGAIN`.
    Again,
    /// `ENOMEM`.
    NoMem,
    /// `EACCES`.
    Access,
    /// `EFAULT`.
    Fault,
    /// `EBUSY`.
    Busy,
    /// `EEXIST`.
    Exist,
    /// `EINVAL`.
    Invalid,
    /// `EOPNOTSUPP`: also what the model answers where it does not know the operation.
    NotSupported,
    /// `EHWPOISON`.
    HwPoison,
}

impl Errno {
    /// The number on x86-64.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::Perm => 1,
            Self::NoEnt => 2,
            Self::Io => 5,
            Self::NxIo => 6,
            Self::Again => 11,
            Self::NoMem => 12,
            Self::Access => 13,
            Self::Fault => 14,
            Self::Busy => 16,
            Self::Exist => 17,
            Self::Invalid => 22,
            Self::NotSupported => 95,
            Self::HwPoison => 133,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "errno {}", self.number())
    }
}

impl core::error::Error for Errno {}

/// The signal that ends an access which cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// No mapping, missing rights, or a guard.
    Segv,
    /// The page is lost or lies behind the end of a file.
    Bus,
    /// Memory is exhausted.
    OutOfMemory,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Segv => "SIGSEGV",
            Self::Bus => "SIGBUS",
            Self::OutOfMemory => "out of memory",
        })
    }
}
