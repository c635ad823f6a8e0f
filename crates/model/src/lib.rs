//! The model host: a world that exists only in memory.
//!
//! | module | what |
//! |---|---|
//! | [`sched`] | a deterministic scheduler: actors, virtual time, locks, choices, replay, exploration |
#![deny(unsafe_code)]

pub mod sched;
