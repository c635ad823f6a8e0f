//! Where a device does its atomics, so that none is lost to the CPU (`svm-design.md` sections 4.6,
//! 5.4.1 and 5.8.3). Pure: it looks at what it is given and changes nothing.

use gpusvm::addr::HostVa;
use gpusvm::error::{Failed, Stale};
use gpusvm::pages::PageSet;
use gpusvm::seam::env::Ns;
use gpusvm::seam::mm::PagemapId;
use gpusvm_abi::fault::AccessType;

/// Migrations that an atomic may fail to get before it is refused.
pub(crate) const ATTEMPTS: u32 = 3;
/// Time for which the CPU leaves pages alone that an atomic has brought to the device
/// (`atomic_svm_timeslice_ms`); doubled with every attempt.
const TIMESLICE: Ns = Ns::from_millis(5);

/// What a VM does about atomics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtomicPolicy {
    /// They are done wherever a page is. Right where the bus carries atomics
    /// (`has_device_atomics_on_smem`); with any other device the CPU comes in between, and increments
    /// are lost.
    #[default]
    System,
    /// In device memory alone: an atomic on a page in host memory faults, and the page migrates, for a
    /// timeslice at least. What cannot be there refuses atomics.
    Device,
    /// In device memory, or on a page in host memory that the CPU has no access to meanwhile. What is
    /// no private memory refuses atomics.
    Exclusive,
    /// Nowhere: atomics are the CPU's.
    Cpu,
    /// A wrong one, for tests: as [`System`](Self::System), on pages that stay where they are, whatever
    /// the bus carries.
    Naive,
}

/// What the pages of a fault have to be for its access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Accessible.
    Access,
    /// In device memory (`need_vram_for_atomic`).
    DeviceMemory,
    /// In device memory, or the device's alone.
    Exclusive,
    /// Accessible where they are.
    InPlace,
}

impl AtomicPolicy {
    /// What an access of this kind needs.
    ///
    /// # Errors
    /// [`Failed::AtomicForbidden`] for an atomic where the device may do none.
    pub(crate) const fn need(self, access: AccessType, at: HostVa) -> Result<Need, Failed> {
        match (access, self) {
            (AccessType::Read | AccessType::Write, _) => Ok(Need::Access),
            (AccessType::Atomic, Self::System) => Ok(Need::Access),
            (AccessType::Atomic, Self::Device) => Ok(Need::DeviceMemory),
            (AccessType::Atomic, Self::Exclusive) => Ok(Need::Exclusive),
            (AccessType::Atomic, Self::Naive) => Ok(Need::InPlace),
            (AccessType::Atomic, Self::Cpu) => Err(Failed::AtomicForbidden(at)),
        }
    }

    /// Whether entries for `pages` allow atomics, where they allow stores.
    pub(crate) fn allows(self, pages: &PageSet) -> bool {
        match self {
            Self::System | Self::Naive => true,
            Self::Device | Self::Exclusive => pages.is_exclusive() || pages.pagemap().is_some(),
            Self::Cpu => false,
        }
    }
}

impl Need {
    /// Whether `pages`, gathered for a device whose memory is `own`, are what is needed.
    ///
    /// # Errors
    /// [`Stale`] where the CPU or another operation was faster.
    pub(crate) fn check(self, pages: &PageSet, own: PagemapId) -> Result<(), Stale> {
        let there = pages.pagemap() == Some(own);
        let met = match self {
            Self::Access | Self::InPlace => true,
            Self::DeviceMemory => there,
            Self::Exclusive => there || pages.is_exclusive(),
        };
        if met { Ok(()) } else { Err(Stale::PagesBusy) }
    }

    /// Time for which the CPU leaves pages alone after the `n`th migration of a fault, counted from 0.
    pub(crate) fn timeslice(self, n: u32) -> Ns {
        match self {
            Self::Access | Self::Exclusive | Self::InPlace => Ns::default(),
            Self::DeviceMemory => Ns(TIMESLICE.0 << n.min(ATTEMPTS - 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: HostVa = HostVa::new(0x1000);

    #[test]
    fn atomics_alone_need_more_than_access() {
        let all = [
            (AtomicPolicy::System, Ok(Need::Access)),
            (AtomicPolicy::Device, Ok(Need::DeviceMemory)),
            (AtomicPolicy::Exclusive, Ok(Need::Exclusive)),
            (AtomicPolicy::Cpu, Err(Failed::AtomicForbidden(AT))),
        ];
        for (policy, need) in all {
            assert_eq!(policy.need(AccessType::Atomic, AT), need);
            assert_eq!(policy.need(AccessType::Write, AT), Ok(Need::Access));
            assert_eq!(policy.need(AccessType::Read, AT), Ok(Need::Access));
        }
    }

    #[test]
    fn timeslice_doubles_as_often_as_there_are_attempts() {
        let slices = [0, 1, 2, 3, 100].map(|n| Need::DeviceMemory.timeslice(n));
        assert_eq!(slices, [5, 10, 20, 20, 20].map(Ns::from_millis));
        assert_eq!(Need::Access.timeslice(2), Ns::default());
    }
}
