//! Device memory in this process: the arena that the software GPU uses as VRAM.

use gpusvm::addr::{HostSpan, PAGE_2M};
use gpusvm_abi::bus::{AtomicOp, BusError, VramStore};
use rustix::io::Errno;

use crate::sys::advise;
use crate::sys::fault_copy::{self, user_pointer};
use crate::sys::mapping::RuntimeMapping;

/// How pages get into device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VramMode {
    /// Pages of the process *become* device memory: nothing is copied.
    #[default]
    Adopt,
    /// The memory stands for a device's own: content is copied.
    Copy,
}

/// The arena. The device accesses it by offsets; nobody makes references into it.
#[derive(Debug)]
pub struct LiveVram {
    memory: RuntimeMapping,
    mode: VramMode,
}

impl LiveVram {
    /// Maps `bytes` bytes, rounded up to 2 MiB.
    ///
    /// Memory that adopts pages takes huge ones as they come, but must not have any made inside it:
    /// khugepaged would join small pages while they are about to move home, and a huge page that
    /// returns to a place of small ones has to be split again (a hundred times the cost).
    pub(crate) fn new(bytes: u64, mode: VramMode) -> Result<Self, Errno> {
        let bytes = bytes
            .checked_next_multiple_of(PAGE_2M)
            .ok_or(Errno::NOMEM)?;
        fault_copy::install();
        let memory = RuntimeMapping::new(bytes)?;
        if mode == VramMode::Adopt {
            advise::no_huge_pages(memory.span());
        }
        Ok(Self { memory, mode })
    }

    /// Where the arena is.
    pub(crate) const fn span(&self) -> HostSpan {
        self.memory.span()
    }

    /// The byte at `offset`, with `len` bytes behind it.
    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        let end = offset.checked_add(u64::try_from(len).unwrap_or(u64::MAX));
        assert!(
            end.is_some_and(|end| end <= self.size()),
            "device memory has no {len} bytes at {offset:#x}"
        );
        self.memory.pointer(offset)
    }

    fn part(&self, offset: u64, len: u64) -> HostSpan {
        let _inside = self.at(offset, usize::try_from(len).unwrap_or(usize::MAX));
        HostSpan::at(self.span().start().plus(offset), len)
    }
}

impl VramStore for LiveVram {
    fn size(&self) -> u64 {
        self.span().bytes()
    }

    fn read(&self, offset: u64, dst: &mut [u8]) {
        let from = self.at(offset, dst.len());
        // Words are page-table entries and single loads: they must not tear.
        if let Ok(word) = <&mut [u8; 8]>::try_from(&mut *dst)
            && offset.is_multiple_of(8)
        {
            // SAFETY: eight aligned bytes inside the arena, which lives as long as `self`.
            *word = unsafe { from.cast::<u64>().read_volatile() }.to_ne_bytes();
            return;
        }
        // SAFETY: both sides hold `dst.len()` bytes. Units race on device memory by nature; the
        // copy is a machine instruction on raw memory, not an access that the compiler reasons
        // about.
        let copied = unsafe { fault_copy::copy(dst.as_mut_ptr(), from, dst.len()) };
        debug_assert_eq!(copied, Ok(()), "the arena is always mapped");
    }

    fn write(&self, offset: u64, src: &[u8]) {
        let to = self.at(offset, src.len());
        if let Ok(word) = <[u8; 8]>::try_from(src)
            && offset.is_multiple_of(8)
        {
            // SAFETY: eight aligned bytes inside the arena.
            unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(word)) };
            return;
        }
        // SAFETY: as for `read`.
        let copied = unsafe { fault_copy::copy(to, src.as_ptr(), src.len()) };
        debug_assert_eq!(copied, Ok(()), "the arena is always mapped");
    }

    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        assert!(offset.is_multiple_of(8), "atomics are on aligned words");
        // SAFETY: an aligned word inside the arena.
        let done = unsafe { fault_copy::atomic(self.at(offset, 8).cast(), op) };
        done.unwrap_or_default()
    }

    fn zero(&self, offset: u64, len: u64) {
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let at = self.at(offset, bytes);
        // SAFETY: `bytes` bytes inside the arena.
        unsafe { at.write_bytes(0, bytes) };
    }

    fn copy_from_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let to = self.at(offset, bytes);
        let from = user_pointer(bus, bytes)?;
        // SAFETY: `to` holds the bytes; a fault at `from` is an answer.
        unsafe { fault_copy::copy(to, from, bytes) }.map_err(|left| left_at(bus, len, left))
    }

    fn copy_to_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError> {
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let from = self.at(offset, bytes);
        let to = user_pointer(bus, bytes)?;
        // SAFETY: `from` holds the bytes; a fault at `to` is an answer.
        unsafe { fault_copy::copy(to, from, bytes) }.map_err(|left| left_at(bus, len, left))
    }

    fn aperture(&self, offset: u64) -> Option<u64> {
        let at = self.part(offset, 0).start().get();
        (self.mode == VramMode::Adopt).then_some(at)
    }

    fn discard(&self, offset: u64, len: u64) {
        advise::drop_pages(self.part(offset, len));
    }
}

fn left_at(bus: u64, len: u64, left: usize) -> BusError {
    BusError {
        address: bus + len - u64::try_from(left).unwrap_or(len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fault_copy::LiveBus;

    fn vram(mode: VramMode) -> LiveVram {
        let _bus = LiveBus::new();
        LiveVram::new(3 << 20, mode).expect("4M can be mapped")
    }

    #[test]
    fn content_survives_any_alignment_and_discard_zeroes() {
        let vram = vram(VramMode::Adopt);
        assert_eq!(vram.size(), 4 << 20, "rounded up");
        let data: Vec<u8> = (0..=255).cycle().take(10_001).collect();
        vram.write(12_345, &data);
        let mut back = vec![0; data.len()];
        vram.read(12_345, &mut back);
        assert_eq!(back, data);
        vram.discard(0, 4 << 20);
        vram.read(12_345, &mut back);
        assert!(back.iter().all(|byte| *byte == 0));
        assert!(vram.aperture(4096).is_some());
    }

    #[test]
    fn copies_cross_the_bus_and_report_where_it_ends() {
        let vram = vram(VramMode::Copy);
        let mut host = vec![1_u8; 8192];
        let bus = u64::try_from(host.as_mut_ptr().expose_provenance()).expect("64-bit");
        assert_eq!(vram.copy_from_bus(0, bus, 8192), Ok(()));
        assert_eq!(vram.atomic(8, AtomicOp::Add(1)), 0x0101_0101_0101_0101);
        assert_eq!(vram.copy_to_bus(0, bus, 8192), Ok(()));
        assert_eq!(host[8], 2);
        assert!(vram.copy_from_bus(0, 8, 4096).is_err());
        assert!(vram.aperture(0).is_none());
    }

    #[test]
    #[should_panic(expected = "device memory has no")]
    fn access_past_the_end_is_a_bug_of_the_device() {
        vram(VramMode::Copy).write((4 << 20) - 4, &[0; 8]);
    }
}
