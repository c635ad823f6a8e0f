//! Random programs.

use gpusvm::addr::PAGE;
use gpusvm_live::scratch::{BATCH, Call, How, Kind, Look, PROCESSES, Place, Step};
use gpusvm_model::sched::Stream;

use crate::conformance::mm::program::{BLOCK, Program, Size};
use crate::conformance::mm::settings::Settings;

/// One program in this many has room for large pages.
const BLOCKS_ONE_IN: u32 = 8;

/// Advices that exist, but for those that take memory away from the machine (`MADV_HWPOISON` and
/// `MADV_SOFT_OFFLINE`), and the two that drop pages once more: they are what makes states.
const ADVICES: [i32; 28] = [
    0, 1, 2, 3, 4, 4, 8, 8, 9, 10, 11, 12, 13, 14, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
    102, 103,
];
/// Advices that do not exist.
const UNKNOWN: [i32; 9] = [-1, 5, 6, 7, 26, 99, 104, 255, i32::MAX];

const COLD: i32 = 20;
const PAGEOUT: i32 = 21;

/// The program with number `seed`. Where there is swap, nothing is paged out: when a page is written
/// is the system's affair.
pub(crate) fn program(seed: u64, steps: usize, settings: &Settings) -> Program {
    let mut maker = Maker {
        random: Stream::named(seed, "conformance mm"),
        size: Size::Pages,
        alive: [true, false, false],
        page_out: if settings.swap { COLD } else { PAGEOUT },
    };
    if maker.one_in(BLOCKS_ONE_IN) {
        maker.size = Size::Blocks;
    }
    let steps = (0..steps).map(|n| maker.step(n)).collect();
    Program {
        size: maker.size,
        steps,
    }
    .sensible()
}

struct Maker {
    random: Stream,
    size: Size,
    alive: [bool; PROCESSES],
    page_out: i32,
}

impl Maker {
    fn one_in(&mut self, n: u32) -> bool {
        self.random.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        let at = self.random.below(u32::try_from(all.len()).unwrap_or(1));
        all[at as usize]
    }

    fn step(&mut self, n: usize) -> Step {
        let who = self.who();
        let call = if n < 2 { self.map() } else { self.call() };
        match call {
            Call::Fork { .. } => {
                if let Some(free) = self.alive.iter_mut().find(|alive| !**alive) {
                    *free = true;
                }
            }
            Call::Exit if who != 0 => self.alive[usize::from(who)] = false,
            _ => {}
        }
        Step {
            who,
            call,
            look: Look::Yes,
        }
    }

    fn who(&mut self) -> u8 {
        let who = self.pick(&[0, 0, 1, 1, 2]);
        if self.alive[usize::from(who)] { who } else { 0 }
    }

    fn call(&mut self) -> Call {
        match self.random.below(100) {
            0..12 => self.map(),
            12..17 => {
                let (at, len) = self.span();
                Call::Unmap { at, len }
            }
            17..26 => {
                let (at, len) = self.span();
                let prot = self.prot();
                Call::Protect { at, len, prot }
            }
            26..38 => self.remap(),
            38..62 => {
                let (at, len) = self.span();
                let advice = self.advice();
                Call::Advise { at, len, advice }
            }
            62..66 => self.advise_many(),
            66..69 => {
                let (at, len) = self.span();
                if self.one_in(2) {
                    Call::Lock { at, len }
                } else {
                    Call::Unlock { at, len }
                }
            }
            69..78 => Call::Load {
                at: self.page() * PAGE,
            },
            78..94 => Call::Store {
                at: self.page() * PAGE,
                value: self.random.below(1000).into(),
            },
            94..98 => Call::Fork { child: 0 },
            _ => Call::Exit,
        }
    }

    /// A page; in a window of blocks often at the ends of one.
    fn page(&mut self) -> u64 {
        let pages = u64::from(self.size.pages());
        match self.size {
            Size::Pages | Size::Roomy => self.random.below(16).into(),
            Size::Blocks => {
                let block = u64::from(self.random.below(3)) * BLOCK;
                let near = self.pick(&[0, 0, 1, 255, 256, 510, 511]);
                let any = u64::from(self.random.below(512));
                let page = if self.one_in(4) { any } else { near };
                (block + page).min(pages - 1)
            }
        }
    }

    fn pages(&mut self) -> u64 {
        match self.size {
            Size::Pages | Size::Roomy => u64::from(self.random.below(5)) + 1,
            Size::Blocks => {
                let whole = u64::from(self.random.below(3)) * BLOCK;
                let few = self.pick(&[0, 0, 0, 1, 2, 255, 256]);
                (whole + few).max(1)
            }
        }
    }

    /// Bytes of the window; wrong ones now and then.
    fn span(&mut self) -> (u64, u64) {
        let page = self.page();
        let most = u64::from(self.size.pages()) - page;
        let len = self.pages().min(most) * PAGE;
        let at = page * PAGE;
        match self.random.below(40) {
            0 => (at + self.pick(&[1, 8, 2048]), PAGE),
            1 => (at, 0),
            2 => (at, len - self.pick(&[1, 8, 4095])),
            3 => (at, self.pick(&[u64::MAX, u64::MAX - 4095])),
            _ => (at, len),
        }
    }

    fn prot(&mut self) -> u8 {
        self.pick(&[0, 1, 3, 3, 3, 3, 2, 5, 7])
    }

    fn map(&mut self) -> Call {
        let (at, len) = self.span();
        let place = self.pick(&[
            Place::Fixed,
            Place::Fixed,
            Place::Fixed,
            Place::Hint,
            Place::NoReplace,
            Place::Anywhere,
        ]);
        Call::Map {
            at,
            len,
            prot: self.pick(&[3, 3, 3, 3, 3, 1, 0, 7]),
            kind: self.pick(&[Kind::Private, Kind::Private, Kind::Private, Kind::Shared]),
            place,
        }
    }

    fn remap(&mut self) -> Call {
        let (at, old) = self.span();
        let new = if self.one_in(2) {
            old
        } else {
            self.pages() * PAGE
        };
        let room = u64::from(self.size.pages()).saturating_sub(new.div_ceil(PAGE));
        let to = self.page().min(room) * PAGE;
        let to = if self.one_in(30) { to + 8 } else { to };
        let how = self.pick(&[
            How::InPlace,
            How::Anywhere,
            How::At(to),
            How::At(to),
            How::LeaveBehind,
            How::LeaveBehindAt(to),
        ]);
        Call::Remap { at, old, new, how }
    }

    fn advice(&mut self) -> i32 {
        if self.one_in(20) {
            return self.pick(&UNKNOWN);
        }
        match self.pick(&ADVICES) {
            PAGEOUT => self.page_out,
            advice => advice,
        }
    }

    fn advise_many(&mut self) -> Call {
        let mut spans = [(0, 0); BATCH];
        for span in &mut spans {
            *span = self.span();
        }
        let count = u8::try_from(self.random.below(5)).unwrap_or(0);
        let advice = self.advice();
        Call::AdviseMany {
            spans,
            count,
            advice,
        }
    }
}
