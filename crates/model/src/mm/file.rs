//! Files: what shared and file-backed mappings map. Their pages stay in memory once read, as those
//! of a memory file do; a file starts with content of its own or empty.

use crate::mm::memory::{FrameId, Owner, index32};
use crate::mm::vma::{Backing, Vma};
use crate::mm::{Machine, Process};

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct File {
    /// Pages in the page cache; its length is the file's.
    pub(crate) pages: Vec<Option<FrameId>>,
    /// Who keeps it.
    pub(crate) named: Named,
}

/// A file of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

impl Machine {
    /// A new memory file of `pages` pages of zeros, with a name.
    pub fn create_file(&mut self, pages: u32) -> FileId {
        self.make_file(pages, Named::Yes)
    }

    /// The nameless file behind a shared anonymous mapping.
    pub(crate) fn make_file(&mut self, pages: u32, named: Named) -> FileId {
        let file = File {
            pages: vec![None; pages as usize],
            named,
        };
        let unused = |file: &File| file.named == Named::Gone;
        match self.files.iter().position(unused) {
            Some(at) => {
                self.files[at] = file;
                FileId(index32(at))
            }
            None => {
                self.files.push(file);
                FileId(index32(self.files.len() - 1))
            }
        }
    }

    /// A file.
    #[must_use]
    pub fn file(&self, file: FileId) -> &File {
        &self.files[file.0 as usize]
    }

    pub(crate) fn file_mut(&mut self, file: FileId) -> &mut File {
        &mut self.files[file.0 as usize]
    }

    /// Page `index` of a file, read in where need be; `None` behind its end.
    pub(crate) fn cached_page(
        &mut self,
        file: FileId,
        index: u32,
    ) -> Result<Option<FrameId>, NoFrame> {
        let Some(slot) = self.file(file).pages.get(index as usize) else {
            return Ok(None);
        };
        if let Some(frame) = *slot {
            return Ok(Some(frame));
        }
        let owner = Owner::File(file.0, index);
        let frame = self.memory.allocate(0, owner).ok_or(NoFrame)?;
        self.get(frame);
        self.file_mut(file).pages[index as usize] = Some(frame);
        Ok(Some(frame))
    }

    /// Drops a page of a file from the cache, and with it its content.
    pub(crate) fn drop_cached(&mut self, file: FileId, index: u32) {
        let slot = self.file_mut(file).pages.get_mut(index as usize);
        if let Some(frame) = slot.and_then(Option::take) {
            self.put(frame);
        }
    }

    /// A mapping of the file is gone: a nameless file goes with its last one.
    pub(crate) fn unuse_file(&mut self, file: FileId) {
        let backing = Backing::File(file);
        let names = |vma: &Vma| vma.backing == backing;
        let used = |process: &Process| process.vmas.all().iter().any(names);
        if self.file(file).named != Named::No || self.processes.iter().any(used) {
            return;
        }
        for index in 0..index32(self.file(file).pages.len()) {
            self.drop_cached(file, index);
        }
        self.file_mut(file).named = Named::Gone;
    }
}

/// Whether a file can be found by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Named {
    /// It stays.
    Yes,
    /// It goes with its last mapping: shared anonymous memory.
    No,
    /// It has gone; the place is free.
    Gone,
}

/// Host memory is exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoFrame;
