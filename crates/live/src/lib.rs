//! The live host: this process's real memory, shared with devices. A whole program that uses it stands
//! [at the end](#embedding-it).
//!
//! | module | what |
//! |---|---|
//! | [`LiveSpace`] (`space`) | the process as an [`AddressSpace`](gpusvm::seam::mm::AddressSpace) |
//! | `mappings` | the process's mappings, as the framework sees them |
//! | `fault_in`, `snapshot` | where pages are, for a device, with and without a fault |
//! | `exclusive` | pages that a device has for itself |
//! | `residency` | which pages are away, or on their way |
//! | `spans`, `large` | sets of addresses; huge pages that are away |
//! | `watch` | which mappings raise faults and brackets |
//! | `stays` | memory that never leaves: control blocks of threads, and their like |
//! | `migrate`, `leg`, `legs`, `staging` | pages leave and return, by `UFFDIO_MOVE` or through the migratable heap |
//! | `read_only` | pages leave mappings that may not be written |
//! | `shard`, `pool`, `reader` | userfaultfds, and the threads that serve CPU faults |
//! | `in_thread` | CPU faults that are served where they occur |
//! | `bracket`, `inside` | address-space calls, seen before they happen; who is inside an invalidation |
//! | `fork`, `attendant` | what children get, and dying processes |
//! | [`LiveEnv`] (`env`) | clock, locks, deferred work |
//! | `level` | what the system allows, and what follows |
//! | [`FaultLoop`] (`yardstick`) | what benches compare faults with |
//! | [`program`], `claim` | what programs do that needs `unsafe`, for scenarios |
//! | [`scratch`] | a process to try address-space calls in |
//! | `stall` | who waits for whom, where nothing moves any more |
//! | `sys` | every `unsafe`, and nothing that knows what it is for |
//!
//! Lock order: host mm (`watch`, then notifiers, then `residency`) → notifier → vram → leaf
//! (`staging`, `stays`).
//!
//! # Embedding it
//!
//! A program that opens a live space declares the allocator that keeps the runtime's own memory
//! apart. This one does, and lets the software GPU compute on a vector of its own:
//!
//! ```
#![doc = include_str!("../examples/embed.rs")]
//! ```

mod attendant;
mod bracket;
mod claim;
mod env;
mod exclusive;
mod fault_in;
mod fork;
mod in_thread;
mod inside;
mod large;
mod leg;
mod legs;
mod level;
mod mappings;
mod migrate;
mod pool;
mod read_only;
mod reader;
mod residency;
mod shard;
mod snapshot;
mod space;
mod spans;
mod staging;
mod stall;
mod stays;
mod sys;
#[cfg(test)]
mod toy;
mod watch;
mod yardstick;

/// What programs do that code without `unsafe` cannot: for scenarios and torture.
pub mod program {
    pub use crate::claim::Claim;
    pub use crate::sys::child::{By, Child, Ended};
    pub use crate::sys::lend::{Break, PipedPages, Ring, Transfer};
    pub use crate::sys::library::Library;
}

/// A span of addresses in a process of its own, to see what the system does with calls.
pub mod scratch {
    pub use crate::sys::scratch::call::{
        AREAS, Answer, Area, BATCH, Call, How, Kind, Look, PAGES, PROCESSES, Place, STEPS, Seen,
        Step, face, flag, flag_names,
    };
    pub use crate::sys::scratch::{Scratch, ScratchError};
}

pub use env::LiveEnv;
pub use fork::begin_anew;
pub use in_thread::ComputeOnly;
pub use inside::is_invalidating;
pub use level::{
    BracketChoice, BracketLevel, FaultLevel, Holes, Level, LevelChoice, LiveConfig, OpenError,
    Sharding, allocate_for,
};
pub use migrate::LiveMigration;
pub use space::LiveSpace;
pub use stall::{ReaderState, ThreadState, Wait, lies_in, threads};
pub use sys::arena::{RuntimeAlloc, RuntimeScope, is_installed};
pub use sys::atfork::is_child;
pub use sys::bare_signal::TakenOver;
pub use sys::fault_copy::LiveBus;
pub use sys::file::FileMapping;
pub use sys::futex::RawFutexMutex;
pub use sys::mapping::{AnonMapping, Huge, Protect};
pub use sys::patch::PatchError;
pub use sys::probe::{Facts, memory_available, probe};
pub use sys::territory::{Advise, Backing, Leave, Territory};
pub use sys::thread;
pub use sys::vram::{LiveVram, VramMode};
pub use sys::waits::Reason;
pub use yardstick::{FaultLoop, SignalLoop};

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: RuntimeAlloc = RuntimeAlloc;
