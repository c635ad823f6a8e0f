//! Random operations against a slow model that knows only pages: their rights and their content.

use std::collections::BTreeMap;

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::mm::Access;
use proptest::prelude::*;

use crate::mm::around::Solo;
use crate::mm::changes::Changes;
use crate::mm::check::{check, check_quiet};
use crate::mm::checker::Checker;
use crate::mm::entry::Entry;
use crate::mm::errno::{Errno, Signal};
use crate::mm::fault::{Hit, fault};
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::{Map, Place, What, mmap, munmap};
use crate::mm::memory::Owner;
use crate::mm::remap::{Remap, Target, mremap};
use crate::mm::{Machine, Pages, Pid, Shape, Thp, advise, fork, ksm, protect, reclaim};

const PAGES: u32 = 16;
const RW: VmFlags = VmFlags::READ.with(VmFlags::WRITE);

/// Where a page's content is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Home {
    /// Here.
    Own(u64),
    /// Here, or gone (`MADV_FREE`).
    Free(u64),
    /// In this page of a shared object.
    Shared(u32, u32),
    /// Nowhere: past the end of a shared object.
    Past,
}

impl Home {
    fn is_shared(self) -> bool {
        matches!(self, Self::Shared(..) | Self::Past)
    }
}

#[derive(Clone, Copy, Debug)]
struct Page {
    rights: VmFlags,
    guard: bool,
    locked: bool,
    /// What a child gets of it.
    child: VmFlags,
    home: Home,
}

#[derive(Clone, Debug, Default)]
struct Slow {
    tables: [BTreeMap<u32, Page>; 3],
    alive: [bool; 3],
    shared: BTreeMap<(u32, u32), u64>,
    /// Pages of each shared object.
    sizes: BTreeMap<u32, u32>,
    next: u32,
}

#[derive(Clone, Debug)]
enum Op {
    Map(u32, u32, bool),
    Unmap(u32, u32),
    Protect(u32, u32, u8),
    Move {
        from: u32,
        len: u32,
        to: u32,
        leave: bool,
    },
    Resize {
        from: u32,
        old: u32,
        new: u32,
        may_move: bool,
    },
    Advise(u32, u32, i32),
    Lock(u32, u32, bool),
    Load(u32),
    Store(u32, u64),
    Reclaim(u32),
    Merge(u32, u32),
    Fork,
    Exit,
}

fn op() -> impl Strategy<Value = (u8, Op)> {
    let at = || 0..PAGES;
    let len = || 1..6u32;
    let advices = prop::sample::select(vec![
        4, 8, 10, 11, 12, 13, 14, 15, 18, 19, 20, 21, 25, 102, 103, 22, 23, 99,
    ]);
    let op = prop_oneof![
        3 => (at(), len(), any::<bool>()).prop_map(|(a, l, s)| Op::Map(a, l, s)),
        1 => (at(), len()).prop_map(|(a, l)| Op::Unmap(a, l)),
        2 => (at(), len(), 0..4u8).prop_map(|(a, l, r)| Op::Protect(a, l, r)),
        2 => (at(), len(), at(), any::<bool>())
            .prop_map(|(from, len, to, leave)| Op::Move { from, len, to, leave }),
        1 => (at(), len(), len(), any::<bool>())
            .prop_map(|(from, old, new, may_move)| Op::Resize { from, old, new, may_move }),
        6 => (at(), len(), advices).prop_map(|(a, l, n)| Op::Advise(a, l, n)),
        1 => (at(), len(), any::<bool>()).prop_map(|(a, l, on)| Op::Lock(a, l, on)),
        6 => at().prop_map(Op::Load),
        10 => (at(), 1..4u64).prop_map(|(a, v)| Op::Store(a, v)),
        2 => at().prop_map(Op::Reclaim),
        2 => (at(), at()).prop_map(|(a, b)| Op::Merge(a, b)),
        1 => Just(Op::Fork),
        1 => Just(Op::Exit),
    ];
    (0..3u8, op)
}

fn machine(thp: Thp) -> Machine {
    Machine::new(Shape {
        pages: PAGES,
        frames: 256,
        slots: 128,
        processes: 3,
        pmd_order: 2,
        thp,
        ..Shape::default()
    })
}

struct Pair {
    mm: Machine,
    checker: Checker,
    slow: Slow,
}

