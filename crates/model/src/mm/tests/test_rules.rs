//! Single rules.

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::mm::Access;

use crate::mm::advise::madvise;
use crate::mm::around::Solo;
use crate::mm::check::{check, check_quiet};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::{Errno, Signal};
use crate::mm::fault::fault;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::fork::fork;
use crate::mm::map::{Map, Place, What, mmap, munmap};
use crate::mm::migrate::Collected;
use crate::mm::pagemap::{PM_GUARD_REGION, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP};
use crate::mm::protect::{mlock, mprotect};
use crate::mm::remap::{Remap, Target, mremap};
use crate::mm::thp::Split;
use crate::mm::{Machine, Pages, Pid, Shape, ksm, reclaim};

const RW: VmFlags = VmFlags::READ.with(VmFlags::WRITE);
const P0: Pid = Pid(0);

fn mm() -> Machine {
    Machine::new(Shape::default())
}

fn at(page: u32) -> HostVa {
    Shape::default().address(page)
}

fn bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE
}

fn map(mm: &mut Machine, page: u32, pages: u32) {
    let map = Map {
        place: Place::Fixed(at(page)),
        len: bytes(pages),
        prot: RW,
        what: What::Private,
        extra: VmFlags::NONE,
    };
    assert_eq!(mmap(&Solo::new(mm), P0, &map), Ok(at(page)));
}

fn write(mm: &mut Machine, pid: Pid, page: u32, value: u64) {
    fault(&Solo::new(mm), pid, page, Access::Write).expect("writable");
    let Entry::Present(frame, _) = mm.entry(pid, page) else {
        panic!("not present");
    };
    mm.memory.content_mut(frame)[0] = value;
}

fn advise(mm: &mut Machine, page: u32, pages: u32, advice: i32) -> Result<(), Errno> {
    madvise(&Solo::new(mm), P0, at(page), bytes(pages), advice)
}

fn borders(mm: &Machine) -> Vec<(u32, u32)> {
    let vmas = mm.process(P0).vmas.all().iter();
    vmas.map(|vma| (vma.pages.start, vma.pages.end)).collect()
}

#[test]
fn neighbours_merge_when_mapped_and_split_when_they_differ() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    map(&mut mm, 4, 2);
    map(&mut mm, 2, 2);
    assert_eq!(borders(&mm), [(0, 6)]);
    mprotect(&Solo::new(&mut mm), P0, at(2), bytes(2), VmFlags::READ).expect("mapped");
    assert_eq!(borders(&mm), [(0, 2), (2, 4), (4, 6)]);
    mprotect(&Solo::new(&mut mm), P0, at(2), bytes(2), RW).expect("mapped");
    assert_eq!(borders(&mm), [(0, 6)]);
}

#[test]
fn mappings_written_apart_stay_apart() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    map(&mut mm, 4, 2);
    write(&mut mm, P0, 0, 1);
    write(&mut mm, P0, 4, 1);
    map(&mut mm, 2, 2);
    assert_eq!(borders(&mm), [(0, 4), (4, 6)]);
}

#[test]
fn moved_memory_merges_only_where_its_offsets_fit() {
    let mut mm = mm();
    map(&mut mm, 0, 4);
    write(&mut mm, P0, 2, 7);
    let there = Remap {
        at: at(2),
        old_len: bytes(2),
        new_len: bytes(2),
        target: Target::At(at(10)),
    };
    mremap(&Solo::new(&mut mm), P0, &there).expect("free");
    map(&mut mm, 12, 2);
    assert_eq!(borders(&mm), [(0, 2), (10, 12), (12, 14)]);
    let back = Remap {
        at: at(10),
        target: Target::At(at(2)),
        ..there
    };
    mremap(&Solo::new(&mut mm), P0, &back).expect("free");
    assert_eq!(borders(&mm), [(0, 4), (12, 14)]);
    check_quiet(&mm).expect("consistent");
}

