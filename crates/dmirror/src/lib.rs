//! The HMM test device: a driver straight on the host's memory management.
//!
//! Linux tests its heterogeneous memory management with a device that exists only in a module
//! (`test_hmm`): it mirrors the address space of whoever opens it, reads and writes through a table
//! of its own, and has memory to which pages can migrate. This is that device as a second driver of
//! the framework's host seam ([`AddressSpace`](gpusvm::seam::mm::AddressSpace)): no ranges, no
//! command streams, ten commands.
//!
//! | module | what |
//! |---|---|
//! | [`Device`] (`device`) | a node: its memory, its allocations |
//! | [`Mirror`] (`mirror`) | an open file: the commands, in the order of their checks |
//! | [`uapi`] | numbers and layouts of the commands, and what they answer |
//! | `table` | the device's page table, and the sink of invalidations |
//! | `fault`, `migrate`, `block` | pages come in reach; go to the device; come home |
//! | `memory` | the device's memory as a place for pages |
//!
//! ```text
//!   command ─▶ mirror ─┬─ table ◀───────────── invalidations ── host
//!                      ├─ fault ── fault_in, snapshot ────────▶ host
//!                      └─ migrate ─ block ── migrate_begin ───▶ host
//! ```
//!
//! Lock order: table (the notifier lock) → memory (a leaf). Neither is held across a call of the
//! host, but for the table in [`make_exclusive`](gpusvm::seam::mm::AddressSpace::make_exclusive)'s
//! commit.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod block;
mod device;
mod fault;
mod memory;
mod migrate;
mod mirror;
mod table;
pub mod uapi;

pub use device::{Device, DeviceConfig, Kind};
pub use mirror::Mirror;
