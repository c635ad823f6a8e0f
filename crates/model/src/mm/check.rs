//! Whether a state makes sense: one function that looks at everything.

use core::fmt;

use crate::mm::entry::{Block, Entry};
use crate::mm::flags::Bits;
use crate::mm::memory::{FrameId, Owner, index32};
use crate::mm::rmap::{Level, Mapping};
use crate::mm::vma::Left;
use crate::mm::{Machine, Pid};

/// A rule that a state breaks, in words, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The rule.
    pub rule: &'static str,
    /// What breaks it.
    pub at: At,
}

/// What breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// A page of a process.
    Page(Pid, u32),
    /// A frame, and the two numbers that differ: found and expected.
    Frame(FrameId, u32, u32),
    /// A swap slot.
    Slot(u32),
    /// A device allocation.
    Allocation(u32),
    /// The machine: found and expected.
    Count(u32, u32),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.rule)?;
        match self.at {
            At::Page(pid, page) => write!(f, "page {page} of process {}", pid.0),
            At::Frame(frame, found, expected) => {
                write!(f, "frame {} has {found}, expected {expected}", frame.0)
            }
            At::Slot(slot) => write!(f, "slot {slot}"),
            At::Allocation(place) => write!(f, "device allocation {place}"),
            At::Count(found, expected) => write!(f, "{found}, expected {expected}"),
        }
    }
}

impl core::error::Error for Broken {}

/// Fails with a rule unless it holds.
macro_rules! rule {
    ($holds:expr, $rule:expr, $at:expr $(,)?) => {
        if $holds {
            Ok(())
        } else {
            Err(Broken {
                rule: $rule,
                at: $at,
            })
        }
    };
}
pub(super) use rule;

/// Checks the whole state. True after every step of every operation.
///
/// # Errors
/// The first rule that does not hold.
pub fn check(mm: &Machine) -> Result<(), Broken> {
    for pid in mm.pids() {
        check_vmas(mm, pid)?;
        check_tables(mm, pid)?;
    }
    let mut at = 0;
    while at < index32(mm.memory.frames.len()) {
        let frame = FrameId(at);
        check_folio(mm, frame)?;
        at += 1 << mm.memory.frame(frame).order;
    }
    check_slots(mm)?;
    check_devices(mm)?;
    check_free(mm)
}

/// Checks a state in which no operation is under way.
///
/// # Errors
/// The first rule that does not hold.
pub fn check_quiet(mm: &Machine) -> Result<(), Broken> {
    check(mm)?;
    for (n, frame) in (0..).zip(&mm.memory.frames) {
        let at = At::Frame(FrameId(n), frame.held, 0);
        rule!(
            frame.held == 0,
            "no operation holds a page when all are done",
            at,
        )?;
        let live = frame.owner != Owner::Free && frame.owner != Owner::Poisoned;
        let head = frame.head == n;
        rule!(
            !(live && head) || frame.refs > 0,
            "a page that nobody refers to is free",
            At::Frame(FrameId(n), frame.refs, 1),
        )?;
    }
    for pid in mm.pids() {
        for page in 0..mm.shape.pages {
            let moving = matches!(mm.entry(pid, page), Entry::Migration(..));
            rule!(
                !moving,
                "no page is being moved when all is done",
                At::Page(pid, page),
            )?;
        }
    }
    Ok(())
}

pub(super) fn check_vmas(mm: &Machine, pid: Pid) -> Result<(), Broken> {
    let list = mm.process(pid).vmas.all();
    for vma in list {
        let at = At::Page(pid, vma.pages.start);
        rule!(!vma.pages.is_empty(), "no mapping is empty", at)?;
        rule!(
            vma.pages.end <= mm.shape.pages,
            "mappings lie in the window",
            at,
        )?;
    }
    for pair in list.windows(2) {
        let at = At::Page(pid, pair[1].pages.start);
        let sorted = pair[0].pages.end <= pair[1].pages.start;
        rule!(sorted, "mappings are sorted and do not overlap", at)?;
        let apart = pair[1].left == Left::Untried || !pair[0].merges_with(&pair[1]);
        rule!(apart, "neighbours that fit are one mapping", at)?;
    }
    Ok(())
}

fn check_tables(mm: &Machine, pid: Pid) -> Result<(), Broken> {
    (0..mm.shape.pages).try_for_each(|page| check_entry(mm, pid, page))
}

