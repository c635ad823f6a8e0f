//! The reference driver: shared virtual memory in the manner of the Xe kernel driver.
//!
//! | module | what | flow |
//! |---|---|---|
//! | [`device`] | one device: port, memory, VMs by address-space id | |
//! | [`vm`] | one device address space and its mirror areas | |
//! | [`fault`] | a device fault, from record to answer | device fault |
//! | [`prefetch`] | pages move because the program says so | |
//! | [`atomics`] | where a device does its atomics (pure) | device fault |
//! | [`place`] | where the pages of a fault should be (pure) | device fault |
//! | [`bind`] | page-table entries of one range | device fault |
//! | [`format`] | how entries are encoded | device fault |
//! | [`store`] | page tables in device memory | device fault |
//! | [`copy`] | moves of pages become jobs of the copy engine | device fault, CPU fault |
//! | [`invalidate`] | entries go away because host memory changes | invalidation |
//! | [`collect`] | dead ranges are removed | |
//! | [`stats`] | per-GT counters with the kernel's names: a fold over events | |
//!
//! The driver knows neither host nor device: hosts stand behind
//! [`AddressSpace`](gpusvm::seam::mm::AddressSpace), devices behind
//! [`DevicePort`](gpusvm_abi::bus::DevicePort).
//!
//! Lock order: `vm` ([`vm::Vm`]'s state) → host mm → notifier → vram → leaf ([`device::Device`]'s
//! table of VMs, which is never held across a call).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod atomics;
pub mod bind;
pub mod collect;
pub mod copy;
pub mod device;
pub mod fault;
pub mod format;
pub mod invalidate;
pub mod place;
pub mod prefetch;
pub mod stats;
pub mod store;
pub mod vm;
