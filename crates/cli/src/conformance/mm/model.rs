//! Programs on the model.

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::mutant::Mutant;
use gpusvm::seam::mm::Access;
use gpusvm_live::scratch::{Answer, Area, Call, How, Kind, Look, Place, Seen, Step, face, flag};
use gpusvm_model::mm::advise::{madvise, process_madvise};
use gpusvm_model::mm::around::Solo;
use gpusvm_model::mm::check::check_quiet;
use gpusvm_model::mm::errno::{Errno, Signal};
use gpusvm_model::mm::fault::{Hit, fault};
use gpusvm_model::mm::flags::VmFlags;
use gpusvm_model::mm::fork::{exit, fork};
use gpusvm_model::mm::map::{Map, What, mmap, munmap};
use gpusvm_model::mm::protect::{mlock, mprotect, munlock};
use gpusvm_model::mm::remap::{Remap, Target, mremap};
use gpusvm_model::mm::vma::{Backing, Vma};
use gpusvm_model::mm::{DeviceFolios, Machine, Pages, Pid, Privilege, Shape, Thp, map};

use crate::conformance::mm::program::{BASE, Program, Size};

const COLLAPSE: i32 = 25;

/// What the model takes from the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    /// When there are large pages.
    pub(crate) thp: Thp,
    /// A difference that is planted.
    pub(crate) planted: Option<Mutant>,
}

/// A program breaks a rule of the model itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inconsistent {
    /// The step after which it was broken.
    pub(crate) step: usize,
    /// The rule.
    pub(crate) rule: String,
}

/// Runs a program on a new machine, up to the first call that the model leaves out.
///
/// # Errors
/// [`Inconsistent`].
pub(crate) fn run(program: &Program, facts: Facts) -> Result<Vec<Seen>, Inconsistent> {
    let mut mm = machine(program.size, facts);
    let mut seen = Vec::with_capacity(program.steps.len());
    for (n, step) in program.steps.iter().enumerate() {
        if leaves_out(&mm, step) {
            break;
        }
        let answer = make(&mut mm, step);
        // Who has ended sees nothing.
        let looks = step.look == Look::Yes && step.call != Call::Exit;
        seen.push(if looks {
            look(&mm, Pid(step.who), answer)
        } else {
            Seen {
                answer: Some(answer),
                ..Seen::default()
            }
        });
        let small = program.size != Size::Blocks || n + 1 == program.steps.len();
        if small && let Err(broken) = check_quiet(&mm) {
            return Err(Inconsistent {
                step: n,
                rule: broken.to_string(),
            });
        }
    }
    Ok(seen)
}

/// Whether the model does not have what a call asks for: large pages of shared memory, which
/// `MADV_COLLAPSE` makes wherever hugepages-2048kB/shmem_enabled is not `never`.
fn leaves_out(mm: &Machine, step: &Step) -> bool {
    let shape = mm.shape();
    let shared = |at: u64, len: u64| {
        let page = |at: u64| {
            u32::try_from(at / PAGE)
                .unwrap_or(u32::MAX)
                .min(shape.pages)
        };
        let pages = Pages::new(
            page(at),
            page(at.saturating_add(len).saturating_add(PAGE - 1)),
        );
        let mut vmas = mm.process(Pid(step.who)).vmas.overlapping(pages);
        vmas.any(|vma| vma.flags.has(VmFlags::SHARED) && vma.pages.len() >= shape.block())
    };
    match step.call {
        Call::Advise {
            at,
            len,
            advice: COLLAPSE,
        } => shared(at, len),
        Call::AdviseMany {
            spans,
            count,
            advice: COLLAPSE,
        } => spans[..count.into()]
            .iter()
            .any(|(at, len)| shared(*at, *len)),
        _ => false,
    }
}

fn machine(size: Size, facts: Facts) -> Machine {
    let frames = match size {
        Size::Pages | Size::Roomy => 256,
        Size::Blocks => 16384,
    };
    let mut mm = Machine::new(Shape {
        base: HostVa::new(BASE),
        pages: size.pages().into(),
        frames,
        slots: 0,
        processes: 3,
        pmd_order: 9,
        words: 1,
        thp: facts.thp,
        device_folios: DeviceFolios::Small,
        coherent: 0,
        privilege: Privilege::None,
    });
    mm.plant(facts.planted);
    mm
}

fn make(mm: &mut Machine, step: &Step) -> Answer {
    let pid = Pid(step.who);
    match step.call {
        Call::Load { at } => return load(mm, pid, at),
        Call::Store { at, value } => return store(mm, pid, at, value),
        Call::Exit => {
            exit(&Solo::new(mm), pid);
            return Answer::Done(0);
        }
        _ => {}
    }
    match call(mm, pid, &step.call) {
        Ok(value) => Answer::Done(value),
        Err(error) => Answer::Failed(error.number()),
    }
}

fn address(at: u64) -> HostVa {
    HostVa::new(BASE.wrapping_add(at))
}

