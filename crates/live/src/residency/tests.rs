use super::*;
use crate::shard::tests::SECOND;
use crate::toy::Toy;
use gpusvm::addr::PAGE;
use proptest::prelude::*;
use std::sync::Arc;

/// Pages of the small address space that the property uses.
const PAGES: u64 = 24;

fn va(page: u64) -> HostVa {
    HostVa::new(page * PAGE)
}

fn pages(start: u64, end: u64) -> HostSpan {
    HostSpan::new(va(start), va(end))
}

/// All memory of any allocation.
fn all() -> VramSpan {
    VramSpan::new(VramAddr::new(0), VramAddr::new(u64::MAX))
}

fn device_page(id: u64, origin: HostSpan) -> DevicePage {
    DevicePage {
        allocation: Arc::new(Toy::loose(id, origin)),
        offset: 0,
        left_at: 0,
        parked: None,
    }
}

/// A table in which the pages `start..end` are resident in allocation `id`.
fn resident(id: u64, start: u64, end: u64) -> Residency {
    let mut table = Residency::default();
    let span = pages(start, end);
    table.claim(span, ShardId::FIRST).expect("an empty table");
    table.depart(span);
    table.settle(span, device_page(id, span));
    table
}

#[test]
fn claims_exclude_each_other_and_bracketed_changes() {
    let mut table = Residency::default();
    assert_eq!(table.change(&[pages(4, 6)]), Ok(()));
    assert_eq!(table.change(&[pages(0, 1), pages(5, 9)]), Err(Busy));
    assert_eq!(table.claim(pages(0, 5), ShardId::FIRST), Err(Busy));
    assert_eq!(table.claim(pages(0, 4), ShardId::FIRST), Ok(()));
    assert_eq!(table.claim(pages(3, 4), ShardId::FIRST), Err(Busy));
    table.unchange(&[pages(4, 6)]);
    assert_eq!(table.claim(pages(4, 6), ShardId::FIRST), Ok(()));
}

#[test]
fn pages_that_left_after_an_event_are_not_the_events() {
    let mut table = resident(1, 0, 4);
    let (late, newer) = (pages(4, 8), device_page(2, pages(4, 8)));
    table.claim(late, ShardId::FIRST).expect("nothing there");
    table.settle(
        late,
        DevicePage {
            left_at: 3,
            ..newer
        },
    );
    let recalled = table
        .recall_older(pages(2, 6), |_first| Some(3))
        .expect("nothing travels");
    assert_eq!(recalled.len(), 1);
    assert_eq!(recalled[0].span, pages(2, 4));
    let _dropped = table.release(pages(2, 4));
    assert_eq!(table.departed_in(pages(0, 6)), [pages(0, 2), pages(4, 6)]);
    table.rebase(pages(0, 8), va(100), ShardId::FIRST, 3);
    let left = table.departed_in(pages(0, 200));
    assert_eq!(left, [pages(4, 6), pages(6, 8), pages(100, 102)]);
}

#[test]
fn event_takes_nothing_that_left_a_mapping_of_another_shard() {
    let mut table = resident(1, 0, 4);
    let (other, page) = (pages(4, 8), device_page(2, pages(4, 8)));
    table.claim(other, SECOND).expect("nothing there");
    table.settle(other, page);
    let first_only = |shard| (shard == ShardId::FIRST).then_some(9);
    let recalled = table.recall_older(pages(0, 8), first_only);
    let spans: Vec<_> = recalled
        .expect("nothing travels")
        .iter()
        .map(|piece| piece.span)
        .collect();
    assert_eq!(spans, [pages(0, 4)]);
    table.rebase(pages(4, 8), va(100), ShardId::FIRST, 9);
    assert_eq!(table.departed_in(pages(0, 200)), [pages(0, 4), other]);
    assert_eq!(table.departed_from(SECOND), [other]);
}

#[test]
fn claimed_span_is_host_memory_until_it_departs() {
    let mut table = Residency::default();
    let span = pages(0, 4);
    table.claim(span, ShardId::FIRST).expect("an empty table");
    assert!(table.is_travelling(span));
    assert!(!table.has_departed(span));
    table.depart(span);
    assert!(table.has_departed(span));
}

