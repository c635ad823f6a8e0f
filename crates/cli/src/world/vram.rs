//! Device memory of a model world: pages with as many words of content as the process's have, page tables
//! in full.

use core::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::PAGE;
use gpusvm_abi::bus::{AtomicOp, BusError, SystemBus, VramStore};
use gpusvm_model::kernel::Kernel;
use gpusvm_model::kernel::bus::Bus;
use gpusvm_model::mm::memory::{load_bytes, store_bytes};
use gpusvm_model::sched::{Kind, ModelEnv};
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

    /// The words that it has; those behind are zeros.
    fn words(&self) -> &[u64] {
        match self {
            Self::Data(words) => words,
            Self::Table(words) => &words[..],
        }
    }

    /// The words that it has, at least so many.
    fn words_mut(&mut self, least: usize) -> &mut [u64] {
        if let Self::Data(words) = self
            && least > N
        {
            let mut table = Box::new([0; ALL_WORDS]);
            table[..N].copy_from_slice(words);
            *self = Self::Table(table);
        }
        match self {
            Self::Data(words) => words,
            Self::Table(words) => &mut words[..],
        }
    }
}

/// Device memory whose pages have `N` words of content, a multiple of [`PIECES`]. Nobody gives way inside an
/// access; each copied page is a switch point.
pub(crate) struct ModelVram<const N: usize> {
    pages: Mutex<Vec<Page<N>>>,
    size: u64,
    written: Arc<Written>,
    wires: Wires,
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

/// What the memory of all devices of a world shares.
#[derive(Clone)]
pub(crate) struct Wires {
    pub(crate) bus: Arc<dyn SystemBus>,
    /// What units use, who look at pages by translations.
    pub(crate) units: Arc<dyn SystemBus>,
    /// Grows with everything that changes, in the whole world.
    pub(crate) changes: Arc<AtomicU64>,
    /// Copies of pages up to the one that fails; 0 where none does.
    pub(crate) fails_in: Arc<AtomicU64>,
}

impl Wires {
    /// Those of a world on `kernel`.
    pub(crate) fn of(kernel: &Arc<Kernel<ModelEnv>>) -> Self {
        Self {
            units: Arc::new(Bus::of_units(Arc::clone(kernel))),
            ..Self::new(Arc::new(Bus::new(Arc::clone(kernel))), kernel.generation())
        }
    }

    fn new(bus: Arc<dyn SystemBus>, changes: &Arc<AtomicU64>) -> Self {
        Self {
            units: Arc::clone(&bus),
            bus,
            changes: Arc::clone(changes),
            fails_in: Arc::default(),
        }
    }
}

impl<const N: usize> ModelVram<N> {
    pub(crate) fn new(pages: usize, wires: Wires, written: Arc<Written>) -> Self {
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
    fn with<R>(&self, act: impl FnOnce(&mut Vec<Page<N>>) -> R) -> R {
        act(&mut self.pages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the page at an offset.
    fn change<R>(&self, offset: u64, act: impl FnOnce(&mut Page<N>) -> R) -> R {
        let bit = Written::bit(offset);
        self.written.0.fetch_or(bit, Ordering::Relaxed);
        self.wires.changes.fetch_add(1, Ordering::Relaxed);
        self.with(|pages| act(&mut pages[place(offset).0]))
    }
}

/// The page at an offset, and the byte in it.
fn place(offset: u64) -> (usize, usize) {
    let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    (number(offset / PAGE), number(offset % PAGE))
}

/// The pieces of a span that lie in one page each: offset, and place in the whole.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = offset + u64::try_from(done).unwrap_or(u64::MAX);
        let room = ALL_WORDS * 8 - place(at).1;
        let piece = done..len.min(done + room);
        done = piece.end;
        (!piece.is_empty()).then_some((at, piece))
    })
}

/// Offsets of the pages of a span.
fn pages(offset: u64, len: u64) -> impl Iterator<Item = u64> {
    (offset..offset + len).step_by(4096)
}

impl<const N: usize> VramStore for ModelVram<N> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, dst: &mut [u8]) {
        self.with(|pages| {
            for (at, piece) in pieces(offset, dst.len()) {
                let (page, byte) = place(at);
                load_bytes(pages[page].words(), byte, &mut dst[piece]);
            }
        });
    }

    fn word(&self, offset: u64) -> u64 {
        let (page, byte) = place(offset);
        self.with(|pages| pages[page].words().get(byte / 8).copied().unwrap_or(0))
    }

    fn write(&self, offset: u64, src: &[u8]) {
        for (at, piece) in pieces(offset, src.len()) {
            let byte = place(at).1;
            let least = (byte + piece.len()).div_ceil(8);
            self.change(at, |page| {
                store_bytes(page.words_mut(least), byte, &src[piece])
            });
        }
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        let at = place(offset).1 / 8;
        self.change(offset, |page| {
            let word = &mut page.words_mut(at + 1)[at];
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
            let mut words = [0; N];
            let pieces = words.chunks_mut(N / PIECES);
            for (piece, address) in pieces.zip((from..).step_by(8 * (N / PIECES))) {
                self.wires.bus.read(address, piece.as_mut_bytes())?;
            }
            self.change(at, |page| *page = Page::Data(words));
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
                    piece.copy_from_slice(&pages[place(at).0].words()[first..][..N / PIECES]);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no host memory.
    struct NoBus;

    impl SystemBus for NoBus {
        fn read(&self, address: u64, _dst: &mut [u8]) -> Result<(), BusError> {
            Err(BusError { address })
        }

        fn write(&self, address: u64, _src: &[u8]) -> Result<(), BusError> {
            Err(BusError { address })
        }

        fn atomic(&self, address: u64, _op: AtomicOp) -> Result<u64, BusError> {
            Err(BusError { address })
        }
    }

    fn assert_keeps_bytes<const N: usize>() {
        let wires = Wires::new(Arc::new(NoBus), &Arc::default());
        let vram = ModelVram::<N>::new(2, wires, Arc::default());
        // Half a word at its end, behind the first words, across a border.
        for at in [4, 8 * 100 + 4, PAGE - 2] {
            vram.write(at, &[1, 2, 3, 4]);
            let mut found = [9; 6];
            vram.read(at - 1, &mut found);
            assert_eq!(found, [0, 1, 2, 3, 4, 0], "{N} words, at {at}");
        }
        assert_eq!(vram.atomic(8 * 300, AtomicOp::Add(5)), 0);
        assert_eq!(vram.atomic(8 * 300, AtomicOp::Add(1)), 5);
    }

    #[test]
    fn bytes_stand_where_they_were_written() {
        assert_keeps_bytes::<WORDS>();
        assert_keeps_bytes::<ALL_WORDS>();
    }
}
