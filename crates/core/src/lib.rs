//! GPU shared virtual memory: the framework.
//!
//! A device uses the memory of a process by address. The framework decides which piece of memory a
//! device fault brings in, moves its pages, gathers where they are, and makes sure that no device
//! uses a page any more when the process changes its address space.
//!
//! Who writes a host or a driver begins with the [example](#all-of-it-on-a-toy-platform). Who wants a device on
//! the memory of a program begins with the crate `gpusvm-live`, whose page has a whole program.
//!
//! | module | what | in Linux |
//! |---|---|---|
//! | [`svm`] | notifiers and ranges of one device address space | `drm_gpusvm` |
//! | [`range`], [`chunk`], [`pages`] | what a range is, how large, where its pages are | `drm_gpusvm_range`, `drm_gpusvm_pages` |
//! | [`mmu`] | the sequence protocol between faults and invalidations | `mmu_interval_notifier` |
//! | [`pagemap`] | device memory as a place for pages, and the ways there and back | `drm_pagemap` |
//! | [`vram`] | allocation and eviction of device memory | buddy, TTM |
//! | [`table`] | the page-table engine | `xe_pt` |
//! | [`seam`] | what a host, a device and an environment must offer: traits only | |
//! | [`addr`], [`error`], [`event`] | addresses, the two kinds of error, what can be observed | |
//! | `notifier_held` | the proof that the notifier lock is held, [`NotifierHeld`] | |
//! | [`mutant`] | known bugs that test worlds can have again | |
//!
//! The rule that everything rests on is in [`svm`]: entries are written under the notifier lock
//! after the sequence was checked, and an invalidation takes that lock after it has moved the
//! sequence. The crate knows no driver, no device, no operating system, no clock and no thread.
//!
//! # All of it on a toy platform
//!
//! ```
#![doc = include_str!("../examples/toy.rs")]
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod addr;
pub mod chunk;
pub mod error;
pub mod event;
pub mod mmu;
pub mod mutant;
mod notifier_held;
pub mod pagemap;
pub mod pages;
pub mod range;
pub mod seam;
pub mod svm;
pub mod table;
#[cfg(test)]
mod test_env;
pub mod vram;

pub use notifier_held::NotifierHeld;
