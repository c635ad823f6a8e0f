//! What a world is made of, and the worlds that have names.

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_model::mm::{DeviceFolios, Privilege, Shape, Thp};
use gpusvm_xe::vm::Rights;

use crate::atomics::Atomics;
use crate::explore::op::Op;
use crate::world::Service;
/// Words of a page that have content: one for each writer.
pub(super) use crate::world::vram::WORDS;

/// Pages of one chunk that a fault moves.
const CHUNK: u32 = 16;
/// Most pages that a world has: two chunks.
pub(super) const PAGES_MAX: u32 = 2 * CHUNK;
/// First address: aligned as the largest chunk is.
const BASE: HostVa = HostVa::new(1 << 40);

/// A named kind of world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Name, on the command line and on tapes.
    pub(crate) name: &'static str,
    /// What it is for.
    pub(crate) what: &'static str,
    /// Devices, each with one unit and one VM.
    pub(super) gpus: u16,
    /// CPU actors.
    pub(super) cpus: u16,
    /// Operations of each actor.
    pub(super) ops: u32,
    /// Pages that everybody uses. Behind them are as many, for what moves away and back.
    pub(super) pages: u32,
    /// Pages of device memory of each device.
    pub(super) vram: usize,
    /// What is in the pages at the beginning.
    pub(super) begins: Begins,
    /// What CPU actors do.
    pub(super) does: &'static [Op],
    /// Where faults are served.
    pub(super) service: Service,
    /// When VMs are closed.
    pub(super) closes: Closes,
    /// Where devices do their atomics.
    pub(super) atomics: Atomics,
    /// What devices may do to the process.
    pub(super) rights: Rights,
    /// Calls fail or are late once in so many times; 0: never.
    pub(super) chaos: u32,
}

/// What is in the pages at the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    /// Nothing.
    Untouched,
    /// A CPU has touched them all: larger ranges want that.
    Touched,
}

/// When the VM of a device is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closes {
    /// When all is over.
    AtTheEnd,
    /// When its unit is done, while others go on.
    Early,
}

const EVERYTHING: &[Op] = Op::EVERYWHERE;
const MIGRATION: &[Op] = &[
    Op::Load,
    Op::Store,
    Op::Store,
    Op::Send,
    Op::Evict,
    Op::SwapOut,
];
const ADDITIONS_AND_FORKS: &[Op] = &[
    Op::Add,
    Op::Add,
    Op::Store,
    Op::Load,
    Op::Send,
    Op::Evict,
    Op::SwapOut,
    Op::Fork,
];
const ADDITIONS: &[Op] = match ADDITIONS_AND_FORKS.split_last() {
    Some((_fork, others)) => others,
    None => &[],
};

/// The word of a page that counts, where the plan has [additions](Plan::adds).
pub(super) const COUNTER: usize = WORDS - 1;

const SWARM: Plan = Plan {
    name: "swarm",
    what: "two CPUs, two devices, everything that a process does",
    gpus: 2,
    cpus: 2,
    ops: 5,
    pages: CHUNK,
    vram: 48,
    begins: Begins::Untouched,
    does: EVERYTHING,
    service: Service::Inline,
    closes: Closes::AtTheEnd,
    atomics: Atomics::System,
    rights: Rights::ReadWrite,
    chaos: 0,
};