#[test]
fn fork_shares_until_one_side_writes() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    write(&mut mm, P0, 0, 1);
    let child = fork(&Solo::new(&mut mm), P0).expect("room");
    assert_eq!(
        mm.entry(P0, 0).named_frame(),
        mm.entry(child, 0).named_frame()
    );
    write(&mut mm, child, 0, 2);
    let Entry::Present(frame, bits) = mm.entry(P0, 0) else {
        panic!("gone");
    };
    assert_eq!(mm.memory().content(frame)[0], 1);
    assert!(
        !bits.has(Bits::WRITE),
        "the parent does not know yet that it is alone"
    );
    write(&mut mm, P0, 0, 3);
    assert_eq!(
        mm.entry(P0, 0).named_frame(),
        Some(frame),
        "reused without a copy"
    );
    check_quiet(&mm).expect("consistent");
}

#[test]
fn guards_survive_dontneed_and_show_in_pagemap() {
    let mut mm = mm();
    map(&mut mm, 0, 4);
    write(&mut mm, P0, 1, 1);
    advise(&mut mm, 0, 3, 102).expect("anonymous");
    advise(&mut mm, 0, 4, 4).expect("anonymous");
    assert_eq!(
        mm.pagemap(P0, 1) & (PM_SWAP | PM_GUARD_REGION),
        PM_SWAP | PM_GUARD_REGION
    );
    let touched = fault(&Solo::new(&mut mm), P0, 1, Access::Read);
    assert_eq!(touched, Err(Signal::Segv));
    assert_eq!(advise(&mut mm, 0, 4, 23), Err(Errno::Fault));
    advise(&mut mm, 0, 4, 103).expect("anonymous");
    write(&mut mm, P0, 1, 2);
    assert_eq!(
        mm.pagemap(P0, 1) & (PM_PRESENT | PM_MMAP_EXCLUSIVE),
        PM_PRESENT | PM_MMAP_EXCLUSIVE
    );
}

#[test]
fn advice_is_validated_as_the_kernel_does() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    for advice in (-1..=130).filter(|n| !matches!(n, 0..=4 | 8..=25 | 100..=103)) {
        assert_eq!(
            advise(&mut mm, 0, 0, advice),
            Err(Errno::Invalid),
            "{advice}"
        );
    }
    assert_eq!(advise(&mut mm, 0, 0, 4), Ok(()));
    assert_eq!(advise(&mut mm, 0, 3, 4), Err(Errno::NoMem));
    assert_eq!(advise(&mut mm, 0, 2, 100), Err(Errno::Perm));
    mlock(&Solo::new(&mut mm), P0, at(0), bytes(1)).expect("mapped");
    assert_eq!(advise(&mut mm, 0, 2, 4), Err(Errno::Invalid));
    assert_eq!(advise(&mut mm, 0, 2, 24), Ok(()));
    let unaligned = madvise(&Solo::new(&mut mm), P0, at(0).plus(1), 1, 4);
    assert_eq!(unaligned, Err(Errno::Invalid));
}

#[test]
fn pages_swapped_out_come_back_with_their_content() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    write(&mut mm, P0, 0, 9);
    let child = fork(&Solo::new(&mut mm), P0).expect("room");
    let Entry::Present(frame, _) = mm.entry(P0, 0) else {
        panic!("not present");
    };
    // What others have, too, is left alone by an advice, but not by the system.
    advise(&mut mm, 0, 2, 21).expect("not locked");
    assert_eq!(mm.entry(P0, 0).named_frame(), Some(frame));
    reclaim::reclaim(&Solo::new(&mut mm), frame);
    assert!(matches!(mm.entry(P0, 0), Entry::Swap(..)));
    assert!(matches!(mm.entry(child, 0), Entry::Swap(..)));
    for pid in [P0, child] {
        fault(&Solo::new(&mut mm), pid, 0, Access::Read).expect("in swap");
        let Entry::Present(frame, _) = mm.entry(pid, 0) else {
            panic!("not present");
        };
        assert_eq!(mm.memory().content(frame)[0], 9);
    }
    check_quiet(&mm).expect("consistent");
}

