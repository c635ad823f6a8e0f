use super::*;
use std::sync::mpsc::channel;

use gpusvm::seam::mm::AddressSpace;

use crate::sys::vram::VramMode;
use crate::toy::Bench;

/// Runs `check` with the mapping of another thread's stack, of `bytes` bytes. The thread ends afterwards,
/// and is joined.
fn with_stack_of_a_thread(procmap: &ProcMap, bytes: usize, check: impl FnOnce(HostSpan)) {
    let (tell, hear) = channel();
    let (go, wait) = channel::<()>();
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().stack_size(bytes);
        let thread = builder.spawn_scoped(scope, move || {
            let local = 0_u8;
            let here = u64::try_from((&raw const local).addr()).expect("64-bit");
            tell.send(here).expect("the test listens");
            let _end = wait.recv();
        });
        thread.expect("one more thread");
        let here = hear.recv().expect("it tells");
        check(mapping_of(procmap, HostVa::new(here)));
        drop(go);
    });
}

#[test]
fn a_thread_whose_stack_was_sent_away_ends_and_is_joined() {
    let Some(bench) = Bench::open(VramMode::Adopt) else {
        return;
    };
    for _ in 0..20 {
        with_stack_of_a_thread(&bench.space.procmap, 2 << 20, |stack| {
            let top = HostSpan::new(HostVa::new(stack.end().get() - TOP), stack.end());
            let near = HostSpan::new(HostVa::new(top.start().get() - TOP), top.start());
            assert!(bench.send(top).is_err(), "the control block stays");
            // Its own pages go, wherever they were touched.
            let _sent = bench.send(near);
            // A mapping may end where a block of 2 MiB does: blocks are armed one by one.
            for (part, kind) in [(top, VmaKind::InPlace), (near, VmaKind::Anonymous)] {
                let mut at = part.start();
                while at < part.end() {
                    let vma = bench.space.find_vma(at).expect("it is mapped");
                    assert_eq!(vma.kind, kind, "{vma:?} of {part}");
                    assert!(vma.span.end() <= part.end(), "{vma:?} of {part}");
                    at = vma.span.end();
                }
            }
        });
    }
}

#[test]
fn where_system_calls_cannot_wait_whole_stacks_stay() {
    let procmap = ProcMap::open().expect("the kernel answers queries");
    let stays = Stays::open(FaultLevel::UserModeOnly).expect("there is a /proc");
    // Larger than any that was used before: the C library uses stacks again, and arming has cut those.
    with_stack_of_a_thread(&procmap, 3 << 20, |stack| {
        let may_leave = stays.check(&procmap, stack).is_ok();
        assert!(!may_leave, "it has a thread");
        stays.known.lock().blocks = SpanSet::default();
        stays.judge(&procmap, stack);
        assert_eq!(stays.within(stack), [stack], "it has the shape of a stack");
    });
}
