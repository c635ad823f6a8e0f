//! Copies that survive a fault: how a device reaches host memory.
//!
//! Each primitive is a few instructions between two labels. When one of them faults, a signal
//! handler ([`signals`]) finds the instruction pointer between the labels and sends it to the
//! fix-up, which returns "this many bytes were left". Costs nothing over `memcpy` as long as nothing faults (`livehost.md`
//! section 4).
//!
//! A page that is away is no fault in this sense: the access waits inside the kernel until the page
//! is home.

use core::arch::global_asm;
use core::ptr;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm_abi::bus::{AtomicOp, BusError, SystemBus};

use crate::sys::signals;

global_asm!(
    ".text",
    // Visible to every object file of this crate, and to nobody else.
    ".globl gpusvm_copy",
    ".hidden gpusvm_copy",
    ".globl gpusvm_copy_begin",
    ".hidden gpusvm_copy_begin",
    ".globl gpusvm_copy_end",
    ".hidden gpusvm_copy_end",
    ".globl gpusvm_copy_wide",
    ".hidden gpusvm_copy_wide",
    ".globl gpusvm_wide_begin",
    ".hidden gpusvm_wide_begin",
    ".globl gpusvm_wide_end",
    ".hidden gpusvm_wide_end",
    ".globl gpusvm_load8",
    ".hidden gpusvm_load8",
    ".globl gpusvm_load8_begin",
    ".hidden gpusvm_load8_begin",
    ".globl gpusvm_load8_end",
    ".hidden gpusvm_load8_end",
    ".globl gpusvm_store8",
    ".hidden gpusvm_store8",
    ".globl gpusvm_store8_begin",
    ".hidden gpusvm_store8_begin",
    ".globl gpusvm_store8_end",
    ".hidden gpusvm_store8_end",
    ".globl gpusvm_cas8",
    ".hidden gpusvm_cas8",
    ".globl gpusvm_cas8_begin",
    ".hidden gpusvm_cas8_begin",
    ".globl gpusvm_cas8_end",
    ".hidden gpusvm_cas8_end",
    ".globl gpusvm_fault_fixup",
    ".hidden gpusvm_fault_fixup",
    ".balign 16",
    "gpusvm_copy:",
    "    mov rcx, rdx",
    "gpusvm_copy_begin:",
    "    rep movsb",
    "gpusvm_copy_end:",
    "    mov rax, rcx",
    "    ret",
    // Blocks of 128 bytes, then the rest. A fault in a block repeats the block byte by byte, which ends
    // at the byte that faults.
    ".balign 16",
    "gpusvm_copy_wide:",
    "    mov rcx, rdx",
    "    sub rcx, 128",
    "    jb 3f",
    ".balign 16",
    "gpusvm_wide_begin:",
    "2:  vmovdqu ymm0, [rsi]",
    "    vmovdqu ymm1, [rsi + 32]",
    "    vmovdqu ymm2, [rsi + 64]",
    "    vmovdqu ymm3, [rsi + 96]",
    "    vmovdqu [rdi], ymm0",
    "    vmovdqu [rdi + 32], ymm1",
    "    vmovdqu [rdi + 64], ymm2",
    "    vmovdqu [rdi + 96], ymm3",
    "    sub rsi, -128",
    "    sub rdi, -128",
    "    sub rcx, 128",
    "    jae 2b",
    "gpusvm_wide_end:",
    "3:  add rcx, 128",
    "    vzeroupper",
    "    jmp gpusvm_copy_begin",
    ".balign 16",
    "gpusvm_load8:",
    "gpusvm_load8_begin:",
    "    mov rax, [rdi]",
    "gpusvm_load8_end:",
    "    mov [rsi], rax",
    "    xor eax, eax",
    "    ret",
    ".balign 16",
    "gpusvm_store8:",
    "gpusvm_store8_begin:",
    "    mov [rdi], rsi",
    "gpusvm_store8_end:",
    "    xor eax, eax",
    "    ret",
    ".balign 16",
    "gpusvm_cas8:",
    "    mov rax, rsi",
    "gpusvm_cas8_begin:",
    "    lock cmpxchg [rdi], rdx",
    "gpusvm_cas8_end:",
    "    mov [rcx], rax",
    "    xor eax, eax",
    "    ret",
    "gpusvm_fault_fixup:",
    "    mov eax, 1",
    "    ret",
);

