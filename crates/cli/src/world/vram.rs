//! Device memory of a model world: pages that are mostly empty, page tables in full.

use gpusvm::addr::PAGE;
use gpusvm_abi::bus::{AtomicOp, BusError, SystemBus, VramStore};
use gpusvm_model::sched::{Kind, ModelEnv};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Words of a page that have content.
pub(crate) const WORDS: usize = 4;
/// Words of a page table.
const TABLE: usize = 512;

/// One page: its first words, or all of it.
#[derive(Clone, Debug)]
enum Page {
    Data([u64; WORDS]),
    Table(Box<[u64; TABLE]>),
}

impl Page {
    const EMPTY: Self = Self::Data([0; WORDS]);

    fn word(&self, at: usize) -> u64 {
        match self {
            Self::Data(words) => words.get(at).copied().unwrap_or(0),
            Self::Table(words) => words[at],
        }
    }

    fn word_mut(&mut self, at: usize) -> &mut u64 {
        if let Self::Data(words) = self
            && at >= WORDS
        {
            let mut table = Box::new([0; TABLE]);
            table[..WORDS].copy_from_slice(words);
            *self = Self::Table(table);
        }
        match self {
            Self::Data(words) => &mut words[at],
            Self::Table(words) => &mut words[at],
        }
    }
}

/// What has been written to a device's memory: one bit for each page, modulo 64.
#[derive(Debug, Default)]
pub(crate) struct Written(AtomicU64);

impl Written {
    /// The bit of the page at an offset.
    pub(crate) const fn bit(offset: u64) -> u64 {
        1 << (offset / PAGE % 64)
    }

    /// Pages that were written since the last call.
    pub(crate) fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

/// Device memory. Its accesses are whole words; each copied page is a switch point.
pub(crate) struct ModelVram {
    pages: Mutex<Vec<Page>>,
    size: u64,
    written: Arc<Written>,
    wires: Wires,
}

/// What the memory of all devices of a world shares.
#[derive(Clone)]
pub(crate) struct Wires {
    pub(crate) bus: Arc<dyn SystemBus>,
    /// Grows with everything that changes, in the whole world.
    pub(crate) changes: Arc<AtomicU64>,
    /// Copies of pages up to the one that fails; 0 where none does.
    pub(crate) fails_in: Arc<AtomicU64>,
}

impl Wires {
    pub(crate) fn new(bus: Arc<dyn SystemBus>, changes: &Arc<AtomicU64>) -> Self {
        Self {
            bus,
            changes: Arc::clone(changes),
            fails_in: Arc::default(),
        }
    }
}

impl ModelVram {
    pub(crate) fn new(pages: usize, written: Arc<Written>, wires: Wires) -> Self {
        Self {
            pages: Mutex::new(vec![Page::EMPTY; pages]),
            size: u64::try_from(pages).unwrap_or(0) * PAGE,
            written,
            wires,
        }
    }

    /// Whether the copy of a page fails because somebody wants it to.
    fn may_fail(&self, address: u64) -> Result<(), BusError> {
        let left = self.wires.fails_in.load(Ordering::Relaxed);
        if left > 0 {
            self.wires.fails_in.store(left - 1, Ordering::Relaxed);
        }
        if left == 1 {
            Err(BusError { address })
        } else {
            Ok(())
        }
    }

    /// Never contended: no actor gives way inside.
    fn with<R>(&self, act: impl FnOnce(&mut Vec<Page>) -> R) -> R {
        act(&mut self.pages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the page at an offset.
    fn change<R>(&self, offset: u64, act: impl FnOnce(&mut Page) -> R) -> R {
        self.written
            .0
            .fetch_or(Written::bit(offset), Ordering::Relaxed);
        self.wires.changes.fetch_add(1, Ordering::Relaxed);
        self.with(|pages| act(&mut pages[place(offset).0]))
    }
}

/// The page and the word at an offset.
fn place(offset: u64) -> (usize, usize) {
    let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    (number(offset / PAGE), number(offset % PAGE / 8))
}

/// Offsets of the pages of a span.
fn pages(offset: u64, len: u64) -> impl Iterator<Item = u64> {
    (offset..offset + len).step_by(4096)
}

impl VramStore for ModelVram {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, dst: &mut [u8]) {
        self.with(|pages| {
            for (at, out) in (offset..).step_by(8).zip(dst.chunks_mut(8)) {
                let (page, word) = place(at);
                let bytes = pages[page].word(word).to_ne_bytes();
                out.copy_from_slice(&bytes[..out.len()]);
            }
        });
    }

    fn write(&self, offset: u64, src: &[u8]) {
        for (at, bytes) in (offset..).step_by(8).zip(src.chunks(8)) {
            self.change(at, |page| {
                let word = page.word_mut(place(at).1);
                let mut whole = word.to_ne_bytes();
                whole[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_ne_bytes(whole);
            });
        }
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        self.change(offset, |page| {
            let word = page.word_mut(place(offset).1);
            let old = *word;
            *word = op.apply(old);
            old
        })
    }

    fn zero(&self, offset: u64, len: u64) {
        for at in pages(offset, len) {
            self.change(at, |page| *page = Page::EMPTY);
            ModelEnv.point(Kind::Access);
        }
    }

    fn copy_from_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        for (at, from) in pages(offset, len).zip((bus..).step_by(4096)) {
            self.may_fail(from)?;
            let mut words = [0; WORDS];
            for (word, address) in words.iter_mut().zip((from..).step_by(8)) {
                let mut bytes = [0; 8];
                self.wires.bus.read(address, &mut bytes)?;
                *word = u64::from_ne_bytes(bytes);
            }
            self.change(at, |page| *page = Page::Data(words));
            ModelEnv.point(Kind::Access);
        }
        Ok(())
    }

    fn copy_to_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        for (at, to) in pages(offset, len).zip((bus..).step_by(4096)) {
            self.may_fail(to)?;
            for (word, address) in (0..WORDS).zip((to..).step_by(8)) {
                let value = self.with(|pages| pages[place(at).0].word(word));
                self.wires.bus.write(address, &value.to_ne_bytes())?;
            }
            ModelEnv.point(Kind::Access);
        }
        Ok(())
    }

    fn aperture(&self, _offset: u64) -> Option<u64> {
        None
    }

    fn discard(&self, offset: u64, len: u64) {
        self.zero(offset, len);
    }
}
