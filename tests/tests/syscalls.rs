//! System calls on buffers that are on a device at that moment: the system reads and writes them as
//! any other memory, waits in them, or holds their pages.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm_live::program::{PipedPages, Ring, Transfer};
use gpusvm_tests::skipped;
use gpusvm_tests::stage::{
    Add, RESIDENT, Resident, away, each_resident, filled, serves_system_calls, without_privileges,
};
use rustix::net::{RecvFlags, SendFlags, recvmsg, sendmsg};
use rustix::thread::futex;

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

/// What other memory holds.
const OTHER: u64 = 0x0bad_0bad_0bad_0bad;

/// A file without a name, empty.
fn file(flags: i32) -> io::Result<File> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("gpusvm-{}-{n}", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(name);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    let file = options.custom_flags(flags).open(&path);
    let _removed = std::fs::remove_file(&path);
    file
}

/// Runs a scenario where system calls on memory that is away are served.
fn each_served(scenario: impl Fn(&mut Resident)) {
    each_resident(|r| {
        if serves_system_calls(&r.machine) {
            scenario(r);
        }
    });
}

/// The words of `bytes`.
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _rest) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_ne_bytes(*word))
}

fn span(r: &Resident, from: u64, bytes: u64) -> HostSpan {
    HostSpan::at(HostVa::new(r.map.address() + from), bytes)
}

#[test]
fn read_and_write_of_a_file() {
    each_served(|r| {
        let mut file = file(0).expect("a place for files");
        file.write_all(r.map.bytes()).expect("the system reads it");
        let mut copy = vec![0; RESIDENT];
        file.read_exact_at(&mut copy, 0).expect("it was written");
        assert!(words(&copy).eq(0..RESIDENT as u64 / 8));
        r.add(7);
        file.rewind().expect("a file");
        file.read_exact(r.map.bytes_mut())
            .expect("the system writes it");
        r.check(0);
        r.send();
        // A piece that begins and ends inside of pages, half of them at home.
        let middle = RESIDENT / 2;
        assert_eq!(r.map.words()[middle / 8 - 100], middle as u64 / 8 - 100);
        let piece = middle - 9 * 4096 - 123..middle + 70 * 4096 + 45;
        let bytes = &r.map.bytes()[piece.clone()];
        file.write_all_at(bytes, 11).expect("the system reads it");
        let mut copy = vec![0; piece.len()];
        file.read_exact_at(&mut copy, 11).expect("it was written");
        r.check(0);
        assert!(copy == r.map.bytes()[piece]);
    });
}

#[test]
fn direct_transfers_past_the_page_cache() {
    each_served(|r| {
        let file = match file(libc_o_direct()) {
            Ok(file) => file,
            Err(why) => return skipped(&format!("O_DIRECT: {why}")),
        };
        file.write_all_at(r.map.bytes(), 0)
            .expect("the disk reads it");
        r.add(3);
        file.read_exact_at(r.map.bytes_mut(), 0)
            .expect("the disk writes it");
        r.check(0);
    });
}

const fn libc_o_direct() -> i32 {
    0o40_000
}

#[test]
fn vectored_reads_and_writes() {
    each_served(|r| {
        let (mut one, mut other) = UnixStream::pair().expect("two ends");
        let pieces = [0..5000, 100_000..100_016, 2 << 20..(2 << 20) + 9000];
        let bytes = r.map.bytes();
        let parts = pieces.map(|piece| IoSlice::new(&bytes[piece]));
        let wanted: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
        r.send();
        let sent = one.write_vectored(&parts).expect("the system reads them");
        assert_eq!(sent, wanted.len());
        r.add(1);
        let (first, second) = r.map.bytes_mut().split_at_mut(RESIDENT / 2);
        let mut parts = [
            IoSliceMut::new(&mut first[4096..9096]),
            IoSliceMut::new(&mut second[..sent - 5000]),
        ];
        let got = other
            .read_vectored(&mut parts)
            .expect("the system writes them");
        assert_eq!(got, sent);
        let bytes = r.map.bytes();
        assert!(bytes[4096..9096] == wanted[..5000]);
        assert!(bytes[RESIDENT / 2..RESIDENT / 2 + sent - 5000] == wanted[5000..]);
        assert!(words(&bytes[..4096]).eq(1..513), "what lies next to it");
    });
}

