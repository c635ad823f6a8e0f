use alloc::vec::Vec;
use std::sync::Mutex as StdMutex;

use super::*;
use crate::error::Stale;
use crate::test_env::TestEnv;

const BLOCK: u64 = 2 << 20;

/// What a holder says to an eviction.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Willing,
    Busy,
}

/// Holds one object until it is evicted.
struct Holder {
    bo: StdMutex<Option<Arc<Bo<TestEnv>>>>,
    mood: Mood,
}

impl Evict for Holder {
    fn evict(self: Arc<Self>) -> Result<(), Interrupted> {
        if self.mood == Mood::Busy {
            return Err(Stale::PagesBusy.into());
        }
        drop(
            self.bo
                .lock()
                .expect("no test panics under the lock")
                .take(),
        );
        Ok(())
    }
}

fn manager(blocks: u64) -> Arc<Manager<TestEnv>> {
    Arc::new(Manager::new(Arc::new(TestEnv::default()), blocks * BLOCK))
}

fn block(manager: &Arc<Manager<TestEnv>>) -> Result<Arc<Bo<TestEnv>>, Failed> {
    manager.allocate(BoRequest {
        bytes: BLOCK,
        from: From::Bottom,
        purpose: Purpose::Pages,
    })
}

/// Memory for tables.
fn table(manager: &Arc<Manager<TestEnv>>) -> Result<Arc<Bo<TestEnv>>, Failed> {
    manager.allocate(BoRequest {
        bytes: BLOCK,
        from: From::Top,
        purpose: Purpose::Tables,
    })
}

fn evictable(manager: &Arc<Manager<TestEnv>>, mood: Mood) -> Arc<Holder> {
    let bo = block(manager).expect("there is room");
    let holder = Arc::new(Holder {
        bo: StdMutex::new(Some(Arc::clone(&bo))),
        mood,
    });
    let weak = Arc::<Holder>::downgrade(&holder);
    manager.make_evictable(&bo, weak);
    holder
}

fn holds(holder: &Holder) -> bool {
    holder
        .bo
        .lock()
        .expect("no test panics under the lock")
        .is_some()
}

#[test]
fn object_is_pinned_until_it_is_made_evictable() {
    let manager = manager(1);
    let pinned = block(&manager).expect("there is room");
    assert_eq!(block(&manager).map(|_bo| ()), Err(Failed::OutOfVram));
    drop(pinned);
    let holder = evictable(&manager, Mood::Willing);
    let _bo = block(&manager).expect("the evictable one goes");
    assert!(!holds(&holder));
}

#[test]
fn oldest_goes_first_and_a_touch_makes_young() {
    let manager = manager(3);
    let holders: Vec<_> = (0..3).map(|_| evictable(&manager, Mood::Willing)).collect();
    if let Some(bo) = holders[0]
        .bo
        .lock()
        .expect("no test panics under the lock")
        .as_ref()
    {
        manager.touch(bo);
    }
    let _bo = block(&manager).expect("one goes");
    assert_eq!(
        holders.iter().map(|h| holds(h)).collect::<Vec<_>>(),
        [true, false, true]
    );
}

#[test]
fn busy_victim_is_passed_over_and_stays_on_the_list() {
    let manager = manager(2);
    let (busy, free) = (
        evictable(&manager, Mood::Busy),
        evictable(&manager, Mood::Willing),
    );
    let bo = block(&manager).expect("the free one goes");
    assert!(holds(&busy) && !holds(&free));
    assert_eq!(
        block(&manager).map(|_bo| ()),
        Err(Failed::OutOfVram),
        "bounded, and reported"
    );
    drop(bo);
    assert_eq!(manager.used(), BLOCK);
}

#[test]
fn tables_wait_for_pages_that_are_on_their_way() {
    let manager = manager(1);
    for outcome in [Some(Mood::Willing), None] {
        let bo = block(&manager).expect("there is room");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| table(&manager).map(|bo| bo.span().bytes()));
            (0..1000).for_each(|_| std::thread::yield_now());
            // The pages arrive and can be evicted, or nothing comes of them.
            let holder = outcome.map(|mood| {
                let holder = Arc::new(Holder {
                    bo: StdMutex::new(Some(Arc::clone(&bo))),
                    mood,
                });
                let weak = Arc::<Holder>::downgrade(&holder);
                manager.make_evictable(&bo, weak);
                holder
            });
            drop(bo);
            assert_eq!(waits.join().expect("it ends"), Ok(BLOCK));
            assert!(holder.is_none_or(|holder| !holds(&holder)));
        });
        assert_eq!(manager.used(), 0);
    }
    let pinned = table(&manager).expect("there is room");
    assert_eq!(table(&manager).map(|_bo| ()), Err(Failed::OutOfVram));
    drop(pinned);
}

#[test]
fn what_can_never_fit_is_told_apart() {
    let request = BoRequest {
        bytes: 2 * BLOCK,
        from: From::Bottom,
        purpose: Purpose::Tables,
    };
    assert_eq!(
        manager(1).allocate(request).map(|_bo| ()),
        Err(Failed::TooLarge)
    );
}

