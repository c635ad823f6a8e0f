//! What userfaultfd tells.

use core::mem::size_of;
use std::os::fd::{FromRawFd, OwnedFd};

use gpusvm::addr::{HostSpan, HostVa};

use super::{Features, Uffd};

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawMessage {
    event: u8,
    reserved: [u8; 7],
    arg: [u64; 3],
}

const _: () = assert!(size_of::<RawMessage>() == 32);

/// One message.
#[derive(Debug)]
pub(crate) enum Message {
    /// An empty place in a batch.
    None,
    /// A thread waits for the page at `at`.
    Fault {
        /// Faulting address.
        at: HostVa,
    },
    /// A span was unmapped.
    Unmap(HostSpan),
    /// A span moved.
    Remap {
        /// Where it was.
        from: HostSpan,
        /// Where it starts now.
        to: HostVa,
    },
    /// The content of a span is about to be dropped.
    Remove(HostSpan),
    /// The process forked; the child's memory.
    Fork(Uffd),
}

impl Message {
    /// Whether it is news of a change, and no fault.
    pub(crate) const fn is_event(&self) -> bool {
        !matches!(self, Self::Fault { .. } | Self::None)
    }
}

/// One message, from its bytes.
pub(super) fn decode(bytes: &[u8]) -> Message {
    let word = |n: usize| {
        let at = n * 8;
        bytes
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_ne_bytes)
    };
    let span = |start, end| HostSpan::new(HostVa::new(start), HostVa::new(end));
    match bytes.first() {
        Some(0x12) => Message::Fault {
            at: HostVa::new(word(2)),
        },
        Some(0x13) => {
            let fd = i32::try_from(word(1) & 0xffff_ffff).unwrap_or(-1);
            // SAFETY: the kernel made this descriptor for the reader of the message, which is us.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            Message::Fork(Uffd::over(fd, Features::NONE))
        }
        Some(0x14) => Message::Remap {
            from: HostSpan::at(HostVa::new(word(1)), word(3)),
            to: HostVa::new(word(2)),
        },
        Some(0x15) => Message::Remove(span(word(1), word(2))),
        Some(0x16) => Message::Unmap(span(word(1), word(2))),
        _ => Message::None,
    }
}
