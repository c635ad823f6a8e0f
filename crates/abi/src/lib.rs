//! The contracts between gpusvm's parts that are not Rust types of the framework: hardware
//! layouts as plain data, and the two buses.
//!
//! * [`pte`]: the bits of a page-table entry (Xe layout).
//! * [`fault`]: the record that a device writes for a page fault, and the answer to it.
//! * [`bus`]: what a device may do to host memory ([`bus::SystemBus`]), what memory a device is
//!   given ([`bus::VramStore`]), and what a driver may do to a device ([`bus::DevicePort`]).
//!
//! Nothing in here has logic beyond reading and writing bit fields. Addresses are plain integers:
//! the driver has its own address types, the device has its own, and the only conversions stand in
//! the driver. The driver *encodes* entries and the device *decodes* them, each with code of its
//! own: two independent readings of one format check each other.
#![no_std]
#![forbid(unsafe_code)]

pub mod bus;
pub mod fault;
pub mod pte;
