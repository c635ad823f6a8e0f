//! [`Mirror`]: a node that is open, and the commands on it.

use alloc::sync::Arc;
use alloc::vec;
use core::fmt;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::mmu::Interval;
use gpusvm::seam::env::{Environment, Ns, Point};
use gpusvm::seam::mm::{Access, AddressSpace, InvalidationSink, Location, Pager};

use crate::block::Flags;
use crate::device::Device;
use crate::table::{Entry, OWNER, Table, Tag};
use crate::uapi::{Arguments, Command, Errno, UserMemory};

/// How long a command takes up with changes of the address space.
pub(crate) const PATIENCE: Ns = Ns::from_millis(1000);

/// First address past user space.
const USER_END: u64 = 1 << 47;

/// Rounds of faults of one command.
const ROUNDS: u64 = 1 << 16;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// An open node: a mirror of the address space of whoever opened it.
pub struct Mirror<E: Environment, S: AddressSpace> {
    pub(crate) device: Arc<Device<E, S>>,
    pub(crate) space: Arc<S>,
    pub(crate) interval: Arc<Interval>,
    pub(crate) table: Arc<Table<E>>,
    pub(crate) flags: Arc<Flags>,
}

impl<E: Environment, S: AddressSpace> fmt::Debug for Mirror<E, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// What a command has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    cpages: u64,
    faults: u64,
}

impl Done {
    /// So many pages, without faults.
    pub(crate) const fn pages(cpages: u64) -> Self {
        Self { cpages, faults: 0 }
    }
}

impl<E: Environment, S: AddressSpace> Mirror<E, S> {
    /// Opens the device for the process `space`.
    ///
    /// # Errors
    /// `EINVAL` where the process is gone or cannot be watched.
    pub fn open(device: &Arc<Device<E, S>>, space: &Arc<S>) -> Result<Self, Errno> {
        let table = Table::<E>::new();
        let sink = Arc::clone(&table) as Arc<dyn InvalidationSink>;
        let window = HostSpan::new(HostVa::new(0), HostVa::new(USER_END));
        let interval = space.subscribe(window, sink);
        Ok(Self {
            device: Arc::clone(device),
            space: Arc::clone(space),
            interval: interval.map_err(|_gone| Errno::Invalid)?,
            table,
            flags: Arc::new(Flags::default()),
        })
    }

    /// Runs a command. The caller holds no lock; on the live host it is a thread of the runtime.
    /// `arguments` changes only where the command succeeds.
    ///
    /// # Errors
    /// As the module: `EINVAL` for a span that is not aligned, empty or wraps, for every command.
    pub fn command(
        &self,
        command: Command,
        arguments: &mut Arguments,
        user: &dyn UserMemory,
    ) -> Result<(), Errno> {
        let span = span_of(arguments)?;
        let ptr = arguments.ptr;
        let done = match command {
            Command::Read => self.read(span, ptr, user, Pager::Refuse)?,
            Command::ReadUnlocked => self.read(span, ptr, user, Pager::Wait)?,
            Command::Write => self.write(span, ptr, user)?,
            Command::MigrateToDevice => {
                self.to_device(span)?;
                self.read_back(span, ptr, user)?
            }
            Command::MigrateToSystem => Done::pages(self.to_system(span)?),
            Command::Snapshot => self.snapshot(span, ptr, user)?,
            Command::Exclusive => {
                self.take_exclusive(span)?;
                self.read_back(span, ptr, user)?
            }
            Command::CheckExclusive => self.check_exclusive(span)?,
            Command::Release => {
                self.device.evict_all();
                Done::default()
            }
            Command::Flags => {
                self.flags.set(arguments.npages);
                Done::default()
            }
        };
        arguments.cpages = done.cpages;
        arguments.faults = done.faults;
        Ok(())
    }

    /// The device reads the span, faulting where its table has nothing.
    fn read(
        &self,
        span: HostSpan,
        ptr: u64,
        user: &dyn UserMemory,
        pager: Pager,
    ) -> Result<Done, Errno> {
        let mut bounce = vec![0; bytes_of(span)];
        let mut done = Done::default();
        loop {
            done.cpages = self.each_page(span, done.cpages, |n, entry| {
                let page = &mut bounce[n..n + PAGE_BYTES];
                entry.map(|entry| self.device.read(entry.at, page))
            })?;
            if done.cpages == span.pages().get() {
                break;
            }
            self.another_round(&mut done)?;
            self.fault(rest(span, done.cpages), Access::Read, pager)?;
        }
        user.copy_out(&bounce, ptr)?;
        Ok(done)
    }

    /// The device writes the span, faulting where its table gives no right.
    fn write(&self, span: HostSpan, ptr: u64, user: &dyn UserMemory) -> Result<Done, Errno> {
        let mut bounce = vec![0; bytes_of(span)];
        user.copy_in(ptr, &mut bounce)?;
        let mut done = Done::default();
        loop {
            done.cpages = self.each_page(span, done.cpages, |n, entry| {
                let page = &bounce[n..n + PAGE_BYTES];
                let writable = entry.filter(|entry| entry.tag == Tag::Write);
                writable.map(|entry| self.device.write(entry.at, page))
            })?;
            if done.cpages == span.pages().get() {
                return Ok(done);
            }
            self.another_round(&mut done)?;
            self.fault(rest(span, done.cpages), Access::Write, Pager::Refuse)?;
        }
    }