unsafe extern "sysv64" {
    /// Copies `len` bytes; returns how many were left at a fault.
    fn gpusvm_copy(to: *mut u8, from: *const u8, len: usize) -> usize;
    /// The same, faster for what fits into the first cache. Needs AVX.
    fn gpusvm_copy_wide(to: *mut u8, from: *const u8, len: usize) -> usize;
    /// Loads a word into `out`; returns 1 at a fault.
    fn gpusvm_load8(from: *const u64, out: *mut u64) -> u64;
    /// Stores a word; returns 1 at a fault.
    fn gpusvm_store8(to: *mut u64, value: u64) -> u64;
    /// Compares and exchanges a word, the former one goes to `old`; returns 1 at a fault.
    fn gpusvm_cas8(at: *mut u64, expected: u64, new: u64, old: *mut u64) -> u64;

    fn gpusvm_copy_begin();
    fn gpusvm_copy_end();
    fn gpusvm_wide_begin();
    fn gpusvm_wide_end();
    fn gpusvm_load8_begin();
    fn gpusvm_load8_end();
    fn gpusvm_store8_begin();
    fn gpusvm_store8_end();
    fn gpusvm_cas8_begin();
    fn gpusvm_cas8_end();
    fn gpusvm_fault_fixup();
}

/// Makes faults of the primitives answers. Call it before the first copy.
pub(crate) fn install() {
    signals::install();
}

/// Where to go on when an instruction of a primitive faults.
pub(in crate::sys) fn fixup_for(at: usize) -> Option<usize> {
    let fix = gpusvm_fault_fixup as unsafe extern "sysv64" fn() as usize;
    let table: [(
        unsafe extern "sysv64" fn(),
        unsafe extern "sysv64" fn(),
        usize,
    ); 5] = [
        // The copy's own end returns what is left.
        (
            gpusvm_copy_begin,
            gpusvm_copy_end,
            gpusvm_copy_end as unsafe extern "sysv64" fn() as usize,
        ),
        (
            gpusvm_wide_begin,
            gpusvm_wide_end,
            gpusvm_wide_end as unsafe extern "sysv64" fn() as usize,
        ),
        (gpusvm_load8_begin, gpusvm_load8_end, fix),
        (gpusvm_store8_begin, gpusvm_store8_end, fix),
        (gpusvm_cas8_begin, gpusvm_cas8_end, fix),
    ];
    table
        .into_iter()
        .find(|(begin, end, _)| (*begin as usize..*end as usize).contains(&at))
        .map(|t| t.2)
}

/// Lengths for which wide registers are faster than the copy instruction: it takes its time to begin,
/// and does not know that a tile's buffer is in the first cache (measured: up to twice as fast). The
/// copy instruction wins where the data is larger than that cache.
const WIDE: core::ops::RangeInclusive<usize> = 128..=8192;

/// Copies `len` bytes. On a fault returns how many were left.
///
/// # Safety
/// One side must be memory that the caller owns for `len` bytes. The other may be any address: if
/// it is not accessible the copy stops there; if it is, its owner accepts the access.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> Result<(), usize> {
    let wide = WIDE.contains(&len) && std::is_x86_feature_detected!("avx");
    let copy = if wide { gpusvm_copy_wide } else { gpusvm_copy };
    // SAFETY: the caller's side is valid; a fault on the other is fixed up, for which `install`
    // was called when the host was opened. The wide copy's instructions were asked for.
    match unsafe { copy(to, from, len) } {
        0 => Ok(()),
        left => Err(left),
    }
}

/// The content of the pages of `span` that `wanted` says; `None` for others and for those that
/// cannot be read.
pub(crate) fn snapshot(
    span: HostSpan,
    wanted: impl Fn(HostSpan) -> bool,
) -> Vec<Option<[u8; 4096]>> {
    let page = |at: u64| {
        let mut content = [0; 4096];
        let wanted = wanted(HostSpan::at(HostVa::new(at), 4096));
        let read = wanted && LiveBus.read(at, &mut content).is_ok();
        read.then_some(content)
    };
    let pages = (span.start().get()..span.end().get()).step_by(4096);
    pages.map(page).collect()
}

