//! What the system allows, what is in use, and what follows for the user.

use core::fmt;

use rustix::io::Errno;

use crate::sys::patch::PatchError;
use crate::sys::thread::SpawnError;
use crate::sys::uffd::{Features, OpenMode, Uffd};

/// How a [`LiveSpace`](crate::LiveSpace) is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveConfig {
    /// Which faults of the CPU to serve.
    pub level: LevelChoice,
    /// Which brackets to use.
    pub brackets: BracketChoice,
}

/// Wish about faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LevelChoice {
    /// The best that the system allows.
    #[default]
    Best,
    /// This one, or an error.
    Forced(FaultLevel),
}

impl LevelChoice {
    /// Whether `level` will do.
    const fn takes(self, level: FaultLevel) -> bool {
        match self {
            Self::Best => true,
            Self::Forced(only) => only as u8 == level as u8,
        }
    }
}

/// Wish about brackets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BracketChoice {
    /// Patched system-call sites, or events where the process cannot be patched.
    #[default]
    Best,
    /// Patched system-call sites, or an error.
    Patched,
    /// Events only.
    Events,
}

/// Which touches of memory that is away are served. Best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultLevel {
    /// Faults of the CPU in user and in kernel mode are served.
    Full,
    /// Faults in user mode are served; system calls on memory that is away answer `EFAULT`.
    UserModeOnly,
}

impl FaultLevel {
    /// Name, as reports show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::UserModeOnly => "user-mode-only",
        }
    }

    /// What to do where the system refuses it.
    const fn remedy(self) -> &'static str {
        match self {
            Self::Full => {
                "run as root, set vm.unprivileged_userfaultfd=1, or take level user-mode-only"
            }
            Self::UserModeOnly => {
                "allow the system call userfaultfd in the container's seccomp profile"
            }
        }
    }

    /// What it does not cover, in a sentence.
    #[must_use]
    pub const fn limits(self) -> &'static str {
        match self {
            Self::Full => "debuggers and /proc/self/mem cannot read memory that is on a device",
            Self::UserModeOnly => {
                "system calls on memory that is on a device fail with EFAULT; touch it first. \
                 Children of a raw clone read zeros there"
            }
        }
    }
}

/// How address-space changes are seen.
#[derive(Debug)]
pub enum BracketLevel {
    /// Before they happen, by patched system-call sites.
    Patched,
    /// After they happened, by userfaultfd events.
    Events {
        /// Why not better; `None` where it was asked for.
        why: Option<PatchError>,
    },
}

impl BracketLevel {
    /// Name, as reports show it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Patched => "patched",
            Self::Events { .. } => "events",
        }
    }

    /// What it does not cover, in a sentence.
    #[must_use]
    pub const fn limits(&self) -> &'static str {
        match self {
            Self::Patched => {
                "raw system calls that bypass libc are seen late, by events, and counted"
            }
            Self::Events { .. } => {
                "changes are seen after they happened; mprotect is not seen at all"
            }
        }
    }
}

/// What is in use.
#[derive(Debug)]
pub struct Level {
    /// Touches of memory that is away.
    pub faults: FaultLevel,
    /// Address-space changes.
    pub bracket: BracketLevel,
}

impl Level {
    /// Whether changes are seen before they happen.
    #[must_use]
    pub const fn is_patched(&self) -> bool {
        matches!(self.bracket, BracketLevel::Patched)
    }
}

/// A live space cannot be opened.
#[derive(Debug)]
pub enum OpenError {
    /// There is one already in this process.
    AlreadyOpen,
    /// This process was forked from one that has a live space.
    Forked,
    /// The runtime's allocator is not the global allocator.
    NoRuntimeAllocator,
    /// userfaultfd is refused.
    NoUffd(Errno),
    /// A level was insisted on that the system refuses.
    NoLevel {
        /// Which.
        level: FaultLevel,
        /// The system's answer.
        errno: Errno,
    },
    /// userfaultfd has no `UFFDIO_MOVE`.
    NoMove,
    /// Patching was insisted on and failed.
    CannotPatch(PatchError),
    /// A step failed.
    Os {
        /// What was attempted.
        step: &'static str,
        /// The system's answer.
        errno: Errno,
    },
}

impl OpenError {
    pub(crate) const fn os(step: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Os { step, errno }
    }
}

impl From<SpawnError> for OpenError {
    fn from(error: SpawnError) -> Self {
        Self::Os {
            step: "start a thread",
            errno: error.errno(),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyOpen => f.write_str(
                "this process has a live space already; close it before opening another",
            ),
            Self::Forked => f.write_str(
                "this process was forked from one that has a live space; start a program by exec \
                 to open one",
            ),
            Self::NoRuntimeAllocator => f.write_str(
                "the runtime's memory must not migrate: declare \
                 `#[global_allocator] static A: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;`",
            ),
            Self::NoUffd(errno) => write!(
                f,
                "userfaultfd is refused ({errno}): run as root, set vm.unprivileged_userfaultfd=1, \
                 or allow the system call in the container's seccomp profile"
            ),
            Self::NoLevel { level, errno } => write!(
                f,
                "level {} is refused ({errno}): {}",
                level.name(),
                level.remedy()
            ),
            Self::NoMove => f.write_str(
                "userfaultfd has no UFFDIO_MOVE: a Linux kernel of at least 6.8 is needed",
            ),
            Self::CannotPatch(why) => write!(f, "{why}"),
            Self::Os { step, errno } => write!(f, "cannot {step}: {errno}"),
        }
    }
}

impl core::error::Error for OpenError {}

/// Descriptors for user memory (with events) and for staging (without), and the level they have.
pub(crate) fn open_descriptors(choice: LevelChoice) -> Result<(Uffd, Uffd, FaultLevel), OpenError> {
    let (user, mode, level) = open_user(choice)?;
    if !user.features().contains(Features::MOVE) {
        return Err(OpenError::NoMove);
    }
    let staging = Uffd::open(mode, Features::NONE).map_err(OpenError::NoUffd)?;
    Ok((user, staging, level))
}

/// The descriptor for user memory, of the best level that `choice` takes and the system gives.
fn open_user(choice: LevelChoice) -> Result<(Uffd, OpenMode, FaultLevel), OpenError> {
    let mut refused = None;
    for level in [FaultLevel::Full, FaultLevel::UserModeOnly] {
        if !choice.takes(level) {
            continue;
        }
        let (opened, mode) = match level {
            FaultLevel::Full => (open_full(), OpenMode::Full),
            FaultLevel::UserModeOnly => {
                let mode = OpenMode::UserModeOnly;
                (Uffd::open(mode, Features::EVENTS), mode)
            }
        };
        match opened {
            Ok(uffd) => return Ok((uffd, mode, level)),
            // The first refusal names the privilege that helps most.
            Err(errno) => refused = refused.or(Some((level, errno))),
        }
    }
    Err(match (choice, refused) {
        (LevelChoice::Forced(_), Some((level, errno))) => OpenError::NoLevel { level, errno },
        (_, refused) => OpenError::NoUffd(refused.map_or(Errno::NOSYS, |(_, errno)| errno)),
    })
}

/// News of clones needs a privilege more than the mode does.
fn open_full() -> Result<Uffd, Errno> {
    Uffd::open(OpenMode::Full, Features::EVENTS.and(Features::FORK))
        .or_else(|_forbidden| Uffd::open(OpenMode::Full, Features::EVENTS))
}
