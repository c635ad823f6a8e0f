//! The least that a fault served by another thread costs, for benches to compare with.
//!
//! [`FaultLoop`] is a userfaultfd with nothing behind it: a thread waits for a message, copies one
//! page in, and wakes. Whatever the live host does for a CPU fault comes on top of this.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm_abi::bus::SystemBus;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::level::{Descriptors, LiveConfig, OpenError};
use crate::sys::advise;
use crate::sys::fault_copy::LiveBus;
use crate::sys::mapping::RuntimeMapping;
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::{Message, RegisterMode, Uffd};

/// A page that faults, and the thread that serves it.
#[derive(Debug)]
pub struct FaultLoop {
    served: Arc<Served>,
    stop: Arc<OwnedFd>,
    thread: Option<RuntimeThread>,
}

#[derive(Debug)]
struct Served {
    uffd: Uffd,
    memory: RuntimeMapping,
}

impl Served {
    fn page(&self) -> HostSpan {
        HostSpan::at(self.memory.span().start(), PAGE)
    }

    /// What is copied in.
    fn source(&self) -> HostSpan {
        HostSpan::at(self.page().end(), PAGE)
    }
}

impl FaultLoop {
    /// Maps the page and starts the thread.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn start() -> Result<Self, OpenError> {
        // The one without events: nobody has to read of the page that is dropped.
        let uffd = Descriptors::open(&LiveConfig::default())?.staging;
        let memory =
            RuntimeMapping::new(2 * PAGE).map_err(OpenError::os("map memory that faults"))?;
        advise::no_huge_pages(memory.span());
        let served = Arc::new(Served { uffd, memory });
        advise::populate_write(served.source()).map_err(OpenError::os("fill a page"))?;
        served
            .uffd
            .register(served.page(), RegisterMode::MissingAndWriteProtect)
            .map_err(OpenError::os("register a page"))?;
        let stop =
            Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(OpenError::os("make an eventfd"))?);
        let (work, told) = (Arc::clone(&served), Arc::clone(&stop));
        let thread = thread::spawn("gpusvm-yardstick", move || serve(&work, &told))?;
        Ok(Self {
            served,
            stop,
            thread: Some(thread),
        })
    }

    /// Drops the page's content, so that the next [`touch`](Self::touch) faults.
    pub fn drop_page(&self) {
        advise::drop_pages(self.served.page());
    }

    /// Reads a word of the page; waits for the thread where the page is missing.
    pub fn touch(&self) {
        let mut word = [0; 8];
        let page = self.served.page().start().get();
        // The memory lives as long as `self`.
        let _read = LiveBus.read(page, &mut word);
    }
}

impl Drop for FaultLoop {
    fn drop(&mut self) {
        // The counter of an eventfd takes this write in any state it can have here.
        let _written = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

fn serve(served: &Served, stop: &OwnedFd) {
    let mut messages = [const { Message::None }; 1];
    loop {
        if !served.uffd.wait_readable(stop.as_fd(), None) {
            return;
        }
        if served.uffd.read(&mut messages) != Ok(1) || !matches!(messages[0], Message::Fault { .. })
        {
            continue;
        }
        let page = served.page();
        while served.uffd.copy(page.start(), served.source()).error == Some(Errno::AGAIN) {}
        // Refused only where the mapping is gone.
        let _woken = served.uffd.wake(page);
    }
}
