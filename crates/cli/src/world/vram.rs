//! Device memory of a model world: pages with as many words of content as the process's have, page tables
//! in full.

use gpusvm::addr::PAGE;
use gpusvm_abi::bus::{AtomicOp, BusError, SystemBus, VramStore};
use gpusvm_model::sched::{Kind, ModelEnv};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use zerocopy::IntoBytes;

/// Words of a page that have content, in worlds that keep little of it.
pub(crate) const WORDS: usize = 4;
/// Words of a page.
pub(crate) const ALL_WORDS: usize = 512;
/// Accesses to host memory by which a page is copied, one after the other.
const PIECES: usize = 4;

/// One page: its first words, or all of it.
#[derive(Clone, Debug)]
enum Page<const N: usize> {
    Data([u64; N]),
    Table(Box<[u64; ALL_WORDS]>),
}

impl<const N: usize> Page<N> {
    const EMPTY: Self = Self::Data([0; N]);

    fn word(&self, at: usize) -> u64 {
        match self {
            Self::Data(words) => words.get(at).copied().unwrap_or(0),
            Self::Table(words) => words[at],
        }
    }

    fn word_mut(&mut self, at: usize) -> &mut u64 {
        if let Self::Data(words) = self
            && at >= N
        {
            let mut table = Box::new([0; ALL_WORDS]);
            table[..N].copy_from_slice(words);
            *self = Self::Table(table);
        }
        match self {
            Self::Data(words) => &mut words[at],
            Self::Table(words) => &mut words[at],
        }
    }
}

/// Device memory whose pages have `N` words of content, a multiple of [`PIECES`]. Its accesses are whole
/// words; each copied page is a switch point.
pub(crate) struct ModelVram<const N: usize> {
    pages: Mutex<Vec<Page<N>>>,
    wires: Wires,
}

/// What the memory of all devices of a world shares.
#[derive(Clone)]
pub(crate) struct Wires {
    pub(crate) bus: Arc<dyn SystemBus>,
    /// Grows with every write by the driver.
    pub(crate) writes: Arc<AtomicU64>,
    /// Copies of pages up to the one that fails; 0 where none does.
    pub(crate) fails_in: Arc<AtomicU64>,
}

impl Wires {
    pub(crate) fn new(bus: Arc<dyn SystemBus>) -> Self {
        Self {
            bus,
            writes: Arc::default(),
            fails_in: Arc::default(),
        }
    }
}

impl<const N: usize> ModelVram<N> {
    pub(crate) fn new(pages: usize, wires: Wires) -> Self {
        Self {
            pages: Mutex::new(vec![Page::EMPTY; pages]),
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
    fn with<R>(&self, act: impl FnOnce(&mut Vec<Page<N>>) -> R) -> R {
        act(&mut self.pages.lock().unwrap_or_else(PoisonError::into_inner))
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

impl<const N: usize> VramStore for ModelVram<N> {
    fn size(&self) -> u64 {
        self.with(|pages| u64::try_from(pages.len()).unwrap_or(0)) * PAGE
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
        self.with(|pages| {
            for (at, bytes) in (offset..).step_by(8).zip(src.chunks(8)) {
                let (page, word) = place(at);
                let mut whole = pages[page].word(word).to_ne_bytes();
                whole[..bytes.len()].copy_from_slice(bytes);
                *pages[page].word_mut(word) = u64::from_ne_bytes(whole);
            }
        });
        self.wires.writes.fetch_add(1, Ordering::Relaxed);
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        self.with(|pages| {
            let (page, word) = place(offset);
            let word = pages[page].word_mut(word);
            let old = *word;
            *word = op.apply(old);
            old
        })
    }

    fn zero(&self, offset: u64, len: u64) {
        for at in pages(offset, len) {
            self.with(|pages| pages[place(at).0] = Page::EMPTY);
            ModelEnv.point(Kind::Access);
        }
    }

    fn copy_from_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        for (at, from) in pages(offset, len).zip((bus..).step_by(4096)) {
            self.may_fail(from)?;
            let mut words = [0; N];
            let pieces = words.chunks_mut(N / PIECES);
            for (piece, address) in pieces.zip((from..).step_by(8 * (N / PIECES))) {
                self.wires.bus.read(address, piece.as_mut_bytes())?;
            }
            self.with(|pages| pages[place(at).0] = Page::Data(words));
            ModelEnv.point(Kind::Access);
        }
        Ok(())
    }

    fn copy_to_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        for (at, to) in pages(offset, len).zip((bus..).step_by(4096)) {
            self.may_fail(to)?;
            for (n, address) in (0..PIECES).zip((to..).step_by(8 * (N / PIECES))) {
                let first = n * (N / PIECES);
                let mut piece = [0; N];
                let piece = &mut piece[..N / PIECES];
                self.with(|pages| {
                    let page = &pages[place(at).0];
                    (first..)
                        .zip(piece.iter_mut())
                        .for_each(|(at, word)| *word = page.word(at));
                });
                self.wires.bus.write(address, piece.as_bytes())?;
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
