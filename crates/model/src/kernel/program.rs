//! What a program does in its process: system calls, loads and stores; and what the system does to
//! it: reclaim, merging, memory errors.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PageCount, VramSpan};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::Access;
use gpusvm_abi::bus::AtomicOp;

use crate::kernel::space::ModelSpace;
use crate::mm::around::Around;
use crate::mm::entry::Entry;
use crate::mm::errno::{Errno, Signal};
use crate::mm::fault::{Hit, fault};
use crate::mm::file::FileId;
use crate::mm::flags::Prot;
use crate::mm::map::Map;
use crate::mm::memory::{FrameId, load_bytes, store_bytes};
use crate::mm::remap::Remap;
use crate::mm::{advise, fork, ksm, map, protect, reclaim, remap};

/// How many of `len` bytes from `at` on lie in the page of `at`.
fn in_page(at: HostVa, len: usize) -> usize {
    let room = usize::try_from(PAGE - at.get() % PAGE).unwrap_or(usize::MAX);
    len.min(room)
}

impl<E: Environment> ModelSpace<E> {
    /// `mmap`.
    ///
    /// # Errors
    /// As the system call.
    pub fn mmap(&self, map: &Map) -> Result<HostVa, Errno> {
        map::mmap(&*self.kernel, self.pid, map)
    }

    /// A new memory file of so many pages of zeros.
    #[must_use]
    pub fn create_file(&self, pages: u32) -> FileId {
        self.kernel.with(|mm| mm.create_file(pages))
    }

    /// `munmap`.
    ///
    /// # Errors
    /// As the system call.
    pub fn munmap(&self, at: HostVa, len: u64) -> Result<(), Errno> {
        map::munmap(&*self.kernel, self.pid, at, len)
    }

    /// `mprotect`.
    ///
    /// # Errors
    /// As the system call.
    pub fn mprotect(&self, at: HostVa, len: u64, prot: Prot) -> Result<(), Errno> {
        protect::mprotect(&*self.kernel, self.pid, at, len, prot)
    }

    /// `mremap`.
    ///
    /// # Errors
    /// As the system call.
    pub fn mremap(&self, remap: &Remap) -> Result<HostVa, Errno> {
        remap::mremap(&*self.kernel, self.pid, remap)
    }

    /// `madvise`, by the number of the advice.
    ///
    /// # Errors
    /// As the system call.
    pub fn madvise(&self, at: HostVa, len: u64, advice: i32) -> Result<(), Errno> {
        advise::madvise(&*self.kernel, self.pid, at, len, advice)
    }

    /// `process_madvise` of the process itself.
    ///
    /// # Errors
    /// As the system call.
    pub fn process_madvise(&self, spans: &[HostSpan], advice: i32) -> Result<u64, Errno> {
        let spans: Vec<_> = spans
            .iter()
            .map(|span| (span.start(), span.bytes()))
            .collect();
        advise::process_madvise(&*self.kernel, self.pid, &spans, advice)
    }

    /// `mlock`.
    ///
    /// # Errors
    /// As the system call.
    pub fn mlock(&self, at: HostVa, len: u64) -> Result<(), Errno> {
        protect::mlock(&*self.kernel, self.pid, at, len)
    }

    /// `munlock`.
    ///
    /// # Errors
    /// As the system call.
    pub fn munlock(&self, at: HostVa, len: u64) -> Result<(), Errno> {
        protect::munlock(&*self.kernel, self.pid, at, len)
    }

    /// `fork`: the child's address space.
    ///
    /// # Errors
    /// As the system call.
    pub fn fork(&self) -> Result<Arc<Self>, Errno> {
        let child = fork::fork(&*self.kernel, self.pid)?;
        Ok(Self::of(&self.kernel, child))
    }

    /// The process ends: its memory goes.
    pub fn exit(&self) {
        fork::exit(&*self.kernel, self.pid);
    }

    /// Clears soft-dirty bits (`clear_refs`).
    pub fn clear_soft_dirty(&self) {
        protect::clear_soft_dirty(&*self.kernel, self.pid);
    }

    /// Loads the word at `at`, which is 8-byte aligned.
    ///
    /// # Errors
    /// The signal that the thread gets.
    pub fn load(&self, at: HostVa) -> Result<u64, Signal> {
        self.touch_word(at, Access::Read, |word| *word)
    }

    /// Stores the word at `at`, which is 8-byte aligned.
    ///
    /// # Errors
    /// The signal that the thread gets.
    pub fn store(&self, at: HostVa, value: u64) -> Result<(), Signal> {
        self.touch_word(at, Access::Write, |word| *word = value)
    }

    /// Updates the word at `at` and returns what it was.
    ///
    /// # Errors
    /// The signal that the thread gets.
    pub fn atomic(&self, at: HostVa, op: AtomicOp) -> Result<u64, Signal> {
        self.touch_word(at, Access::Write, |word| {
            let old = *word;
            *word = op.apply(old);
            old
        })
    }

