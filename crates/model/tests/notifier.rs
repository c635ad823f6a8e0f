//! The framework's own interval notifiers, in every order in which a fault and an invalidation can
//! meet: the smallest picture of the whole design, and the check that the scheduler finds what
//! happens without its one rule.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::mmu::{Interval, IntervalNotifiers, Seq};
use gpusvm::seam::mm::{InvalidateReason, InvalidationSink};
use gpusvm_model::sched::{
    Explorer, Kind, ModelEnv, ModelMutex, Options, Picker, Rank, Sim, Summary, When,
};

/// A page of the process, and what a device knows of it.
struct Page {
    /// The notifier lock.
    lock: lock_api::Mutex<ModelMutex, ()>,
    /// Frame that the CPU's table names.
    frame: AtomicU32,
    /// Frame that the device's table names; 0 for none.
    entry: AtomicU32,
    /// Frames that are free, one bit each.
    free: AtomicU64,
}

type Notifiers = IntervalNotifiers<ModelEnv>;

struct Sink(Arc<Page>);

impl InvalidationSink for Sink {
    fn start(&self, interval: &Interval, _span: HostSpan, _why: InvalidateReason, seq: Seq) {
        let _held = self.0.lock.lock();
        interval.set_seq(seq);
        ModelEnv.point(Kind::Pte);
        self.0.entry.store(0, Ordering::Relaxed);
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

/// Whether a fault asks for the sequence again before it writes its entry.
#[derive(Clone, Copy)]
enum Recheck {
    Done,
    Forgotten,
}

fn fault(notifiers: &Notifiers, page: &Page, interval: &Interval, recheck: Recheck) {
    loop {
        let seq = notifiers.read_begin(&ModelEnv, interval);
        let frame = page.frame.load(Ordering::Relaxed);
        ModelEnv.point(Kind::Access);
        let _held = page.lock.lock();
        let stale = matches!(recheck, Recheck::Done) && interval.read_retry(seq);
        if !stale {
            page.entry.store(frame, Ordering::Relaxed);
            return;
        }
    }
}

/// The page moves to another frame, and the old one is free.
fn migrate(notifiers: &Notifiers, page: &Page, span: HostSpan) {
    let invalidation = notifiers.start(span, InvalidateReason::Migrate);
    ModelEnv.point(Kind::Pte);
    let old = page.frame.fetch_add(1, Ordering::Relaxed);
    page.free.fetch_or(1 << old, Ordering::Relaxed);
    notifiers.end(&ModelEnv, invalidation);
}

fn world(sim: &Sim, recheck: Recheck) {
    let span = HostSpan::at(HostVa::new(0x1000), 0x1000);
    let notifiers = Arc::new(Notifiers::new());
    let page = Arc::new(Page {
        lock: lock_api::Mutex::new(()),
        frame: AtomicU32::new(1),
        entry: AtomicU32::new(0),
        free: AtomicU64::new(0),
    });
    sim.name_locks(&*notifiers, "interval notifiers", Rank::HOST_MM);
    sim.name_locks(&page.lock, "notifier", Rank::NOTIFIER);
    let sink = Arc::new(Sink(Arc::clone(&page)));
    let interval = notifiers.insert(span, sink);
    let (mover, moving) = (Arc::clone(&page), Arc::clone(&notifiers));
    sim.spawn("cpu", move || {
        migrate(&moving, &mover, span);
        migrate(&moving, &mover, span);
    });
    let device = Arc::clone(&page);
    sim.spawn("gpu", move || {
        fault(&notifiers, &device, &interval, recheck);
        fault(&notifiers, &device, &interval, recheck);
    });
    sim.oracle(When::EveryStep, move || {
        let entry = page.entry.load(Ordering::Relaxed);
        match page.free.load(Ordering::Relaxed) >> entry & 1 {
            0 => Ok(()),
            _ => Err(format!(
                "the device has an entry to frame {entry}, which is free"
            )),
        }
    });
}

fn search(recheck: Recheck, preemptions_max: u32) -> Summary {
    let explorer = Explorer {
        options: Options::default(),
        picker: Picker::swarm,
        threads: 1,
        build: move |sim: &Sim| world(sim, recheck),
    };
    explorer.run_all(preemptions_max, 1_000_000)
}

#[test]
fn no_entry_outlives_an_invalidation_with_three_preemptions() {
    let summary = search(Recheck::Done, 3);
    println!("{summary}");
    assert!(summary.failure.is_none(), "{summary}");
    assert!(summary.lock_cycles.is_empty(), "{summary}");
    assert!(summary.worlds > 1000);
}

#[test]
fn a_forgotten_recheck_is_found_with_one_preemption() {
    let summary = search(Recheck::Forgotten, 1);
    println!("{summary}");
    let (_, trouble) = summary.failure.expect("the entry of a freed frame is seen");
    assert!(trouble.failure.text.contains("which is free"));
    assert!(trouble.tape.interesting() <= 2, "{}", trouble.tape);
}
