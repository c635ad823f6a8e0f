//! A scratch window: a span of addresses in a process of its own, where any address-space call may
//! be made to see what the system does.
//!
//! The process is a fork that has nothing but the window to work on. Everything else of its address
//! space is taken, so that the system finds room inside the window only, and the window is the
//! lowest of its mappings. What a call does there reaches nobody else; an access that fails is an
//! answer. Children that a program makes are processes of the same kind, and end with it.
//!
//! | module | what |
//! |---|---|
//! | `call` | what can be asked, what is answered |
//! | `board` | the memory through which both go |
//! | `child` | the process |
//! | `look` | what it sees of the window |

mod board;
pub(crate) mod call;
mod child;
mod look;

use core::fmt;
use core::ptr::NonNull;
use std::io;

use gpusvm::addr::{HostVa, PAGE};

use crate::sys::fault_copy;
use crate::sys::scratch::board::{Board, KEEPER, empty};
use crate::sys::scratch::call::{PAGES, PROCESSES, STEPS, Seen, Step};
use crate::sys::scratch::child::{Window, serve};

/// How often a process is waited for in vain, a tenth of a second each, before it counts as stuck.
const PATIENCE: u32 = 600;

/// Why a window is of no use any more.
#[derive(Debug)]
pub enum ScratchError {
    /// The system's answer to setting it up.
    System(io::Error),
    /// A window of this many pages, or a program of this many steps, is not possible.
    TooLarge(usize),
    /// A process ended that should not have: a call reached beyond the window.
    Died,
    /// Nothing moves: a process is stuck in a call.
    Stuck,
    /// A process could not see its window, with this error number.
    Blind(i32),
}

impl fmt::Display for ScratchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(why) => write!(f, "cannot make a scratch process: {why}"),
            Self::TooLarge(n) => write!(
                f,
                "{n} is too large for a scratch window: at most {PAGES} pages and {STEPS} steps"
            ),
            Self::Died => f.write_str(
                "a scratch process ended by itself: a call of the program reached out of the window",
            ),
            Self::Stuck => f.write_str("a scratch process is stuck in a call"),
            Self::Blind(error) => write!(
                f,
                "a scratch process cannot read its pagemap, PAGEMAP_SCAN or smaps (error {error}): \
                 this needs Linux 6.7 and /proc"
            ),
        }
    }
}

impl core::error::Error for ScratchError {}

/// A scratch window and its processes.
pub struct Scratch {
    board: NonNull<Board>,
    window: Window,
    pid: i32,
    steps: usize,
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch")
            .field("window", &self.window)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Scratch {
    /// A window of `pages` pages at `base`, which must be a multiple of 2 MiB below all mappings of
    /// this process.
    ///
    /// # Errors
    /// [`ScratchError::System`], [`ScratchError::TooLarge`], [`ScratchError::Died`] where the
    /// address space of the process cannot be taken.
    pub fn open(base: HostVa, pages: usize) -> Result<Self, ScratchError> {
        if pages == 0 || pages > PAGES {
            return Err(ScratchError::TooLarge(pages));
        }
        fault_copy::install();
        let board = new_board().map_err(ScratchError::System)?;
        let window = Window {
            base: base.get(),
            bytes: pages as u64 * PAGE,
        };
        // SAFETY: the child runs `serve` and nothing else, which neither allocates nor locks.
        let pid = unsafe { libc::fork() };
        match pid {
            // SAFETY: zeroed shared memory of that size, which nobody unmaps in the child.
            0 => serve(unsafe { board.as_ref() }, window, 0),
            1.. => {
                let mut this = Self {
                    board,
                    window,
                    pid,
                    steps: 0,
                };
                this.await_keeper()?;
                Ok(this)
            }
            _ => {
                let why = io::Error::last_os_error();
                drop_board(board);
                Err(ScratchError::System(why))
            }
        }
    }

    fn board(&self) -> &Board {
        // SAFETY: mapped until this value is dropped.
        unsafe { self.board.as_ref() }
    }

    /// Begins to run a program in the empty window. [`finish`](Self::finish) waits for it.
    ///
    /// # Errors
    /// [`ScratchError::TooLarge`].
    pub fn start(&mut self, steps: &[Step]) -> Result<(), ScratchError> {
        if steps.len() >= STEPS {
            return Err(ScratchError::TooLarge(steps.len()));
        }
        self.steps = steps.len();
        let clear = empty(self.window.bytes);
        self.board()
            .put_up(core::iter::once(clear).chain(steps.iter().copied()));
        self.board().pass_turn(0);
        Ok(())
    }

    /// Waits for the program, and tells what came of each of its steps. Its children end.
    ///
    /// # Errors
    /// As [`ScratchError`] says; the window is of no use then.
    pub fn finish(&mut self) -> Result<Vec<Seen>, ScratchError> {
        loop {
            self.await_keeper()?;
            if let Some(pid) = self.board().take_exiting() {
                reap(pid);
            }
            if self.board().is_done() {
                break;
            }
            self.board().pass_turn(0);
        }
        self.end_children();
        let pages = usize::try_from(self.window.bytes / PAGE).unwrap_or(0);
        let seen = (1..=self.steps).map(|at| self.board().seen(at, pages));
        seen.collect::<Result<_, _>>().map_err(ScratchError::Blind)
    }

    /// Runs a program in the empty window.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`finish`](Self::finish).
    pub fn run(&mut self, steps: &[Step]) -> Result<Vec<Seen>, ScratchError> {
        self.start(steps)?;
        self.finish()
    }

    fn await_keeper(&mut self) -> Result<(), ScratchError> {
        for _ in 0..PATIENCE {
            if self.board().await_briefly(KEEPER) {
                return Ok(());
            }
            if has_ended(self.pid) {
                self.pid = 0;
                return Err(ScratchError::Died);
            }
        }
        Err(ScratchError::Stuck)
    }

    fn end_children(&self) {
        for who in 0..PROCESSES {
            end(self.board().take_pid(who));
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        end(self.pid);
        self.end_children();
        drop_board(self.board);
    }
}

fn new_board() -> io::Result<NonNull<Board>> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping, which overlaps nothing.
    let board = unsafe {
        libc::mmap(
            core::ptr::null_mut(),
            size_of::<Board>(),
            rights,
            flags,
            -1,
            0,
        )
    };
    if board == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(board.cast()).ok_or_else(io::Error::last_os_error)
}

fn drop_board(board: NonNull<Board>) {
    // SAFETY: made by `new_board`, and not used again.
    let _unmapped = unsafe { libc::munmap(board.as_ptr().cast(), size_of::<Board>()) };
}

/// Ends a child of ours, if there is one.
fn end(pid: i32) {
    if pid > 0 {
        // SAFETY: our own child, which nobody has waited for.
        let _killed = unsafe { libc::kill(pid, libc::SIGKILL) };
        reap(pid);
    }
}

fn reap(pid: i32) {
    // SAFETY: our own child; the status is not asked for.
    let _reaped = unsafe { libc::waitpid(pid, core::ptr::null_mut(), 0) };
}

fn has_ended(pid: i32) -> bool {
    // SAFETY: our own child; the status is not asked for.
    let ended = unsafe { libc::waitpid(pid, core::ptr::null_mut(), libc::WNOHANG) };
    ended == pid
}

#[cfg(test)]
mod tests;
