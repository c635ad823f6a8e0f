//! What can be asked of a scratch window, and what it answers. Places are bytes from the window's
//! start, lengths are bytes, so that wrong ones can be asked for, too.

/// Processes that a window can be in at a time.
pub const PROCESSES: usize = 3;
/// Steps of one program.
pub const STEPS: usize = 160;
/// Pages of the largest window.
pub const PAGES: usize = 1536;
/// Mappings that one look tells of.
pub const AREAS: usize = 64;
/// Spans of one batched call.
pub const BATCH: usize = 4;

/// A step of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Number of the process that makes the call: 0 is there from the start.
    pub who: u8,
    /// The call.
    pub call: Call,
    /// Whether its process looks at the window afterwards.
    pub look: Look,
}

/// Whether a process looks at the window after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It does.
    Yes,
    /// Only the answer matters.
    No,
}

/// One call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `mmap` of anonymous memory.
    Map {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
        /// Rights, as `PROT_*`.
        prot: u8,
        /// Private or shared with children.
        kind: Kind,
        /// What about memory that is there already.
        place: Place,
    },
    /// `munmap`.
    Unmap {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// `mprotect`.
    Protect {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
        /// Rights, as `PROT_*`.
        prot: u8,
    },
    /// `mremap`.
    Remap {
        /// Where.
        at: u64,
        /// Bytes before.
        old: u64,
        /// Bytes afterwards.
        new: u64,
        /// How.
        how: How,
    },
    /// `madvise`.
    Advise {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
        /// The advice's number, known or not.
        advice: i32,
    },
    /// `process_madvise` of the process itself.
    AdviseMany {
        /// Places and bytes; the first `count` count.
        spans: [(u64, u64); BATCH],
        /// How many.
        count: u8,
        /// The advice's number, known or not.
        advice: i32,
    },
    /// `mlock`.
    Lock {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// `munlock`.
    Unlock {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Reads the word there.
    Load {
        /// Where, a multiple of eight.
        at: u64,
    },
    /// Writes the word there.
    Store {
        /// Where, a multiple of eight.
        at: u64,
        /// What.
        value: u64,
    },
    /// `fork`. The child waits for steps of its own.
    Fork {
        /// Its number, which nobody has.
        child: u8,
    },
    /// The process ends, and is gone when the next step runs. Not for process 0.
    Exit,
}

/// Who sees stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The process.
    Private,
    /// The process and its children.
    Shared,
}

/// Where a mapping goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// There if nothing is in the way, elsewhere in the window otherwise.
    Hint,
    /// There (`MAP_FIXED`).
    Fixed,
    /// There or not at all (`MAP_FIXED_NOREPLACE`).
    NoReplace,
    /// Anywhere in the window.
    Anywhere,
}

/// What `mremap` may do to get room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Nothing.
    InPlace,
    /// Move (`MREMAP_MAYMOVE`).
    Anywhere,
    /// Move there (`MREMAP_FIXED`).
    At(u64),
    /// Move pages only (`MREMAP_DONTUNMAP`).
    LeaveBehind,
    /// Move pages only, there.
    LeaveBehindAt(u64),
}

/// What a call answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// It succeeded: a place in the window, a number of bytes, the word that was read, or 0.
    Done(u64),
    /// It failed with this error number.
    Failed(i32),
    /// The access raised this signal.
    Signal(i32),
}

/// One mapping of the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Area {
    /// First byte of the window.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
    /// Where in what backs it, for memory that is shared; 0 for private memory.
    pub offset: u64,
    /// Its flags (`VmFlags` of smaps), one bit for each that [`flag`] knows.
    pub flags: u32,
}

/// Flags of mappings by their names in smaps: a flag's bit is its place.
const FLAGS: [&[u8; 2]; 20] = [
    b"rd", b"wr", b"ex", b"sh", b"mr", b"mw", b"me", b"lo", b"lf", b"dc", b"wf", b"hg", b"nh",
    b"mg", b"de", b"dd", b"sr", b"rr", b"ac", b"gu",
];

/// The bit of a flag that smaps calls `name`; 0 for one that is not told.
#[must_use]
pub fn flag(name: &[u8]) -> u32 {
    let found = FLAGS.iter().position(|known| known.as_slice() == name);
    found.map_or(0, |at| 1 << at)
}

/// The names of flags.
#[must_use]
pub fn flag_names(flags: u32) -> String {
    let mut names = String::new();
    for (at, name) in FLAGS.iter().enumerate() {
        if flags >> at & 1 == 1 {
            names.extend([char::from(name[0]), char::from(name[1]), ' ']);
        }
    }
    names.truncate(names.trim_end().len());
    names
}

/// What the window looked like to the process that made a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// What the call answered.
    pub answer: Option<Answer>,
    /// Mappings, by address.
    pub areas: Vec<Area>,
    /// One [`face`] for each page.
    pub pages: Vec<u32>,
}

/// What is known of a page: its pagemap word from bit 55 on in the lower half, its categories by
/// `PAGEMAP_SCAN` in the upper one.
#[must_use]
pub const fn face(word: u64, categories: u64) -> u32 {
    let high = (word >> 55).to_le_bytes();
    let categories = categories.to_le_bytes();
    u32::from_le_bytes([high[0], high[1], categories[0], categories[1]])
}
