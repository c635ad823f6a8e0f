use super::*;
use crate::sys::mapping::{AnonMapping, Huge};
use crate::sys::territory::{Advise, Territory};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use rustix::event::{EventfdFlags, eventfd};

/// A descriptor, or the reason why this machine has none.
fn open() -> Option<Uffd> {
    // Without events: nobody would read them, and unmapping would wait for that.
    let uffd = Uffd::open(OpenMode::Full, Features::NONE)
        .or_else(|_full| Uffd::open(OpenMode::UserModeOnly, Features::NONE));
    match uffd {
        Ok(uffd) if uffd.features().contains(Features::MOVE) => Some(uffd),
        Ok(_) => {
            println!("skipped: userfaultfd has no UFFDIO_MOVE");
            None
        }
        Err(errno) => {
            println!("skipped: userfaultfd is refused: {errno}");
            None
        }
    }
}

fn span_of(map: &AnonMapping) -> HostSpan {
    let bytes = u64::try_from(map.bytes().len()).expect("64-bit");
    HostSpan::at(HostVa::new(map.address()), bytes)
}

#[test]
fn moved_pages_keep_their_content_both_ways() {
    let Some(uffd) = open() else { return };
    let mut home = AnonMapping::new(2 << 20, Huge::Advise).expect("2M can be mapped");
    let away = AnonMapping::new(2 << 20, Huge::Advise).expect("2M can be mapped");
    home.words_mut()
        .iter_mut()
        .zip(1..)
        .for_each(|(word, n)| *word = n);
    let (here, there) = (span_of(&home), span_of(&away));
    uffd.register(here, RegisterMode::WriteProtect)
        .expect("anonymous memory registers");
    uffd.register(there, RegisterMode::WriteProtect)
        .expect("anonymous memory registers");
    assert_eq!(
        uffd.move_pages(there.start(), here),
        Moved {
            bytes: 2 << 20,
            error: None
        }
    );
    assert_eq!(away.words()[1000], 1001);
    assert_eq!(
        uffd.move_pages(here.start(), there),
        Moved {
            bytes: 2 << 20,
            error: None
        }
    );
    assert_eq!(home.words()[1000], 1001);
}

#[test]
fn move_onto_present_pages_is_refused_and_says_how_far_it_came() {
    let Some(uffd) = open() else { return };
    let mut from = AnonMapping::new(16 << 10, Huge::Never).expect("16K can be mapped");
    let mut to = AnonMapping::new(16 << 10, Huge::Never).expect("16K can be mapped");
    from.bytes_mut().fill(1);
    to.bytes_mut()[8192] = 9;
    uffd.register(span_of(&to), RegisterMode::WriteProtect)
        .expect("anonymous memory registers");
    let first = uffd.move_pages(span_of(&to).start(), span_of(&from));
    assert_eq!(first.bytes, 8192);
    let rest = HostSpan::new(span_of(&from).start().plus(8192), span_of(&from).end());
    let second = uffd.move_pages(span_of(&to).start().plus(8192), rest);
    assert_eq!(
        second,
        Moved {
            bytes: 0,
            error: Some(Errno::EXIST)
        }
    );
}

#[test]
fn move_stops_at_a_hole() {
    let Some(uffd) = open() else { return };
    let mut from = AnonMapping::new(16 << 10, Huge::Never).expect("16K can be mapped");
    let to = AnonMapping::new(16 << 10, Huge::Never).expect("16K can be mapped");
    from.bytes_mut()[0] = 1;
    from.bytes_mut()[8192] = 1;
    uffd.register(span_of(&to), RegisterMode::WriteProtect)
        .expect("anonymous memory registers");
    let first = uffd.move_pages(span_of(&to).start(), span_of(&from));
    assert_eq!(first.bytes, 4096);
    let rest = HostSpan::new(span_of(&from).start().plus(4096), span_of(&from).end());
    let second = uffd.move_pages(span_of(&to).start().plus(4096), rest);
    assert_eq!((second.bytes, second.error), (0, Some(Errno::NOENT)));
}

#[test]
fn move_of_pages_that_are_dropped_meanwhile_ends() {
    const BYTES: u64 = 8 << 10;
    const ROUNDS: usize = 40_000;
    let Some(uffd) = open() else { return };
    let land = Territory::reserve(2 * BYTES).expect("there is room");
    let from = HostSpan::at(land.span().start(), BYTES);
    let to = HostSpan::at(from.end(), BYTES);
    land.map(from, Huge::Never).expect("a hole");
    land.map(to, Huge::Never).expect("a hole");
    uffd.register(to, RegisterMode::WriteProtect)
        .expect("anonymous memory registers");
    let (stop, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                land.advise(from, Advise::Discard).expect("mapped");
            }
        });
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                land.advise(from, Advise::Populate).expect("mapped");
                let _any = uffd.move_pages(to.start(), from);
                land.advise(to, Advise::Discard).expect("mapped");
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let end = crate::sys::futex::now_ns() + 20_000_000_000;
        while rounds.load(Ordering::Relaxed) < ROUNDS {
            // A thread that is stuck in the call would keep the scope from ending.
            let late = crate::sys::futex::now_ns() > end;
            if late {
                std::process::abort();
            }
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn touch_of_an_armed_hole_waits_until_the_page_is_there() {
    let Some(uffd) = open() else { return };
    let map = AnonMapping::new(8192, Huge::Never).expect("two pages can be mapped");
    let mut filled = AnonMapping::new(4096, Huge::Never).expect("a page can be mapped");
    filled.bytes_mut().fill(42);
    uffd.register(span_of(&map), RegisterMode::MissingAndWriteProtect)
        .expect("registers");
    let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| map.bytes()[5000]);
        assert!(uffd.wait_readable(stop.as_fd(), None));
        let mut messages = [Message::None, Message::None];
        assert_eq!(uffd.read(&mut messages), Ok(1));
        let Message::Fault { at } = messages[0] else {
            panic!("not a fault: {messages:?}")
        };
        let page = at.align_down(PAGE);
        assert_eq!(page.get(), map.address() + 4096);
        assert_eq!(
            uffd.copy(page, span_of(&filled)),
            Moved {
                bytes: 4096,
                error: None
            }
        );
        uffd.wake(HostSpan::at(page, PAGE))
            .expect("the page is registered");
        assert_eq!(reader.join().expect("the read returns"), 42);
    });
    assert_eq!(uffd.read(&mut [Message::None]), Ok(0));
}
