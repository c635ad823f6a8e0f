//! The gpusvm command: its parts as a library, for the binary and for tests.
//!
//! [`machine`] puts a host, a driver and a device together; [`workload`] is what runs on it; the
//! other modules are the command line and what it shows.
#![forbid(unsafe_code)]

pub mod args;
pub mod atomics;
pub mod bench;
pub mod conformance;
mod cpu_time;
pub mod explore;
pub mod folder;
pub mod info;
pub mod machine;
pub mod notes;
mod on_tile;
pub mod page;
pub mod progress;
pub mod report;
pub mod run;
pub mod scenario;
pub mod size;
pub mod table;
pub mod timeline;
mod torture;
pub mod workload;
mod world;
