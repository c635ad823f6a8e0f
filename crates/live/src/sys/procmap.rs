//! What is mapped where: `PROCMAP_QUERY` (0.4 microseconds, whatever the number of mappings;
//! parsing the text file costs milliseconds).

use std::os::fd::OwnedFd;

use gpusvm::addr::{HostSpan, HostVa};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    start: u64,
    end: u64,
    flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_addr: u64,
    build_id_addr: u64,
}

const OP_QUERY: Opcode = opcode::read_write::<Query>(b'f', 17);
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const EXECUTABLE: u64 = 4;
const SHARED: u64 = 8;
const COVERING_OR_NEXT: u64 = 0x10;
/// Longer than any name that the kernel gives to a mapping of its own.
const NAME_BYTES: usize = 32;

/// What a mapping's name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameKind {
    /// Nothing, a file, or the heap.
    Plain,
    /// The main thread's stack.
    Stack,
    /// The kernel's own: vdso, vvar and their like.
    Special,
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) span: HostSpan,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) exec: bool,
    pub(crate) sharing: Sharing,
    /// Inode of the file behind it, 0 for none.
    pub(crate) inode: u64,
    pub(crate) name: NameKind,
}

/// Whether writes are seen by other mappings of the same object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Private,
    Shared,
}

/// The process's mappings.
#[derive(Debug)]
pub(crate) struct ProcMap(OwnedFd);

impl ProcMap {
    /// Opens the process's own table and checks that it answers queries.
    ///
    /// # Errors
    /// `ENOTTY` on a kernel before 6.11, or where /proc is not to be had.
    pub(crate) fn open() -> Result<Self, Errno> {
        let fd = open(
            "/proc/self/maps",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let map = Self(fd);
        map.query(HostVa::new(0))?;
        Ok(map)
    }

    /// The mapping at `at`, or the first one behind it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn query(&self, at: HostVa) -> Result<Option<MapInfo>, Errno> {
        let mut name = [0_u8; NAME_BYTES];
        let mut arg = Query {
            size: u64::try_from(size_of::<Query>()).unwrap_or(0),
            query_flags: COVERING_OR_NEXT,
            query_addr: at.get(),
            name_size: u32::try_from(NAME_BYTES).unwrap_or(0),
            name_addr: name.as_mut_ptr().expose_provenance() as u64,
            ..Query::default()
        };
        let mut result = self.ask(&mut arg);
        if result == Err(Errno::NAMETOOLONG) {
            // A file with a long name: the name is not needed.
            (arg.name_size, arg.name_addr) = (0, 0);
            result = self.ask(&mut arg);
        }
        match result {
            Ok(()) => Ok(Some(info(&arg, &name))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn ask(&self, arg: &mut Query) -> Result<(), Errno> {
        // SAFETY: PROCMAP_QUERY reads and writes `struct procmap_query`, whose layout `Query` has.
        let call = unsafe { Updater::<OP_QUERY, _>::new(arg) };
        // SAFETY: the kernel writes the argument and at most `name_size` bytes at `name_addr`,
        // which is a buffer of that size that outlives the call.
        unsafe { ioctl(&self.0, call) }
    }
}

fn info(arg: &Query, name: &[u8]) -> MapInfo {
    let name = if arg.name_size == 0 { &[] } else { name };
    let kind = if name.starts_with(b"[stack") {
        NameKind::Stack
    } else if name.starts_with(b"[v") {
        NameKind::Special
    } else {
        NameKind::Plain
    };
    MapInfo {
        span: HostSpan::new(HostVa::new(arg.start), HostVa::new(arg.end)),
        read: arg.flags & READABLE != 0,
        write: arg.flags & WRITABLE != 0,
        exec: arg.flags & EXECUTABLE != 0,
        sharing: if arg.flags & SHARED != 0 {
            Sharing::Shared
        } else {
            Sharing::Private
        },
        inode: arg.inode,
        name: kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{AnonMapping, Huge};

    #[test]
    fn own_mapping_stack_and_code_are_told_apart() {
        let map = ProcMap::open().expect("the kernel answers queries");
        let mine = AnonMapping::new(1 << 20, Huge::Never).expect("a megabyte can be mapped");
        let at = |address| {
            map.query(HostVa::new(address))
                .expect("queries do not fail")
                .expect("mapped")
        };
        let anon = at(mine.address());
        assert!(anon.read && anon.write && !anon.exec && anon.inode == 0);
        assert!(anon.span.contains(HostVa::new(mine.address())));
        let code = at(info as fn(&Query, &[u8]) -> MapInfo as usize as u64);
        assert!(code.exec && !code.write && code.inode != 0);
    }

    #[test]
    fn behind_the_last_mapping_there_is_none() {
        let map = ProcMap::open().expect("the kernel answers queries");
        let beyond = map
            .query(HostVa::new((1 << 47) - 4096))
            .expect("queries do not fail");
        assert!(
            beyond.is_none_or(|m| m.span.start().get() >= 1 << 47 || m.name == NameKind::Special)
        );
    }
}
