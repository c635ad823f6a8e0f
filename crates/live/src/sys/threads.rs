//! The threads of this process, and where the kernel writes for them.
//!
//! At a thread's end the kernel clears a word of it (`set_tid_address(2)`) and walks its list of
//! robust locks, past all faults: it takes what is mapped at that moment and nothing else. The C
//! library keeps both in the thread's control block, and tells the kernel where: `get_robust_list(2)`
//! gives it for every thread, also another's.

use core::arch::asm;
use core::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use gpusvm::addr::HostVa;
use rustix::fs::{Mode, OFlags, RawDir, SeekFrom, open, seek};
use rustix::io::{Errno, pread};

const GET_ROBUST_LIST: usize = 274;

/// The table of threads.
#[derive(Debug)]
pub(crate) struct Threads {
    tasks: OwnedFd,
    made: Made,
}

/// Where the system tells which thread was made last.
#[derive(Debug)]
enum Made {
    /// As a number. Cheap, where the system was built with it.
    LastPid(OwnedFd),
    /// As the last word of a line.
    Load(OwnedFd),
}

impl Made {
    fn open() -> Result<Self, Errno> {
        let file = |path| open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        file("/proc/sys/kernel/ns_last_pid")
            .map(Self::LastPid)
            .or_else(|_not_built_in| file("/proc/loadavg").map(Self::Load))
    }

    fn last(&self) -> Option<u64> {
        let mut text = [0; 96];
        let (Self::LastPid(file) | Self::Load(file)) = self;
        let count = pread(file, &mut text[..], 0).ok()?;
        let text = str::from_utf8(&text[..count]).ok()?;
        text.split_ascii_whitespace().last()?.parse().ok()
    }
}

/// Names a thread (`gettid(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId(usize);

/// What a thread has told of its control block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The head of its robust list lies there.
    Block(HostVa),
    /// Nothing yet: it is new, or none of the C library's.
    Nothing,
    /// It has ended.
    Ended,
}

impl ThreadId {
    /// Whether the process began with it.
    pub(crate) fn is_first(self) -> bool {
        u32::try_from(self.0) == Ok(std::process::id())
    }

    /// What it has told.
    pub(crate) fn told(self) -> Told {
        match robust_list(self.0) {
            None => Told::Ended,
            Some(0) => Told::Nothing,
            Some(head) => Told::Block(HostVa::new(head)),
        }
    }
}

impl Threads {
    /// Opens the process's own table.
    ///
    /// # Errors
    /// The system's, where /proc is not to be had.
    pub(crate) fn open() -> Result<Self, Errno> {
        let folder = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECTORY;
        Ok(Self {
            tasks: open("/proc/self/task", folder, Mode::empty())?,
            made: Made::open()?,
        })
    }

    /// A number that changes with every thread that is made, anywhere in this process's world: the
    /// last id that was given out. It changes before the thread can run. `None` where it is not
    /// told.
    pub(crate) fn last_made(&self) -> Option<u64> {
        self.made.last()
    }

    /// Shows every thread to `see`. One caller at a time.
    ///
    /// # Errors
    /// The system's: not all have been shown then.
    pub(crate) fn each(&self, mut see: impl FnMut(ThreadId)) -> Result<(), Errno> {
        seek(&self.tasks, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut entries = RawDir::new(&self.tasks, &mut buffer);
        while let Some(entry) = entries.next() {
            let name = entry?.file_name().to_str().unwrap_or_default().parse();
            // All but `.` and `..`.
            name.into_iter().for_each(|id| see(ThreadId(id)));
        }
        Ok(())
    }
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
        let seen = threads.each(|thread| {
            if let Told::Block(at) = thread.told() {
                found.push(at);
            }
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
}
