//! The system layer: every `unsafe` of the live host, and nothing that knows what it is for.
//!
//! Code in here may run while a fault is served or inside an address-space bracket, on any thread
//! of the process. Such code makes raw system calls only: no libc `errno`, no thread-locals with
//! destructors, no `malloc`, no stdio. What may run only at set-up says so.

pub(crate) mod advise;
pub(crate) mod arena;
pub(crate) mod atfork;
pub(crate) mod bare_signal;
pub(crate) mod child;
pub(crate) mod depth;
pub(crate) mod fault_copy;
pub(crate) mod file;
pub(crate) mod futex;
#[cfg(test)]
mod futex_tests;
pub(crate) mod heap;
pub(crate) mod in_thread;
pub(crate) mod last_wish;
pub(crate) mod lend;
pub(crate) mod library;
pub(crate) mod mapping;
pub(crate) mod modules;
pub(crate) mod owned;
pub(crate) mod pagemap;
pub(crate) mod patch;
pub(crate) mod probe;
pub(crate) mod process_lock;
pub(crate) mod procmap;
pub(crate) mod scratch;
pub(crate) mod signals;
pub(crate) mod smaps;
pub(crate) mod stack;
pub(crate) mod symbols;
pub(crate) mod territory;
pub mod thread;
pub(crate) mod threads;
pub(crate) mod uffd;
pub(crate) mod vram;
pub(crate) mod waits;
pub(crate) mod word;