impl Pair {
    fn new(thp: Thp) -> Self {
        let mut slow = Slow::default();
        slow.alive[0] = true;
        let mm = machine(thp);
        Self {
            checker: Checker::new(&mm),
            mm,
            slow,
        }
    }

    fn at(&self, page: u32) -> HostVa {
        self.mm.shape().address(page)
    }

    fn run(&mut self, pid: u8, op: &Op) {
        let process = usize::from(pid);
        if !self.slow.alive[process] {
            return;
        }
        match *op {
            Op::Map(at, len, shared) => {
                let what = if shared { What::Shared } else { What::Private };
                self.map(pid, at, len, what);
            }
            Op::Unmap(at, len) => self.unmap(pid, at, len),
            Op::Protect(at, len, rights) => self.protect(pid, at, len, rights),
            Op::Move {
                from,
                len,
                to,
                leave,
            } => {
                let target = self.at(to);
                let target = if leave {
                    Target::LeaveBehindAt(target)
                } else {
                    Target::At(target)
                };
                self.remap(pid, from, len, len, target);
            }
            Op::Resize {
                from,
                old,
                new,
                may_move,
            } => {
                let target = if may_move {
                    Target::Anywhere
                } else {
                    Target::InPlace
                };
                self.remap(pid, from, old, new, target);
            }
            Op::Advise(at, len, advice) => self.advise(pid, at, len, advice),
            Op::Lock(at, len, true) => self.lock(pid, at, len, VmFlags::LOCKED),
            Op::Lock(at, len, false) => self.lock(pid, at, len, VmFlags::NONE),
            Op::Load(at) => self.load(pid, at),
            Op::Store(at, value) => self.store(pid, at, value),
            Op::Reclaim(at) => {
                if let Entry::Present(frame, _) = self.mm.entry(Pid(pid), at) {
                    reclaim::reclaim(&Solo::new(&mut self.mm), frame);
                }
            }
            Op::Merge(a, b) => {
                let first = (Pid(0), a);
                ksm::merge(&Solo::new(&mut self.mm), first, (Pid(pid), b));
            }
            Op::Fork => self.fork(pid),
            Op::Exit if pid > 0 => {
                fork::exit(&Solo::new(&mut self.mm), Pid(pid));
                self.slow.alive[process] = false;
                self.slow.tables[process].clear();
            }
            Op::Exit => {}
        }
    }

    fn map(&mut self, pid: u8, at: u32, len: u32, what: What) {
        let map = Map {
            place: Place::Fixed(self.at(at)),
            len: u64::from(len) * PAGE,
            prot: RW,
            what,
            extra: VmFlags::NONE,
        };
        let got = mmap(&Solo::new(&mut self.mm), Pid(pid), &map);
        if at + len > PAGES {
            assert_eq!(got, Err(Errno::NoMem));
            return;
        }
        assert_eq!(got, Ok(self.at(at)));
        self.slow.next += 1;
        self.slow.sizes.insert(self.slow.next, len);
        for page in at..at + len {
            let home = if what == What::Shared {
                Home::Shared(self.slow.next, page - at)
            } else {
                Home::Own(0)
            };
            let page_state = Page {
                rights: RW,
                guard: false,
                locked: false,
                child: VmFlags::NONE,
                home,
            };
            self.slow.tables[usize::from(pid)].insert(page, page_state);
        }
    }

    fn unmap(&mut self, pid: u8, at: u32, len: u32) {
        let start = self.at(at);
        let got = munmap(
            &Solo::new(&mut self.mm),
            Pid(pid),
            start,
            u64::from(len) * PAGE,
        );
        if at + len > PAGES {
            assert_eq!(got, Err(Errno::Invalid));
            return;
        }
        assert_eq!(got, Ok(()));
        for page in at..at + len {
            self.slow.tables[usize::from(pid)].remove(&page);
        }
    }

    fn protect(&mut self, pid: u8, at: u32, len: u32, rights: u8) {
        let rights = match rights {
            0 => VmFlags::NONE,
            1 => VmFlags::READ,
            _ => RW,
        };
        let start = self.at(at);
        let bytes = u64::from(len) * PAGE;
        let got = protect::mprotect(&Solo::new(&mut self.mm), Pid(pid), start, bytes, rights);
        let table = &mut self.slow.tables[usize::from(pid)];
        for page in at..at + len {
            let Some(page) = table.get_mut(&page) else {
                assert_eq!(got, Err(Errno::NoMem));
                return;
            };
            page.rights = rights;
        }
        assert_eq!(got, Ok(()));
    }

