//! Two answers to one program, and what may differ between them.
//!
//! What is left open, and why:
//!
//! * A difference has to come again each time. Pages wait in batches before they are on the lists that
//!   `MADV_PAGEOUT`, `MADV_FREE` and `MADV_COLLAPSE` look at, khugepaged makes large pages when it likes, and
//!   memory may be short: what comes once is counted apart.
//! * An empty page counts as written for `PAGEMAP_SCAN` where there is a table for it. A window smaller
//!   than a table shares it with its neighbours, so nothing can be said there.
//! * Programs end for the comparison where `MADV_COLLAPSE` meets shared memory with room for large
//!   pages, which the model does not have.
//! * `MADV_HWPOISON` and `MADV_SOFT_OFFLINE` are not tried: where they work, the machine loses memory.
//! * Where there is swap, `MADV_PAGEOUT` is not tried: when a page is written is the system's affair.

use std::fmt::Write as _;

use gpusvm_live::scratch::{Area, Seen, flag_names};

use crate::conformance::mm::program::Size;
use crate::size::counted;

/// What is compared of a page, as [`face`](gpusvm_live::scratch::face) has it: the pagemap bits 56,
/// 57, 58, 61, 62 and 63, and the categories but for soft-dirty, which most kernels are built
/// without.
const COMPARED: u32 = 0b1_1100_1110 | 0x017E_0000;

/// The first difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The step after which there is one.
    pub(crate) step: usize,
    /// What of it differs.
    pub(crate) what: What,
    /// In words: the kernel's side, and the model's.
    pub(crate) text: String,
}

/// What can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Return value, error number, signal or data.
    Answer,
    /// Mappings.
    Areas,
    /// Pages.
    Pages,
    /// A rule that the model keeps for itself.
    Rule,
}

/// The first step at which the two differ.
pub(crate) fn difference(size: Size, kernel: &[Seen], model: &[Seen]) -> Option<Difference> {
    let pairs = kernel.iter().zip(model).enumerate();
    pairs
        .filter_map(|(step, (kernel, model))| {
            let (what, text) = step_difference(size, kernel, model)?;
            Some(Difference { step, what, text })
        })
        .next()
}

fn step_difference(size: Size, kernel: &Seen, model: &Seen) -> Option<(What, String)> {
    if kernel.answer != model.answer {
        let text = format!(
            "answer: kernel {:?}, model {:?}",
            kernel.answer, model.answer
        );
        return Some((What::Answer, text));
    }
    if kernel.areas != model.areas {
        let text = format!(
            "mappings:\n  kernel {}\n  model  {}",
            areas(&kernel.areas),
            areas(&model.areas)
        );
        return Some((What::Areas, text));
    }
    pages(size, &kernel.pages, &model.pages).map(|text| (What::Pages, text))
}

fn areas(all: &[Area]) -> String {
    let one = |area: &Area| {
        let (start, end) = (area.start / 4096, area.end / 4096);
        let offset = match area.offset {
            0 => String::new(),
            offset => format!(" at {}", offset / 4096),
        };
        format!("[{start}-{end}{offset} {}]", flag_names(area.flags))
    };
    all.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// What is compared of a page. An empty page counts as written where Linux has a table for it. A
/// window smaller than a table shares its own with what is mapped beside it, so it says nothing there.
const fn compared(face: u32, size: Size) -> u32 {
    const WRITTEN: u32 = 1 << 17;
    match face & COMPARED {
        WRITTEN if matches!(size, Size::Pages | Size::Roomy) => 0,
        all => all,
    }
}

fn pages(size: Size, kernel: &[u32], model: &[u32]) -> Option<String> {
    let differ = |(_, (kernel, model)): &(usize, (&u32, &u32))| {
        compared(**kernel, size) != compared(**model, size)
    };
    let mut differing = kernel.iter().zip(model).enumerate().filter(differ);
    let (first, (kernel, model)) = differing.next()?;
    let others = differing.count();
    let mut text = format!(
        "page {first}: kernel {}, model {}",
        face_names(*kernel),
        face_names(*model)
    );
    if others > 0 {
        let others = counted(others as u64, "more page", "more pages");
        let _whole = write!(text, "; and {others}");
    }
    Some(text)
}

/// A page's face in words.
fn face_names(face: u32) -> String {
    let names = [
        (1, "exclusive"),
        (2, "uffd-wp"),
        (3, "guard"),
        (6, "file"),
        (7, "swap"),
        (8, "present"),
        (17, "WRITTEN"),
        (18, "FILE"),
        (19, "PRESENT"),
        (20, "SWAPPED"),
        (21, "PFNZERO"),
        (22, "HUGE"),
        (24, "GUARD"),
    ];
    let set: Vec<_> = names
        .iter()
        .filter(|(bit, _)| face >> bit & 1 == 1)
        .map(|(_, name)| *name)
        .collect();
    if set.is_empty() {
        "nothing".to_owned()
    } else {
        set.join("+")
    }
}
