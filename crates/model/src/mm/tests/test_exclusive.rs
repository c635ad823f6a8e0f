//! Pages that a device has for itself: the contract of the entry, and that nobody loses a write.

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::mm::Access;
use proptest::prelude::*;

use crate::mm::advise::madvise;
use crate::mm::around::Solo;
use crate::mm::check::check_quiet;
use crate::mm::entry::Entry;
use crate::mm::errno::Errno;
use crate::mm::fault::fault;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::fork::{exit, fork};
use crate::mm::map::{Map, Place, What, mmap, munmap};
use crate::mm::memory::FrameId;
use crate::mm::migrate::Collected;
use crate::mm::protect::mprotect;
use crate::mm::{Machine, Pid, Shape, ksm, reclaim};

const P0: Pid = Pid(0);
const PAGES: u32 = 8;
const RW: VmFlags = VmFlags::READ.with(VmFlags::WRITE);
const MERGEABLE: i32 = 12;
const COLLAPSE: i32 = 25;

fn at(page: u32) -> HostVa {
    Shape::default().address(page)
}

fn machine() -> Machine {
    let mut mm = Machine::new(Shape::default());
    let map = Map {
        place: Place::Fixed(at(0)),
        len: u64::from(PAGES) * PAGE,
        prot: RW,
        what: What::Private,
        extra: VmFlags::NONE,
    };
    assert_eq!(mmap(&Solo::new(&mut mm), P0, &map), Ok(at(0)));
    mm
}

fn protect(mm: &mut Machine, page: u32, rights: VmFlags) {
    mprotect(&Solo::new(mm), P0, at(page), PAGE, rights).expect("mapped");
}

fn advise(mm: &mut Machine, page: u32, pages: u32, advice: i32) -> Result<(), Errno> {
    let len = u64::from(pages) * PAGE;
    madvise(&Solo::new(mm), P0, at(page), len, advice)
}

/// What a process reads.
fn load(mm: &mut Machine, pid: Pid, page: u32) -> u64 {
    fault(&Solo::new(mm), pid, page, Access::Read).expect("mapped");
    let entry = mm.entry(pid, page);
    let frame = entry.mapped_frame();
    frame.map_or(0, |frame| mm.memory().content(frame)[0])
}

/// A process adds one, by an access.
fn add(mm: &mut Machine, pid: Pid, page: u32) {
    fault(&Solo::new(mm), pid, page, Access::Write).expect("writable");
    let frame = mm.entry(pid, page).mapped_frame().expect("present");
    mm.memory.content_mut(frame)[0] += 1;
}

/// Gives the page to a device, which adds one. Returns whether it could.
fn device_adds(mm: &mut Machine, page: u32) -> bool {
    let frame = exclusive(mm, page);
    if let Some(frame) = frame {
        mm.memory.content_mut(frame)[0] += 1;
    }
    frame.is_some()
}

/// Gives the page to a device, where it is not a device's already.
fn exclusive(mm: &mut Machine, page: u32) -> Option<FrameId> {
    if let Some(frame) = mm.make_exclusive(P0, page) {
        mm.unlock(frame);
    }
    let Entry::DeviceExclusive(frame, _) = mm.entry(P0, page) else {
        return None;
    };
    Some(frame)
}

#[test]
fn an_exclusive_page_is_mapped_as_before_and_free_when_its_mapping_goes() {
    let mut mm = machine();
    add(&mut mm, P0, 0);
    let frame = mm.entry(P0, 0).mapped_frame().expect("present");
    let before = *mm.memory().frame(frame);
    assert_eq!(exclusive(&mut mm, 0), Some(frame));
    let after = *mm.memory().frame(frame);
    let counts = |of: &crate::mm::memory::Frame| (of.mapcount, of.refs, of.exclusive);
    assert_eq!(counts(&after), counts(&before));
    munmap(&Solo::new(&mut mm), P0, at(0), PAGE).expect("mapped");
    assert_eq!(mm.memory().frame(frame).refs, 0);
    assert!(mm.memory().is_free(frame));
    check_quiet(&mm).expect("consistent");
}