    fn remap(&mut self, pid: u8, from: u32, old: u32, new: u32, target: Target) {
        let remap = Remap {
            at: self.at(from),
            old_len: u64::from(old) * PAGE,
            new_len: u64::from(new) * PAGE,
            target,
        };
        let Ok(to) = mremap(&Solo::new(&mut self.mm), Pid(pid), &remap) else {
            return;
        };
        let to = self.mm.shape().page(to).expect("inside");
        let table = &mut self.slow.tables[usize::from(pid)];
        let kept = old.min(new);
        let pages: Vec<Option<Page>> = (from..from + kept)
            .map(|page| table.get(&page).copied())
            .collect();
        for page in from..from + old {
            let left = table.get_mut(&page);
            if !matches!(target, Target::LeaveBehindAt(_)) {
                table.remove(&page);
            } else if let Some(left) = left {
                left.guard = false;
                if !left.home.is_shared() {
                    left.home = Home::Own(0);
                }
            }
        }
        if matches!(target, Target::LeaveBehindAt(_)) {
            for page in from..from + old {
                self.unlock_around(pid, page);
            }
        }
        let table = &mut self.slow.tables[usize::from(pid)];
        for (n, page) in (0..).zip(&pages) {
            if let Some(page) = page {
                table.insert(to + n, *page);
            }
        }
        for n in kept..new {
            let last = pages
                .last()
                .copied()
                .flatten()
                .expect("only mapped pages grow");
            let home = match last.home {
                Home::Shared(id, index) if index + 1 + n - kept < self.slow.sizes[&id] => {
                    Home::Shared(id, index + 1 + n - kept)
                }
                Home::Shared(..) | Home::Past => Home::Past,
                Home::Own(_) | Home::Free(_) => Home::Own(0),
            };
            table.insert(
                to + n,
                Page {
                    home,
                    guard: false,
                    ..last
                },
            );
        }
    }

    /// What stays behind loses its lock, as far as its mapping goes.
    fn unlock_around(&mut self, pid: u8, from: u32) {
        let Some(vma) = self.mm.process(Pid(pid)).vmas.at(from).copied() else {
            return;
        };
        for page in vma.pages.iter() {
            if let Some(page) = self.slow.tables[usize::from(pid)].get_mut(&page) {
                page.locked = false;
            }
        }
    }

    fn advise(&mut self, pid: u8, at: u32, len: u32, advice: i32) {
        let start = self.at(at);
        let bytes = u64::from(len) * PAGE;
        let got = advise::madvise(&Solo::new(&mut self.mm), Pid(pid), start, bytes, advice);
        if advice == 99 {
            assert_eq!(got, Err(Errno::Invalid));
            return;
        }
        let mut expected = Ok(());
        for page in at..at + len {
            let table = &mut self.slow.tables[usize::from(pid)];
            let Some(page) = table.get_mut(&page) else {
                expected = Err(Errno::NoMem);
                if matches!(advice, 22 | 23) {
                    break;
                }
                continue;
            };
            if let Err(error) = page.advise(advice) {
                expected = Err(error);
                break;
            }
        }
        if advice != 25 {
            assert_eq!(got, expected, "advice {advice}");
        }
    }

    fn lock(&mut self, pid: u8, at: u32, len: u32, locks: VmFlags) {
        let on = locks.has(VmFlags::LOCKED);
        let start = self.at(at);
        let bytes = u64::from(len) * PAGE;
        let solo = Solo::new(&mut self.mm);
        let got = if on {
            protect::mlock(&solo, Pid(pid), start, bytes)
        } else {
            protect::munlock(&solo, Pid(pid), start, bytes)
        };
        let whole =
            (at..at + len).all(|page| self.slow.tables[usize::from(pid)].contains_key(&page));
        assert!(whole || got == Err(Errno::NoMem), "{got:?}");
        for page in at..at + len {
            match self.slow.tables[usize::from(pid)].get_mut(&page) {
                Some(page) => page.locked = on,
                None => return,
            }
        }
    }

