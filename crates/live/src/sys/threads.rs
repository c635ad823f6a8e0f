//! The threads of this process, and where the kernel writes for them.
//!
//! At a thread's end the kernel clears a word of it (`set_tid_address(2)`) and walks its list of
//! robust locks, past all faults: it takes what is mapped at that moment and nothing else. The C
//! library keeps both in the thread's control block, and tells the kernel where: `get_robust_list(2)`
//! gives it for every thread, also another's.

use core::arch::asm;
use core::mem::MaybeUninit;
use core::ops::ControlFlow;
use std::os::fd::OwnedFd;

use gpusvm::addr::HostVa;
use rustix::fs::{Mode, OFlags, RawDir, SeekFrom, open, openat, seek};
use rustix::io::{Errno, pread};

const GET_ROBUST_LIST: usize = 274;
/// The call that a thread may make before it has told the kernel where its control block is.
const FUTEX: &str = "202";
/// Clock ticks of processor time after which a thread that has told nothing never will: the C
/// library's own tell in their first microsecond.
const TICKS: u64 = 10;

/// What is known of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seat {
    /// The head of its robust list, in its control block.
    Block(HostVa),
    /// It sleeps, its stack pointer is here, and it has told the kernel nothing yet.
    Asleep(HostVa),
    /// It runs, and has told the kernel nothing yet.
    Starting,
    /// Not one of the C library's: nothing is written for it that we know of.
    Foreign,
}

/// The table of threads.
#[derive(Debug)]
pub(crate) struct Threads {
    tasks: OwnedFd,
    load: OwnedFd,
}

impl Threads {
    /// Opens the process's own table.
    ///
    /// # Errors
    /// The system's, where /proc is not to be had.
    pub(crate) fn open() -> Result<Self, Errno> {
        let plain = OFlags::RDONLY | OFlags::CLOEXEC;
        let folder = plain | OFlags::DIRECTORY;
        Ok(Self {
            tasks: open("/proc/self/task", folder, Mode::empty())?,
            load: open("/proc/loadavg", plain, Mode::empty())?,
        })
    }

    /// A number that changes with every thread that is made, anywhere in this process's world: the
    /// last id that was given out. It changes before the thread can run. `None` where it is not
    /// told.
    pub(crate) fn last_made(&self) -> Option<u64> {
        let mut text = [0; 96];
        let count = pread(&self.load, &mut text[..], 0).ok()?;
        let text = str::from_utf8(&text[..count]).ok()?;
        text.split_ascii_whitespace().nth(4)?.parse().ok()
    }

    /// Shows every thread to `see`, until it has seen enough. One caller at a time.
    ///
    /// # Errors
    /// The system's: not all have been shown then.
    pub(crate) fn each(&self, mut see: impl FnMut(Seat) -> ControlFlow<()>) -> Result<(), Errno> {
        seek(&self.tasks, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut entries = RawDir::new(&self.tasks, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_str().unwrap_or_default();
            // All but `.` and `..`; a thread that has ended meanwhile has nothing written.
            let seat = name.parse().ok().and_then(|id| self.seat(name, id));
            if seat.is_some_and(|seat| see(seat).is_break()) {
                break;
            }
        }
        Ok(())
    }

    /// `None` where the thread has ended.
    fn seat(&self, name: &str, id: usize) -> Option<Seat> {
        match robust_list(id)? {
            0 => self.silent(name),
            head => Some(Seat::Block(HostVa::new(head))),
        }
    }

    /// A thread that has told nothing: one that is just being made, or none of the C library's.
    fn silent(&self, name: &str) -> Option<Seat> {
        let mut text = [0; 512];
        let call = self.read(name, "/syscall", &mut text)?;
        let mut words = call.split_ascii_whitespace();
        let number = words.next()?;
        if number == "running" {
            let mut text = [0; 512];
            let stat = self.read(name, "/stat", &mut text)?;
            let done = ticks(stat).is_some_and(|ticks| ticks >= TICKS);
            let never = done || is_kernels(stat);
            return Some(if never { Seat::Foreign } else { Seat::Starting });
        }
        // In a fault, or where a thread may wait before it tells.
        if number != "-1" && number != FUTEX {
            return Some(Seat::Foreign);
        }
        let pointer = words.rev().nth(1)?.strip_prefix("0x")?;
        let at = u64::from_str_radix(pointer, 16).ok()?;
        Some(Seat::Asleep(HostVa::new(at)))
    }

    fn read<'b>(&self, name: &str, file: &str, text: &'b mut [u8]) -> Option<&'b str> {
        let mut path = [0_u8; 32];
        let (head, rest) = path.split_at_mut_checked(name.len())?;
        head.copy_from_slice(name.as_bytes());
        rest.get_mut(..file.len())?.copy_from_slice(file.as_bytes());
        let path = &path[..name.len() + file.len()];
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = openat(&self.tasks, path, flags, Mode::empty()).ok()?;
        let count = pread(&opened, &mut *text, 0).ok()?;
        str::from_utf8(&text[..count]).ok()
    }
}

