use alloc::string::ToString;

use super::*;
use gpusvm::addr::HostVa;
use gpusvm::seam::mm::Access;

fn huge() -> HostSpan {
    HostSpan::at(HostVa::new(0x20_0000), 0x20_0000)
}

fn fold(events: &[Event]) -> DeviceStats {
    let stats = DeviceStats::new(2);
    events.iter().for_each(|event| stats.record(Ns(0), event));
    stats
}

#[test]
fn text_form_begins_with_the_four_lines_of_the_original_file() {
    let fault = Event::FaultStart {
        gt: 0,
        at: HostVa::new(0x1000),
        access: Access::Read,
    };
    let stats = fold(&[fault, fault, Event::TlbInvalidate { gt: 0 }]);
    let text = stats.gt(0).map(ToString::to_string).unwrap_or_default();
    assert!(
        text.starts_with(
            "svm_pagefault_count: 2\ntlb_inval_count: 1\nvma_pagefault_count: 0\n\
             vma_pagefault_kb: 0\n"
        ),
        "{text}"
    );
    assert!(text.ends_with('\n') && text.lines().count() == Counter::ALL.len());
}

#[test]
fn counters_are_kept_per_gt_and_reset_together() {
    let at = HostVa::new(0x1000);
    let stats = fold(&[Event::FaultStart {
        gt: 1,
        at,
        access: Access::Write,
    }]);
    assert_eq!(
        stats.gt(0).map(|gt| gt.get(Counter::SvmPagefaultCount)),
        Some(0)
    );
    assert_eq!(stats.total(Counter::SvmPagefaultCount), 1);
    stats.gt(1).into_iter().for_each(GtStats::reset);
    assert_eq!(stats.total(Counter::SvmPagefaultCount), 0);
    assert!(stats.gt(2).is_none());
}

#[test]
fn copied_and_adopted_pages_are_told_apart_by_direction() {
    let (copied, adopted) = (PageCount::new(512), PageCount::new(16));
    let took = Ns(3_000);
    let cause = HomeCause::Teardown;
    let stats = fold(&[
        Event::ToDevice {
            span: huge(),
            copied,
            adopted,
            took,
        },
        Event::ToSystem {
            span: huge(),
            cause,
            copied: PageCount::ZERO,
            adopted,
            took,
        },
    ]);
    let get = |counter| stats.total(counter);
    assert_eq!(get(Counter::Svm2mDeviceCopyKb), 2048);
    assert_eq!(get(Counter::SvmCpuCopyKb), 0);
    assert_eq!(get(Counter::AdoptedToDeviceKb), 64);
    assert_eq!(get(Counter::AdoptedKb), 128);
    assert_eq!(get(Counter::EvictTeardownCount), 1);
    assert_eq!(get(Counter::Svm2mDeviceCopyUs), 3);
}

#[test]
fn each_reason_to_come_home_counts_its_own_pages_and_no_others() {
    let causes = [
        (HomeCause::CpuFault, Counter::HomeCpuFaultKb),
        (HomeCause::Pressure, Counter::HomePressureKb),
        (HomeCause::Mixed, Counter::HomeMixedKb),
        (HomeCause::SpaceChange, Counter::HomeSpaceChangeKb),
        (HomeCause::Teardown, Counter::HomeTeardownKb),
    ];
    for (cause, own) in causes {
        let stats = fold(&[Event::ToSystem {
            span: huge(),
            cause,
            copied: PageCount::new(3),
            adopted: PageCount::new(2),
            took: Ns(0),
        }]);
        for (_, counter) in causes {
            let wanted = if counter == own { 20 } else { 0 };
            assert_eq!(stats.total(counter), wanted, "{cause:?}: {counter:?}");
        }
    }
}

#[test]
fn size_classes_follow_the_range() {
    let of = |bytes| HostSpan::at(HostVa::new(0x40_0000), bytes);
    let stats = fold(&[
        Event::FaultRange {
            gt: 0,
            range: of(PAGE),
        },
        Event::FaultRange {
            gt: 0,
            range: of(PAGE_64K),
        },
        Event::FaultRange {
            gt: 0,
            range: of(PAGE_64K),
        },
        Event::FaultRange {
            gt: 0,
            range: huge(),
        },
    ]);
    assert_eq!(stats.total(Counter::Svm4kPagefaultCount), 1);
    assert_eq!(stats.total(Counter::Svm64kPagefaultCount), 2);
    assert_eq!(stats.total(Counter::Svm2mPagefaultCount), 1);
}
