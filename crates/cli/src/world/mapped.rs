//! [`Mapped`]: memory of a world's process, as its program uses it.

use std::sync::Arc;

use gpusvm::addr::{HostVa, PAGE};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_model::kernel::ModelSpace;
use gpusvm_model::mm::around::Around;
use gpusvm_model::mm::errno::{Errno, Signal};
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::sched::ModelEnv;

/// A mapping of its own, of whole pages. What goes wrong fails the world: nothing should.
#[derive(Debug)]
pub(crate) struct Mapped {
    space: Arc<ModelSpace<ModelEnv>>,
    at: HostVa,
}

impl Mapped {
    /// Maps fresh private memory, at least a page.
    pub(crate) fn new(space: &Arc<ModelSpace<ModelEnv>>, bytes: u64) -> Self {
        Self::of(space, bytes, What::Private)
    }

    /// Maps a fresh file of this content, shared, to be read.
    pub(crate) fn file(space: &Arc<ModelSpace<ModelEnv>>, content: &[u8]) -> Self {
        let bytes = u64::try_from(content.len()).unwrap_or(u64::MAX);
        let pages = u32::try_from(bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
        let file = space.kernel().with(|mm| mm.create_file(pages));
        let mapped = Self::of(space, bytes, What::SharedFile(file, 0));
        mapped.write(0, content);
        if let Err(errno) = space.mprotect(mapped.at, u64::from(pages) * PAGE, Prot::READ) {
            refused("mprotect", errno);
        }
        mapped
    }

    fn of(space: &Arc<ModelSpace<ModelEnv>>, bytes: u64, what: What) -> Self {
        let map = Map {
            place: Place::Hint(HostVa::default()),
            len: bytes.max(1),
            prot: Prot::READ.with(Prot::WRITE),
            what,
            extra: VmFlags::NONE,
        };
        let at = space.mmap(&map).unwrap_or_else(|errno| {
            refused("mmap", errno);
            HostVa::default()
        });
        Self {
            space: Arc::clone(space),
            at,
        }
    }

    /// First address.
    pub(crate) const fn address(&self) -> u64 {
        self.at.get()
    }

    /// The CPU loads bytes from `offset` on.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) {
        if let Err(signal) = self.space.read(self.at.plus(offset), out) {
            killed("load", signal);
        }
    }

    /// The CPU stores bytes from `offset` on.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        if let Err(signal) = self.space.write(self.at.plus(offset), bytes) {
            killed("store", signal);
        }
    }

    /// The CPU adds to the word at `offset`, by an atomic.
    pub(crate) fn add(&self, offset: u64, by: u64) {
        let done = self.space.atomic(self.at.plus(offset), AtomicOp::Add(by));
        if let Err(signal) = done {
            killed("atomic", signal);
        }
    }
}

fn refused(call: &str, errno: Errno) {
    ModelEnv.fail(format!("{call} of the program's data answers {errno}"));
}

fn killed(access: &str, signal: Signal) {
    ModelEnv.fail(format!("a {access} of the program's own data: {signal}"));
}
