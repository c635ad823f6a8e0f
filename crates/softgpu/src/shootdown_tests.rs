//! What [`shootdown`](crate::shootdown) does on one thread; `tests/orders.rs` tries it on several.

use crate::mmu::{Leaf, Permit, Target};
use crate::shootdown::{Gate, SEQNO_MAX, Shootdown, number_of, seqno_of};
use crate::tlb::Tlb;

#[test]
fn sequence_numbers_wrap_past_zero_and_lead_back() {
    for n in [
        1,
        2,
        SEQNO_MAX - 1,
        SEQNO_MAX,
        SEQNO_MAX + 1,
        5 * SEQNO_MAX + 7,
    ] {
        let seqno = seqno_of(n);
        assert!(seqno >= 1 && u64::from(seqno) <= SEQNO_MAX);
        for latest in [n, n + 1, n + 1000] {
            assert_eq!(number_of(seqno, latest), n);
        }
    }
}

#[test]
fn unit_that_is_far_behind_drops_everything() {
    let shootdown = Shootdown::new();
    let (gate, mut tlb) = (Gate::default(), Tlb::new(4));
    let leaf = Leaf {
        va: 0,
        shift: 12,
        target: Target::Null,
        write: Permit::No,
        atomic: Permit::No,
    };
    tlb.insert(1, leaf);
    for n in 1..=200 {
        shootdown.publish(2, n << 12, (n + 1) << 12);
    }
    gate.enter(&shootdown, &mut tlb);
    assert!(tlb.look_up(1, 0).is_none());
    assert!(gate.has_acknowledged(200));
    assert!(!gate.has_acknowledged(201), "inside, and not seen");
    gate.leave();
    assert!(gate.has_acknowledged(201), "quiescent");
}
