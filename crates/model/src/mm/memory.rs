//! Page frames and folios: a fixed number of frames of host memory, then as many of coherent device
//! memory, which the CPU uses in place, then pages of private device memory.
//!
//! A folio is a naturally aligned run of frames with one reference count, kept at its first frame,
//! the *head*. A frame with reference count zero is free. Host frames are handed out in turn, so
//! that a freed one stays free for long: who still uses it is found out.

use zerocopy::IntoBytes;

use crate::mm::Shape;
use crate::mm::changes::Marks;
use crate::mm::entry::SlotId;
use crate::mm::rmap::RmapId;

/// A page frame. Those of host memory come first; behind them are the device pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId(pub u32);

impl FrameId {
    /// The frame as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The frame `n` further on.
    #[must_use]
    pub const fn plus(self, n: u32) -> Self {
        Self(self.0 + n)
    }
}

/// Whose content a folio holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Owner {
    /// Nobody's: the frame is free.
    #[default]
    Free,
    /// Private anonymous memory.
    Anon,
    /// Identical pages that were merged.
    Ksm,
    /// Private memory in a page of the pool of huge pages.
    HugePages,
    /// Page `1` of file `0`.
    File(u32, u32),
    /// Anonymous memory in page `1` of the device allocation in place `0` of the table.
    Device(u32, u32),
    /// Withdrawn after a memory error; never handed out again.
    Poisoned,
}

/// A page of a device allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePage {
    /// Place of the allocation in the table.
    pub place: u32,
    /// Which of its pages.
    pub page: u32,
}

flags! {
    /// State of a folio.
    FolioFlags: u8 {
        /// Differs from its copy in a file or in swap.
        DIRTY = 1;
        /// `MADV_FREE`: may be dropped while it is clean.
        LAZYFREE = 2;
        /// An operation has it; others come back later.
        LOCKED = 4;
        /// Used of late.
        ACTIVE = 8;
        /// Used since reclaim looked last.
        REFERENCED = 16;
    }
}

/// A frame, and its folio where it is a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Head of the folio; itself for a head and where free.
    pub head: u32,
    /// Order of the folio (head).
    pub order: u8,
    /// State of the folio (head).
    pub flags: FolioFlags,
    /// Whose content it is (head).
    pub owner: Owner,
    /// References to the folio (head): mappings, pins, caches, operations.
    pub refs: u32,
    /// Of these, pins by system calls and devices (head).
    pub pins: u32,
    /// Of these, operations under way (head).
    pub held: u32,
    /// Mappings of the whole folio by one block entry (head).
    pub entire: u32,
    /// Mappings of this very page by a small entry.
    pub mapcount: u32,
    /// The page belongs to one process alone, which may write it.
    pub exclusive: bool,
    /// A memory error was found in it.
    pub poisoned: bool,
    /// Slot in swap that has a copy, or had (head).
    pub swap: Option<SlotId>,
    /// First of its mappings (block mappings: at the head).
    pub rmap: Option<RmapId>,
}

/// All frames and the content of those in host memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Memory {
    pub(crate) frames: Vec<Frame>,
    words: Vec<u64>,
    host: u32,
    coherent: u32,
    per_page: u32,
    next: u32,
    free: u32,
    device_free: Vec<u32>,
    /// Frames that may have changed.
    pub(crate) changed: Marks,
    /// Allocations until one is refused; 0 where none will be.
    patience: u32,
    /// Allocations of host memory that were refused so far.
    refused: u32,
    /// Heads of large device folios that are free.
    device_free_large: Vec<u32>,
    /// Order of those.
    large: u8,
}

impl Memory {
    pub(crate) fn new(shape: &Shape) -> Self {
        let (host, coherent, per_page) = (shape.frames, shape.coherent, shape.words);
        let frames = host + coherent;
        let words = vec![0; (frames * per_page) as usize];
        let mut frames = vec![Frame::default(); frames as usize];
        for (frame, n) in frames.iter_mut().zip(0..) {
            frame.head = n;
        }
        Self {
            frames,
            words,
            host,
            coherent,
            per_page,
            next: 0,
            free: host,
            device_free: Vec::new(),
            changed: Marks::default(),
            patience: 0,
            refused: 0,
            device_free_large: Vec::new(),
            large: shape.pmd_order,
        }
    }

    /// Refuses one allocation, of host memory, a device page or a page table: the `nth` one from now,
    /// counted from 1; none, where it is 0.
    pub(crate) const fn refuse(&mut self, nth: u32) {
        self.patience = nth;
    }

