//! A case at work.

use std::cell::RefCell;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_dmirror::uapi::{Arguments, Command, Errno, UserMemory};

use crate::conformance::hmm::host::{Memory, Node, Process, Rights, Variant};
use crate::size::counted;

/// Why a case did not come to its end.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    /// The host cannot do it here.
    Lacking(String),
    /// Something is not as it should be.
    Wrong(String),
}

/// The case has failed for this reason.
pub(super) fn wrong<R>(why: impl Into<String>) -> Result<R, Trouble> {
    Err(Trouble::Wrong(why.into()))
}

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// All of it.
    Full,
    /// All but what takes long.
    Short,
}

/// Whether a case looks at the process's page map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageMap {
    Unseen,
    Seen,
}

/// What a host is asked to run.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) variant: Variant,
    pub(super) effort: Effort,
    pub(super) page_map: PageMap,
    pub(super) run: fn(&Bench<'_>) -> Result<(), Trouble>,
}

impl Plan {
    /// Runs the case in a process; its record.
    pub(super) fn play(&self, process: &dyn Process) -> Result<Vec<String>, Trouble> {
        let bench = Bench::new(process, self.variant, self.effort);
        (self.run)(&bench)?;
        Ok(bench.record())
    }
}

/// The content that a case looks at: two words at the start of every page.
pub(super) type Words = [u64; 2];

/// What page `n` holds where everything was filled with `salt`.
pub(super) const fn pattern(salt: u64, n: u64) -> Words {
    let word = salt << 32 | (n + 1);
    [word, !word]
}

/// An open device, by its letter in the record.
pub(super) struct Device {
    letter: char,
    node: Box<dyn Node>,
}

/// A process, and the record of what its devices answered.
pub(super) struct Bench<'p> {
    pub(super) process: &'p dyn Process,
    pub(super) variant: Variant,
    pub(super) effort: Effort,
    record: RefCell<Vec<String>>,
}

impl<'p> Bench<'p> {
    pub(super) fn new(process: &'p dyn Process, variant: Variant, effort: Effort) -> Self {
        Self {
            process,
            variant,
            effort,
            record: RefCell::default(),
        }
    }

    pub(super) fn record(&self) -> Vec<String> {
        self.record.borrow().clone()
    }

    /// Adds what a child's devices answered.
    pub(super) fn append(&self, record: Vec<String>) {
        self.record.borrow_mut().extend(record);
    }

    /// Opens the first node of the variant.
    pub(super) fn open(&self) -> Result<Device, Trouble> {
        self.open_as('a', 0)
    }

    /// Opens a node under a letter.
    pub(super) fn open_as(&self, letter: char, number: usize) -> Result<Device, Trouble> {
        let node = self.process.open(self.variant.first_node() + number)?;
        Ok(Device { letter, node })
    }

    /// Private memory of so many pages that may be written, filled.
    pub(super) fn filled(&self, pages: u64, salt: u64) -> Result<HostSpan, Trouble> {
        self.filled_as(Memory::Private, pages, salt)
    }

    /// The same of another kind.
    pub(super) fn filled_as(
        &self,
        what: Memory,
        pages: u64,
        salt: u64,
    ) -> Result<HostSpan, Trouble> {
        let span = self.map(what, pages)?;
        self.fill(span, salt)?;
        Ok(span)
    }

    /// Memory that may be written.
    pub(super) fn map(&self, what: Memory, pages: u64) -> Result<HostSpan, Trouble> {
        self.process.map(what, pages * PAGE, Rights::ReadWrite)
    }

    /// The CPU writes a pattern.
    pub(super) fn fill(&self, span: HostSpan, salt: u64) -> Result<(), Trouble> {
        for (n, at) in addresses(span) {
            let [first, second] = pattern(salt, n);
            self.process.store(at, first)?;
            self.process.store(at.plus(8), second)?;
        }
        Ok(())
    }

    /// The CPU finds the pattern.
    pub(super) fn check(&self, span: HostSpan, salt: u64) -> Result<(), Trouble> {
        self.check_from(span, salt, 0)
    }

    /// The CPU finds the pattern of pages from number `first` on.
    pub(super) fn check_from(&self, span: HostSpan, salt: u64, first: u64) -> Result<(), Trouble> {
        for (n, at) in addresses(span) {
            let wanted = pattern(salt, first + n);
            self.finds(at, wanted)?;
        }
        Ok(())
    }

