//! [`Refused`]: an access of a device that the driver refused, and what the user can do.

use std::fmt;

use gpusvm::error::Failed;
use gpusvm_live::FaultLevel;
use gpusvm_softgpu::Stop;

/// Why the driver refused an access of a device on the live host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What the device wanted.
    pub stop: Stop,
    /// The last thing that the driver said.
    pub why: Failed,
    /// Which touches the host serves.
    pub level: FaultLevel,
}

impl Refused {
    /// Whether an atomic met memory where the policy has none at this level: other options change that, and
    /// nothing else does.
    #[must_use]
    pub const fn is_for_want_of_options(&self) -> bool {
        matches!(self.why, Failed::NotMigratable(_))
    }

    /// What stays home at the level, where that is more than at level full.
    const fn stays(&self) -> Option<&'static str> {
        match self.level {
            FaultLevel::Full => None,
            FaultLevel::UserModeOnly => {
                Some("stacks and what lies beside a thread's variables stay home")
            }
            FaultLevel::Mprotect => {
                Some("pages are never a device's alone, and only large allocations can move to one")
            }
            FaultLevel::Explicit => Some("nothing moves to a device because it is accessed"),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stop, why, level } = self;
        write!(f, "{stop}: {why}")?;
        if !self.is_for_want_of_options() {
            return Ok(());
        }
        if let Some(stays) = self.stays() {
            write!(f, ", as {stays} at level {}", level.name())?;
        }
        f.write_str("; use --atomics system")?;
        match self.stays() {
            Some(_) => {
                f.write_str(", or level full: as root, or with vm.unprivileged_userfaultfd=1")
            }
            None => Ok(()),
        }
    }
}
