//! Which pages have content: `PAGEMAP_SCAN`.

use std::os::fd::OwnedFd;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const OP_SCAN: Opcode = opcode::read_write::<Scan>(b'f', 16);
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
/// The page is the one that all untouched memory reads as.
const ZERO_PAGE: u64 = 1 << 5;
/// A huge entry maps the page.
const HUGE: u64 = 1 << 6;
/// Every access is refused.
const GUARD: u64 = 1 << 8;
/// The page has content, in memory or in swap.
const CONTENT: u64 = PRESENT | SWAPPED;

/// What the page map says of a page.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Look {
    word: u64,
    categories: u64,
}

impl Look {
    /// It is in memory.
    pub(crate) const fn is_present(self) -> bool {
        self.word >> 63 & 1 == 1
    }

    /// It belongs to a file, or is shared.
    pub(crate) const fn is_file(self) -> bool {
        self.word >> 61 & 1 == 1
    }

    /// Only one entry maps it.
    pub(crate) const fn is_exclusive(self) -> bool {
        self.word >> 56 & 1 == 1
    }

    /// It is the page of zeros.
    pub(crate) const fn is_zero(self) -> bool {
        self.categories & ZERO_PAGE != 0
    }

    /// A huge entry maps it.
    pub(crate) const fn is_huge(self) -> bool {
        self.categories & HUGE != 0
    }
}

/// The process's page map.
#[derive(Debug)]
pub(crate) struct PageMap(OwnedFd);