    fn fork(&mut self, pid: u8) {
        let dead = self.slow.alive.iter().position(|alive| !alive);
        let got = fork::fork(&Solo::new(&mut self.mm), Pid(pid));
        let Some(child) = dead else {
            assert_eq!(got, Err(Errno::Again));
            return;
        };
        assert_eq!(got.map(|pid| usize::from(pid.0)), Ok(child));
        self.slow.alive[child] = true;
        let mut table = self.slow.tables[usize::from(pid)].clone();
        table.retain(|_, page| !page.child.has(VmFlags::DONT_COPY));
        for page in table.values_mut() {
            page.locked = false;
            if page.child.has(VmFlags::WIPE_ON_FORK) {
                page.home = Home::Own(0);
                page.guard = false;
            }
        }
        self.slow.tables[child] = table;
    }

    fn touch(&mut self, pid: u8, page: u32, access: Access) -> Result<Hit, Signal> {
        fault(&Solo::new(&mut self.mm), Pid(pid), page, access)?;
        Ok(self
            .mm
            .access(Pid(pid), page, access)
            .expect("just faulted in"))
    }

    fn load(&mut self, pid: u8, at: u32) {
        let got = self.touch(pid, at, Access::Read).map(|hit| match hit {
            Hit::Frame(frame) => self.mm.memory().content(frame)[0],
            Hit::Zero => 0,
        });
        let shared = &self.slow.shared;
        match self.slow.tables[usize::from(pid)].get_mut(&at) {
            Some(page) if page.allows(VmFlags::READ) => match page.home {
                Home::Own(value) => assert_eq!(got, Ok(value), "page {at}"),
                Home::Shared(id, index) => {
                    let value = shared.get(&(id, index)).copied().unwrap_or(0);
                    assert_eq!(got, Ok(value), "page {at}");
                }
                Home::Past => assert_eq!(got, Err(Signal::Bus), "page {at}"),
                Home::Free(value) => {
                    assert!(got == Ok(value) || got == Ok(0), "page {at}: {got:?}");
                    if got == Ok(0) {
                        page.home = Home::Own(0);
                    }
                }
            },
            Some(_) | None => assert_eq!(got, Err(Signal::Segv), "page {at}"),
        }
    }

    fn store(&mut self, pid: u8, at: u32, value: u64) {
        let got = self.touch(pid, at, Access::Write);
        match self.slow.tables[usize::from(pid)].get_mut(&at) {
            Some(page) if page.allows(VmFlags::WRITE) => {
                if page.home == Home::Past {
                    return assert_eq!(got, Err(Signal::Bus), "page {at}");
                }
                let Ok(Hit::Frame(frame)) = got else {
                    panic!("page {at}: {got:?}");
                };
                self.mm.memory.content_mut(frame)[0] = value;
                match page.home {
                    Home::Own(_) | Home::Free(_) => page.home = Home::Own(value),
                    Home::Shared(id, index) => {
                        self.slow.shared.insert((id, index), value);
                    }
                    Home::Past => unreachable!("there is nothing to store to"),
                }
            }
            Some(_) | None => assert_eq!(got, Err(Signal::Segv), "page {at}"),
        }
    }

    fn compare(&mut self) {
        check(&self.mm).expect("the state makes sense");
        check_quiet(&self.mm).expect("nothing is under way");
        note(&mut self.mm, &mut self.checker);
        let changed = self.checker.check(&self.mm);
        changed.expect("what has changed makes sense");
        for pid in 0..3u8 {
            let process = self.mm.process(Pid(pid));
            let table = &self.slow.tables[usize::from(pid)];
            for page in 0..PAGES {
                let rights = process.vmas.at(page).map(|vma| vma.flags.common(RW));
                assert_eq!(
                    rights,
                    table.get(&page).map(|page| page.rights),
                    "page {page}"
                );
            }
        }
    }
}

impl Page {
    fn allows(&self, right: VmFlags) -> bool {
        let enough = if right == VmFlags::READ {
            self.rights != VmFlags::NONE
        } else {
            self.rights.has(right)
        };
        enough && !self.guard
    }

    fn advise(&mut self, advice: i32) -> Result<(), Errno> {
        let shared = self.home.is_shared();
        let refused = match advice {
            4 | 20 | 21 | 102 => self.locked,
            8 => self.locked || shared,
            18 => shared,
            22 => !self.rights.has(VmFlags::READ),
            23 => !self.rights.has(VmFlags::WRITE),
            _ => false,
        };
        if refused {
            return Err(Errno::Invalid);
        }
        match (advice, self.home) {
            (22 | 23, home) if self.guard || home == Home::Past => return Err(Errno::Fault),
            (102, home) => {
                self.guard = true;
                if !home.is_shared() {
                    self.home = Home::Own(0);
                }
            }
            (103, _) => self.guard = false,
            (4, Home::Own(_) | Home::Free(_)) => self.home = Home::Own(0),
            (8, Home::Own(value)) => self.home = Home::Free(value),
            (10, _) => self.child = self.child.with(VmFlags::DONT_COPY),
            (11, _) => self.child = self.child.without(VmFlags::DONT_COPY),
            (18, _) => self.child = self.child.with(VmFlags::WIPE_ON_FORK),
            (19, _) => self.child = self.child.without(VmFlags::WIPE_ON_FORK),
            _ => {}
        }
        Ok(())
    }
}