    /// Counts a round of faults. A mapping that changes all the time keeps the device away.
    fn another_round(&self, done: &mut Done) -> Result<(), Errno> {
        done.faults += 1;
        if done.faults > ROUNDS {
            return Err(Errno::Busy);
        }
        Ok(())
    }

    /// Visits the entries of the pages of `span` from number `from` on, with the offset of each in
    /// the buffer, until `access` answers `None`; returns the number of that page. The table is
    /// locked while a page is used.
    fn each_page(
        &self,
        span: HostSpan,
        from: u64,
        mut access: impl FnMut(usize, Option<Entry>) -> Option<Result<(), Errno>>,
    ) -> Result<u64, Errno> {
        for n in from..span.pages().get() {
            let at = span.start().plus(n * PAGE);
            let offset = usize::try_from(n * PAGE).map_err(|_large| Errno::NoMem)?;
            let entries = self.table.0.lock();
            let found = access(offset, entries.at(at));
            drop(entries);
            match found {
                None => return Ok(n),
                Some(result) => result?,
            }
        }
        Ok(span.pages().get())
    }

    /// Returns what the device finds through its table, without faults. The caller's memory is touched
    /// with the table unlocked: it may be on the device, and has to leave the table to come home.
    fn read_back(&self, span: HostSpan, ptr: u64, user: &dyn UserMemory) -> Result<Done, Errno> {
        let mut bounce = vec![0; bytes_of(span)];
        let cpages = self.each_page(span, 0, |n, entry| {
            let page = &mut bounce[n..n + PAGE_BYTES];
            entry.map(|entry| self.device.read(entry.at, page))
        })?;
        if cpages < span.pages().get() {
            return Err(Errno::NoEnt);
        }
        user.copy_out(&bounce, ptr)?;
        Ok(Done::pages(cpages))
    }

    /// Takes the pages away from the CPU, one after the other, until one refuses.
    fn take_exclusive(&self, span: HostSpan) -> Result<(), Errno> {
        for n in 0..span.pages().get() {
            let at = span.start().plus(n * PAGE);
            self.retry(|| self.try_exclusive(at))
                .map_err(|why| match why {
                    Failed::NotMigratable(_) => Errno::NotSupported,
                    Failed::AddressSpaceGone => Errno::Invalid,
                    Failed::Budget(_) => Errno::Busy,
                    Failed::OutOfMemory => Errno::NoMem,
                    _other => Errno::Fault,
                })?;
        }
        Ok(())
    }

    /// Takes one page.
    fn try_exclusive(&self, at: HostVa) -> Result<(), Interrupted> {
        let mut entered = false;
        self.space.make_exclusive(at, OWNER, &mut |bus| {
            let entry = Entry {
                at: Location::System(bus),
                tag: Tag::Atomic,
            };
            entered = self.table.0.lock().enter_taken(at, entry);
        })?;
        if entered {
            Ok(())
        } else {
            Err(Stale::CpuMappingChanged.into())
        }
    }

    /// Entries of the device's page table: a large page has one.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.table.0.lock().len()
    }

    fn check_exclusive(&self, span: HostSpan) -> Result<Done, Errno> {
        let entries = self.table.0.lock();
        if entries.has_exclusive(span) {
            return Err(Errno::Perm);
        }
        Ok(Done::default())
    }

    /// Tries again while the address space is faster, as long as there is patience.
    pub(crate) fn retry<R>(
        &self,
        mut attempt: impl FnMut() -> Result<R, Interrupted>,
    ) -> Result<R, Failed> {
        let env = self.device.env();
        let deadline = env.now().after(PATIENCE);
        loop {
            match attempt() {
                Ok(result) => return Ok(result),
                Err(Interrupted::Failed(why)) => return Err(why),
                Err(Interrupted::Stale(why)) if env.now() >= deadline => {
                    return Err(Failed::Budget(why));
                }
                Err(Interrupted::Stale(_)) => env.yield_point(Point::Retry),
            }
        }
    }
}

/// Closing a node ends the mirror and sends home what is on the device, of every process.
impl<E: Environment, S: AddressSpace> Drop for Mirror<E, S> {
    fn drop(&mut self) {
        self.space.unsubscribe(&self.interval);
        self.table.clear(self.interval.window());
        self.device.evict_all();
    }
}

/// The span of a command.
fn span_of(arguments: &Arguments) -> Result<HostSpan, Errno> {
    let start = HostVa::new(arguments.addr);
    let bytes = arguments.npages.checked_mul(PAGE).ok_or(Errno::Invalid)?;
    let end = start.get().checked_add(bytes);
    if !start.is_aligned(PAGE) || bytes == 0 || end.is_none() {
        return Err(Errno::Invalid);
    }
    Ok(HostSpan::at(start, bytes))
}

fn bytes_of(span: HostSpan) -> usize {
    usize::try_from(span.bytes()).unwrap_or(usize::MAX)
}

/// What is left of `span` after `pages` pages.
fn rest(span: HostSpan, pages: u64) -> HostSpan {
    HostSpan::new(span.start().plus(pages * PAGE), span.end())
}
