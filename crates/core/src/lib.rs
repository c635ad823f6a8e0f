//! GPU shared virtual memory: the framework.
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
mod notifier_held;
pub mod pagemap;
pub mod range;
pub mod seam;
pub mod svm;
pub mod table;
#[cfg(test)]
mod test_env;
pub mod vram;

pub use notifier_held::NotifierHeld;