impl PageMap {
    /// Opens the process's own page map and checks that it can be scanned.
    ///
    /// # Errors
    /// `ENOTTY` on a kernel before 6.7, or where /proc is not to be had.
    pub(crate) fn open() -> Result<Self, Errno> {
        let fd = open(
            "/proc/self/pagemap",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let map = Self(fd);
        let page = HostSpan::at(HostVa::new(0x1000), 0x1000);
        map.missing(page)?;
        Ok(map)
    }

    /// Whether every page of `span` is in memory or in swap. A scan that fails says no.
    pub(crate) fn populated(&self, span: HostSpan) -> bool {
        self.missing(span).is_ok_and(|missing| !missing)
    }

    /// Whether some page of `span` is in neither.
    fn missing(&self, span: HostSpan) -> Result<bool, Errno> {
        // Pages for which neither bit is set.
        let wanted = Scan {
            max_pages: 1,
            category_inverted: CONTENT,
            category_mask: CONTENT,
            ..Scan::default()
        };
        Ok(self.first(span, wanted)?.is_some())
    }

    /// The first stretch of `span` whose pages have content.
    ///
    /// # Errors
    /// `ENOMEM`, `EINTR`: nothing is known then.
    pub(crate) fn first_populated(&self, span: HostSpan) -> Result<Option<HostSpan>, Errno> {
        let wanted = Scan {
            category_anyof_mask: CONTENT,
            ..Scan::default()
        };
        self.first(span, wanted)
    }

    /// The first stretch of `span` whose pages are guards (`MADV_GUARD_INSTALL`). A scan that fails,
    /// as it does on a kernel without guards, finds none.
    pub(crate) fn first_guard(&self, span: HostSpan) -> Option<HostSpan> {
        let wanted = Scan {
            category_mask: GUARD,
            ..Scan::default()
        };
        self.first(span, wanted).ok().flatten()
    }

    /// Whether some page of `span` was ever written. A scan that fails says no.
    pub(crate) fn was_written(&self, span: HostSpan) -> bool {
        let wanted = Scan {
            max_pages: 1,
            category_inverted: ZERO_PAGE,
            category_mask: ZERO_PAGE,
            category_anyof_mask: CONTENT,
            ..Scan::default()
        };
        self.first(span, wanted).is_ok_and(|found| found.is_some())
    }

    /// What the page map says of every page of `span`: its word, and the categories of a scan. A page
    /// that cannot be looked at has none.
    pub(crate) fn looks(&self, span: HostSpan) -> Vec<Look> {
        let pages = usize::try_from(span.pages().get()).unwrap_or(0);
        let mut looks = vec![Look::default(); pages];
        let mut words = vec![0_u8; pages * 8];
        let offset = span.start().get() / PAGE * 8;
        let read = rustix::io::pread(&self.0, &mut words, offset).unwrap_or(0);
        for (look, word) in looks.iter_mut().zip(words[..read].chunks_exact(8)) {
            look.word = u64::from_ne_bytes(word.try_into().unwrap_or_default());
        }
        let wanted = Scan {
            category_anyof_mask: ZERO_PAGE | HUGE,
            return_mask: ZERO_PAGE | HUGE,
            ..Scan::default()
        };
        let mut rest = span;
        while let Ok(Some((found, categories))) = self.first_region(rest, wanted) {
            let number = |at: HostVa| {
                let pages = at.offset_from(span.start()) / PAGE;
                usize::try_from(pages).unwrap_or(usize::MAX)
            };
            for look in &mut looks[number(found.start())..number(found.end())] {
                look.categories = categories;
            }
            rest = HostSpan::new(found.end(), span.end());
        }
        looks
    }

    /// Whether all of `span` is mapped by huge entries.
    pub(crate) fn is_huge(&self, span: HostSpan) -> bool {
        let wanted = Scan {
            category_mask: HUGE,
            return_mask: HUGE,
            ..Scan::default()
        };
        self.first(span, wanted)
            .is_ok_and(|found| found == Some(span))
    }

    /// The first stretch of `span` that `wanted` describes.
    fn first(&self, span: HostSpan, wanted: Scan) -> Result<Option<HostSpan>, Errno> {
        let return_mask = wanted.return_mask | CONTENT;
        let wanted = Scan {
            return_mask,
            ..wanted
        };
        Ok(self.first_region(span, wanted)?.map(|(found, _)| found))
    }

    /// The same, with the categories that were asked for.
    fn first_region(&self, span: HostSpan, wanted: Scan) -> Result<Option<(HostSpan, u64)>, Errno> {
        let mut region = [Region::default(); 1];
        let mut arg = Scan {
            size: u64::try_from(size_of::<Scan>()).unwrap_or(0),
            start: span.start().get(),
            end: span.end().get(),
            vec: region.as_mut_ptr().expose_provenance() as u64,
            vec_len: 1,
            ..wanted
        };
        // SAFETY: PAGEMAP_SCAN reads and writes `struct pm_scan_arg`, whose layout `Scan` has.
        let call = unsafe { Updater::<OP_SCAN, _>::new(&mut arg) };
        // SAFETY: the kernel writes at most one region, into a buffer of one that outlives the
        // call.
        unsafe { ioctl(&self.0, call) }?;
        let [found] = region;
        let span = HostSpan::new(HostVa::new(found.start), HostVa::new(found.end));
        Ok((!span.is_empty()).then_some((span, found.categories)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{AnonMapping, Huge};

    #[test]
    fn one_untouched_page_is_noticed() {
        let map = PageMap::open().expect("the kernel scans page maps");
        let mut mine = AnonMapping::new(64 << 10, Huge::Never).expect("64K can be mapped");
        let span = HostSpan::at(HostVa::new(mine.address()), 64 << 10);
        assert!(!map.populated(span));
        assert_eq!(map.first_populated(span), Ok(None));
        assert_eq!(mine.bytes()[4096], 0);
        assert!(map.first_populated(span).is_ok_and(|found| found.is_some()));
        assert!(!map.was_written(span));
        for page in (0..16).filter(|page| *page != 7) {
            mine.bytes_mut()[page * 4096] = 1;
        }
        assert!(!map.populated(span));
        mine.bytes_mut()[7 * 4096] = 1;
        assert!(map.populated(span));
        assert_eq!(map.first_populated(span), Ok(Some(span)));
    }
}