#[test]
fn recall_cuts_at_the_borders_and_keeps_offsets() {
    let mut table = resident(1, 0, 8);
    let pieces = table
        .recall_older(pages(2, 5), |_any| Some(u64::MAX))
        .expect("nothing travels");
    assert_eq!(pieces.len(), 1);
    assert_eq!(pieces[0].span, pages(2, 5));
    assert_eq!(pieces[0].page.offset, 2 * PAGE);
    assert!(
        table
            .recall_older(pages(4, 8), |_any| Some(u64::MAX))
            .is_err(),
        "a part travels"
    );
    let rest = table.recall(AllocationId(1), pages(0, 8), all());
    let spans: Vec<_> = rest.iter().map(|piece| piece.span).collect();
    assert_eq!(spans, [pages(0, 2), pages(5, 8)]);
}

#[test]
fn part_of_an_allocation_comes_alone() {
    let mut table = resident(1, 0, 8);
    let part = VramSpan::new(VramAddr::new(2 * PAGE), VramAddr::new(5 * PAGE));
    let pieces = table.recall(AllocationId(1), pages(0, 8), part);
    let spans: Vec<_> = pieces.iter().map(|piece| piece.span).collect();
    assert_eq!(spans, [pages(2, 5)]);
    assert_eq!(pieces[0].page.offset, 2 * PAGE);
    let found = table.find(AllocationId(1), VramAddr::new(6 * PAGE));
    assert!(found.is_some_and(|(span, page)| span == pages(5, 8) && page.offset == 5 * PAGE));
}

#[test]
fn moved_mapping_takes_its_pages_along_and_recall_finds_them() {
    let mut table = resident(1, 0, 8);
    table.rebase(pages(2, 4), va(100), ShardId::FIRST, 1);
    assert!(table.at(va(2)).is_none());
    let Some((_, State::Resident(page))) = table.at(va(101)) else {
        panic!("the page is at its new place");
    };
    // 100 is page 2 of the allocation.
    assert_eq!(page.offset, 3 * PAGE);
    let spans = table.recall(AllocationId(1), pages(0, 8), all());
    assert_eq!(spans.len(), 3);
}

/// What the table must say about one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Host,
    Claimed,
    Leaving,
    /// Travels with a page of an allocation: its id and the offset.
    Recalled(u64, u64),
    Resident(u64, u64),
}

