//! What a case needs of a process, and of the device that the process opens.

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm_dmirror::uapi::{Arguments, Command, Errno, UserMemory};

use crate::conformance::hmm::bench::Trouble;

/// Kind of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// The device's alone.
    Private,
    /// The CPU's, too.
    Coherent,
}

impl Variant {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Coherent => "coherent",
        }
    }

    /// Number of the first of its two nodes.
    pub(super) const fn first_node(self) -> usize {
        match self {
            Self::Private => 0,
            Self::Coherent => 2,
        }
    }
}

/// What some hosts do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Device memory that the CPU uses in place.
    CoherentMemory,
    /// Pins by the system's own test of them (`gup_test`).
    GupTest,
    /// Pages of a private file mapping that migrate.
    PrivateFilePages,
}

/// What is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Private anonymous memory, small pages.
    Private,
    /// Private anonymous memory, large pages.
    Large,
    /// Memory shared with children.
    Shared,
    /// A file, shared.
    SharedFile,
    /// A file, private.
    PrivateFile,
    /// Pages of the pool of huge pages.
    HugePages,
    /// The device's own: fresh pages, mapped at once, for reading.
    Device,
}

/// Rights of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    None,
    Read,
    ReadWrite,
}

/// What is asked of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// The content may be dropped.
    Free,
    /// Pages become large ones.
    Collapse,
}

/// What a move leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaves {
    Hole,
    Mapping,
}

/// What a child does; it answers with its record.
pub(super) type ChildWork = Box<dyn FnOnce(&dyn Process) -> Result<Vec<String>, Trouble> + Send>;

/// A child that was made and has not begun.
pub(super) trait Child {
    /// Lets it work, and waits until it has ended.
    fn join(self: Box<Self>) -> Result<Vec<String>, Trouble>;
}

/// Something that goes on until it is dropped.
pub(super) trait Held {}

/// An open node.
pub(super) trait Node {
    /// Runs a command.
    fn command(
        &self,
        command: Command,
        arguments: &mut Arguments,
        user: &(dyn UserMemory + Sync),
    ) -> Result<(), Errno>;
}

/// A process.
pub(super) trait Process {
    /// Maps memory at a multiple of 2 MiB.
    fn map(&self, what: Memory, bytes: u64, rights: Rights) -> Result<HostSpan, Trouble>;
    /// `munmap`.
    fn unmap(&self, span: HostSpan) -> Result<(), Trouble>;
    /// `mprotect`.
    fn protect(&self, span: HostSpan, rights: Rights) -> Result<(), Trouble>;
    /// `madvise`.
    fn advise(&self, span: HostSpan, advice: Advice) -> Result<(), Trouble>;
    /// A multiple of 2 MiB with room for so many bytes behind it, where nothing is mapped.
    fn room(&self, bytes: u64) -> Result<HostVa, Trouble>;
    /// `mremap` to a given place.
    fn relocate(&self, from: HostSpan, to: HostVa, leaves: Leaves) -> Result<(), Trouble>;
    /// A load by the CPU.
    fn load(&self, at: HostVa) -> Result<u64, Trouble>;
    /// A store by the CPU.
    fn store(&self, at: HostVa, value: u64) -> Result<(), Trouble>;
    /// The word of `/proc/self/pagemap`.
    fn pagemap(&self, at: HostVa) -> Result<u64, Trouble>;
    /// Opens a node.
    fn open(&self, node: usize) -> Result<Box<dyn Node>, Trouble>;
    /// `fork`.
    fn fork(&self, work: ChildWork) -> Result<Box<dyn Child>, Trouble>;
    /// Another thread unmaps `span` at some moment from now on. Dropped when it has.
    fn unmap_beside(&self, span: HostSpan) -> Result<Box<dyn Held>, Trouble>;
    /// Another thread serves missing pages of `span`: with `word` at their start.
    fn serve_missing(&self, span: HostSpan, word: u64) -> Result<Box<dyn Held>, Trouble>;
    /// Pins a page for long, until the value is dropped.
    fn pin(&self, at: HostVa) -> Result<Box<dyn Held>, Trouble>;
}
