//! Transcripts of a real kernel: the same calls must give the same answers, the same mappings and
//! the same pagemap bits.
//!
//! A line is `call arguments = errno | mappings | pagemap`. Of a page's word the transcript has
//! present, swapped, file and exclusive as the bits of a hexadecimal digit, `g` for a guard and
//! `.` for nothing. Only answers that do not depend on pressure and configuration are in it.

use std::fmt::Write as _;
use std::path::Path;

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::mm::Access;

use crate::mm::around::Solo;
use crate::mm::check::check_quiet;
use crate::mm::errno::Errno;
use crate::mm::fault::fault;
use crate::mm::flags::VmFlags;
use crate::mm::map::{Map, Place, What, mmap, munmap};
use crate::mm::pagemap::{PM_FILE, PM_GUARD_REGION, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP};
use crate::mm::protect::{mlock, mprotect, munlock};
use crate::mm::remap::{Remap, Target, mremap};
use crate::mm::{Machine, Pid, Shape, Thp, advise};

const PAGES: u32 = 16;
const P0: Pid = Pid(0);

fn machine() -> Machine {
    Machine::new(Shape {
        pages: PAGES,
        frames: 64,
        processes: 1,
        pmd_order: 9,
        thp: Thp::Madvise,
        ..Shape::default()
    })
}

fn rights(n: u32) -> VmFlags {
    match n {
        0 => VmFlags::NONE,
        1 => VmFlags::READ,
        _ => VmFlags::READ.with(VmFlags::WRITE),
    }
}

fn call(mm: &mut Machine, name: &str, args: &[u32]) -> Result<(), Errno> {
    let shape = mm.shape().clone();
    let at = |n: usize| shape.address(args[n]);
    let len = |n: usize| u64::from(args[n]) * PAGE;
    let solo = Solo::new(mm);
    match name {
        "map" => {
            let map = Map {
                place: Place::Fixed(at(0)),
                len: len(1),
                prot: rights(args[2]),
                what: if args[3] == 1 {
                    What::Shared
                } else {
                    What::Private
                },
                extra: VmFlags::NONE,
            };
            mmap(&solo, P0, &map).map(drop_address)
        }
        "unmap" => munmap(&solo, P0, at(0), len(1)),
        "protect" => mprotect(&solo, P0, at(0), len(1), rights(args[2])),
        "move" | "resize" => {
            let remap = Remap {
                at: at(0),
                old_len: len(1),
                new_len: if name == "move" { len(1) } else { len(2) },
                target: match (name, args.get(3)) {
                    ("move", Some(1)) => Target::LeaveBehindAt(at(2)),
                    ("move", _) => Target::At(at(2)),
                    _ => Target::InPlace,
                },
            };
            mremap(&solo, P0, &remap).map(drop_address)
        }
        "advise" => {
            let advice = i32::try_from(args[2]).expect("small");
            advise::madvise(&solo, P0, at(0), len(1), advice)
        }
        "lock" => mlock(&solo, P0, at(0), len(1)),
        "unlock" => munlock(&solo, P0, at(0), len(1)),
        "load" => touch(&solo, args[0], Access::Read),
        "store" => touch(&solo, args[0], Access::Write),
        // Found out by the comparison: no transcript has this answer.
        _ => Err(Errno::NotSupported),
    }
}

fn drop_address(_at: HostVa) {}

fn touch(solo: &Solo<'_>, page: u32, access: Access) -> Result<(), Errno> {
    fault(solo, P0, page, access).map_err(|_signal| Errno::Fault)
}

fn mappings(mm: &Machine) -> String {
    let letter = |has: VmFlags, flags: VmFlags, letter| if flags.has(has) { letter } else { '-' };
    let all = mm.process(P0).vmas.all().iter().map(|vma| {
        let shared = if vma.flags.has(VmFlags::SHARED) {
            's'
        } else {
            'p'
        };
        let read = letter(VmFlags::READ, vma.flags, 'r');
        let write = letter(VmFlags::WRITE, vma.flags, 'w');
        format!(
            "{}-{}:{read}{write}-{shared}",
            vma.pages.start, vma.pages.end
        )
    });
    all.collect::<Vec<_>>().join(" ")
}

fn pagemap(mm: &Machine) -> String {
    let mut text = String::new();
    for page in 0..PAGES {
        let word = mm.pagemap(P0, page);
        let bits = [PM_PRESENT, PM_SWAP, PM_FILE, PM_MMAP_EXCLUSIVE];
        let digit: u32 = (0..)
            .zip(bits)
            .map(|(n, bit)| u32::from(word & bit != 0) << n)
            .sum();
        match digit {
            _ if word & PM_GUARD_REGION != 0 => text.push('g'),
            0 => text.push('.'),
            _ => write!(text, "{digit:x}").expect("a string takes everything"),
        }
    }
    text
}

/// Replays a transcript and returns the number of calls.
fn replay(text: &str) -> usize {
    let mut mm = machine();
    let (mut calls, mut history) = (0, String::new());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line == "seq" {
            mm = machine();
            history.clear();
            continue;
        }
        writeln!(history, "{line}").expect("a string takes everything");
        let (request, answer) = line.split_once(" = ").expect("a call and its answer");
        let mut words = request.split(' ');
        let name = words.next().expect("a name");
        let args: Vec<u32> = words.map(|word| word.parse().expect("a number")).collect();
        let errno = call(&mut mm, name, &args).map_or_else(Errno::number, |()| 0);
        let ours = format!("{errno} | {} | {}", mappings(&mm), pagemap(&mm));
        assert_eq!(ours, answer, "(model, then kernel) after\n{history}");
        check_quiet(&mm).unwrap_or_else(|broken| panic!("{broken} after\n{history}"));
        calls += 1;
    }
    calls
}

#[test]
fn calls_answer_as_linux_does() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for file in std::fs::read_dir(folder).expect("transcripts are there") {
        let text = std::fs::read_to_string(file.expect("a file").path()).expect("text");
        assert!(replay(&text) > 1000);
    }
}
