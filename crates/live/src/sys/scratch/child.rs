//! A process of a scratch window: it makes the calls that the board says, and notes what came of
//! them. It shares nothing with the process that asked but the board: no allocation, no lock, no
//! output, and only raw system calls, which nobody patches.

use core::ffi::{c_int, c_long, c_void};
use core::ptr;
use core::sync::atomic::{AtomicI32, Ordering};

use gpusvm_abi::bus::SystemBus;

use crate::sys::fault_copy::{LiveBus, fixup_for};
use crate::sys::scratch::board::{Board, KEEPER, Record};
use crate::sys::scratch::call::{Answer, BATCH, Call, How, Kind, Look, PAGES, Place, face};
use crate::sys::scratch::look::{Eyes, no_regions};

/// The window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    /// Its first address, a multiple of 2 MiB.
    pub(super) base: u64,
    /// Its size.
    pub(super) bytes: u64,
}

impl Window {
    /// The address of a place. Places outside the window are addresses, too: there is nothing in
    /// the process that a call could harm but the process.
    fn address(self, at: u64) -> c_long {
        self.base.wrapping_add(at).cast_signed()
    }
}

/// Lowest address that may be mapped.
const LOWEST: u64 = 1 << 16;
/// First address behind those of a process.
const END: u64 = (1 << 47) - 4096;
/// Bytes of stack that are there before the room around it is taken.
const STACK: usize = 512 << 10;

/// The signal of the last access that failed.
static RAISED: AtomicI32 = AtomicI32::new(0);

/// Serves the board as its process `me`, and never comes back.
pub(super) fn serve(board: &Board, window: Window, me: u8) -> ! {
    follow_parent();
    prepare_stack();
    catch_faults();
    stay_on_one_processor();
    let ready = take_all_room(window);
    let mut process = Process {
        board,
        window,
        me,
        eyes: Eyes::open(),
    };
    if !ready {
        leave(1);
    }
    board.pass_turn(KEEPER);
    loop {
        board.await_turn(u32::from(process.me));
        process.go_on();
    }
}

/// The process that asked must not be survived.
fn follow_parent() {
    // SAFETY: asks for a signal when the parent is gone.
    let _asked = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Makes the stack as large as it will ever be.
#[inline(never)]
fn prepare_stack() {
    let mut room = [0_u8; STACK];
    core::hint::black_box(&mut room);
}

/// Accesses that fail are answers.
fn catch_faults() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: all-zero is a valid `sigaction`: the default action, no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
        action.sa_sigaction =
            note as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        // SAFETY: the handler touches an atomic and its own frame.
        let _set = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    }
}

extern "C" fn note(signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the registers that the thread goes on with.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let at = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    match usize::try_from(*at).ok().and_then(fixup_for) {
        Some(next) => {
            RAISED.store(signal, Ordering::Relaxed);
            *at = i64::try_from(next).unwrap_or(0);
        }
        None => leave(2),
    }
}

/// Pages wait in batches, one for each processor, until the system puts them on its lists: on one
/// processor what a process did before decides what it finds.
fn stay_on_one_processor() {
    // SAFETY: all-zero is an empty set.
    let mut set: libc::cpu_set_t = unsafe { core::mem::zeroed() };
    // SAFETY: asks only.
    let here = usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(0);
    // SAFETY: a set of ours, and a processor that exists.
    unsafe { libc::CPU_SET(here, &mut set) };
    // SAFETY: a valid set, for the calling thread.
    let _set = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
}

/// Maps everything that is free outside the window, so that the system finds room inside it only.
/// Nothing in the window merges with what is mapped here: it has other rights and flags.
fn take_all_room(window: Window) -> bool {
    let mut text = [0_u8; 64 << 10];
    let Some(length) = read_all(c"/proc/self/maps", &mut text) else {
        return false;
    };
    let mut at = LOWEST;
    for line in text[..length].split(|byte| *byte == b'\n') {
        let Some((start, end)) = ends(line) else {
            continue;
        };
        if !take_between(window, at, start) {
            return false;
        }
        at = at.max(end);
    }
    take_between(window, at, END)
}

fn take_between(window: Window, from: u64, to: u64) -> bool {
    let (low, high) = (window.base, window.base + window.bytes);
    take(from, to.min(low)) && take(from.max(high), to)
}

fn take(from: u64, to: u64) -> bool {
    if from >= to.min(END) {
        return true;
    }
    let (at, len) = (from.cast_signed(), (to.min(END) - from).cast_signed());
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let rights = libc::PROT_EXEC;
    let mapped = call(
        libc::SYS_mmap,
        [at, len, rights.into(), flags.into(), -1, 0],
    );
    let apart = call(
        libc::SYS_madvise,
        [at, len, libc::MADV_DONTDUMP.into(), 0, 0, 0],
    );
    mapped.is_ok() && apart.is_ok()
}

