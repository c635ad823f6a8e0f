//! What the system allows, what is in use, and what follows for the user.

use core::fmt;

use rustix::io::Errno;

use crate::sys::heap;
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
    /// How watched memory is spread over userfaultfds.
    pub sharding: Sharding,
    /// What `/proc/self/pagemap` shows of memory that is away.
    pub holes: Holes,
}

/// What `/proc/self/pagemap` shows of memory that is away, at level full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holes {
    /// Nothing is there.
    #[default]
    Empty,
    /// Something that is not present, as of pages in private device memory. It costs a system call in
    /// each direction, and huge pages come home as small ones: markers fill a page table. Holes of
    /// memory that may only be read do not leave then.
    Marked,
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
    /// Patched system-call sites; where the process cannot be patched symbols, and without them
    /// events.
    #[default]
    Best,
    /// Patched system-call sites, or an error.
    Patched,
    /// Symbols of this program, or an error.
    Symbols,
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
    /// Without userfaultfd: memory of the program's allocator is closed while it is away, and a touch
    /// is served by a signal handler.
    Mprotect,
    /// Without userfaultfd and signals: memory of the program's allocator migrates by calls of the
    /// program only, and must be called home before it is touched.
    Explicit,
}

impl FaultLevel {
    /// Whether pages leave and return by userfaultfd, rather than through the migratable heap.
    pub(crate) const fn has_uffd(self) -> bool {
        matches!(self, Self::Full | Self::UserModeOnly)
    }

    /// Name, as reports show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::UserModeOnly => "user-mode-only",
            Self::Mprotect => "mprotect",
            Self::Explicit => "explicit",
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
            Self::Mprotect | Self::Explicit => {
                "allow the system call memfd_create, and 512 GiB of address space (ulimit -v)"
            }
        }
    }

    /// What it does not cover, in a sentence.
    #[must_use]
    pub const fn limits(self) -> &'static str {
        match self {
            Self::Full => "debuggers and /proc/self/mem cannot read memory that is on a device",
            Self::UserModeOnly => {
                "system calls on memory that is on a device fail with EFAULT; touch it first. A \
                 signal for a thread on a stack of the program's own making may end the process. \
                 Children of a raw clone read zeros there"
            }
            Self::Mprotect => {
                "only allocations of 64 KiB and more that this program makes by its allocator after \
                 the level was chosen migrate, by copying; children do not have them; pages pinned \
                 by the system must not migrate; system calls on memory that is on a device fail \
                 with EFAULT; threads must not block SIGSEGV, and handlers of it that are installed \
                 later must pass it on"
            }
            Self::Explicit => {
                "as level mprotect, and nothing migrates by itself: a touch of memory that the \
                 program has sent to a device and not brought home is a SIGSEGV"
            }
        }
    }
}

/// How address-space changes are seen.
#[derive(Debug)]
pub enum BracketLevel {
    /// Before they happen, by patched system-call sites.
    Patched,
    /// Before they happen, by symbols of this program that stand for those of the C library.
    Symbols {
        /// Why not better; `None` where it was asked for.
        why: Option<PatchError>,
    },
    /// After they happened, by userfaultfd events.
    Events {
        /// Why not better; `None` where it was asked for.
        why: Option<PatchError>,
    },
    /// Where the program's allocator makes them: there is no userfaultfd that would tell of others.
    Owner {
        /// Why not better.
        why: PatchError,
    },
}

impl BracketLevel {
    /// Name, as reports show it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Patched => "patched",
            Self::Symbols { .. } => "symbols",
            Self::Events { .. } => "events",
            Self::Owner { .. } => "owner",
        }
    }

    /// What it does not cover, in a sentence.
    #[must_use]
    pub const fn limits(&self) -> &'static str {
        match self {
            Self::Patched => {
                "raw system calls that bypass libc are seen late, by events, and counted"
            }
            Self::Symbols { .. } => {
                "calls inside the C library, those of free() among them, and raw system calls are \
                 seen late, by events, and counted; without userfaultfd they are not seen"
            }
            Self::Events { .. } => {
                "changes are seen after they happened; mprotect is not seen at all"
            }
            Self::Owner { .. } => {
                "changes other than by the program's allocator are not seen: a device uses what is \
                 mapped where it was told to"
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
    /// Symbols were insisted on, and the program's are not those that its libraries find.
    NoSymbols,
    /// Events were insisted on at a level that has none.
    NoEvents(FaultLevel),
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
            Self::NoSymbols => f.write_str(
                "this program does not export the C library's address-space calls: build it with \
                 gpusvm-live's feature `symbols`, or take other brackets",
            ),
            Self::NoEvents(level) => write!(
                f,
                "level {} has no userfaultfd whose events could be read: take other brackets",
                level.name()
            ),
            Self::CannotPatch(why) => write!(f, "{why}"),
            Self::Os { step, errno } => write!(f, "cannot {step}: {errno}"),
        }
    }
}