fn call(mm: &mut Machine, pid: Pid, call: &Call) -> Result<u64, Errno> {
    let solo = Solo::new(mm);
    let none = |()| 0;
    let place = |at: HostVa| at.get().wrapping_sub(BASE);
    match *call {
        Call::Map { .. } => mmap(&solo, pid, &mapping(call)).map(place),
        Call::Unmap { at, len } => munmap(&solo, pid, address(at), len).map(none),
        Call::Protect { at, len, prot } => {
            mprotect(&solo, pid, address(at), len, rights(prot)).map(none)
        }
        Call::Remap { at, old, new, how } => {
            let remap = Remap {
                at: address(at),
                old_len: old,
                new_len: new,
                target: target(how),
            };
            mremap(&solo, pid, &remap).map(place)
        }
        Call::Advise { at, len, advice } => madvise(&solo, pid, address(at), len, advice).map(none),
        Call::AdviseMany {
            spans,
            count,
            advice,
        } => {
            let spans: Vec<_> = spans
                .iter()
                .take(count.into())
                .map(|(at, len)| (address(*at), *len))
                .collect();
            process_madvise(&solo, pid, &spans, advice)
        }
        Call::Lock { at, len } => mlock(&solo, pid, address(at), len).map(none),
        Call::Unlock { at, len } => munlock(&solo, pid, address(at), len).map(none),
        Call::Fork { .. } => fork(&solo, pid).map(|child| child.0.into()),
        Call::Load { .. } | Call::Store { .. } | Call::Exit => Ok(0),
    }
}

fn mapping(call: &Call) -> Map {
    let Call::Map {
        at,
        len,
        prot,
        kind,
        place,
    } = *call
    else {
        unreachable!("asked for mappings only");
    };
    Map {
        place: match place {
            Place::Hint => map::Place::Hint(address(at)),
            Place::Fixed => map::Place::Fixed(address(at)),
            Place::NoReplace => map::Place::NoReplace(address(at)),
            Place::Anywhere => map::Place::Hint(HostVa::new(0)),
        },
        len,
        prot: rights(prot),
        what: match kind {
            Kind::Private => What::Private,
            Kind::Shared => What::Shared,
        },
        extra: VmFlags::NONE,
    }
}

fn rights(prot: u8) -> VmFlags {
    let all = [(1, VmFlags::READ), (2, VmFlags::WRITE), (4, VmFlags::EXEC)];
    let given = all.iter().filter(|(bit, _)| prot & bit != 0);
    given.fold(VmFlags::NONE, |flags, (_, flag)| flags.with(*flag))
}

fn target(how: How) -> Target {
    match how {
        How::InPlace => Target::InPlace,
        How::Anywhere => Target::Anywhere,
        How::At(to) => Target::At(address(to)),
        How::LeaveBehind => Target::LeaveBehind,
        How::LeaveBehindAt(to) => Target::LeaveBehindAt(address(to)),
    }
}

fn touch(mm: &mut Machine, pid: Pid, at: u64, access: Access) -> Result<Hit, i32> {
    let page = u32::try_from(at / PAGE).unwrap_or(u32::MAX);
    let signal = |signal| match signal {
        Signal::Segv => 11,
        Signal::Bus => 7,
        Signal::OutOfMemory => 9,
    };
    fault(&Solo::new(mm), pid, page, access).map_err(signal)?;
    mm.access(pid, page, access).ok_or(0)
}

fn load(mm: &mut Machine, pid: Pid, at: u64) -> Answer {
    match touch(mm, pid, at, Access::Read) {
        Err(signal) => Answer::Signal(signal),
        Ok(Hit::Zero) => Answer::Done(0),
        Ok(Hit::Frame(frame)) => {
            let word = mm.memory().content(frame).first().copied();
            Answer::Done(word.unwrap_or(0))
        }
    }
}

fn store(mm: &mut Machine, pid: Pid, at: u64, value: u64) -> Answer {
    match touch(mm, pid, at, Access::Write) {
        Ok(Hit::Frame(frame)) => {
            mm.write_word(frame, 0, value);
            Answer::Done(0)
        }
        Ok(Hit::Zero) => Answer::Signal(0),
        Err(signal) => Answer::Signal(signal),
    }
}

fn look(mm: &Machine, pid: Pid, answer: Answer) -> Seen {
    Seen {
        answer: Some(answer),
        areas: mm.process(pid).vmas.all().iter().map(area).collect(),
        pages: (0..mm.shape().pages)
            .map(|page| face(mm.pagemap(pid, page), mm.categories(pid, page)))
            .collect(),
    }
}

fn area(vma: &Vma) -> Area {
    let offset = match vma.backing {
        Backing::Anon => 0,
        Backing::File(_) | Backing::HugePages | Backing::Special => u64::from(vma.offset) * PAGE,
    };
    Area {
        start: u64::from(vma.pages.start) * PAGE,
        end: u64::from(vma.pages.end) * PAGE,
        offset,
        flags: flags(vma.flags),
    }
}

fn flags(flags: VmFlags) -> u32 {
    let names = [
        (VmFlags::READ, b"rd"),
        (VmFlags::WRITE, b"wr"),
        (VmFlags::EXEC, b"ex"),
        (VmFlags::SHARED, b"sh"),
        (VmFlags::MAY_READ, b"mr"),
        (VmFlags::MAY_WRITE, b"mw"),
        (VmFlags::MAY_EXEC, b"me"),
        (VmFlags::LOCKED, b"lo"),
        (VmFlags::LOCK_ON_FAULT, b"lf"),
        (VmFlags::DONT_COPY, b"dc"),
        (VmFlags::WIPE_ON_FORK, b"wf"),
        (VmFlags::HUGE, b"hg"),
        (VmFlags::NO_HUGE, b"nh"),
        (VmFlags::MERGEABLE, b"mg"),
        (VmFlags::DONT_EXPAND, b"de"),
        (VmFlags::DONT_DUMP, b"dd"),
        (VmFlags::SEQUENTIAL, b"sr"),
        (VmFlags::RANDOM, b"rr"),
        (VmFlags::ACCOUNT, b"ac"),
        (VmFlags::MAYBE_GUARD, b"gu"),
    ];
    let set = names.iter().filter(|(known, _)| flags.has(*known));
    set.map(|(_, name)| flag(*name)).sum()
}