#[test]
fn each_walker_takes_an_exclusive_page_for_what_it_is() {
    let mut mm = machine();
    (0..4).for_each(|page| add(&mut mm, P0, page));
    advise(&mut mm, 0, PAGES, MERGEABLE).expect("anonymous");
    assert!(device_adds(&mut mm, 1));
    assert_eq!(advise(&mut mm, 0, 4, COLLAPSE), Err(Errno::Invalid));
    assert!(!ksm::merge(&Solo::new(&mut mm), (P0, 0), (P0, 1)));
    assert_eq!(mm.collect(P0, 1), Collected::Refused);
    let frame = exclusive(&mut mm, 1).expect("nobody took it back");
    // Reclaim may have it: the content goes along.
    assert!(reclaim::reclaim(&Solo::new(&mut mm), frame));
    assert!(matches!(mm.entry(P0, 1), Entry::Swap(..)));
    assert_eq!(load(&mut mm, P0, 1), 2);
    check_quiet(&mm).expect("consistent");
}

#[test]
fn what_the_cpu_may_do_afterwards_is_what_the_mapping_allows() {
    let mut mm = machine();
    for (page, rights) in [(0, VmFlags::READ), (1, RW)] {
        add(&mut mm, P0, page);
        assert!(device_adds(&mut mm, page));
        protect(&mut mm, page, rights);
        assert_eq!(load(&mut mm, P0, page), 2);
        let writable = mm.entry(P0, page).bits().has(Bits::WRITE);
        assert_eq!(writable, rights == RW, "page {page}");
    }
    assert!(!device_adds(&mut mm, 0), "not against the mapping");
    check_quiet(&mm).expect("consistent");
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Add(u32),
    DeviceAdds(u32),
    Reclaim(u32),
    Merge(u32, u32),
    Collapse(u32),
    Protect(u32, bool),
    ForkAndAdd(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let page = || 0..PAGES;
    prop_oneof![
        4 => page().prop_map(Op::Add),
        6 => page().prop_map(Op::DeviceAdds),
        3 => page().prop_map(Op::Reclaim),
        2 => (page(), page()).prop_map(|(a, b)| Op::Merge(a, b)),
        2 => page().prop_map(Op::Collapse),
        2 => (page(), any::<bool>()).prop_map(|(a, w)| Op::Protect(a, w)),
        2 => page().prop_map(Op::ForkAndAdd),
    ]
}

/// Pages that may be written, and what they hold.
struct Known {
    writable: [bool; PAGES as usize],
    values: [u64; PAGES as usize],
}

impl Known {
    fn run(&mut self, mm: &mut Machine, op: Op) {
        match op {
            Op::Add(page) if self.writable[page as usize] => {
                add(mm, P0, page);
                self.values[page as usize] += 1;
            }
            Op::Add(_) => {}
            Op::DeviceAdds(page) => {
                self.values[page as usize] += u64::from(device_adds(mm, page));
            }
            Op::Reclaim(page) => {
                if let Some(frame) = mm.entry(P0, page).mapped_frame() {
                    let _gone = reclaim::reclaim(&Solo::new(mm), frame);
                }
            }
            Op::Merge(a, b) => {
                let _merged = ksm::merge(&Solo::new(mm), (P0, a), (P0, b));
            }
            Op::Collapse(page) => drop(advise(mm, page & !3, 4, COLLAPSE)),
            Op::Protect(page, writable) => {
                protect(mm, page, if writable { RW } else { VmFlags::READ });
                self.writable[page as usize] = writable;
            }
            Op::ForkAndAdd(page) => self.fork(mm, page),
        }
    }

    /// A child finds what was there, and what it writes is its own.
    fn fork(&self, mm: &mut Machine, page: u32) {
        let child = fork(&Solo::new(mm), P0).expect("room");
        if self.writable[page as usize] {
            add(mm, child, page);
            let found = load(mm, child, page);
            assert_eq!(found, self.values[page as usize] + 1);
        }
        exit(&Solo::new(mm), child);
    }
}

proptest! {
    // With 50 operations each, some hundred thousand.
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nobody_loses_a_write_to_an_exclusive_page(ops in prop::collection::vec(op(), 50)) {
        let mut mm = machine();
        advise(&mut mm, 0, PAGES, MERGEABLE).expect("anonymous");
        let mut known = Known { writable: [true; 8], values: [0; 8] };
        for op in ops {
            known.run(&mut mm, op);
            check_quiet(&mm).expect("consistent");
        }
        for page in 0..PAGES {
            prop_assert_eq!(load(&mut mm, P0, page), known.values[page as usize]);
        }
    }
}
