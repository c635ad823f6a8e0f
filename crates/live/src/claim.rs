//! Another user of userfaultfd in the same process, as garbage collectors and virtual machines are.
//!
//! The system gives a mapping to one descriptor only. What a [`Claim`] has, the live host cannot
//! have: devices use such memory in place.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_abi::bus::SystemBus;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::level::OpenError;
use crate::sys::fault_copy::LiveBus;
use crate::sys::mapping::RuntimeMapping;
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::{Features, Message, OpenMode, RegisterMode, Uffd};

/// Memory whose missing pages somebody else fills: with one word, all over.
#[derive(Debug)]
pub struct Claim {
    stop: Arc<OwnedFd>,
    thread: Option<RuntimeThread>,
}

#[derive(Debug)]
struct Pager {
    uffd: Uffd,
    /// One page with the content of all.
    content: RuntimeMapping,
}

impl Claim {
    /// Claims mappings and serves their faults with pages full of `word`, until this is dropped.
    ///
    /// # Errors
    /// What the system refuses; `EBUSY` where somebody else has some of it.
    pub fn take(span: HostSpan, word: u64) -> Result<Self, OpenError> {
        let uffd = Uffd::open(OpenMode::Full, Features::NONE)
            .or_else(|_forbidden| Uffd::open(OpenMode::UserModeOnly, Features::NONE))
            .map_err(OpenError::NoUffd)?;
        let content = RuntimeMapping::new(PAGE).map_err(OpenError::os("map a page"))?;
        for at in (0..PAGE).step_by(8) {
            // The memory is this value's own.
            let _written =
                LiveBus.write(content.span().start().plus(at).get(), &word.to_ne_bytes());
        }
        uffd.register(span, RegisterMode::MissingAndWriteProtect)
            .map_err(OpenError::os("register memory"))?;
        let stop =
            Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(OpenError::os("make an eventfd"))?);
        let told = Arc::clone(&stop);
        let pager = Pager { uffd, content };
        let thread = thread::spawn("other-pager", move || pager.serve(&told))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The counter of an eventfd takes this write in any state it can have here.
        let _written = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

impl Pager {
    fn serve(&self, stop: &OwnedFd) {
        let mut messages = [const { Message::None }; 1];
        while self.uffd.wait_readable(stop.as_fd(), None) {
            if self.uffd.read(&mut messages) == Ok(1)
                && let Message::Fault { at } = messages[0]
            {
                self.fill(at.align_down(PAGE));
            }
        }
    }

    fn fill(&self, at: HostVa) {
        let from = HostSpan::at(self.content.span().start(), PAGE);
        while self.uffd.copy(at, from).error == Some(Errno::AGAIN) {}
        // Refused only where the mapping is gone.
        let _woken = self.uffd.wake(HostSpan::at(at, PAGE));
    }
}