/// All that have names.
pub(crate) const PLANS: &[Plan] = &[
    SWARM,
    Plan {
        name: "full",
        what: "two CPUs, two devices, eight pages, twenty operations: the yardstick of speed",
        pages: 8,
        vram: 24,
        ..SWARM
    },
    Plan {
        name: "queue",
        what: "as swarm, with faults served through the fault ring",
        service: Service::Queue,
        ..SWARM
    },
    Plan {
        name: "migration",
        what: "pages go to and fro, nothing else changes",
        does: MIGRATION,
        ..SWARM
    },
    Plan {
        name: "pressure",
        what: "device memory for one chunk and its tables",
        does: MIGRATION,
        vram: 24,
        ..SWARM
    },
    Plan {
        name: "unmap",
        what: "mappings go and come back under a device",
        gpus: 1,
        does: &[
            Op::Store,
            Op::Unmap,
            Op::Unmap,
            Op::Discard,
            Op::Move,
            Op::Send,
        ],
        ..SWARM
    },
    Plan {
        name: "close",
        what: "VMs are closed while the process goes on",
        does: &[
            Op::Store,
            Op::Unmap,
            Op::Discard,
            Op::SwapOut,
            Op::Send,
            Op::Evict,
        ],
        closes: Closes::Early,
        ..SWARM
    },
    Plan {
        name: "shutdown",
        what: "mappings go while the VM of their device closes",
        ops: 2,
        does: &[Op::Unmap],
        closes: Closes::Early,
        ..SWARM
    },
    Plan {
        name: "guards",
        what: "guards come and go while pages migrate",
        gpus: 1,
        ops: 3,
        does: &[Op::Guard, Op::Guard, Op::Send],
        ..SWARM
    },
    Plan {
        name: "reclaim",
        what: "pages are swapped out, and pinned meanwhile",
        gpus: 1,
        ops: 4,
        does: &[Op::Pin, Op::SwapOut, Op::Store],
        ..SWARM
    },
    Plan {
        name: "large",
        what: "large pages come and go in parts",
        gpus: 1,
        ops: 4,
        does: &[Op::Collapse, Op::Discard, Op::Discard, Op::Store],
        ..SWARM
    },
    Plan {
        name: "crowd",
        what: "pages want to a device that has room for a few",
        gpus: 1,
        ops: 4,
        does: &[Op::Send, Op::Send, Op::Send, Op::Store],
        vram: 8,
        ..SWARM
    },
    Plan {
        name: "fork",
        what: "children look at pages that devices write",
        gpus: 1,
        does: &[Op::Load, Op::Store, Op::Fork, Op::Fork, Op::Send],
        ..SWARM
    },
    Plan {
        name: "read-only",
        what: "devices may only read, also what is shared, protected, or zeros",
        gpus: 1,
        does: &[
            Op::Load,
            Op::Store,
            Op::Fork,
            Op::ProtectRead,
            Op::SwapOut,
            Op::Send,
        ],
        rights: Rights::ReadOnly,
        ..SWARM
    },
    Plan {
        name: "protect",
        what: "rights come and go under a device",
        gpus: 1,
        does: &[
            Op::ProtectRead,
            Op::WriteProtect,
            Op::ProtectRead,
            Op::Store,
            Op::Send,
        ],
        ..SWARM
    },
    Plan {
        name: "lazy",
        what: "pages are given up until they are stored to, also by a device",
        gpus: 1,
        ops: 8,
        pages: 4,
        vram: 8,
        does: &[
            Op::FreeLazily,
            Op::SwapOut,
            Op::SwapOut,
            Op::Store,
            Op::Send,
        ],
        ..SWARM
    },
    Plan {
        name: "atomics",
        what: "a CPU and devices add to the same words, in device memory",
        cpus: 1,
        does: ADDITIONS,
        atomics: Atomics::Device,
        ..SWARM
    },
    Plan {
        name: "exclusive",
        what: "a CPU and devices add to the same words, on pages that a device has for itself",
        cpus: 1,
        pages: 4,
        does: ADDITIONS_AND_FORKS,
        atomics: Atomics::Exclusive,
        ..SWARM
    },
    Plan {
        name: "apart",
        what: "a device takes pages for itself out of larger ranges, for which it has no room",
        gpus: 1,
        cpus: 1,
        ops: 10,
        pages: PAGES_MAX,
        vram: 8,
        begins: Begins::Touched,
        does: &[Op::Discard, Op::SwapOut, Op::Unmap],
        atomics: Atomics::Exclusive,
        ..SWARM
    },
    Plan {
        name: "chaos",
        what: "as swarm, and calls fail or are late, until all must be well",
        chaos: 6,
        vram: 24,
        ..SWARM
    },
    Plan {
        name: "chaos-queue",
        what: "as chaos, with faults served through the fault ring, and VMs closed early",
        chaos: 6,
        service: Service::Queue,
        closes: Closes::Early,
        ..SWARM
    },
];

impl Plan {
    /// The plan of a name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        PLANS.iter().find(|plan| plan.name == name)
    }

    /// What its CPU actors do.
    pub(super) fn does(&self) -> impl Iterator<Item = Op> {
        self.does.iter().copied()
    }

    /// Whether its pages have counters: words to which everybody adds, and whose content nothing
    /// destroys.
    pub(super) fn adds(&self) -> bool {
        self.does.contains(&Op::Add)
    }

    /// Words of a page that hold versions.
    pub(super) fn slots(&self) -> usize {
        if self.adds() { COUNTER } else { WORDS }
    }

    /// Sizes of its process: room for copies of all pages, and some more.
    pub(super) fn shape(&self) -> Shape {
        Shape {
            base: BASE,
            pages: 2 * self.pages,
            frames: 6 * self.pages,
            slots: 3 * self.pages,
            processes: 2,
            pmd_order: 2,
            words: u32::try_from(WORDS).unwrap_or(1),
            thp: Thp::Madvise,
            device_folios: DeviceFolios::Small,
            coherent: 0,
            privilege: Privilege::Admin,
        }
    }
}

/// A page.
pub(super) fn page_at(page: u32) -> HostSpan {
    HostSpan::at(address(page, 0), PAGE)
}

/// Address of a word.
pub(super) fn address(page: u32, slot: usize) -> HostVa {
    let inside = u64::try_from(slot).unwrap_or(0) * 8;
    BASE.plus(u64::from(page) * PAGE + inside)
}