fn read_all(path: &core::ffi::CStr, text: &mut [u8]) -> Option<usize> {
    // SAFETY: a path that ends with a zero; the answer is a descriptor or -1.
    let file = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    let mut length = 0;
    loop {
        let room = text.get_mut(length..).filter(|room| !room.is_empty())?;
        // SAFETY: writes at most as many bytes as `room` has.
        let read = unsafe { libc::read(file, room.as_mut_ptr().cast(), room.len()) };
        match usize::try_from(read).ok()? {
            0 => break,
            read => length += read,
        }
    }
    // SAFETY: ours, and not used again.
    let _closed = unsafe { libc::close(file) };
    Some(length)
}

/// The ends of a mapping from its line in maps.
fn ends(line: &[u8]) -> Option<(u64, u64)> {
    let mut words = line.split(|byte| *byte == b'-' || *byte == b' ');
    let mut number = || {
        let digits = str::from_utf8(words.next()?).ok()?;
        u64::from_str_radix(digits, 16).ok()
    };
    Some((number()?, number()?))
}

pub(super) fn leave(code: c_int) -> ! {
    // SAFETY: ends the process without running anything else of it.
    unsafe { libc::_exit(code) }
}

pub(super) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A raw system call: its value, or its error number.
fn call(number: c_long, args: [c_long; 6]) -> Result<u64, i32> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: whatever the call does to the memory of this process, which has nothing in it that
    // another one depends on, it does to what nobody here holds a reference to; and if a wrong
    // length makes it hit more than the window, the process dies, which its maker notices.
    let value = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if value == -1 {
        return Err(errno());
    }
    Ok(value.cast_unsigned())
}

/// What the process has.
struct Process<'a> {
    board: &'a Board,
    window: Window,
    me: u8,
    eyes: Eyes,
}