#[test]
fn threads_evict_each_other_and_nothing_leaks() {
    let manager = manager(4);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                drop(
                    (0..200)
                        .map(|_| try_evictable(&manager))
                        .collect::<Vec<_>>(),
                )
            });
        }
    });
    assert_eq!(manager.used(), 0);
}

/// As [`evictable`], where there is room.
fn try_evictable(manager: &Arc<Manager<TestEnv>>) -> Option<Arc<Holder>> {
    let bo = block(manager).ok()?;
    let holder = Arc::new(Holder {
        bo: StdMutex::new(Some(Arc::clone(&bo))),
        mood: Mood::Willing,
    });
    let weak = Arc::<Holder>::downgrade(&holder);
    manager.make_evictable(&bo, weak);
    Some(holder)
}

fn usage(manager: &Manager<TestEnv>) -> Usage {
    let usage = manager.usage();
    let all = usage.free + usage.used + usage.balloon + usage.withdrawn;
    assert_eq!(all, manager.size());
    usage
}

fn nth(block: u64, bytes: u64) -> VramSpan {
    VramSpan::at(crate::addr::VramAddr::new(block * BLOCK), bytes)
}

#[test]
fn block_goes_offline_and_what_was_in_it_elsewhere() {
    let manager = manager(4);
    let holders: Vec<_> = (0..4).map(|_| evictable(&manager, Mood::Willing)).collect();
    let offline = manager.take_offline(nth(1, BLOCK)).expect("all may go");
    assert_eq!(
        holders.iter().map(|h| holds(h)).collect::<Vec<_>>(),
        [true, false, true, true]
    );
    assert_eq!(usage(&manager).withdrawn, BLOCK);
    assert!(
        manager
            .allocate(BoRequest {
                bytes: 4 * BLOCK,
                from: From::Bottom,
                purpose: Purpose::Pages
            })
            .is_err()
    );
    // Whoever needs memory evicts others, and gets none of the block.
    let more: Vec<_> = (0..3)
        .map(|_| block(&manager).expect("others may go"))
        .collect();
    assert!(more.iter().all(|bo| !bo.span().overlaps(offline.span())));
    assert!(block(&manager).is_err());
    drop(offline);
    assert_eq!(usage(&manager).withdrawn, 0);
    let back = block(&manager).expect("online again");
    assert_eq!(back.span(), nth(1, BLOCK));
}

#[test]
fn block_with_something_that_stays_is_not_taken_offline() {
    let manager = manager(2);
    let pinned = manager.allocate(BoRequest {
        bytes: BLOCK,
        from: From::Bottom,
        purpose: Purpose::Pinned,
    });
    let pinned = pinned.expect("room");
    let busy = evictable(&manager, Mood::Busy);
    for at in 0..2 {
        let refused = manager.take_offline(nth(at, BLOCK)).map(drop);
        assert_eq!(refused, Err(Failed::OutOfVram));
    }
    assert!(holds(&busy));
    drop(pinned);
    assert_eq!(
        usage(&manager),
        Usage {
            free: BLOCK,
            used: BLOCK,
            ..Usage::default()
        }
    );
}

#[test]
fn lost_page_is_never_handed_out_again() {
    let manager = manager(1);
    let bo = block(&manager).expect("room");
    let bad = VramSpan::at(bo.span().start().plus(5 * PAGE), PAGE);
    manager.lose(bad);
    assert_eq!(usage(&manager).used, BLOCK, "who has it keeps it");
    drop(bo);
    drop(
        manager
            .take_offline(nth(0, BLOCK))
            .expect("nothing is in it"),
    );
    assert_eq!(
        usage(&manager),
        Usage {
            free: BLOCK - PAGE,
            withdrawn: PAGE,
            ..Usage::default()
        }
    );
    let page = BoRequest {
        bytes: PAGE,
        from: From::Bottom,
        purpose: Purpose::Pinned,
    };
    let all: Vec<_> = core::iter::from_fn(|| manager.allocate(page).ok()).collect();
    assert_eq!(all.len(), 511);
    assert!(all.iter().all(|bo| bo.span() != bad));
}

#[test]
fn balloon_takes_what_others_have_and_gives_it_back() {
    let manager = manager(4);
    let holders: Vec<_> = (0..3).map(|_| evictable(&manager, Mood::Willing)).collect();
    let balloon = manager.inflate(2 * BLOCK + 1).expect("others may go");
    assert_eq!(balloon.bytes(), 2 * BLOCK + PAGE);
    let kept = holders.iter().filter(|holder| holds(holder)).count();
    assert_eq!(kept, 1, "two had to go");
    let expected = Usage {
        free: BLOCK - PAGE,
        used: BLOCK,
        balloon: 2 * BLOCK + PAGE,
        withdrawn: 0,
    };
    assert_eq!(usage(&manager), expected);
    assert_eq!(manager.inflate(2 * BLOCK).map(drop), Err(Failed::OutOfVram));
    assert_eq!(
        usage(&manager).balloon,
        expected.balloon,
        "no part of it stays"
    );
    drop(balloon);
    assert_eq!(usage(&manager).balloon, 0);
    let again: Vec<_> = (0..3).map(|_| block(&manager).expect("room")).collect();
    assert_eq!(again.len(), 3);
}