impl core::error::Error for OpenError {}

/// Finds the level that `config` gives here, and lets this program's allocator make allocations that
/// migrate at that level, until a space is closed: for data that is allocated before the space is
/// opened, which must be with the same configuration. At levels with userfaultfd all memory migrates,
/// and this changes nothing.
///
/// # Errors
/// As [`LiveSpace::open`](crate::LiveSpace::open), where a level is insisted on.
pub fn allocate_for(config: &LiveConfig) -> Result<FaultLevel, OpenError> {
    let level = Descriptors::open(config)?.level;
    if level.has_uffd() {
        heap::stop_allocating();
    } else {
        heap::start_allocating();
    }
    Ok(level)
}

/// The descriptors of a space, and the level they have. Levels without userfaultfd have descriptors
/// that refuse everything.
pub(crate) struct Descriptors {
    /// For user memory, with events: one per shard.
    pub(crate) user: Vec<Uffd>,
    /// As those, but faults are signals. Children have nothing of it: they would die of them.
    pub(crate) compute_only: Option<Uffd>,
    /// For staging and device memory.
    pub(crate) staging: Uffd,
    pub(crate) level: FaultLevel,
}

impl Descriptors {
    /// Opens them at the best level that `config` takes.
    pub(crate) fn open(config: &LiveConfig) -> Result<Self, OpenError> {
        const LADDER: [FaultLevel; 4] = [
            FaultLevel::Full,
            FaultLevel::UserModeOnly,
            FaultLevel::Mprotect,
            FaultLevel::Explicit,
        ];
        let mut refused = None;
        for level in LADDER
            .into_iter()
            .filter(|level| config.level.takes(*level))
        {
            match Self::at(level, config) {
                Ok(descriptors) => return Ok(descriptors),
                // The first refusal names the privilege that helps most.
                Err(why) => refused = refused.or(Some((level, why))),
            }
        }
        Err(match (config.level, refused) {
            (_, None) => OpenError::NoMove,
            (_, Some((_, Refusal::NoMove))) => OpenError::NoMove,
            (LevelChoice::Forced(_), Some((level, Refusal::Os(errno)))) => {
                OpenError::NoLevel { level, errno }
            }
            (LevelChoice::Best, Some((_, Refusal::Os(errno)))) => OpenError::NoUffd(errno),
        })
    }

    fn at(level: FaultLevel, config: &LiveConfig) -> Result<Self, Refusal> {
        let sharding = config.sharding;
        let full = || open_full(config.holes);
        let user_mode = || Uffd::open(OpenMode::UserModeOnly, Features::EVENTS);
        let (open, mode): (&dyn Fn() -> _, _) = match level {
            FaultLevel::Full => (&full, OpenMode::Full),
            FaultLevel::UserModeOnly => (&user_mode, OpenMode::UserModeOnly),
            FaultLevel::Mprotect | FaultLevel::Explicit => {
                heap::prepare()?;
                return Ok(Self {
                    user: vec![Uffd::none()?],
                    compute_only: None,
                    staging: Uffd::none()?,
                    level,
                });
            }
        };
        let first = open()?;
        if !first.features().contains(Features::MOVE) {
            return Err(Refusal::NoMove);
        }
        let staging = match sharding {
            Sharding::Arenas => Uffd::open(mode, Features::NONE)?,
            Sharding::None => first.another()?,
        };
        let signals = Features::EVENTS.and(Features::SIGBUS);
        let has_signals = first.features().contains(Features::SIGBUS);
        let compute_only = has_signals.then(|| Uffd::open(mode, signals)).transpose()?;
        let mut user = vec![first];
        while user.len() < sharding.shards() {
            user.push(open()?);
        }
        Ok(Self {
            user,
            compute_only,
            staging,
            level,
        })
    }
}

/// Why a level cannot be had.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Os(Errno),
    NoMove,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Os(errno)
    }
}

/// News of clones needs a privilege more than the mode does.
fn open_full(holes: Holes) -> Result<Uffd, Errno> {
    let wanted = match holes {
        Holes::Empty => Features::EVENTS,
        Holes::Marked => Features::EVENTS.and(Features::MARKERS),
    };
    Uffd::open(OpenMode::Full, wanted.and(Features::FORK))
        .or_else(|_forbidden| Uffd::open(OpenMode::Full, wanted))
}

#[cfg(test)]
mod tests;
