//! Device memory of the model host: of each page there are the words that cases look at.

use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::{BusAddr, PAGE};
use gpusvm_abi::bus::{AtomicOp, BusError, SystemBus, VramStore};

/// Words of content per page.
pub(super) const WORDS: usize = 2;
/// Pages of a device: 256 MiB.
pub(super) const DEVICE_PAGES: u32 = 65536;
const BYTES: usize = WORDS * 8;

/// Memory of the device's own. Never contended: no actor gives way inside.
pub(super) struct Private {
    pages: Mutex<Vec<[u8; BYTES]>>,
    bus: Arc<dyn SystemBus>,
}

impl Private {
    pub(super) fn new(bus: Arc<dyn SystemBus>) -> Self {
        Self {
            pages: Mutex::new(vec![[0; BYTES]; DEVICE_PAGES as usize]),
            bus,
        }
    }

    fn with<R>(&self, offset: u64, act: impl FnOnce(&mut [u8; BYTES]) -> R) -> R {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let page = usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
        act(&mut pages[page])
    }
}

/// Offsets of the pages of a span, with the same of another one.
fn pages(offset: u64, other: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(PAGE)).map(move |n| (offset + n * PAGE, other + n * PAGE))
}

impl VramStore for Private {
    fn size(&self) -> u64 {
        u64::from(DEVICE_PAGES) * PAGE
    }

    fn read(&self, offset: u64, dst: &mut [u8]) {
        dst.fill(0);
        let len = dst.len().min(BYTES);
        self.with(offset, |page| dst[..len].copy_from_slice(&page[..len]));
    }

    fn write(&self, offset: u64, src: &[u8]) {
        let len = src.len().min(BYTES);
        self.with(offset, |page| page[..len].copy_from_slice(&src[..len]));
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        let at = usize::try_from(offset % PAGE).unwrap_or(0);
        self.with(offset, |page| {
            let Some(place) = page.get_mut(at..at + 8) else {
                return 0;
            };
            let mut word = [0; 8];
            word.copy_from_slice(place);
            let old = u64::from_ne_bytes(word);
            place.copy_from_slice(&op.apply(old).to_ne_bytes());
            old
        })
    }

    fn zero(&self, offset: u64, len: u64) {
        for (at, _) in pages(offset, 0, len) {
            self.with(at, |page| page.fill(0));
        }
    }

    fn copy_from_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        for (at, from) in pages(offset, bus, len) {
            let mut bytes = [0; BYTES];
            self.bus.read(from, &mut bytes)?;
            self.with(at, |page| *page = bytes);
        }
        Ok(())
    }

    fn copy_to_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        for (at, to) in pages(offset, bus, len) {
            let bytes = self.with(at, |page| *page);
            self.bus.write(to, &bytes)?;
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

/// Coherent memory: the frames at a stretch of bus addresses. An access to a frame that nobody has is
/// noted by the bus.
pub(super) struct OnBus {
    bus: Arc<dyn SystemBus>,
    first: BusAddr,
    bytes: u64,
}

impl OnBus {
    pub(super) const fn new(bus: Arc<dyn SystemBus>, first: BusAddr, bytes: u64) -> Self {
        Self { bus, first, bytes }
    }

    fn at(&self, offset: u64) -> u64 {
        self.first.plus(offset).get()
    }

    fn copy(&self, from: u64, to: u64, len: u64) -> Result<(), BusError> {
        for (from, to) in pages(from, to, len) {
            let mut bytes = [0; BYTES];
            self.bus.read(from, &mut bytes)?;
            self.bus.write(to, &bytes)?;
        }
        Ok(())
    }
}

impl VramStore for OnBus {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, dst: &mut [u8]) {
        // A frame that nobody has is a violation, which the bus has noted.
        let _noted = self.bus.read(self.at(offset), dst);
    }

    fn write(&self, offset: u64, src: &[u8]) {
        let _noted = self.bus.write(self.at(offset), src);
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        self.bus.atomic(self.at(offset), op).unwrap_or(0)
    }

    fn zero(&self, offset: u64, len: u64) {
        for (at, _) in pages(offset, 0, len) {
            self.write(at, &[0; BYTES]);
        }
    }

    fn copy_from_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        self.copy(bus, self.at(offset), len)
    }

    fn copy_to_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        self.copy(self.at(offset), bus, len)
    }

    fn aperture(&self, _offset: u64) -> Option<u64> {
        None
    }

    fn discard(&self, _offset: u64, _len: u64) {}
}