/// Puts a [`snapshot`] to another place.
pub(crate) fn restore(span: HostSpan, content: &[Option<[u8; 4096]>]) {
    let pages = (span.start().get()..span.end().get()).step_by(4096);
    for (at, content) in pages.zip(content) {
        // A page that cannot be written keeps what it has.
        let _written = content.map(|content| LiveBus.write(at, &content));
    }
}

/// Updates a word. `None` where it cannot be accessed.
///
/// # Safety
/// `at` may be any 8-byte aligned address; if it is accessible, its owner accepts the update.
pub(crate) unsafe fn atomic(at: *mut u64, op: AtomicOp) -> Option<u64> {
    let mut expected = 0;
    // SAFETY: a fault at `at` is fixed up; `expected` is ours.
    if unsafe { gpusvm_load8(at, &raw mut expected) } != 0 {
        return None;
    }
    loop {
        let mut old = 0;
        // SAFETY: as above.
        if unsafe { gpusvm_cas8(at, expected, op.apply(expected), &raw mut old) } != 0 {
            return None;
        }
        if old == expected {
            return Some(old);
        }
        expected = old;
    }
}

/// The bus of the live host: a bus address is the host virtual address.
///
/// Every access is a copy between a buffer of the device and process memory. Process memory is
/// accessed as another thread of the process would, and a fault is an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct LiveBus;

impl LiveBus {
    /// The bus. Installs the signal handler that makes faults answers.
    #[must_use]
    pub fn new() -> Self {
        install();
        Self
    }
}

/// First address past user space.
const USER_END: u64 = 1 << 47;

/// The address as a pointer, if `len` bytes there lie in user space and not in the null page.
pub(crate) fn user_pointer(address: u64, len: usize) -> Result<*mut u8, BusError> {
    let len = u64::try_from(len).unwrap_or(u64::MAX);
    let end = address.checked_add(len);
    if address < 4096 || end.is_none_or(|end| end > USER_END) {
        return Err(BusError { address });
    }
    let address = usize::try_from(address).map_err(|_wide| BusError { address })?;
    Ok(ptr::with_exposed_provenance_mut(address))
}

fn stopped(address: u64, len: usize, left: usize) -> BusError {
    BusError {
        address: address + u64::try_from(len - left).unwrap_or(0),
    }
}

impl SystemBus for LiveBus {
    fn read(&self, address: u64, dst: &mut [u8]) -> Result<(), BusError> {
        let from = user_pointer(address, dst.len())?;
        // An aligned word does not tear, and faults as a whole.
        if let Ok(word) = <&mut [u8; 8]>::try_from(&mut *dst)
            && address.is_multiple_of(8)
        {
            let mut value = 0;
            // SAFETY: a fault at `from` is fixed up; `value` is ours.
            if unsafe { gpusvm_load8(from.cast(), &raw mut value) } != 0 {
                return Err(BusError { address });
            }
            *word = value.to_ne_bytes();
            return Ok(());
        }
        // SAFETY: `dst` is ours for its whole length.
        unsafe { copy(dst.as_mut_ptr(), from, dst.len()) }
            .map_err(|left| stopped(address, dst.len(), left))
    }

    fn write(&self, address: u64, src: &[u8]) -> Result<(), BusError> {
        let to = user_pointer(address, src.len())?;
        if let Ok(word) = <[u8; 8]>::try_from(src)
            && address.is_multiple_of(8)
        {
            // SAFETY: a fault at `to` is fixed up.
            let fault = unsafe { gpusvm_store8(to.cast(), u64::from_ne_bytes(word)) };
            return if fault == 0 {
                Ok(())
            } else {
                Err(BusError { address })
            };
        }
        // SAFETY: `src` is readable for its whole length.
        unsafe { copy(to, src.as_ptr(), src.len()) }
            .map_err(|left| stopped(address, src.len(), left))
    }