#[test]
fn lazily_freed_pages_go_unless_they_are_written_again() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    write(&mut mm, P0, 0, 1);
    write(&mut mm, P0, 1, 1);
    advise(&mut mm, 0, 2, 8).expect("anonymous");
    write(&mut mm, P0, 1, 2);
    assert!(mm.access(P0, 1, Access::Write).is_some());
    advise(&mut mm, 0, 2, 21).expect("not locked");
    assert_eq!(mm.entry(P0, 0), Entry::None);
    assert_ne!(mm.entry(P0, 1), Entry::None);
}

#[test]
fn a_pinned_page_is_copied_by_fork_and_not_reclaimed() {
    let mut mm = mm();
    map(&mut mm, 0, 1);
    write(&mut mm, P0, 0, 5);
    let frame = reclaim::pin(&Solo::new(&mut mm), P0, 0, Access::Write).expect("writable");
    let child = fork(&Solo::new(&mut mm), P0).expect("room");
    assert_ne!(mm.entry(child, 0).named_frame(), Some(frame));
    assert!(mm.entry(P0, 0).bits().has(Bits::WRITE));
    assert!(!reclaim::reclaim(&Solo::new(&mut mm), frame));
    assert_eq!(mm.collect(P0, 0), Collected::Refused);
    munmap(&Solo::new(&mut mm), P0, at(0), bytes(1)).expect("mapped");
    assert!(!mm.memory().is_free(frame));
    reclaim::unpin(&Solo::new(&mut mm), frame);
    assert!(mm.memory().is_free(frame));
}

#[test]
fn a_large_page_splits_around_one_page_into_halves() {
    let mut mm = Machine::new(Shape {
        pmd_order: 3,
        ..Shape::default()
    });
    map(&mut mm, 0, 8);
    advise(&mut mm, 0, 8, 14).expect("anonymous");
    write(&mut mm, P0, 3, 1);
    let Block::Huge(head, _) = mm.block(P0, 0) else {
        panic!("not large");
    };
    mm.split_block(P0, 0);
    assert!(mm.split_folio(head, Split::Around(head.plus(3))));
    let mut orders = Vec::new();
    let mut page = head;
    while page.0 < head.0 + 8 {
        let order = mm.memory().frame(page).order;
        orders.push(order);
        page = page.plus(1 << order);
    }
    assert_eq!(orders, [1, 0, 0, 2]);
    check(&mm).expect("consistent");
}

#[test]
fn collapse_makes_a_large_page_of_what_is_there() {
    let mut mm = mm();
    map(&mut mm, 0, 4);
    assert_eq!(advise(&mut mm, 0, 4, 25), Err(Errno::Invalid));
    write(&mut mm, P0, 2, 3);
    assert_eq!(advise(&mut mm, 0, 4, 25), Ok(()));
    assert!(mm.is_huge(P0, 0));
    let frame = mm.entry(P0, 2).named_frame().expect("present");
    assert_eq!(mm.memory().content(frame)[0], 3);
    check_quiet(&mm).expect("consistent");
}

#[test]
fn identical_pages_merge_and_part_again() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    advise(&mut mm, 0, 2, 12).expect("anonymous");
    write(&mut mm, P0, 0, 4);
    write(&mut mm, P0, 1, 4);
    assert!(ksm::merge(&Solo::new(&mut mm), (P0, 0), (P0, 1)));
    assert_eq!(mm.entry(P0, 0).named_frame(), mm.entry(P0, 1).named_frame());
    write(&mut mm, P0, 1, 5);
    let first = mm.entry(P0, 0).named_frame().expect("present");
    assert_eq!(mm.memory().content(first)[0], 4);
    advise(&mut mm, 0, 2, 13).expect("anonymous");
    check_quiet(&mm).expect("consistent");
}

#[test]
fn a_poisoned_page_is_an_error_and_never_comes_again() {
    let mut mm = mm();
    map(&mut mm, 0, 2);
    write(&mut mm, P0, 0, 1);
    let frame = mm.entry(P0, 0).named_frame().expect("present");
    reclaim::poison(&Solo::new(&mut mm), frame);
    assert_eq!(
        fault(&Solo::new(&mut mm), P0, 0, Access::Read),
        Err(Signal::Bus)
    );
    assert_eq!(advise(&mut mm, 0, 1, 22), Err(Errno::HwPoison));
    advise(&mut mm, 0, 1, 4).expect("anonymous");
    for page in 0..2 {
        write(&mut mm, P0, page, 1);
        assert_ne!(mm.entry(P0, page).named_frame(), Some(frame));
    }
    check_quiet(&mm).expect("consistent");
}