fn page_at(table: &Residency, page: u64) -> Page {
    let found = table.overlapping(pages(page, page + 1)).next();
    let Some((span, state)) = found else {
        return Page::Host;
    };
    let place = |held: &DevicePage| {
        let offset = held.offset + va(page).offset_from(span.start());
        (held.allocation.id().0, offset / PAGE)
    };
    match state {
        State::Claimed => Page::Claimed,
        State::Transit(None) => Page::Leaving,
        State::Transit(Some(held)) => {
            let (id, offset) = place(held);
            Page::Recalled(id, offset)
        }
        State::Resident(held) => {
            let (id, offset) = place(held);
            Page::Resident(id, offset)
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// A migration to the device begins.
    Begin(u64, u64),
    /// The oldest one arrives.
    Settle,
    /// The oldest one fails.
    Fail,
    /// An allocation is recalled.
    Recall(u64),
    /// A span is recalled.
    RecallSpan(u64, u64),
    /// The oldest recalled piece comes home.
    ComeHome,
    /// The oldest recalled piece stays after all.
    PutBack,
}

fn op() -> impl Strategy<Value = Op> {
    let span = (0..PAGES, 1..8_u64).prop_map(|(start, len)| (start, (start + len).min(PAGES)));
    prop_oneof![
        span.clone().prop_map(|(start, end)| Op::Begin(start, end)),
        Just(Op::Settle),
        Just(Op::Fail),
        (0..20_u64).prop_map(Op::Recall),
        span.prop_map(|(start, end)| Op::RecallSpan(start, end)),
        Just(Op::ComeHome),
        Just(Op::PutBack),
    ]
}

/// The table beside an array with one state per page.
#[derive(Default)]
struct Both {
    table: Residency,
    model: Vec<Page>,
    leaving: Vec<HostSpan>,
    recalled: Vec<Piece>,
    origins: Vec<HostSpan>,
}

impl Both {
    fn new() -> Self {
        Self {
            model: vec![Page::Host; usize::try_from(PAGES).expect("64-bit")],
            ..Self::default()
        }
    }

    fn part(&mut self, span: HostSpan) -> &mut [Page] {
        let index = |at: HostVa| usize::try_from(at.get() / PAGE).expect("64-bit");
        &mut self.model[index(span.start())..index(span.end())]
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Begin(start, end) => self.begin(pages(start, end)),
            Op::Settle => self.settle(),
            Op::Fail => self.fail(),
            Op::Recall(id) => self.recall(id),
            Op::RecallSpan(start, end) => self.recall_span(pages(start, end)),
            Op::ComeHome => self.come_home(),
            Op::PutBack => self.put_back(),
        }
    }

    fn begin(&mut self, span: HostSpan) {
        let free = self.part(span).iter().all(|page| *page == Page::Host);
        assert_eq!(self.table.claim(span, ShardId::FIRST).is_ok(), free);
        if free {
            self.part(span).fill(Page::Claimed);
            self.leaving.push(span);
        }
    }

    /// The oldest migration, on its way.
    fn depart(&mut self) -> Option<HostSpan> {
        if self.leaving.is_empty() {
            return None;
        }
        let span = self.leaving.remove(0);
        self.table.depart(span);
        let first = page_at(&self.table, span.start().get() / PAGE);
        assert_eq!(first, Page::Leaving);
        Some(span)
    }

    fn settle(&mut self) {
        let Some(span) = self.depart() else { return };
        let id = u64::try_from(self.origins.len()).expect("few");
        self.origins.push(span);
        self.table.settle(span, device_page(id, span));
        for (page, offset) in self.part(span).iter_mut().zip(0..) {
            *page = Page::Resident(id, offset);
        }
    }

    fn fail(&mut self) {
        let Some(span) = self.depart() else { return };
        let held = self.table.release(span);
        assert!(matches!(held, Some(State::Transit(None))));
        self.part(span).fill(Page::Host);
    }

    fn recall(&mut self, id: u64) {
        let Some(origin) = usize::try_from(id).ok().and_then(|n| self.origins.get(n)) else {
            return;
        };
        let pieces = self.table.recall(AllocationId(id), *origin, all());
        for page in &mut self.model {
            if let Page::Resident(owner, offset) = *page
                && owner == id
            {
                *page = Page::Recalled(owner, offset);
            }
        }
        self.recalled.extend(pieces);
    }

    fn recall_span(&mut self, span: HostSpan) {
        let settled = |page: &Page| matches!(page, Page::Host | Page::Resident(..));
        let free = self.part(span).iter().all(settled);
        let recalled = self.table.recall_older(span, |_any| Some(u64::MAX));
        assert_eq!(recalled.is_ok(), free);
        if !free {
            return;
        }
        for page in self.part(span) {
            if let Page::Resident(id, offset) = *page {
                *page = Page::Recalled(id, offset);
            }
        }
        self.recalled.extend(recalled.unwrap_or_default());
    }

    fn oldest_recalled(&mut self) -> Option<Piece> {
        (!self.recalled.is_empty()).then(|| self.recalled.remove(0))
    }

    fn come_home(&mut self) {
        let Some(piece) = self.oldest_recalled() else {
            return;
        };
        let held = self.table.release(piece.span);
        assert!(matches!(held, Some(State::Transit(Some(_)))));
        self.part(piece.span).fill(Page::Host);
    }

    fn put_back(&mut self) {
        let Some(piece) = self.oldest_recalled() else {
            return;
        };
        self.table.put_back(&piece);
        for page in self.part(piece.span) {
            if let Page::Recalled(id, offset) = *page {
                *page = Page::Resident(id, offset);
            }
        }
    }
}

proptest! {
    #[test]
    fn table_agrees_with_one_state_per_page(ops in prop::collection::vec(op(), 1..60)) {
        let mut both = Both::new();
        for op in &ops {
            both.apply(op);
            for (page, expected) in (0..).zip(&both.model) {
                prop_assert_eq!(page_at(&both.table, page), *expected, "page {} after {:?}", page, op);
            }
        }
    }
}
