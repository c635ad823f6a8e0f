//! [`Atomics`]: what machines do about atomics of devices.

use clap::ValueEnum;
use gpusvm_softgpu::SmemAtomics;
use gpusvm_xe::atomics::AtomicPolicy;

/// Where device atomics happen: a policy of the VM, and a device to go with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Atomics {
    /// Wherever a page is: the bus of this device carries them.
    #[default]
    System,
    /// In device memory alone. As with all that follow, the bus carries none.
    Device,
    /// In device memory, or on pages that the device has for itself, which takes userfaultfd.
    Exclusive,
    /// Nowhere: they are the CPU's.
    #[value(skip)]
    Cpu,
    /// Wherever a page is, though the bus carries none: additions are lost. For tests of tests.
    Naive,
}

impl Atomics {
    /// The VM's part.
    #[must_use]
    pub const fn policy(self) -> AtomicPolicy {
        match self {
            Self::System => AtomicPolicy::System,
            Self::Naive => AtomicPolicy::Naive,
            Self::Device => AtomicPolicy::Device,
            Self::Exclusive => AtomicPolicy::Exclusive,
            Self::Cpu => AtomicPolicy::Cpu,
        }
    }

    /// The device's part.
    #[must_use]
    pub const fn smem(self) -> SmemAtomics {
        match self {
            Self::System => SmemAtomics::OnTheBus,
            Self::Device | Self::Exclusive | Self::Cpu | Self::Naive => SmemAtomics::ReadThenWrite,
        }
    }
}
