//! Page-fault records and their answers (`svm-design.md` section 5.2).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What the access that faulted wanted to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessType {
    /// A load.
    Read,
    /// A store.
    Write,
    /// A read-modify-write that must be atomic for the device.
    Atomic,
}

/// Value of [`FaultRecord::access`] bit 7: the access was a prefetch.
pub const ACCESS_PREFETCH: u8 = 1 << 7;
/// Value of [`FaultRecord::kind`] that asks for a refusal without service.
pub const KIND_NACK: u8 = 0xff;

/// What went wrong in the walk, bits 7:4 of [`FaultRecord::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No present entry.
    NotPresent,
    /// A present entry without write permission met a write.
    WriteProtected,
    /// A present entry without atomic enable met an atomic.
    AtomicProtected,
}

/// One page fault as the device reports it: 64 bytes, plain data, any bit pattern is readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FaultRecord {
    /// Faulting virtual address, page aligned by the device.
    pub address: u64,
    /// Ticket by which the device matches the answer to the waiting unit.
    pub ticket: u64,
    /// Address-space id of the context that faulted.
    pub asid: u32,
    /// Index of the GT that raised the fault.
    pub gt: u16,
    /// Index of the execution unit inside the GT.
    pub unit: u16,
    /// Access code: 0 read, 1 write, 2 atomic; bit 7 is [`ACCESS_PREFETCH`].
    pub access: u8,
    /// Level of the entry that stopped the walk (bits 3:0) and fault kind (bits 7:4), or
    /// [`KIND_NACK`].
    pub kind: u8,
    /// Reserved, zero.
    pub reserved: [u8; 38],
}

const _: () = assert!(size_of::<FaultRecord>() == 64);

impl FaultRecord {
    /// Builds the record of an access that a walk refused at `level`.
    #[must_use]
    pub const fn new(
        address: u64,
        asid: u32,
        access: AccessType,
        kind: FaultKind,
        level: u8,
    ) -> Self {
        let access = match access {
            AccessType::Read => 0,
            AccessType::Write => 1,
            AccessType::Atomic => 2,
        };
        let kind = match kind {
            FaultKind::NotPresent => 0,
            FaultKind::WriteProtected => 1,
            FaultKind::AtomicProtected => 2,
        };
        Self {
            address,
            ticket: 0,
            asid,
            gt: 0,
            unit: 0,
            access,
            kind: kind << 4 | (level & 0xf),
            reserved: [0; 38],
        }
    }

    /// The access type with the prefetch bit masked off; `None` for a code that no device writes.
    #[must_use]
    pub const fn access_type(&self) -> Option<AccessType> {
        match self.access & !ACCESS_PREFETCH {
            0 => Some(AccessType::Read),
            1 => Some(AccessType::Write),
            2 => Some(AccessType::Atomic),
            _ => None,
        }
    }

    /// Whether the access was a prefetch, which may fail without harm.
    #[must_use]
    pub const fn is_prefetch(&self) -> bool {
        self.access & ACCESS_PREFETCH != 0
    }

    /// Page-table level at which the walk stopped.
    #[must_use]
    pub const fn level(&self) -> u8 {
        self.kind & 0xf
    }
}

/// The driver's answer to a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultResponse {
    /// The translation is there now (or will be): replay the access.
    Replay,
    /// The access is illegal: stop the context that made it.
    Refuse,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetch_bit_does_not_change_the_access() {
        let mut record = FaultRecord::new(0x1000, 1, AccessType::Read, FaultKind::NotPresent, 2);
        record.access |= ACCESS_PREFETCH;
        assert_eq!(record.access_type(), Some(AccessType::Read));
        assert!(record.is_prefetch());
        assert_eq!(record.level(), 2);
        record.access = 3;
        assert_eq!(record.access_type(), None);
    }
}
