use super::*;
use crate::sys::scratch::call::{Answer, Call, Kind, Look, Place};

const BASE: u64 = 1 << 28;

fn step(call: Call) -> Step {
    Step {
        who: 0,
        call,
        look: Look::Yes,
    }
}

fn map(at: u64, pages: u64) -> Step {
    step(Call::Map {
        at: at * PAGE,
        len: pages * PAGE,
        prot: 3,
        kind: Kind::Private,
        place: Place::Fixed,
    })
}

fn open() -> Scratch {
    Scratch::open(HostVa::new(BASE), 16).expect("one more process")
}

#[test]
fn program_is_seen_step_by_step_and_leaves_nothing_behind() {
    let mut scratch = open();
    let program = [
        map(0, 4),
        step(Call::Store { at: PAGE, value: 7 }),
        step(Call::Load { at: PAGE }),
        step(Call::Load { at: 9 * PAGE }),
        step(Call::Unmap { at: 0, len: PAGE }),
    ];
    for _ in 0..3 {
        let seen = scratch.run(&program).expect("the window serves");
        let answers: Vec<_> = seen.iter().filter_map(|seen| seen.answer).collect();
        let segv = Answer::Signal(libc::SIGSEGV);
        let done = Answer::Done;
        assert_eq!(answers, [done(0), done(0), done(7), segv, done(0)]);
        assert_ne!(seen[0].pages, seen[1].pages);
        let ends = |n: usize| (seen[n].areas[0].start, seen[n].areas[0].end);
        assert_eq!((ends(0), ends(4)), ((0, 4 * PAGE), (PAGE, 4 * PAGE)));
    }
}

#[test]
fn room_is_found_in_the_window_only() {
    let mut scratch = open();
    let anywhere = |pages: u64| {
        step(Call::Map {
            at: 0,
            len: pages * PAGE,
            prot: 3,
            kind: Kind::Private,
            place: Place::Anywhere,
        })
    };
    let seen = scratch.run(&[anywhere(10), anywhere(6), anywhere(1)]);
    let seen = seen.expect("the window serves");
    let answers: Vec<_> = seen.iter().filter_map(|seen| seen.answer).collect();
    assert_eq!(
        answers,
        [
            Answer::Done(6 * PAGE),
            Answer::Done(0),
            Answer::Failed(libc::ENOMEM)
        ]
    );
}

#[test]
fn children_act_in_turn_and_end() {
    let mut scratch = open();
    let by = |who: u8, call: Call| Step { who, ..step(call) };
    let program = [
        map(0, 1),
        step(Call::Store { at: 0, value: 1 }),
        step(Call::Fork { child: 1 }),
        by(1, Call::Load { at: 0 }),
        by(1, Call::Store { at: 0, value: 2 }),
        by(0, Call::Load { at: 0 }),
        by(1, Call::Load { at: 0 }),
        by(1, Call::Exit),
        by(0, Call::Load { at: 0 }),
        by(0, Call::Fork { child: 1 }),
        by(1, Call::Load { at: 0 }),
    ];
    let seen = scratch.run(&program).expect("the window serves");
    let loads = [3, 5, 6, 8, 10].map(|n: usize| seen[n].answer);
    assert_eq!(loads, [1, 1, 2, 1, 1].map(|word| Some(Answer::Done(word))));
}

#[test]
fn process_that_a_call_ends_is_reported() {
    let mut scratch = open();
    let everything = step(Call::Unmap {
        at: 0_u64.wrapping_sub(BASE),
        len: (1 << 47) - PAGE,
    });
    assert!(matches!(
        scratch.run(&[everything]),
        Err(ScratchError::Died)
    ));
}