    fn atomic(&self, address: u64, op: AtomicOp) -> Result<u64, BusError> {
        let at = user_pointer(address, 8)?;
        if !address.is_multiple_of(8) {
            return Err(BusError { address });
        }
        // SAFETY: aligned, as just checked.
        unsafe { atomic(at.cast(), op) }.ok_or(BusError { address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{AnonMapping, Huge};

    #[test]
    fn copy_stops_at_the_end_of_the_mapping_and_says_where() {
        let bus = LiveBus::new();
        let mut map = AnonMapping::new(8192, Huge::Never).expect("two pages can be mapped");
        map.bytes_mut().fill(7);
        let address = map.address();
        map.unmap_tail(4096);
        let mut buffer = [0; 100];
        assert_eq!(
            bus.read(address + 4090, &mut buffer),
            Err(BusError {
                address: address + 4096
            })
        );
        assert_eq!(&buffer[..7], &[7, 7, 7, 7, 7, 7, 0]);
        assert_eq!(
            bus.write(address + 4096, &[1; 8]),
            Err(BusError {
                address: address + 4096
            })
        );
        // A word across the border stops at the border, and what lies before it was copied.
        let mut word = [0; 8];
        let end = Err(BusError {
            address: address + 4096,
        });
        assert_eq!(bus.read(address + 4092, &mut word), end);
        assert_eq!(word, [7, 7, 7, 7, 0, 0, 0, 0]);
        assert_eq!(bus.write(address + 4092, &[9; 8]), end);
        assert_eq!(&map.bytes()[4092..], &[9; 4]);
        assert_eq!(
            bus.atomic(address + 4096, AtomicOp::Add(1)),
            Err(BusError {
                address: address + 4096
            })
        );
        assert_eq!(bus.write(address, b"all eleven."), Ok(()));
        assert_eq!(&map.bytes()[..11], b"all eleven.");
    }

    #[test]
    fn copies_of_every_length_stop_at_the_byte_that_faults() {
        let bus = LiveBus::new();
        let mut map = AnonMapping::new(3 * 4096, Huge::Never).expect("three pages can be mapped");
        let content: Vec<u8> = (0..=250).cycle().take(3 * 4096).collect();
        map.bytes_mut().copy_from_slice(&content);
        let (address, end) = (map.address(), 8192);
        map.unmap_tail(end);
        for len in [1, 127, 128, 129, 255, 256, 1000, 4096, 8192] {
            for past in [0, 1, 127, 128, 200, len] {
                let from = end + past.min(len) - len;
                let inside = end - from;
                let mut buffer = vec![0xff; len];
                let read = bus.read(address + u64::try_from(from).expect("small"), &mut buffer);
                assert_eq!(read.is_ok(), past == 0, "{len} bytes, {past} past the end");
                assert_eq!(buffer[..inside], content[from..end]);
                assert!(buffer[inside..].iter().all(|byte| *byte == 0xff));
                let stop = read.map_or_else(|error| error.address, |()| address + 8192);
                assert_eq!(stop, address + 8192);
            }
        }
    }

    #[test]
    fn wild_addresses_are_refused_without_an_access() {
        let bus = LiveBus::new();
        for address in [0, 8, 4095, 1 << 47, u64::MAX - 3, (1 << 47) - 4] {
            assert_eq!(
                bus.read(address, &mut [0; 8]),
                Err(BusError { address }),
                "{address:#x}"
            );
        }
        assert!(bus.atomic(0x1_0001, AtomicOp::Xor(1)).is_err(), "unaligned");
    }

    #[test]
    fn atomics_return_the_former_value_and_lose_none() {
        let bus = LiveBus::new();
        let map = AnonMapping::new(4096, Huge::Never).expect("a page can be mapped");
        let address = map.address();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    (0..10_000).for_each(|_| assert!(bus.atomic(address, AtomicOp::Add(1)).is_ok()))
                });
            }
        });
        let swap = AtomicOp::CompareExchange {
            expected: 20_000,
            new: 5,
        };
        assert_eq!(bus.atomic(address, swap), Ok(20_000));
        assert_eq!(bus.atomic(address, AtomicOp::Max(9)), Ok(5));
        assert_eq!(bus.atomic(address, AtomicOp::Min(3)), Ok(9));
        assert_eq!(map.bytes()[0], 3);
    }
}