fn run(thp: Thp, ops: &[(u8, Op)]) {
    let mut pair = Pair::new(thp);
    for (pid, op) in ops {
        pair.run(*pid, op);
        pair.compare();
    }
    for pid in 0..3 {
        for page in 0..PAGES {
            if pair.slow.alive[usize::from(pid)] {
                pair.load(pid, page);
            }
        }
    }
    for pid in 0..3 {
        if pair.slow.alive[usize::from(pid)] {
            fork::exit(&Solo::new(&mut pair.mm), Pid(pid));
        }
    }
    check_quiet(&pair.mm).expect("nothing is left");
    assert_eq!(
        pair.mm.memory().free_frames(),
        pair.mm.memory().host_frames()
    );
    assert!(pair.mm.swap.slots.iter().all(|slot| slot.count == 0));
    let whole = Pages::new(0, PAGES);
    assert!(pair.mm.next_used(Pid(0), 0, whole).is_none());
}

fn note(mm: &mut Machine, checker: &mut Checker) {
    let mut changes = Changes::default();
    mm.take_changes(&mut changes);
    checker.note(&mut changes);
}

/// Breaks something about the page at `at`, its frame or its slot, as a bug in a step would.
fn damage(mm: &mut Machine, pid: Pid, at: u32, how: u8) {
    let entry = mm.entry(pid, at);
    if let Entry::Swap(slot, _) = entry {
        match how % 3 {
            0 => mm.swap.slot_mut(slot).count += 1,
            1 => mm.swap.slot_mut(slot).cache = None,
            _ => mm.set_entry(pid, at, Entry::None),
        }
    }
    let Some(frame) = entry.named_frame() else {
        return;
    };
    let head = mm.memory.head(frame);
    match how {
        0 => mm.memory.frame_mut(head).refs += 1,
        1 => mm.memory.frame_mut(frame).mapcount ^= 1,
        2 => mm.memory.frame_mut(frame).exclusive ^= true,
        3 => mm.memory.frame_mut(head).owner = Owner::Free,
        4 => mm.memory.frame_mut(head).swap = None,
        5 => mm.memory.frame_mut(head).pins += 1,
        6 => mm.set_entry(pid, at, Entry::None),
        7 => mm.set_entry(pid, (at + 1) % PAGES, entry),
        8 => mm.set_entry(pid, at, Entry::Migration(frame, entry.bits())),
        9 => mm.free_folio(head),
        10 => {
            mm.process_mut(pid).vmas.remove(Pages::one(at));
        }
        _ => mm.set_bits(pid, at, entry.bits().with(Bits::WRITE)),
    }
}

/// Breaks something after some operations; the check of what has changed finds it where that of
/// everything does.
fn run_and_damage(ops: &[(u8, Op)], (pid, at, how): (u8, u32, u8)) {
    let mut pair = Pair::new(Thp::Always);
    for (pid, op) in ops {
        pair.run(*pid, op);
    }
    pair.compare();
    damage(&mut pair.mm, Pid(pid), at, how);
    note(&mut pair.mm, &mut pair.checker);
    let (whole, changed) = (check(&pair.mm), pair.checker.check(&pair.mm));
    assert_eq!(changed.is_err(), whole.is_err(), "{changed:?}, {whole:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_agree_with_a_page_by_page_model(ops in prop::collection::vec(op(), 1..60)) {
        run(Thp::Madvise, &ops);
    }

    #[test]
    fn large_pages_change_nothing_that_a_program_sees(ops in prop::collection::vec(op(), 1..60)) {
        run(Thp::Always, &ops);
    }

    #[test]
    fn what_has_changed_is_all_that_must_be_looked_at(
        ops in prop::collection::vec(op(), 1..40),
        damage in (0..3u8, 0..PAGES, 0..12u8),
    ) {
        run_and_damage(&ops, damage);
    }
}