#[test]
fn messages_of_sockets() {
    each_served(|r| {
        let (one, other) = UnixDatagram::pair().expect("two ends");
        let bytes = r.map.bytes();
        let parts = [
            IoSlice::new(&bytes[4096..8192]),
            IoSlice::new(&bytes[3 << 20..(3 << 20) + 4096]),
        ];
        let mut nothing = Default::default();
        sendmsg(&one, &parts, &mut nothing, SendFlags::empty()).expect("the system reads it");
        one.send(&bytes[2 << 20..(2 << 20) + 8192])
            .expect("the system reads it");
        r.add(1);
        let mut parts = [IoSliceMut::new(&mut r.map.bytes_mut()[8192..16384])];
        let mut nothing = Default::default();
        let got = recvmsg(&other, &mut parts, &mut nothing, RecvFlags::empty());
        assert_eq!(got.expect("the system writes it").bytes, 8192);
        let bytes = r.map.bytes();
        assert!(words(&bytes[8192..12288]).eq(512..1024));
        assert!(words(&bytes[12288..16384]).eq((3 << 17)..(3 << 17) + 512));
        r.send();
        let part = &mut r.map.bytes_mut()[..8192];
        assert_eq!(other.recv(part).expect("the system writes it"), 8192);
        assert!(words(&r.map.bytes()[..8192]).eq((2 << 17)..(2 << 17) + 1024));
    });
}

/// Sleeps until the word is not 0.
fn wait_for_change(word: &AtomicU32, flags: futex::Flags) {
    while word.load(Ordering::Acquire) == 0 {
        // Interrupted, or not asleep any more: looks again.
        let _woken = futex::wait(word, flags, 0, None);
    }
}

#[test]
fn waiting_at_a_word_on_the_device() {
    each_served(|r| {
        for flags in [futex::Flags::PRIVATE, futex::Flags::empty()] {
            let block: Vec<AtomicU32> = (0..1 << 20).map(|_| AtomicU32::new(0)).collect();
            let word = &block[512 << 10];
            let start = block.as_ptr().expose_provenance() as u64;
            let middle = (start + (2 << 20)) & !4095;
            let land = HostSpan::at(HostVa::new(middle - (1 << 20)), 2 << 20);
            let send = || gpusvm_live::thread::run(|| r.machine.send(land));
            thread::scope(|scope| {
                let waiter = scope.spawn(|| wait_for_change(word, flags));
                let _sent = send();
                assert!(
                    futex::wait(word, flags, 5, None).is_err(),
                    "the system finds another value there"
                );
                let _sent = send();
                word.store(1, Ordering::Release);
                let _sent = send();
                while !waiter.is_finished() {
                    futex::wake(word, flags, 1).expect("nothing is refused");
                    thread::yield_now();
                }
            });
            assert_eq!(word.load(Ordering::Relaxed), 1);
        }
        r.check(0);
    });
}

/// Rounds of each of two players.
const ROUNDS: u64 = 300;

/// Counts whenever the count is even, or odd: `me`.
fn play_in_turns(lock: &Mutex<u64>, changed: &Condvar, me: u64) {
    for _ in 0..ROUNDS {
        let turn = lock.lock().expect("nobody panics");
        let theirs = |count: &mut u64| *count % 2 != me;
        *changed.wait_while(turn, theirs).expect("nobody panics") += 1;
        changed.notify_one();
    }
}

#[test]
fn locks_whose_words_travel() {
    each_served(|r| {
        let locks: Vec<(Mutex<u64>, Condvar)> = (0..128 << 10)
            .map(|_| (Mutex::new(0), Condvar::new()))
            .collect();
        let middle = &raw const locks[64 << 10];
        // Some way from both ends, where the system may have joined it with a stack.
        let block = HostVa::new(middle.expose_provenance() as u64).align_down(64 << 10);
        let inner = HostSpan::at(block, 64 << 10);
        let (lock, changed) = &locks[64 << 10];
        let mut moved = 0_u64;
        thread::scope(|scope| {
            let players = [0, 1].map(|me| scope.spawn(move || play_in_turns(lock, changed, me)));
            while !players.iter().all(thread::ScopedJoinHandle::is_finished) {
                let sent = gpusvm_live::thread::run(|| r.machine.send(inner));
                moved += u64::from(sent.is_ok());
            }
        });
        assert_eq!(*lock.lock().expect("nobody panics"), 2 * ROUNDS);
        assert!(moved > 0, "it was on the device meanwhile");
        r.check(0);
    });
}

#[test]
fn asynchronous_reads_and_writes() {
    each_served(|r| {
        let mut ring = match Ring::new() {
            Ok(ring) => ring,
            Err(why) => return skipped(&format!("io_uring: {why}")),
        };
        let mut file = file(0).expect("a place for files");
        let all = span(r, 0, RESIDENT as u64);
        let written = ring.transfer(Transfer::Write, file.as_fd(), all);
        assert_eq!(written.expect("the system reads it"), RESIDENT);
        r.add(9);
        file.rewind().expect("a file");
        let read = ring.transfer(Transfer::Read, file.as_fd(), all);
        assert_eq!(read.expect("the system writes it"), RESIDENT);
        r.check(0);
    });
}

