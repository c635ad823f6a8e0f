//! A software GPU.
//!
//! It has memory, an MMU that walks page tables in that memory, a TLB per execution unit, a bounded
//! fault ring, a copy engine, and units that run kernels. It knows no driver and no framework: the
//! driver reaches it through [`DevicePort`](gpusvm_abi::bus::DevicePort), and it reaches the world
//! through [`SystemBus`](gpusvm_abi::bus::SystemBus), [`VramStore`](gpusvm_abi::bus::VramStore) and
//! [`Park`](gpusvm_abi::bus::Park).
//!
//! | module | what |
//! |---|---|
//! | [`device`] | [`SoftGpu`]: the device and its port |
//! | `mmu` | the page-table walk, decoding with code of its own |
//! | `tlb` | cached translations of one unit |
//! | `shootdown` | how TLB invalidations reach units, and how they acknowledge |
//! | `fault_ring` | faults that wait for service |
//! | `copy` | the copy engine |
//! | `unit` | one access of one unit: translate, fault, copy |
//! | `updating` | atomics on host memory |
//! | `look` | what page tables say, for whoever checks them |
//! | `sync` | the atomics of `shootdown`, in whose place tests put others |
//! | [`work`] | [`Kernel`], [`Tile`], [`Dispatch`] |
//!
//! Kernels are plain safe Rust over **local tiles**: a work-group loads spans of device addresses
//! into private buffers, computes, and stores back. So every access is translated and can fault,
//! and memory-bound kernels still run near native speed.
//!
//! ```text
//!   Kernel ─ Tile ─▶ unit: enter ─ TLB hit? ─ copy ─ leave
//!                              └ miss: walk ┘└ no entry: leave, fault, again
//! ```
//!
//! Threads come from the embedder: each calls [`SoftGpu::run`] for one unit.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod copy;
pub mod device;
mod fault_ring;
mod look;
mod mmu;
mod shootdown;
#[cfg(test)]
mod shootdown_tests;
mod sync;
#[cfg(test)]
mod tests;
mod tlb;
mod unit;
mod updating;
pub mod work;

pub use copy::COPY_JOB_BYTES;
pub use device::{ConfigError, FaultService, GpuConfig, Planted, SoftGpu, UnitState};
pub use look::{Translation, Walked};
pub use updating::SmemAtomics;
pub use work::{DeviceFault, Dispatch, Kernel, Stop, Tile};
