//! What units of a device may do to host memory, and what counts as written.

use std::sync::Arc;

use gpusvm::addr::PAGE;
use gpusvm::seam::mm::Access;
use gpusvm_abi::bus::SystemBus;

use super::test_bench::Bench;
use crate::kernel::bus::{Bus, Violation};
use crate::mm::flags::Prot;

const FREE: i32 = 8;
const HUGE: i32 = 14;

fn units(bench: &Bench) -> Bus<super::test_bench::TestEnv> {
    Bus::of_units(Arc::clone(&bench.kernel))
}

#[test]
fn units_may_do_what_some_process_may() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    let at = bench.look_up(Access::Write);
    assert!(units(&bench).write(at.get(), &[2]).is_ok());
    bench
        .space
        .mprotect(bench.at(0), PAGE, Prot::READ)
        .expect("mapped");
    assert!(units(&bench).read(at.get(), &mut [0]).is_ok());
    assert!(units(&bench).write(at.get(), &[3]).is_err());
    let broken = [Violation::NoRight(at, Access::Write)];
    assert_eq!(bench.kernel.violations(), broken);
    let copies = Bus::new(Arc::clone(&bench.kernel));
    assert!(
        copies.write(at.get(), &[4]).is_ok(),
        "a copy has no translation"
    );
}

#[test]
fn units_may_not_store_to_what_a_child_has_too() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    let at = bench.look_up(Access::Write);
    let child = bench.space.fork().expect("room");
    assert!(units(&bench).write(at.get(), &[2]).is_err());
    assert_eq!(child.load(bench.at(0)), Ok(1));
}

#[test]
fn units_may_use_parts_of_large_pages() {
    let bench = Bench::new();
    bench.map(0, 8);
    let advised = bench.space.madvise(bench.at(0), 8 * PAGE, HUGE);
    advised.expect("anonymous");
    bench.store(1, 4);
    assert!(bench.kernel.look(|mm| mm.is_huge(bench.space.pid(), 0)));
    let at = bench.look_up(Access::Write).get();
    let pages = bench.kernel.look(|mm| 1 << mm.shape().pmd_order);
    for page in 0..pages {
        let at = at + u64::from(page) * PAGE;
        assert_eq!(units(&bench).write(at, &[1]), Ok(()), "page {page}");
    }
    assert_eq!(bench.load(pages - 1), 1);
}

#[test]
fn what_a_device_only_reads_may_be_dropped() {
    let bench = Bench::new();
    bench.map(0, 1);
    bench.store(0, 1);
    let advised = bench.space.madvise(bench.at(0), PAGE, FREE);
    advised.expect("anonymous");
    let _at = bench.look_up(Access::Read);
    assert!(bench.space.reclaim(bench.at(0)), "it can go");
    assert_eq!(bench.load(0), 0);
}