    /// Allocations of host memory that were refused so far, by [`refuse`](crate::kernel::Kernel::refuse).
    #[must_use]
    pub const fn refused(&self) -> u32 {
        self.refused
    }

    /// Whether the allocation that is about to be made is to be refused.
    pub(crate) const fn is_refused(&mut self) -> bool {
        let due = self.patience == 1;
        self.patience = self.patience.saturating_sub(1);
        due
    }

    /// Frames of host memory.
    #[must_use]
    pub const fn host_frames(&self) -> u32 {
        self.host
    }

    /// Frames of coherent device memory, behind those of host memory.
    #[must_use]
    pub const fn coherent_frames(&self) -> u32 {
        self.coherent
    }

    /// Frames of host memory that are free.
    #[must_use]
    pub const fn free_frames(&self) -> u32 {
        self.free
    }

    /// Frames of all kinds that there have been so far.
    #[must_use]
    pub fn all_frames(&self) -> u32 {
        index32(self.frames.len())
    }

    /// Frames of host memory that somebody has; not those that were lost to an error.
    pub fn taken_frames(&self) -> impl Iterator<Item = FrameId> {
        let host = (0..self.host).map(FrameId);
        host.filter(|frame| !matches!(self.folio(*frame).owner, Owner::Free | Owner::Poisoned))
    }

    /// Words of content that every page has.
    #[must_use]
    pub const fn words_per_page(&self) -> u32 {
        self.per_page
    }

    /// A frame.
    #[must_use]
    pub fn frame(&self, frame: FrameId) -> &Frame {
        &self.frames[frame.index()]
    }

    pub(crate) fn frame_mut(&mut self, frame: FrameId) -> &mut Frame {
        self.changed.add(frame.0);
        &mut self.frames[frame.index()]
    }

    /// Head of the folio that `frame` is in.
    #[must_use]
    pub fn head(&self, frame: FrameId) -> FrameId {
        FrameId(self.frames[frame.index()].head)
    }

    /// The folio that `frame` is in.
    #[must_use]
    pub fn folio(&self, frame: FrameId) -> &Frame {
        self.frame(self.head(frame))
    }

    pub(crate) fn folio_mut(&mut self, frame: FrameId) -> &mut Frame {
        let head = self.head(frame);
        self.frame_mut(head)
    }

    /// Marks the folio that `frame` is in as written to. No rule looks at that: it is no change to look at.
    pub(crate) fn mark_dirty(&mut self, frame: FrameId) {
        let head = self.head(frame);
        let flags = &mut self.frames[head.index()].flags;
        *flags = flags.with(FolioFlags::DIRTY);
    }

    /// Frames of the folio at `head`.
    pub(crate) fn pages_of(&self, head: FrameId) -> impl Iterator<Item = FrameId> + use<> {
        (head.0..head.0 + (1 << self.frame(head).order)).map(FrameId)
    }

    /// Whether a memory error was found in any page of the folio that `frame` is in
    /// (`folio_contain_hwpoisoned_page`).
    #[must_use]
    pub fn has_poison(&self, frame: FrameId) -> bool {
        let mut pages = self.pages_of(self.head(frame));
        pages.any(|page| self.frame(page).poisoned)
    }

    /// Whether the frame is in device memory.
    #[must_use]
    pub const fn is_device(&self, frame: FrameId) -> bool {
        frame.0 >= self.host
    }

    /// Whether the frame is in device memory that the CPU uses in place.
    #[must_use]
    pub const fn is_coherent(&self, frame: FrameId) -> bool {
        frame.0 >= self.host && frame.0 < self.host + self.coherent
    }

    /// The place of the device allocation that has the frame, and its page there.
    #[must_use]
    pub fn device_page(&self, frame: FrameId) -> Option<DevicePage> {
        let head = self.head(frame);
        match self.frame(head).owner {
            Owner::Device(place, page) => Some(DevicePage {
                place,
                page: page + (frame.0 - head.0),
            }),
            Owner::Free
            | Owner::Anon
            | Owner::Ksm
            | Owner::HugePages
            | Owner::File(..)
            | Owner::Poisoned => None,
        }
    }

    /// Whether nobody has the frame.
    #[must_use]
    pub fn is_free(&self, frame: FrameId) -> bool {
        self.folio(frame).owner == Owner::Free
    }

    /// The content of a page in host memory.
    #[must_use]
    pub fn content(&self, frame: FrameId) -> &[u64] {
        let at = (frame.0 * self.per_page) as usize;
        &self.words[at..at + self.per_page as usize]
    }