impl Process<'_> {
    /// Makes calls until the next one is somebody else's.
    fn go_on(&mut self) {
        while let Some((at, step)) = self.board.next_step() {
            if step.who != self.me {
                return self.board.pass_turn(u32::from(step.who));
            }
            match step.call {
                Call::Exit => self.exit(at),
                Call::Fork { child } => {
                    if self.fork(at, child) {
                        return;
                    }
                }
                _ => {
                    let answer = self.make(&step.call);
                    self.note(at, answer, step.look);
                }
            }
            self.board.done_with(at);
        }
        self.board.pass_turn(KEEPER);
    }

    fn exit(&self, at: usize) -> ! {
        self.note(at, Answer::Done(0), Look::No);
        self.board.done_with(at);
        self.board.exits(self.me);
        self.board.pass_turn(KEEPER);
        leave(0)
    }

    fn note(&self, at: usize, answer: Answer, look: Look) {
        self.board.record(at, |record| {
            record.answer = Some(answer);
            record.looked = look == Look::Yes;
            if record.looked {
                self.look(record);
            }
        });
    }

    fn look(&self, record: &mut Record) {
        let pages = usize::try_from(self.window.bytes / 4096)
            .unwrap_or(0)
            .min(PAGES);
        let mut words = [0_u64; PAGES];
        let mut regions = no_regions::<PAGES>();
        let mut trouble = self.eyes.words(self.window, &mut words[..pages]);
        for (face_of, word) in record.pages.iter_mut().zip(&words[..pages]) {
            *face_of = face(*word, 0);
        }
        let scanned = self
            .eyes
            .categories(self.window, &mut regions[..pages], |from, to, kind| {
                let index = |page: u64| usize::try_from(page).unwrap_or(PAGES).min(PAGES);
                for one in &mut record.pages[index(from)..index(to)] {
                    *one |= face(0, kind);
                }
            });
        trouble = trouble.max(scanned);
        match self.eyes.areas(self.window, &mut record.areas) {
            Some(count) => record.area_count = count,
            None => trouble = trouble.max(1),
        }
        record.trouble = trouble;
    }

    /// Makes a child, whose maker is that of this process. Returns whether this is the child.
    fn fork(&mut self, at: usize, child: u8) -> bool {
        let flags = libc::CLONE_PARENT | libc::SIGCHLD;
        match call(libc::SYS_clone, [flags.into(), 0, 0, 0, 0, 0]) {
            Ok(0) => {
                follow_parent();
                self.eyes.close();
                self.eyes = Eyes::open();
                self.me = child;
                return true;
            }
            Ok(pid) => {
                self.board.born(child, i32::try_from(pid).unwrap_or(0));
                self.note(at, Answer::Done(child.into()), Look::Yes);
            }
            Err(error) => self.note(at, Answer::Failed(error), Look::Yes),
        }
        false
    }

    fn make(&self, what: &Call) -> Answer {
        let done = match *what {
            Call::Load { at } => return self.load(at),
            Call::Store { at, value } => return self.store(at, value),
            Call::Fork { .. } | Call::Exit => return Answer::Done(0),
            Call::Map {
                at,
                len,
                prot,
                kind,
                place,
            } => self.map(at, len, prot, kind, place),
            Call::Unmap { at, len } => self.plain(libc::SYS_munmap, at, len, 0),
            Call::Protect { at, len, prot } => self.plain(libc::SYS_mprotect, at, len, prot.into()),
            Call::Remap { at, old, new, how } => self.remap(at, old, new, how),
            Call::Advise { at, len, advice } => {
                self.plain(libc::SYS_madvise, at, len, advice.into())
            }
            Call::AdviseMany {
                spans,
                count,
                advice,
            } => self.advise_many(&spans, count, advice),
            Call::Lock { at, len } => self.plain(libc::SYS_mlock, at, len, 0),
            Call::Unlock { at, len } => self.plain(libc::SYS_munlock, at, len, 0),
        };
        match done {
            Ok(value) => Answer::Done(value),
            Err(error) => Answer::Failed(error),
        }
    }

    fn plain(&self, number: c_long, at: u64, len: u64, extra: c_long) -> Result<u64, i32> {
        let args = [self.window.address(at), len.cast_signed(), extra, 0, 0, 0];
        call(number, args)
    }

    fn place_of(&self, address: u64) -> u64 {
        address.wrapping_sub(self.window.base)
    }

    fn map(&self, at: u64, len: u64, prot: u8, kind: Kind, place: Place) -> Result<u64, i32> {
        let shared = match kind {
            Kind::Private => libc::MAP_PRIVATE,
            Kind::Shared => libc::MAP_SHARED,
        };
        let (at, fixed) = match place {
            Place::Hint => (self.window.address(at), 0),
            Place::Fixed => (self.window.address(at), libc::MAP_FIXED),
            Place::NoReplace => (self.window.address(at), libc::MAP_FIXED_NOREPLACE),
            Place::Anywhere => (0, 0),
        };
        let flags = shared | fixed | libc::MAP_ANONYMOUS;
        let args = [at, len.cast_signed(), prot.into(), flags.into(), -1, 0];
        call(libc::SYS_mmap, args).map(|at| self.place_of(at))
    }

    fn remap(&self, at: u64, old: u64, new: u64, how: How) -> Result<u64, i32> {
        let (flags, to) = match how {
            How::InPlace => (0, 0),
            How::Anywhere => (libc::MREMAP_MAYMOVE, 0),
            How::At(to) => (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to),
            How::LeaveBehind => (libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, 0),
            How::LeaveBehindAt(to) => (
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP,
                to,
            ),
        };
        let to = match how {
            How::InPlace | How::Anywhere | How::LeaveBehind => 0,
            How::At(_) | How::LeaveBehindAt(_) => self.window.address(to),
        };
        let sizes = (old.cast_signed(), new.cast_signed());
        let at = self.window.address(at);
        call(
            libc::SYS_mremap,
            [at, sizes.0, sizes.1, flags.into(), to, 0],
        )
        .map(|at| self.place_of(at))
    }

    fn advise_many(&self, spans: &[(u64, u64); BATCH], count: u8, advice: i32) -> Result<u64, i32> {
        let myself = call(
            libc::SYS_pidfd_open,
            [std::process::id().into(), 0, 0, 0, 0, 0],
        )?;
        let vector = spans.map(|(at, len)| [self.window.address(at), len.cast_signed()]);
        let place = (&raw const vector).expose_provenance();
        let place = c_long::try_from(place).unwrap_or(0);
        let count = usize::from(count).min(BATCH);
        let (file, count) = (myself.cast_signed(), c_long::try_from(count).unwrap_or(0));
        let done = call(
            libc::SYS_process_madvise,
            [file, place, count, advice.into(), 0, 0],
        );
        let _closed = call(libc::SYS_close, [file, 0, 0, 0, 0, 0]);
        done
    }

    fn load(&self, at: u64) -> Answer {
        let mut word = [0; 8];
        match LiveBus.read(self.window.base.wrapping_add(at), &mut word) {
            Ok(()) => Answer::Done(u64::from_ne_bytes(word)),
            Err(_) => Answer::Signal(RAISED.load(Ordering::Relaxed)),
        }
    }

    fn store(&self, at: u64, value: u64) -> Answer {
        match LiveBus.write(self.window.base.wrapping_add(at), &value.to_ne_bytes()) {
            Ok(()) => Answer::Done(0),
            Err(_) => Answer::Signal(RAISED.load(Ordering::Relaxed)),
        }
    }
}
