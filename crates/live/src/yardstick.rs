//! The least that a served fault costs, for benches to compare with.
//!
//! [`FaultLoop`] is a userfaultfd with nothing behind it: a thread waits for a message, copies one
//! page in, and wakes. [`SignalLoop`] does without the thread: the one that faults copies the page
//! in, in a signal handler. Whatever the live host does for a CPU fault comes on top of these.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm_abi::bus::SystemBus;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::level::{Descriptors, LiveConfig, OpenError};
use crate::sys::advise;
use crate::sys::bare_signal::{self, BarePage, TakenOver};
use crate::sys::fault_copy::LiveBus;
use crate::sys::mapping::RuntimeMapping;
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::{Features, Message, OpenMode, RegisterMode, Uffd};

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
        // The memory lives as long as `self`.
        read_word(self.served.page());
    }
}

fn read_word(page: HostSpan) {
    let _read = LiveBus.read(page.start().get(), &mut [0; 8]);
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

/// A page that faults, and that the faulting thread fills.
#[derive(Clone, Copy, Debug)]
pub struct SignalLoop(&'static BarePage);

impl SignalLoop {
    /// Maps the page, for the life of the process.
    ///
    /// # Errors
    /// What the system refuses; `ENOTSUP` where it has no such faults.
    pub fn start() -> Result<Self, OpenError> {
        let uffd = Uffd::open(OpenMode::UserModeOnly, Features::SIGBUS)
            .map_err(OpenError::os("open a userfaultfd"))?;
        if !uffd.features().contains(Features::SIGBUS) {
            return Err(OpenError::os("have faults as signals")(Errno::NOTSUP));
        }
        let memory =
            RuntimeMapping::new(2 * PAGE).map_err(OpenError::os("map memory that faults"))?;
        advise::no_huge_pages(memory.span());
        let page = HostSpan::at(memory.span().start(), PAGE);
        let source = HostSpan::at(page.end(), PAGE);
        advise::populate_write(source).map_err(OpenError::os("fill a page"))?;
        uffd.register(page, RegisterMode::MissingAndWriteProtect)
            .map_err(OpenError::os("register a page"))?;
        Ok(Self(Box::leak(Box::new(BarePage {
            uffd,
            _memory: memory,
            page,
            source,
        }))))
    }

    /// Drops the page's content, and takes SIGBUS over until the answer is dropped: a
    /// [`touch`](Self::touch) meanwhile faults, and is served.
    pub fn prepare(&self) -> TakenOver {
        advise::drop_pages(self.0.page);
        bare_signal::take_over(self.0)
    }

    /// Reads a word of the page.
    pub fn touch(&self) {
        read_word(self.0.page);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signal_is_the_yardsticks_only_while_it_is_taken_over() {
        let Ok(bare) = SignalLoop::start() else {
            return;
        };
        // Whoever has the signal otherwise makes an error of a fault in such a read.
        let bus = LiveBus::new();
        for _ in 0..3 {
            let taken = bare.prepare();
            bare.touch();
            let page = bare.0.page.start().get();
            assert!(bus.read(page, &mut [0; 8]).is_ok());
            drop(taken);
            advise::drop_pages(bare.0.page);
            assert!(bus.read(page, &mut [0; 8]).is_err());
        }
    }
}