/// Checks what stands at one page.
pub(super) fn check_entry(mm: &Machine, pid: Pid, page: u32) -> Result<(), Broken> {
    let (process, at) = (mm.process(pid), At::Page(pid, page));
    let (small, block) = (process.entries[page as usize], mm.block(pid, page));
    if small == Entry::None && block == Block::Table {
        return Ok(());
    }
    rule!(
        small == Entry::None || (block == Block::Table && mm.has_table(pid, page)),
        "nothing lies below a block entry, or where there is no table",
        at,
    )?;
    let mapped = process.vmas.at(page).is_some();
    let dying = process.detached.contains(page);
    rule!(mapped || dying, "an entry lies in a mapping", at)?;
    match small.named_frame() {
        Some(frame) => check_named(mm, pid, page, small, frame),
        None => Ok(()),
    }
}

fn check_named(
    mm: &Machine,
    pid: Pid,
    page: u32,
    entry: Entry,
    frame: FrameId,
) -> Result<(), Broken> {
    let at = At::Page(pid, page);
    let device = mm.memory.is_device(frame);
    let private = device && !mm.memory.is_coherent(frame);
    match entry {
        Entry::Present(..) | Entry::DeviceExclusive(..) => {
            rule!(!private, "a present page is where the CPU can use it", at)?;
        }
        Entry::DevicePrivate(..) => rule!(private, "a device page is in device memory", at)?,
        Entry::Migration(..) => {
            let held = mm.memory.folio(frame).held > 0;
            rule!(held, "a page that is being moved is held", at)?;
        }
        Entry::HwPoison(_) => {
            let poisoned = mm.memory.frame(frame).poisoned;
            return rule!(poisoned, "a poison entry names a poisoned page", at);
        }
        Entry::None | Entry::Zero(_) | Entry::Swap(..) | Entry::Guard | Entry::UffdWp => {}
    }
    rule!(
        !mm.memory.is_free(frame),
        "an entry names a page that is not free",
        at,
    )?;
    let linked = Mapping {
        pid,
        page,
        level: Level::Page,
    };
    let mut chain = mm.rmaps.of(&mm.memory, frame);
    rule!(
        chain.any(|m| m == linked),
        "every mapping is in the page's chain",
        at,
    )?;
    let folio = mm.memory.folio(frame);
    let private = matches!(folio.owner, Owner::Anon | Owner::Ksm | Owner::Device(..));
    let writable = entry.bits().has(Bits::WRITE) && entry.mapped_frame().is_some();
    let sole = !writable || !private || mm.memory.frame(frame).exclusive;
    rule!(sole, "what may be written belongs to one process alone", at)
}

/// Checks the folio at `head`, and the chains of its pages.
pub(super) fn check_folio(mm: &Machine, head: FrameId) -> Result<(), Broken> {
    let folio = *mm.memory.frame(head);
    rule!(
        folio.head == head.0,
        "folios begin at heads",
        At::Frame(head, folio.head, head.0),
    )?;
    let mut mapped = 0;
    for page in mm.memory.pages_of(head) {
        mapped += check_page(mm, head, page)?;
    }
    let cached = u32::from(folio.swap.is_some())
        + u32::from(matches!(folio.owner, Owner::File(..)) && in_cache(mm, head));
    let expected = mapped + folio.entire + folio.pins + folio.held + cached;
    let at = At::Frame(head, folio.refs, expected);
    rule!(
        folio.refs == expected,
        "references are mappings, pins, caches and holds",
        at,
    )?;
    let unused = folio.refs == 0 && folio.swap.is_none();
    let free = matches!(folio.owner, Owner::Free | Owner::Poisoned);
    rule!(!free || unused, "a free page has no references", at)
}

fn in_cache(mm: &Machine, frame: FrameId) -> bool {
    match mm.memory.frame(frame).owner {
        Owner::File(file, index) => {
            let pages = mm.files.get(file as usize).map(|file| &file.pages);
            pages.and_then(|pages| pages.get(index as usize)) == Some(&Some(frame))
        }
        Owner::Free
        | Owner::Anon
        | Owner::Ksm
        | Owner::HugePages
        | Owner::Device(..)
        | Owner::Poisoned => false,
    }
}