    /// The CPU finds zeros.
    pub(super) fn check_zeros(&self, span: HostSpan) -> Result<(), Trouble> {
        for (_, at) in addresses(span) {
            self.finds(at, [0; 2])?;
        }
        Ok(())
    }

    fn finds(&self, at: HostVa, wanted: Words) -> Result<(), Trouble> {
        let found = [self.process.load(at)?, self.process.load(at.plus(8))?];
        if found == wanted {
            return Ok(());
        }
        wrong(format!("the CPU finds {found:x?} at {at}, not {wanted:x?}"))
    }

    /// The CPU adds one to the first word of every page.
    pub(super) fn increment(&self, span: HostSpan) -> Result<(), Trouble> {
        for (_, at) in addresses(span) {
            let value = self.process.load(at)?;
            self.process.store(at, value + 1)?;
        }
        Ok(())
    }

    /// Runs a command and takes it down.
    fn command(
        &self,
        device: &Device,
        command: Command,
        span: HostSpan,
        user: &(dyn UserMemory + Sync),
    ) -> Result<(), Errno> {
        let mut arguments = Arguments {
            addr: span.start().get(),
            npages: span.pages().get(),
            ..Arguments::default()
        };
        let result = device.node.command(command, &mut arguments, user);
        let mut line = format!(
            "{} {} {} = ",
            device.letter,
            name(command),
            arguments.npages
        );
        // Writing to a string does not fail.
        let _written = match result {
            Ok(()) => write!(line, "{} {}", arguments.cpages, arguments.faults),
            Err(errno) => write!(line, "{errno}"),
        };
        self.record.borrow_mut().push(line);
        result
    }

    /// A command that returns no content.
    pub(super) fn ask(
        &self,
        device: &Device,
        command: Command,
        span: HostSpan,
    ) -> Result<(), Errno> {
        self.command(device, command, span, &Buffer::default())
    }

    /// Sets the flags of the file.
    pub(super) fn set_flags(&self, device: &Device, flags: u64) -> Result<(), Errno> {
        let span = HostSpan::at(HostVa::new(PAGE), flags * PAGE);
        self.ask(device, Command::Flags, span)
    }

    /// A command that returns content.
    pub(super) fn fetch(
        &self,
        device: &Device,
        command: Command,
        span: HostSpan,
    ) -> Result<Vec<Words>, Errno> {
        let buffer = Buffer::default();
        self.command(device, command, span, &buffer)?;
        Ok(buffer.into_pages())
    }

    /// A command that must succeed, and return the pattern.
    pub(super) fn expect(
        &self,
        device: &Device,
        command: Command,
        span: HostSpan,
        salt: u64,
    ) -> Result<(), Trouble> {
        let found = self.fetch(device, command, span);
        let found = found.map_err(|errno| failed(command, errno))?;
        let wanted: Vec<_> = (0..span.pages().get()).map(|n| pattern(salt, n)).collect();
        same(command, &found, &wanted)
    }

    /// The same, but the content is zero.
    pub(super) fn expect_zeros(
        &self,
        device: &Device,
        command: Command,
        span: HostSpan,
    ) -> Result<(), Trouble> {
        let found = self.fetch(device, command, span);
        let found = found.map_err(|errno| failed(command, errno))?;
        same(command, &found, &vec![[0; 2]; found.len()])
    }

    /// The device writes the pattern.
    pub(super) fn write(&self, device: &Device, span: HostSpan, salt: u64) -> Result<(), Errno> {
        let pages = (0..span.pages().get()).map(|n| pattern(salt, n)).collect();
        self.command(device, Command::Write, span, &Buffer::of(pages))
    }

    /// The device writes the pattern, and the CPU finds it.
    pub(super) fn write_and_check(
        &self,
        device: &Device,
        span: HostSpan,
        salt: u64,
    ) -> Result<(), Trouble> {
        let written = self.write(device, span, salt);
        written.map_err(|errno| failed(Command::Write, errno))?;
        self.check(span, salt)
    }