/// Whether a thread is one of the kernel's own, as those of io_uring: `PF_IO_WORKER` or
/// `PF_USER_WORKER` in field 9.
fn is_kernels(stat: &str) -> bool {
    const WORKERS: u64 = 0x10 | 0x4000;
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| {
        let mut fields = rest.split_ascii_whitespace().skip(6);
        fields.next()?.parse::<u64>().ok()
    });
    flags.is_some_and(|flags| flags & WORKERS != 0)
}

/// Processor time of a thread, from its line in `/proc`: fields 14 and 15 (proc(5)), counted from
/// behind the name, which may contain anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Where a thread's robust list begins, 0 where it has none; `None` where the thread has ended.
fn robust_list(id: usize) -> Option<u64> {
    let mut head = 0_u64;
    let mut bytes = 0_usize;
    let result: isize;
    // SAFETY: the kernel writes the two words, which are ours, and changes rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") GET_ROBUST_LIST => result,
            in("rdi") id,
            in("rsi") &raw mut head,
            in("rdx") &raw mut bytes,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    (result == 0).then_some(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn blocks(threads: &Threads) -> Vec<HostVa> {
        let mut found = Vec::new();
        let seen = threads.each(|seat| {
            if let Seat::Block(at) = seat {
                found.push(at);
            }
            ControlFlow::Continue(())
        });
        seen.expect("the table can be read");
        found
    }

    /// The calling thread's pointer, where the C library keeps a pointer to it.
    fn own_block() -> u64 {
        let at: u64;
        // SAFETY: the first word of a thread's control block is its own address.
        unsafe { asm!("mov {}, fs:[0]", out(reg) at, options(nostack, readonly)) };
        at
    }

    #[test]
    fn every_thread_of_the_c_library_is_found_in_its_control_block() {
        let threads = Threads::open().expect("there is a /proc");
        let (tell, hear) = channel();
        let (go, wait) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                tell.send(own_block()).expect("the test listens");
                let _end = wait.recv();
            });
            let other = hear.recv().expect("it tells");
            let found = blocks(&threads);
            for block in [own_block(), other] {
                let inside = |at: &HostVa| (block..block + 4096).contains(&at.get());
                assert!(found.iter().any(inside), "{block:#x} {found:?}");
            }
            drop(go);
        });
    }

    #[test]
    fn a_new_thread_is_told_before_it_runs() {
        let threads = Threads::open().expect("there is a /proc");
        let before = threads.last_made();
        assert!(before.is_some());
        let after = std::thread::scope(|scope| {
            let other = scope.spawn(|| threads.last_made());
            other.join().expect("it answers")
        });
        assert_ne!(before, after);
    }

    #[test]
    fn processor_time_is_read_past_any_name() {
        let line = "12 (a) b) R 1 2 3 4 5 6 7 8 9 10 31 11 0 0 20 0";
        assert_eq!(ticks(line), Some(42));
        assert_eq!(ticks("12 (a"), None);
    }
}