/// Checks the counts of one page against its chain, and returns its mappings by small entries.
fn check_page(mm: &Machine, head: FrameId, page: FrameId) -> Result<u32, Broken> {
    let frame = mm.memory.frame(page);
    rule!(
        frame.head == head.0,
        "pages know their head",
        At::Frame(page, frame.head, head.0),
    )?;
    let (mut small, mut blocks) = (0, 0);
    for mapping in mm.rmaps.of(&mm.memory, page) {
        let at = At::Page(mapping.pid, mapping.page);
        match mapping.level {
            Level::Block => {
                blocks += 1;
                let found = mm.block(mapping.pid, mapping.page);
                let here = matches!(found, Block::Huge(found, _) | Block::Device(found, _) if found == page);
                rule!(here, "a chain names block entries that are there", at)?;
            }
            Level::Page => {
                let entry = mm.process(mapping.pid).entries[mapping.page as usize];
                let here = entry.named_frame() == Some(page);
                rule!(here, "a chain names entries that are there", at)?;
                small += u32::from(entry.mapped_frame().is_some());
            }
        }
    }
    let at = At::Frame(page, frame.mapcount, small);
    rule!(
        frame.mapcount == small,
        "the mapping count is that of the chain",
        at,
    )?;
    let at = At::Frame(page, frame.entire, blocks);
    rule!(
        frame.entire == blocks,
        "the count of block mappings is that of the chain",
        at,
    )?;
    let alone = !frame.exclusive || small + blocks <= 1;
    rule!(
        alone,
        "an exclusive page has one mapping",
        At::Frame(page, small + blocks, 1),
    )?;
    Ok(small)
}

fn check_slots(mm: &Machine) -> Result<(), Broken> {
    (0..mm.shape.slots).try_for_each(|slot| check_slot(mm, slot))
}

/// Checks one slot.
pub(super) fn check_slot(mm: &Machine, n: u32) -> Result<(), Broken> {
    let slot = mm.swap.slots[n as usize];
    let names = |entry: &&Entry| entry.slot().is_some_and(|slot| slot.0 == n);
    let entries = mm.processes.iter().flat_map(|process| &process.entries);
    let counted = usize::try_from(slot.count) == Ok(entries.filter(names).count());
    rule!(
        counted,
        "a slot counts the entries that name it",
        At::Slot(n),
    )?;
    check_cached(mm, n)
}

/// Checks that a slot and the page in its cache name each other.
pub(super) fn check_cached(mm: &Machine, n: u32) -> Result<(), Broken> {
    let Some(frame) = mm.swap.slots[n as usize].cache else {
        return Ok(());
    };
    let mutual = mm.memory.frame(frame).swap.is_some_and(|slot| slot.0 == n);
    rule!(mutual, "slot and cached page name each other", At::Slot(n))
}

/// Every page of a device allocation has one frame at most, and the allocation counts them.
fn check_devices(mm: &Machine) -> Result<(), Broken> {
    let first = mm.memory.host_frames() as usize;
    let mut counts = vec![0; mm.device_pages.len()];
    let mut owners = Vec::new();
    for frame in &mm.memory.frames[first..] {
        if let Owner::Device(place, page) = frame.owner {
            let pages = 1 << frame.order;
            counts[place as usize] += pages;
            owners.extend((page..page + pages).map(|page| (place, page)));
        }
    }
    owners.sort_unstable();
    for pair in owners.windows(2) {
        let at = At::Allocation(pair[0].0);
        rule!(pair[0] != pair[1], "a device page has one owner", at)?;
    }
    for ((n, expected), found) in (0..).zip(&mm.device_pages).zip(counts) {
        let at = At::Allocation(n);
        rule!(*expected == found, "an allocation counts its pages", at)?;
    }
    Ok(())
}

/// No frame is lost: what is not free is somebody's.
fn check_free(mm: &Machine) -> Result<(), Broken> {
    let host = &mm.memory.frames[..mm.memory.host_frames() as usize];
    let heads = (0..).zip(host).filter(|(n, frame)| frame.head == *n);
    let free: u32 = heads
        .filter(|(_, frame)| frame.owner == Owner::Free)
        .map(|_| 1)
        .sum();
    let known = mm.memory.free_frames();
    rule!(
        free == known,
        "free pages are counted",
        At::Count(known, free),
    )
}