#[test]
fn pinned_pages_stay_and_device_and_disk_share_them() {
    each_served(|r| {
        let mut ring = match Ring::new() {
            Ok(ring) => ring,
            Err(why) => return skipped(&format!("io_uring: {why}")),
        };
        let mut file = file(0).expect("a place for files");
        file.write_all(r.map.bytes()).expect("the system reads it");
        r.send();
        let pinned = span(r, 1 << 20, 64 << 10);
        if let Err(why) = ring.pin(pinned) {
            return skipped(&format!("registered buffers: {why}"));
        }
        for _ in 0..3 {
            r.add(5);
            let home = away(&r.machine);
            assert!(home < RESIDENT as u64, "pinned pages are in system memory");
            file.rewind().expect("a file");
            let read = ring.transfer(Transfer::Read, file.as_fd(), pinned);
            assert_eq!(read.expect("the disk writes it"), 64 << 10);
            // What the disk wrote is what the device finds, and the other way round.
            r.add(2);
            file.rewind().expect("a file");
            let written = ring.transfer(Transfer::Write, file.as_fd(), pinned);
            assert_eq!(written.expect("the disk reads it"), 64 << 10);
            let mut copy = vec![0; 64 << 10];
            file.read_exact_at(&mut copy, 0).expect("it was written");
            assert!(words(&copy).eq(2..2 + (8 << 10)));
            // As it was.
            let restore: Vec<u8> = (0..8_u64 << 10).flat_map(u64::to_ne_bytes).collect();
            file.write_all_at(&restore, 0).expect("a file");
        }
        drop(ring);
        let found: Vec<u64> = words(&r.map.bytes()[1 << 20..(1 << 20) + (64 << 10)]).collect();
        assert!(found.into_iter().eq(2..2 + (8 << 10)));
        // The system lets the pages go a while after the ring is gone.
        let free = || gpusvm_live::thread::run(|| r.machine.send(pinned)).is_ok();
        assert!((0..100_000).any(|_| free()), "what is free can leave");
    });
}

#[test]
fn pages_in_a_pipe_keep_their_content() {
    each_served(|r| {
        let lent = span(r, 2 << 20, 64 << 10);
        let pipe = match PipedPages::lend(lent) {
            Ok(pipe) => pipe,
            Err(why) => return skipped(&format!("vmsplice: {why}")),
        };
        // They may leave or stay; others come and go meanwhile, through the same places.
        for _ in 0..6 {
            let other = filled(RESIDENT, OTHER);
            let at = other.address();
            r.machine.launch(&Add { at, by: 1 }, 4).expect("mapped");
            r.add(0);
            assert!(other.words().iter().all(|word| *word == OTHER + 1));
            r.check(0);
        }
        let content = pipe.read().expect("it is full");
        let first = (2 << 20) / 8;
        assert!(words(&content).eq(first..first + (8 << 10)));
        r.check(0);
    });
}

#[test]
fn pages_in_a_pipe_outlive_their_mapping() {
    each_served(|r| {
        let mut other = filled(RESIDENT, 77);
        let at = other.address();
        r.machine.launch(&Add { at, by: 1 }, 4).expect("mapped");
        let lent = HostSpan::at(HostVa::new(at + (1 << 20)), 64 << 10);
        let pipe = match PipedPages::lend(lent) {
            Ok(pipe) => pipe,
            Err(why) => return skipped(&format!("vmsplice: {why}")),
        };
        r.machine.launch(&Add { at, by: 0 }, 4).expect("mapped");
        other.unmap_tail(0);
        for _ in 0..4 {
            let fresh = filled(2 * RESIDENT, 5);
            let at = fresh.address();
            r.machine.launch(&Add { at, by: 1 }, 8).expect("mapped");
        }
        let content = pipe.read().expect("it is full");
        assert!(words(&content).all(|word| word == 78));
    });
}

#[test]
fn system_calls_fail_cleanly_where_the_level_does_not_serve_them() {
    each_resident(|r| {
        let limited = r.machine.space().level().faults != gpusvm_live::FaultLevel::Full;
        if !limited {
            return skipped(&"this level serves them");
        }
        let file = file(0).expect("a place for files");
        let refused = file.write_at(r.map.bytes(), 0).expect_err("it is away");
        assert_eq!(refused.raw_os_error(), Some(14), "EFAULT");
        // As the level says: touched first, it works.
        r.check(0);
        file.write_all_at(r.map.bytes(), 0).expect("it is home");
    });
}

#[test]
fn all_of_it_without_privileges() {
    without_privileges("all_of_it_without_privileges");
}
