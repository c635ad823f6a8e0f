//! What a scenario says, as data.

use std::sync::Arc;

use gpusvm::seam::env::{Ns, Point};
use gpusvm_xe::stats::Counter;
use gpusvm_xe::vm::Rights as Mirror;

use crate::atomics::Atomics;
use crate::scenario::HostKind;
use crate::scenario::words::{
    Advice, Answers, Backing, Collector, Compare, Deed, Entries, Huge, Object, Rights,
};

/// One scenario of `svm-design.md` section 7.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub(crate) number: u32,
    pub(crate) title: String,
    pub(crate) place: Place,
    /// On the model host, and on the live one.
    pub(crate) setups: [Setup; 2],
    pub(crate) lines: Vec<Line>,
    pub(crate) skips: Vec<(HostKind, String)>,
}

impl Scenario {
    /// Its number in section 7.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// What it is about.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.title
    }

    /// File and line.
    #[must_use]
    pub fn place(&self) -> String {
        self.place.to_string()
    }

    /// Why a host does not run it, where it says so.
    #[must_use]
    pub fn skips(&self, host: HostKind) -> Option<&str> {
        let skip = self.skips.iter().find(|(kind, _)| *kind == host);
        skip.map(|(_, why)| why.as_str())
    }

    /// What it runs on, on this host.
    pub(crate) const fn setup(&self, host: HostKind) -> &Setup {
        &self.setups[host as usize]
    }

    /// Lines that run at once at most.
    pub(crate) fn width(&self) -> usize {
        let widths = self.lines.iter().map(|line| match &line.act {
            Act::Together(lanes) => lanes.len(),
            Act::At { .. } => 1,
            _ => 0,
        });
        widths.max().unwrap_or(0)
    }
}

/// Where something stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) file: Arc<str>,
    pub(crate) line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What it runs on.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) gpus: u16,
    /// Bytes of memory of each device.
    pub(crate) vram: u64,
    /// Bytes of a notifier window.
    pub(crate) window: Option<u64>,
    /// Bytes of host memory of the model.
    pub(crate) memory: u64,
    /// Orders of events that the model tries.
    pub(crate) seeds: u64,
    pub(crate) collector: Collector,
    pub(crate) answers: Answers,
    pub(crate) atomics: Atomics,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            gpus: 1,
            vram: 8 << 20,
            window: None,
            memory: 32 << 20,
            seeds: 1,
            collector: Collector::Runs,
            answers: Answers::Arrive,
            atomics: Atomics::System,
        }
    }
}

/// One line, or a block of lines.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) place: Place,
    /// The one host on which it is done.
    pub(crate) only: Option<HostKind>,
    pub(crate) act: Act,
    /// How it may end; empty where it must succeed.
    pub(crate) answers: Vec<String>,
    pub(crate) times: u32,
}

/// What is done.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Map(Map),
    Unmap(Span),
    Protect(Span, Rights),
    Advise(Span, Advice),
    Remap {
        from: Span,
        to: String,
        /// The old mapping stays, empty.
        leaving: bool,
    },
    Deed(Deed, Span),
    Access(Who, Access, Span),
    Drive(usize, Drive),
    /// The process ends.
    Die,
    /// The copy of a page fails, counted from 1.
    FailCopy(u64),
    Sleep(Ns),
    /// Counters count from here.
    Mark,
    /// The statistics begin anew.
    Reset,
    /// A child does these lines, and ends.
    Fork(Vec<Line>),
    /// Each line on a thread of its own.
    Together(Vec<Line>),
    /// When the rest comes to a point, these lines are done there by somebody else.
    At {
        point: Point,
        often: Often,
        lines: Vec<Line>,
    },
    Expect(Expect),
}

/// How often lines are done at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Often {
    /// The next time.
    Once,
    /// Every time until the next line of the scenario is done.
    Always,
}

/// A new mapping.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) area: String,
    pub(crate) bytes: u64,
    pub(crate) rights: Rights,
    pub(crate) backing: Backing,
    pub(crate) huge: Huge,
    /// The area behind which it lies, without a gap.
    pub(crate) behind: Option<String>,
}

/// Part of an area, in bytes from its start.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) area: String,
    pub(crate) part: Option<(u64, u64)>,
}

/// Who makes an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Cpu,
    Child,
    Gpu(usize),
}

/// An access to every page of a span.
#[derive(Clone, Debug)]
pub(crate) enum Access {
    /// Loads the content; it must be one of these, if there are any.
    Read(Vec<Value>),
    /// Stores content.
    Write(Value),
    /// Adds to the page's counter, atomically.
    Add(u64),
    /// Loads the page's counter, which must be this.
    Count(u64),
}

/// Content of pages: every page has its own word of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Value {
    pub(crate) value: u64,
    /// The page that the first one was when it was written; else its own number.
    pub(crate) from: Option<u64>,
}

/// What a driver is told.
#[derive(Clone, Debug)]
pub(crate) enum Drive {
    Prefetch(Span),
    /// Moves pages to the device, which keeps them for a time.
    Take(Span, Ns),
    /// Everything that can go from the device goes.
    Evict,
    Close,
    Mirror(Span, Mirror),
    /// An object of its own in device memory.
    Buy(u64, Object),
    /// Such objects until this many bytes are left.
    Fill(u64),
    /// All of these objects go.
    Sell,
}

/// What must be true.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    /// Size of the range around the first page.
    Range(usize, Span, Option<u64>),
    Ranges(usize, u64),
    Notifiers(usize, u64),
    /// Bytes of device memory that hold no tables.
    Vram(usize, Compare, u64),
    /// Page tables.
    Tables(usize, Compare, u64),
    /// Every page is in this device's memory, or in none.
    Placed(Span, Option<usize>),
    /// GPU entries of every page, the size of their blocks, and the side to which they lead.
    Entries {
        gpu: usize,
        span: Span,
        entries: Entries,
        block: Option<u64>,
    },
    Count(Counter, Compare, u64),
    Collected(u64),
    Flushed(Span),
    /// The CPU's entries are those of the last mark.
    Kept(Span),
    Took(Compare, Ns),
}
