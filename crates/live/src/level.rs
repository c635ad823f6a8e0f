//! What the system allows, what is in use, and what follows for the user.

use core::fmt;

use rustix::io::Errno;

use crate::sys::patch::PatchError;
use crate::sys::thread::SpawnError;
use crate::sys::uffd::{Features, OpenMode, Uffd};

/// How a [`LiveSpace`](crate::LiveSpace) is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveConfig {
    /// Which brackets to use.
    pub brackets: BracketChoice,
    /// How watched memory is spread over userfaultfds.
    pub sharding: Sharding,
}

/// How watched memory is spread over userfaultfds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharding {
    /// Over several by address, and staging has one of its own: events of one arena do not stall
    /// migrations in others.
    #[default]
    Arenas,
    /// One for everything, staging too: to compare.
    None,
}

impl Sharding {
    /// Descriptors for user memory.
    pub(crate) const fn shards(self) -> usize {
        match self {
            Self::Arenas => 8,
            Self::None => 1,
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

/// What userfaultfd allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdLevel {
    /// Faults of the CPU in user and in kernel mode are served.
    Full,
    /// Faults in user mode are served; system calls on memory that is away answer `EFAULT`.
    UserModeOnly,
}

impl UffdLevel {
    /// Name, as reports show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::UserModeOnly => "user-mode-only",
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
    /// Faults.
    pub uffd: UffdLevel,
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
            Self::NoMove => f.write_str(
                "userfaultfd has no UFFDIO_MOVE: a Linux kernel of at least 6.8 is needed",
            ),
            Self::CannotPatch(why) => write!(f, "{why}"),
            Self::Os { step, errno } => write!(f, "cannot {step}: {errno}"),
        }
    }
}

impl core::error::Error for OpenError {}

/// The descriptors of a space, and the level they have.
pub(crate) struct Descriptors {
    /// For user memory, with events: one per shard.
    pub(crate) user: Vec<Uffd>,
    /// For staging and device memory.
    pub(crate) staging: Uffd,
    pub(crate) level: UffdLevel,
}

impl Descriptors {
    /// Opens them at the best level that there is.
    pub(crate) fn open(sharding: Sharding) -> Result<Self, OpenError> {
        // News of clones needs a privilege more than the mode does.
        let with_forks = Features::EVENTS.and(Features::FORK);
        let attempts = [
            (OpenMode::Full, with_forks, UffdLevel::Full),
            (OpenMode::Full, Features::EVENTS, UffdLevel::Full),
            (
                OpenMode::UserModeOnly,
                Features::EVENTS,
                UffdLevel::UserModeOnly,
            ),
        ];
        let mut refused = None;
        for (mode, features, level) in attempts {
            match Uffd::open(mode, features) {
                Ok(first) if !first.features().contains(Features::MOVE) => {
                    return Err(OpenError::NoMove);
                }
                Ok(first) => return Self::with(first, sharding, mode, features, level),
                Err(errno) => refused = refused.or(Some(errno)),
            }
        }
        Err(OpenError::NoUffd(refused.unwrap_or(Errno::PERM)))
    }

    fn with(
        first: Uffd,
        sharding: Sharding,
        mode: OpenMode,
        features: Features,
        level: UffdLevel,
    ) -> Result<Self, OpenError> {
        let staging = match sharding {
            Sharding::Arenas => Uffd::open(mode, Features::NONE),
            Sharding::None => first.another(),
        };
        let mut user = vec![first];
        while user.len() < sharding.shards() {
            user.push(Uffd::open(mode, features).map_err(OpenError::NoUffd)?);
        }
        Ok(Self {
            user,
            staging: staging.map_err(OpenError::NoUffd)?,
            level,
        })
    }
}