    /// Takes a snapshot; its bytes go into the record.
    pub(super) fn snapshot(&self, device: &Device, span: HostSpan) -> Result<(), Trouble> {
        let bytes = Bytes::default();
        let taken = self.command(device, Command::Snapshot, span, &bytes);
        taken.map_err(|errno| failed(Command::Snapshot, errno))?;
        if let Some(line) = self.record.borrow_mut().last_mut() {
            line.push_str(&bytes.text());
        }
        Ok(())
    }
}

/// A command must not have failed.
pub(super) fn failed(command: Command, errno: Errno) -> Trouble {
    Trouble::Wrong(format!("{} answers {errno}", name(command)))
}

fn same(command: Command, found: &[Words], wanted: &[Words]) -> Result<(), Trouble> {
    let pairs = found.iter().zip(wanted);
    let differs = pairs.zip(0..).find(|((found, wanted), _)| found != wanted);
    match differs {
        None if found.len() == wanted.len() => Ok(()),
        None => wrong(format!(
            "{} returns {}",
            name(command),
            counted(found.len() as u64, "page", "pages")
        )),
        Some(((found, wanted), n)) => wrong(format!(
            "{} returns {found:x?} for page {n}, not {wanted:x?}",
            name(command)
        )),
    }
}

const fn name(command: Command) -> &'static str {
    match command {
        Command::Read => "READ",
        Command::Write => "WRITE",
        Command::MigrateToDevice => "TO_DEV",
        Command::MigrateToSystem => "TO_SYS",
        Command::Snapshot => "SNAPSHOT",
        Command::Exclusive => "EXCLUSIVE",
        Command::CheckExclusive => "CHECK_EXCLUSIVE",
        Command::Release => "RELEASE",
        Command::Flags => "FLAGS",
        Command::ReadUnlocked => "READ_UNLOCKED",
    }
}

/// Pages of a span, numbered.
pub(super) fn addresses(span: HostSpan) -> impl Iterator<Item = (u64, HostVa)> {
    (0..span.pages().get()).map(move |n| (n, span.start().plus(n * PAGE)))
}

/// `pages` pages of a span from number `first` on.
pub(super) fn part(span: HostSpan, first: u64, pages: u64) -> HostSpan {
    HostSpan::at(span.start().plus(first * PAGE), pages * PAGE)
}

/// The caller's buffer, at address 0. Of every page it keeps the words that cases look at.
#[derive(Default)]
struct Buffer(Mutex<Vec<Words>>);

impl Buffer {
    fn of(pages: Vec<Words>) -> Self {
        Self(Mutex::new(pages))
    }

    fn into_pages(self) -> Vec<Words> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

fn number(offset: u64) -> usize {
    usize::try_from(offset / PAGE).unwrap_or(usize::MAX)
}

impl UserMemory for Buffer {
    fn copy_in(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (n, bytes) in (number(from)..).zip(to.chunks_mut(4096)) {
            let [first, second] = pages.get(n).copied().ok_or(Errno::Fault)?;
            bytes[..8].copy_from_slice(&first.to_ne_bytes());
            bytes[8..16].copy_from_slice(&second.to_ne_bytes());
        }
        Ok(())
    }

    fn copy_out(&self, from: &[u8], to: u64) -> Result<(), Errno> {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (n, bytes) in (number(to)..).zip(from.chunks(4096)) {
            let word = |at: usize| {
                let mut word = [0; 8];
                word.copy_from_slice(&bytes[at..at + 8]);
                u64::from_ne_bytes(word)
            };
            if pages.len() <= n {
                pages.resize(n + 1, [0; 2]);
            }
            pages[n] = [word(0), word(8)];
        }
        Ok(())
    }
}

/// A buffer for the bytes of a snapshot.
#[derive(Default)]
struct Bytes(Mutex<Vec<u8>>);

impl Bytes {
    /// The bytes, as the record has them: `ff*2 11`.
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for run in bytes.chunk_by(|a, b| a == b) {
            // Writing to a string does not fail.
            let _written = match run.len() {
                1 => write!(text, " {:02x}", run[0]),
                n => write!(text, " {:02x}*{n}", run[0]),
            };
        }
        text
    }
}

impl UserMemory for Bytes {
    fn copy_in(&self, _from: u64, _to: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::Fault)
    }

    fn copy_out(&self, from: &[u8], _to: u64) -> Result<(), Errno> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend_from_slice(from);
        Ok(())
    }
}
