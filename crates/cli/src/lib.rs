//! The gpusvm command: its parts as a library, for the binary and for tests.
#![forbid(unsafe_code)]

pub mod machine;