    /// Loads bytes from `at` on, page by page: what others store meanwhile may be half there.
    ///
    /// # Errors
    /// The signal that the thread gets; a prefix is loaded then.
    pub fn read(&self, at: HostVa, out: &mut [u8]) -> Result<(), Signal> {
        let mut left = out;
        let mut at = at;
        while !left.is_empty() {
            let (piece, rest) = left.split_at_mut(in_page(at, left.len()));
            self.touch(at, Access::Read, |words, offset| {
                load_bytes(words, offset, piece);
            })?;
            at = at.plus(piece.len() as u64);
            left = rest;
        }
        Ok(())
    }

    /// Stores bytes from `at` on, page by page.
    ///
    /// # Errors
    /// The signal that the thread gets; a prefix is stored then.
    pub fn write(&self, at: HostVa, bytes: &[u8]) -> Result<(), Signal> {
        let mut left = bytes;
        let mut at = at;
        while !left.is_empty() {
            let (piece, rest) = left.split_at(in_page(at, left.len()));
            self.touch(at, Access::Write, |words, offset| {
                store_bytes(words, offset, piece);
            })?;
            at = at.plus(piece.len() as u64);
            left = rest;
        }
        Ok(())
    }

    /// Accesses the word at `at`. A word that pages of this machine do not have reads as zero.
    fn touch_word<R>(
        &self,
        at: HostVa,
        access: Access,
        act: impl FnOnce(&mut u64) -> R,
    ) -> Result<R, Signal> {
        self.touch(at, access, |words, offset| {
            act(words.get_mut(offset / 8).unwrap_or(&mut 0))
        })
    }

    /// Makes an access, faulting until it can be made. `act` is given the words that the page at `at` has,
    /// none where it is the page of zeros, and the offset of `at` in the page.
    fn touch<R>(
        &self,
        at: HostVa,
        access: Access,
        act: impl FnOnce(&mut [u64], usize) -> R,
    ) -> Result<R, Signal> {
        let offset = usize::try_from(at.get() % PAGE).unwrap_or(0);
        let page = self.kernel.shape().page(at).ok_or(Signal::Segv)?;
        let mut act = Some(act);
        loop {
            let done = self.kernel.with(|mm| {
                let hit = mm.access(self.pid, page, access)?;
                let act = act.take()?;
                let words = match hit {
                    Hit::Frame(frame) => mm.memory.content_mut(frame),
                    Hit::Zero => &mut [],
                };
                Some(act(words, offset))
            });
            match done {
                Some(result) => return Ok(result),
                None => fault(&*self.kernel, self.pid, page, access)?,
            }
        }
    }

    /// Reclaims the page at `at`, whoever else maps it. Returns whether it is free.
    #[must_use]
    pub fn reclaim(&self, at: HostVa) -> bool {
        let frame = self.present(at);
        frame.is_some_and(|frame| reclaim::reclaim(&*self.kernel, frame))
    }

    /// Has a memory error in the page at `at`, of host memory or of a device's, which is told.
    pub fn poison(&self, at: HostVa) {
        let Some(frame) = self.entry(at).and_then(Entry::mapped_frame) else {
            return;
        };
        let device = self.kernel.look(|mm| mm.memory().device_page(frame));
        let owner = device.and_then(|device| self.kernel.allocation(device.place));
        reclaim::poison(&*self.kernel, frame);
        if let (Some(device), Some(owner)) = (device, owner) {
            let offset = PageCount::new(device.page.into()).bytes();
            let first = owner.vram().start();
            owner.memory_failure(VramSpan::at(first.plus(offset), PAGE));
        }
    }

    /// Merges the page at `first` with the one at `second` of another process or this one.
    #[must_use]
    pub fn merge(&self, first: HostVa, other: &Self, second: HostVa) -> bool {
        let page = |at| self.kernel.shape().page(at);
        match (page(first), page(second)) {
            (Some(a), Some(b)) => ksm::merge(&*self.kernel, (self.pid, a), (other.pid, b)),
            (Some(_) | None, _) => false,
        }
    }

    /// Pins the page at `at`.
    ///
    /// # Errors
    /// The signal that the access would raise.
    pub fn pin(&self, at: HostVa, access: Access) -> Result<FrameId, Signal> {
        let page = self.kernel.shape().page(at).ok_or(Signal::Segv)?;
        reclaim::pin(&*self.kernel, self.pid, page, access)
    }

    /// Ends a pin.
    pub fn unpin(&self, frame: FrameId) {
        reclaim::unpin(&*self.kernel, frame);
    }

    /// The frame of the page at `at`, if it is present.
    fn present(&self, at: HostVa) -> Option<FrameId> {
        self.kernel.look(|mm| {
            let page = mm.shape().page(at)?;
            let entry = mm.entry(self.pid, page);
            entry
                .mapped_frame()
                .filter(|frame| !mm.memory().is_device(*frame))
        })
    }

    /// The entry of the page at `at`.
    #[must_use]
    pub fn entry(&self, at: HostVa) -> Option<Entry> {
        self.kernel
            .look(|mm| Some(mm.entry(self.pid, mm.shape().page(at)?)))
    }

    /// The pagemap word of the page at `at`.
    #[must_use]
    pub fn pagemap(&self, at: HostVa) -> u64 {
        self.kernel.look(|mm| {
            mm.shape()
                .page(at)
                .map_or(0, |page| mm.pagemap(self.pid, page))
        })
    }
}
