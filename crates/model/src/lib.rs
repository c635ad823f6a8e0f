//! The model host: a process that exists only in memory.
//!
//! * [`mm`]: the memory management of Linux 6.18 for one or several processes, as plain data that
//!   clones, hashes and compares cheaply: mappings, CPU page tables with every kind of entry,
//!   folios, reverse maps, swap, files. Operations run in steps, so that others can run between.
//! * [`kernel`]: the layer around it that runs those steps as Linux does: under the mmap lock,
//!   inside the brackets of interval notifiers, with switch points between them. It offers the
//!   framework's [`AddressSpace`](gpusvm::seam::mm::AddressSpace) and the device's
//!   [`SystemBus`](gpusvm_abi::bus::SystemBus).
//! * [`mm::check`]: one function that says whether a state makes sense.
//! * [`sched`]: a deterministic scheduler for worlds of a few actors: virtual time, locks, choices, replay,
//!   exploration. It knows nothing of the mm.
//!
//! What a rule rests on is said where it stands; measured facts are those of Linux 6.18.
#![deny(unsafe_code)]

pub mod kernel;
pub mod mm;
pub mod sched;
