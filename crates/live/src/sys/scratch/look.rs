//! What a process sees of its window: mappings from smaps, pages from pagemap and `PAGEMAP_SCAN`.
//!
//! The window is the lowest mapping but one, so that its mappings come early in smaps.

use core::ffi::c_int;

use crate::sys::scratch::call::{Area, flag};
use crate::sys::scratch::child::{Window, errno};

const PAGE: u64 = 4096;
/// Bytes of smaps that are read at once: some mappings.
const CHUNK: usize = 4096;
/// Flags of one mapping come on one line, and lines are shorter than this.
const LINE: usize = 512;
/// All categories of `PAGEMAP_SCAN`.
const ALL: u64 = 0x1FF;
/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`.
const SCAN: libc::Ioctl = 0xC060_6610;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Files of the process that say what it has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Eyes {
    pagemap: c_int,
    smaps: c_int,
}

impl Eyes {
    /// Opens them for the calling process.
    pub(super) fn open() -> Self {
        let open = |path: &core::ffi::CStr| {
            // SAFETY: a path that ends with a zero; the answer is a descriptor or -1.
            unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) }
        };
        Self {
            pagemap: open(c"/proc/self/pagemap"),
            smaps: open(c"/proc/self/smaps"),
        }
    }

    pub(super) fn close(self) {
        for file in [self.pagemap, self.smaps] {
            // SAFETY: ours, and not used again.
            let _closed = unsafe { libc::close(file) };
        }
    }

    /// Reads the pagemap words of the window. Returns an error number, or 0.
    pub(super) fn words(self, window: Window, words: &mut [u64]) -> i32 {
        let bytes = size_of_val(words);
        let at = i64::try_from(window.base / PAGE * 8).unwrap_or(0);
        // SAFETY: writes `bytes` bytes at most into a slice of that size.
        let read = unsafe { libc::pread(self.pagemap, words.as_mut_ptr().cast(), bytes, at) };
        if usize::try_from(read) == Ok(bytes) {
            0
        } else {
            errno().max(1)
        }
    }

    /// Calls `found` with the first page, the first page behind, and the categories of every run of
    /// pages of the window. Returns an error number, or 0.
    pub(super) fn categories(
        self,
        window: Window,
        regions: &mut [Region],
        mut found: impl FnMut(u64, u64, u64),
    ) -> i32 {
        let end = window.base + window.bytes;
        let mut arg = [0_u64; 12];
        arg[0] = 96;
        arg[2] = window.base;
        arg[3] = end;
        arg[5] = regions.as_mut_ptr().expose_provenance() as u64;
        arg[6] = regions.len() as u64;
        arg[11] = ALL;
        // SAFETY: `arg` has the layout of `struct pm_scan_arg`, twelve words, and names a buffer of
        // as many regions as it says.
        let count = unsafe { libc::ioctl(self.pagemap, SCAN, arg.as_mut_ptr()) };
        let Ok(count) = usize::try_from(count) else {
            return errno();
        };
        for region in regions.iter().take(count) {
            let page = |at: u64| (at - window.base) / PAGE;
            found(page(region.start), page(region.end), region.categories);
        }
        0
    }

    /// Reads the mappings of the window. Returns their number, or `None` where smaps is not as
    /// expected.
    pub(super) fn areas(self, window: Window, areas: &mut [Area]) -> Option<usize> {
        let mut text = [0_u8; CHUNK + LINE];
        let (mut kept, mut at) = (0, 0_i64);
        let mut list = List {
            window,
            areas,
            count: 0,
            head: None,
        };
        loop {
            let room = text.get_mut(kept..kept + CHUNK)?;
            // SAFETY: writes at most as many bytes as `room` has.
            let read = unsafe { libc::pread(self.smaps, room.as_mut_ptr().cast(), room.len(), at) };
            let read = usize::try_from(read).ok().filter(|read| *read > 0)?;
            at += i64::try_from(read).ok()?;
            let all = text.get(..kept + read)?;
            let last = all.iter().rposition(|byte| *byte == b'\n');
            let end = last.map_or(0, |newline| newline + 1);
            for line in all[..end].split(|byte| *byte == b'\n') {
                if list.take(line)? == Taken::End {
                    return Some(list.count);
                }
            }
            let length = all.len();
            text.copy_within(end..length, 0);
            // The beginning of a line, of which the rest comes next.
            kept = length - end;
            if kept > LINE {
                return None;
            }
        }
    }
}

/// Whether lines of smaps behind one may matter.
#[derive(PartialEq, Eq)]
enum Taken {
    More,
    End,
}

/// The mappings of the window, as far as lines of smaps told of them.
struct List<'a> {
    window: Window,
    areas: &'a mut [Area],
    count: usize,
    /// The mapping that the lines are about, if it is in the window.
    head: Option<Area>,
}

impl List<'_> {
    /// Takes the next line in. `None` where there are too many mappings.
    fn take(&mut self, line: &[u8]) -> Option<Taken> {
        let Window { base, bytes } = self.window;
        if let Some(head) = header(line) {
            if head.start >= base + bytes {
                return Some(Taken::End);
            }
            self.head = (head.start >= base).then_some(head);
        } else if let (Some(names), Some(head)) = (line.strip_prefix(b"VmFlags:"), self.head) {
            let flags = names.split(|byte| *byte == b' ').map(flag).sum();
            *self.areas.get_mut(self.count)? = Area {
                start: head.start - base,
                end: head.end - base,
                flags,
                ..head
            };
            self.count += 1;
        }
        Some(Taken::More)
    }
}

/// The first line of a mapping: `start-end rights offset device inode name`.
fn header(line: &[u8]) -> Option<Area> {
    let mut words = line.split(|byte| *byte == b' ');
    let mut ends = words.next()?.split(|byte| *byte == b'-');
    let (start, end) = (hex(ends.next()?)?, hex(ends.next()?)?);
    let offset = hex(words.nth(1)?)?;
    Some(Area {
        start,
        end,
        offset,
        flags: 0,
    })
}

fn hex(digits: &[u8]) -> Option<u64> {
    let mut value = 0;
    for digit in digits {
        value = value << 4 | u64::from(char::from(*digit).to_digit(16)?);
    }
    (!digits.is_empty()).then_some(value)
}

/// A place for the regions of a scan.
pub(super) const fn no_regions<const N: usize>() -> [Region; N] {
    [Region {
        start: 0,
        end: 0,
        categories: 0,
    }; N]
}
