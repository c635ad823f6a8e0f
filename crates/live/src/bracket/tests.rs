use super::*;

use gpusvm_abi::bus::SystemBus;

use crate::sys::fault_copy::LiveBus;
use crate::sys::mapping::Huge;
use crate::sys::territory::Territory;
use crate::sys::vram::VramMode;
use crate::toy::Bench;

use Effect::{Clear, Move, Populate, Protect, Replace, Unmap};

/// An address that is page-aligned, and one that is not.
const AT: usize = 0x7000_0000;
const ODD: usize = AT + 8;
/// Two pages, and a size that ends inside the second.
const TWO: usize = 0x2000;
const ABOUT_TWO: usize = 0x1001;

fn two_pages(at: usize) -> HostSpan {
    HostSpan::at(HostVa::new(u64::try_from(at).expect("64-bit")), 2 * PAGE)
}

#[test]
fn each_call_brackets_the_pages_that_it_changes_and_no_others() {
    let advice = |n| SysCall::new(Call::Madvise, &[AT, TWO, n]);
    let onto = AT + 0x10_0000;
    let cases: &[(SysCall, &[(usize, Effect)])] = &[
        (SysCall::new(Call::Munmap, &[AT, TWO]), &[(AT, Unmap)]),
        (SysCall::new(Call::Munmap, &[AT, ABOUT_TWO]), &[(AT, Unmap)]),
        (
            SysCall::new(Call::Mprotect, &[AT, TWO, 1]),
            &[(AT, Protect)],
        ),
        (
            SysCall::new(Call::Mmap, &[AT, TWO, 3, 0x32]),
            &[(AT, Unmap)],
        ),
        (
            SysCall::new(Call::Mmap, &[AT, TWO, 3, 0x12]),
            &[(AT, Replace)],
        ),
        (SysCall::new(Call::Mmap, &[AT, TWO, 3, 0x22]), &[]),
        (SysCall::new(Call::Mmap, &[AT, TWO, 3, 0x10_0022]), &[]),
        (
            SysCall::new(Call::Mremap, &[AT, TWO, TWO, 1]),
            &[(AT, Move)],
        ),
        (
            SysCall::new(Call::Mremap, &[AT, TWO, TWO, 3, onto]),
            &[(AT, Move), (onto, Replace)],
        ),
        (advice(4), &[(AT, Clear)]),
        (advice(8), &[(AT, Clear)]),
        (advice(9), &[(AT, Populate)]),
        (advice(24), &[(AT, Clear)]),
        (advice(102), &[(AT, Clear)]),
        (advice(22), &[(AT, Populate)]),
        (advice(23), &[(AT, Populate)]),
        (advice(25), &[(AT, Populate)]),
        (SysCall::new(Call::Mlock, &[AT, TWO]), &[(AT, Populate)]),
        // Huge pages, cold, taking guards away: nothing changes that anybody could read.
        (advice(14), &[]),
        (advice(20), &[]),
        (advice(103), &[]),
    ];
    for (call, expected) in cases {
        let found: Vec<_> = effects(call).into_iter().flatten().collect();
        let expected: Vec<_> = (expected.iter())
            .map(|(at, effect)| (two_pages(*at), *effect))
            .collect();
        assert_eq!(found, expected, "{call:?}");
    }
}

#[test]
fn advice_past_a_hole_was_taken_all_the_same() {
    assert_eq!(Outcome::of(Clear, -ENOMEM), Outcome::Done);
    assert_eq!(Outcome::of(Unmap, -ENOMEM), Outcome::Refused);
    assert_eq!(Outcome::of(Clear, -22), Outcome::Refused);
    assert_eq!(Outcome::of(Clear, 0), Outcome::Done);
}

#[test]
fn calls_that_the_system_will_refuse_have_no_effect() {
    for args in [[ODD, TWO], [AT, 0], [usize::MAX & !0xfff, TWO]] {
        assert_eq!(
            effects(&SysCall::new(Call::Munmap, &args)),
            [None, None],
            "{args:x?}"
        );
    }
}

#[test]
fn process_madvise_brackets_the_hull_of_its_parts() {
    let parts = [[AT + 0x5000, 0x1000], [AT, 0x1000]];
    let args = [0, parts.as_ptr().expose_provenance(), 2, 4];
    let hull = HostSpan::new(two_pages(AT).start(), two_pages(AT + 0x4000).end());
    assert_eq!(
        effects(&SysCall::new(Call::ProcessMadvise, &args)),
        [Some((hull, Move)), None]
    );
}

#[test]
fn heap_end_that_goes_down_unmaps_and_up_does_not() {
    let now = SysCall::new(Call::Brk, &[0]).raw();
    let now = usize::try_from(now)
        .expect("an address")
        .next_multiple_of(0x1000);
    // Asked about, not called.
    let down = effects(&SysCall::new(Call::Brk, &[now - TWO]));
    assert!(matches!(down, [Some((_, Unmap)), None]));
    assert_eq!(
        effects(&SysCall::new(Call::Brk, &[now + (1 << 30)])),
        [None, None]
    );
}

/// Mapped memory without huge pages.
fn small_pages() -> Territory {
    let land = Territory::reserve(2 << 20).expect("there is room");
    land.map(land.span(), Huge::Never).expect("a hole");
    land
}

#[test]
fn content_is_gone_where_a_call_fails_that_has_unmapped_it() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = small_pages();
    let span = land.span();
    let at = span.start().get();
    LiveBus::new().write(at, &[1]).expect("mapped");
    bench.send(span).expect("plain memory migrates");
    let space = &bench.space;
    space.begin_change(&[span]);
    let refused = space.bracket_span((span, Unmap), || {
        land.unmap_raw(span).expect("it is mapped");
        -ENOMEM
    });
    space.end_change(&[span]);
    assert_eq!(refused, -ENOMEM);
    assert!(!space.residency.lock().has_departed(span));
    assert!(!space.watch.is_watched(span));
    land.map(span, Huge::Never).expect("a hole");
    let mut byte = [7];
    LiveBus::new().read(at, &mut byte).expect("mapped");
    assert_eq!(byte, [0], "a mapping of its own");
}

#[test]
fn other_threads_find_what_a_call_that_will_be_refused_would_have_destroyed() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    let land = small_pages();
    let span = land.span();
    let at = span.start().get();
    let (from, bytes) = (
        usize::try_from(at).expect("64-bit"),
        usize::try_from(span.bytes()).expect("64-bit"),
    );
    let calls = [
        SysCall::new(Call::Madvise, &[from, bytes, 9]),
        SysCall::new(Call::Mmap, &[from, bytes, 3, 0x12, usize::MAX]),
        SysCall::new(Call::Mremap, &[AT, bytes, bytes, 3, from]),
    ];
    for call in calls {
        for offset in [0, PAGE] {
            LiveBus::new().write(at + offset, &[1]).expect("mapped");
        }
        bench.send(span).expect("plain memory migrates");
        let [first, second] = effects(&call);
        let what = second.or(first).expect("it changes the span");
        bench.space.begin_change(&[span]);
        let mut byte = [7];
        let refused = bench.space.bracket_span(what, || {
            LiveBus::new().read(at, &mut byte).expect("mapped");
            -22
        });
        bench.space.end_change(&[span]);
        assert_eq!((refused, byte), (-22, [1]), "{call:?}");
        LiveBus::new().read(at + PAGE, &mut byte).expect("mapped");
        assert_eq!(byte, [1], "{call:?}");
    }
    assert_eq!(bench.counts.lost.load(Ordering::Relaxed), 0);
}