#[test]
fn a_large_page_knows_of_a_bad_one_in_it_until_a_split_sets_it_apart() {
    let mut mm = Machine::new(Shape {
        pmd_order: 9,
        pages: 512,
        frames: 1024,
        ..Shape::default()
    });
    map(&mut mm, 0, 512);
    advise(&mut mm, 0, 512, 14).expect("anonymous");
    write(&mut mm, P0, 0, 7);
    let Block::Huge(head, _) = mm.block(P0, 0) else {
        panic!("not large");
    };
    let bad = head.plus(300);
    assert!(!mm.memory().has_poison(head));
    // A pin keeps it in one piece.
    let pinned = reclaim::pin(&Solo::new(&mut mm), P0, 0, Access::Write).expect("mapped");
    reclaim::poison(&Solo::new(&mut mm), bad);
    assert_eq!(mm.memory().frame(head).order, 9);
    assert!(mm.memory().has_poison(head) && mm.memory().has_poison(head.plus(511)));
    let touched = fault(&Solo::new(&mut mm), P0, 300, Access::Read);
    assert_eq!(touched, Err(Signal::Bus));
    reclaim::unpin(&Solo::new(&mut mm), pinned);
    assert!(mm.split_folio(head, Split::Uniform));
    let poisoned = (0..512).filter(|n| mm.memory().has_poison(head.plus(*n)));
    assert_eq!(poisoned.collect::<Vec<_>>(), [300]);
    check(&mm).expect("consistent");
    assert!(reclaim::reclaim(&Solo::new(&mut mm), head.plus(1)));
    munmap(&Solo::new(&mut mm), P0, at(0), bytes(512)).expect("mapped");
    let free = (0..512).filter(|n| mm.memory().is_free(head.plus(*n)));
    assert_eq!(free.count(), 511);
    check_quiet(&mm).expect("consistent");
}

#[test]
fn device_pages_are_shared_by_fork_and_freed_with_the_last_mapping() {
    let mut mm = mm();
    map(&mut mm, 0, 1);
    write(&mut mm, P0, 0, 1);
    let Collected::Page(frame) = mm.collect(P0, 0) else {
        panic!("refused");
    };
    assert!(mm.is_isolated(frame));
    let device = mm.new_device_page(0, 0, 0).expect("private memory");
    mm.settle(frame, device);
    mm.let_go(frame);
    assert!(mm.memory().is_free(frame));
    let child = fork(&Solo::new(&mut mm), P0).expect("room");
    assert_eq!(mm.entry(child, 0).named_frame(), Some(device));
    assert_eq!(mm.pagemap(P0, 0) & (PM_SWAP | PM_PRESENT), PM_SWAP);
    munmap(&Solo::new(&mut mm), P0, at(0), bytes(1)).expect("mapped");
    assert!(mm.released.is_empty());
    munmap(&Solo::new(&mut mm), child, at(0), bytes(1)).expect("mapped");
    assert_eq!(mm.released, [0]);
    check_quiet(&mm).expect("consistent");
}

#[test]
fn a_new_mapping_of_whole_blocks_is_aligned() {
    let mut mm = mm();
    map(&mut mm, 63, 1);
    let anywhere = Map {
        place: Place::Hint(HostVa::new(0)),
        len: bytes(4),
        prot: RW,
        what: What::Private,
        extra: VmFlags::NONE,
    };
    assert_eq!(mmap(&Solo::new(&mut mm), P0, &anywhere), Ok(at(56)));
    let ragged = Map {
        len: bytes(3),
        ..anywhere
    };
    assert_eq!(mmap(&Solo::new(&mut mm), P0, &ragged), Ok(at(60)));
    assert_eq!(mm.gap(P0, 4), Some(Pages::new(52, 56)));
}