    pub(crate) fn content_mut(&mut self, frame: FrameId) -> &mut [u64] {
        let at = (frame.0 * self.per_page) as usize;
        &mut self.words[at..at + self.per_page as usize]
    }

    pub(crate) fn copy_content(&mut self, from: FrameId, to: FrameId) {
        let at = (from.0 * self.per_page) as usize;
        let whole = at..at + self.per_page as usize;
        self.words
            .copy_within(whole, (to.0 * self.per_page) as usize);
    }

    /// A folio of zeros with no references; `None` where memory is exhausted or in pieces.
    pub(crate) fn allocate(&mut self, order: u8, owner: Owner) -> Option<FrameId> {
        let size = 1 << order;
        if self.is_refused() {
            self.refused += 1;
            return None;
        }
        if self.free < size {
            return None;
        }
        let head = self.find_free(size)?;
        self.next = (head.0 + size) % self.host;
        self.free -= size;
        self.make_folio(head, order, owner);
        let at = (head.0 * self.per_page) as usize;
        self.words[at..at + (size * self.per_page) as usize].fill(0);
        Some(head)
    }

    /// The next aligned run of `size` free frames, going round once.
    fn find_free(&self, size: u32) -> Option<FrameId> {
        let blocks = self.host / size;
        let first = self.next.div_ceil(size);
        (0..blocks)
            .map(|n| (first + n) % blocks * size)
            .find(|at| {
                (*at..at + size).all(|n| {
                    self.frames[n as usize].owner == Owner::Free
                        && self.frames[n as usize].head == n
                })
            })
            .map(FrameId)
    }

    fn make_folio(&mut self, head: FrameId, order: u8, owner: Owner) {
        for n in 0..1 << order {
            *self.frame_mut(head.plus(n)) = Frame {
                head: head.0,
                ..Frame::default()
            };
        }
        let folio = self.frame_mut(head);
        folio.order = order;
        folio.owner = owner;
    }

    /// A folio of private device memory with no references. Large ones are all of one order.
    pub(crate) fn allocate_device(&mut self, order: u8, owner: Owner) -> FrameId {
        let free = match order {
            0 => self.device_free.pop(),
            _ => self.device_free_large.pop(),
        };
        let at = free.unwrap_or_else(|| {
            let at = index32(self.frames.len());
            self.frames
                .extend(core::iter::repeat_n(Frame::default(), 1 << order));
            at
        });
        self.make_folio(FrameId(at), order, owner);
        FrameId(at)
    }

    /// A page of coherent device memory with no references; `None` where somebody has it.
    pub(crate) fn take_coherent(&mut self, frame: FrameId, owner: Owner) -> Option<FrameId> {
        let free = self.is_coherent(frame) && self.is_free(frame);
        free.then(|| {
            self.make_folio(frame, 0, owner);
            frame
        })
    }

    /// Gives the frames of a folio back that nobody references.
    pub(crate) fn release(&mut self, head: FrameId) {
        // A piece of a large one is free page by page, and what is left of one with a bad page.
        let large = self.frame(head).order == self.large && !self.has_poison(head);
        let private = self.is_device(head) && !self.is_coherent(head);
        if private && large {
            self.device_free_large.push(head.0);
        }
        for page in self.pages_of(head) {
            let poisoned = self.frame(page).poisoned;
            *self.frame_mut(page) = Frame {
                head: page.0,
                poisoned,
                owner: if poisoned {
                    Owner::Poisoned
                } else {
                    Owner::Free
                },
                ..Frame::default()
            };
            match (self.is_device(page), poisoned) {
                (_, true) => {}
                (false, false) => self.free += 1,
                (true, false) if private && !large => self.device_free.push(page.0),
                (true, false) => {}
            }
        }
    }
}

/// Loads bytes of a page out of the words that it has, from byte `offset` on; those behind read as zeros.
pub fn load_bytes(words: &[u64], offset: usize, dst: &mut [u8]) {
    let there = words.as_bytes().get(offset..).unwrap_or_default();
    let (from_words, behind) = dst.split_at_mut(there.len().min(dst.len()));
    from_words.copy_from_slice(&there[..from_words.len()]);
    behind.fill(0);
}

/// Stores bytes into the words that a page has, from byte `offset` on; those behind are dropped.
pub fn store_bytes(words: &mut [u64], offset: usize, src: &[u8]) {
    let there = words.as_mut_bytes().get_mut(offset..).unwrap_or_default();
    let len = there.len().min(src.len());
    there[..len].copy_from_slice(&src[..len]);
}

/// An index as the arenas keep it.
pub(crate) fn index32(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
