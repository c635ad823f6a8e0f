//! GPU shared virtual memory: the framework.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod addr;
pub mod error;
pub mod event;
pub mod mmu;
pub mod seam;
