//! Numbers and layouts of the commands (`hmm-tests.md` section 2).

use core::fmt;

/// A command, as the number of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Command {
    /// The device reads pages into the caller's buffer.
    Read,
    /// The device writes the caller's buffer to pages.
    Write,
    /// Pages move to the device; their content is returned.
    MigrateToDevice,
    /// The device's pages move home.
    MigrateToSystem,
    /// One byte per page says what the device finds without a fault.
    Snapshot,
    /// The device gets pages for itself, where they are.
    Exclusive,
    /// Whether it has none of them any more.
    CheckExclusive,
    /// Everything leaves the device.
    Release,
    /// Sets the flags of the file.
    Flags,
    /// As [`Read`](Self::Read), also where somebody else serves the process's faults.
    ReadUnlocked,
}

/// Request number of the first command: reads and writes 40 bytes, group `'H'`.
const FIRST: u32 = 0xC028_4800;

impl Command {
    /// All commands, by their number.
    pub const ALL: [Self; 10] = [
        Self::Read,
        Self::Write,
        Self::MigrateToDevice,
        Self::MigrateToSystem,
        Self::Snapshot,
        Self::Exclusive,
        Self::CheckExclusive,
        Self::Release,
        Self::Flags,
        Self::ReadUnlocked,
    ];

    /// The command of an ioctl request.
    #[must_use]
    pub fn of_request(request: u32) -> Option<Self> {
        let number = request.checked_sub(FIRST)?;
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// The ioctl request.
    #[must_use]
    pub fn request(self) -> u32 {
        let number = Self::ALL.iter().position(|one| *one == self).unwrap_or(0);
        FIRST + u32::try_from(number).unwrap_or(0)
    }
}

/// Bit 0 of the file's flags: the next allocation of a page, on the side that pages move to, fails.
/// It is cleared by that.
pub const FAIL_ALLOC: u64 = 1;

/// The structure of every command (`struct hmm_dmirror_cmd`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// First address, a multiple of a page.
    pub addr: u64,
    /// Address of the caller's buffer.
    pub ptr: u64,
    /// Pages, at least one; the flags for [`Command::Flags`].
    pub npages: u64,
    /// Out: pages that were done.
    pub cpages: u64,
    /// Out: rounds of faults.
    pub faults: u64,
}

impl Arguments {
    /// Bytes of the structure.
    pub const BYTES: usize = 40;

    /// The structure from memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |n: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[n * 8..n * 8 + 8]);
            u64::from_ne_bytes(word)
        };
        Self {
            addr: word(0),
            ptr: word(1),
            npages: word(2),
            cpages: word(3),
            faults: word(4),
        }
    }

    /// The structure as it lies in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let words = [self.addr, self.ptr, self.npages, self.cpages, self.faults];
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// What a command answers when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Errno {
    /// `EPERM`.
    Perm,
    /// `ENOENT`.
    NoEnt,
    /// `EIO`.
    Io,
    /// `ENOMEM`.
    NoMem,
    /// `EFAULT`.
    Fault,
    /// `EBUSY`.
    Busy,
    /// `EINVAL`.
    Invalid,
    /// `EOPNOTSUPP`.
    NotSupported,
}

impl Errno {
    const NAMES: [(Self, &'static str, i32); 8] = [
        (Self::Perm, "EPERM", 1),
        (Self::NoEnt, "ENOENT", 2),
        (Self::Io, "EIO", 5),
        (Self::NoMem, "ENOMEM", 12),
        (Self::Fault, "EFAULT", 14),
        (Self::Busy, "EBUSY", 16),
        (Self::Invalid, "EINVAL", 22),
        (Self::NotSupported, "EOPNOTSUPP", 95),
    ];

    fn entry(self) -> (&'static str, i32) {
        let found = Self::NAMES.iter().find(|(errno, ..)| *errno == self);
        found.map_or(("", 0), |(_, name, number)| (name, *number))
    }

    /// The name, as `errno(3)` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.entry().0
    }

    /// The number on x86-64.
    #[must_use]
    pub fn number(self) -> i32 {
        self.entry().1
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for Errno {}

/// Bits of the bytes that [`Command::Snapshot`] answers.
pub mod snapshot {
    /// Nothing that the device could ever use.
    pub const ERROR: u8 = 0xFF;
    /// Nothing that it can use without a fault.
    pub const NONE: u8 = 0x00;
    /// It may read.
    pub const READ: u8 = 0x01;
    /// It may write; in the place of [`READ`].
    pub const WRITE: u8 = 0x02;
    /// The CPU maps the page with 2 MiB around it.
    pub const PMD: u8 = 0x04;
    /// The CPU maps the page with 1 GiB around it.
    pub const PUD: u8 = 0x08;
    /// The page of zeros.
    pub const ZERO: u8 = 0x10;
    /// A page of this device's private memory.
    pub const DEV_PRIVATE_LOCAL: u8 = 0x20;
    /// A page of this device's coherent memory.
    pub const DEV_COHERENT_LOCAL: u8 = 0x40;
    /// A page of another device's coherent memory.
    pub const DEV_COHERENT_REMOTE: u8 = 0x50;
}

/// How commands reach the memory of their caller.
pub trait UserMemory {
    /// Copies in.
    ///
    /// # Errors
    /// [`Errno::Fault`] where the caller may not read there.
    fn copy_in(&self, from: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// Copies out.
    ///
    /// # Errors
    /// [`Errno::Fault`] where the caller may not write there.
    fn copy_out(&self, from: &[u8], to: u64) -> Result<(), Errno>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_module() {
        assert_eq!(Command::Read.request(), 0xC028_4800);
        assert_eq!(Command::ReadUnlocked.request(), 0xC028_4809);
        assert_eq!(Command::of_request(0xC028_480A), None);
        for command in Command::ALL {
            assert_eq!(Command::of_request(command.request()), Some(command));
        }
    }

    #[test]
    fn the_structure_survives_memory() {
        let arguments = Arguments {
            addr: 1,
            ptr: 2,
            npages: 3,
            cpages: 4,
            faults: 5,
        };
        let bytes = arguments.to_bytes();
        assert_eq!(bytes[8], 2);
        assert_eq!(Arguments::from_bytes(&bytes), arguments);
    }
}
