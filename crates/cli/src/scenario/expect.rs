//! What must be true: every `expect` of the format.

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm::seam::mm::{AddressSpace, PagemapId, Placement};
use gpusvm_softgpu::Translation;
use gpusvm_xe::stats::Counter;

use crate::scenario::host::Host;
use crate::scenario::play::{Play, Trouble, locked};
use crate::scenario::text::{Expect, Span};
use crate::scenario::words::{Compare, Entries};

impl<H: Host> Play<H> {
    /// Looks whether something is as expected.
    pub(super) fn expect(&self, expect: &Expect) -> Result<(), String> {
        match expect {
            Expect::Range(gpu, span, size) => self.expect_range(*gpu, span, *size),
            Expect::Ranges(gpu, wanted) => {
                let found = self.of_vm(*gpu, |vm| vm.svm().range_count())?;
                compare("ranges", Compare::Equal, count(found), *wanted)
            }
            Expect::Notifiers(gpu, wanted) => {
                let found = self.of_vm(*gpu, |vm| vm.svm().notifier_count())?;
                compare("notifiers", Compare::Equal, count(found), *wanted)
            }
            Expect::Vram(gpu, how, wanted) => {
                let node = self.node(*gpu).map_err(said)?;
                let used = || {
                    let used = node.device.pagemap().vram().used();
                    used.saturating_sub(node.device.table_bytes())
                };
                let rule = |used: &u64| compare("bytes of device memory", *how, *used, *wanted);
                rule(&self.host.settle(used, |used| rule(used).is_ok()))
            }
            Expect::Tables(gpu, how, wanted) => {
                let node = self.node(*gpu).map_err(said)?;
                let tables = self.host.drive(|| node.device.table_bytes() / PAGE);
                compare("tables", *how, tables, *wanted)
            }
            Expect::Placed(span, device) => self.expect_placed(span, *device),
            Expect::Entries {
                gpu,
                span,
                entries,
                block,
            } => self.expect_entries(*gpu, span, *entries, *block),
            Expect::Count(counter, how, wanted) => {
                let name = counter.name();
                compare(name, *how, self.counted(*counter), *wanted)
            }
            Expect::Collected(wanted) => {
                let found = self.host.told().1.collected();
                compare("collected ranges", Compare::Equal, found, *wanted)
            }
            Expect::Flushed(span) => self.expect_flushed(span),
            Expect::Kept(span) => self.host.kept(self.find(span).map_err(said)?),
            Expect::Took(how, wanted) => {
                let since = locked(&self.since).time;
                let took = self.host.now().since(since);
                compare("nanoseconds", *how, took.0, wanted.0)
            }
        }
    }

    fn of_vm<R: Send>(
        &self,
        gpu: usize,
        look: impl FnOnce(&gpusvm_xe::vm::Vm<H::Platform>) -> R + Send,
    ) -> Result<R, String> {
        let node = self.node(gpu).map_err(said)?;
        Ok(self.host.drive(|| look(node.vm)))
    }

    fn expect_range(&self, gpu: usize, span: &Span, wanted: Option<u64>) -> Result<(), String> {
        let at = self.find(span).map_err(said)?.start();
        let found = self.of_vm(gpu, |vm| vm.svm().range_at(at))?;
        let bytes = found.map(HostSpan::bytes);
        if bytes == wanted {
            return Ok(());
        }
        let named =
            |bytes: Option<u64>| bytes.map_or("none".to_owned(), |b| format!("{}K", b >> 10));
        Err(format!(
            "the range is {}, must be {}",
            named(bytes),
            named(wanted)
        ))
    }

    fn expect_placed(&self, span: &Span, device: Option<usize>) -> Result<(), String> {
        let span = self.find(span).map_err(said)?;
        let wanted = match device {
            Some(gpu) => {
                let node = self.node(gpu).map_err(said)?;
                Placement::Device(node.device.pagemap().id())
            }
            None => Placement::System,
        };
        for n in 0..span.pages().get() {
            let page = HostSpan::at(span.start().plus(n * PAGE), PAGE);
            let found = self.host.drive(|| self.host.space().placement(page));
            if found != wanted {
                return Err(format!(
                    "page {n} of the span is in {}, must be in {}",
                    named_place(found),
                    named_place(wanted)
                ));
            }
        }
        Ok(())
    }

    fn expect_entries(
        &self,
        gpu: usize,
        span: &Span,
        wanted: Entries,
        block: Option<u64>,
    ) -> Result<(), String> {
        let span = self.find(span).map_err(said)?;
        let node = self.node(gpu).map_err(said)?;
        for n in 0..span.pages().get() {
            let at = span.start().plus(n * PAGE).get();
            let found = node.gpu.translation(node.vm.asid(), at);
            let size = found.map(block_of);
            let right = allows(found, wanted) && (block.is_none() || block == size);
            if !right {
                return Err(format!(
                    "the entry of page {n} of the span is {found:x?}, must be {wanted:?} {block:x?}"
                ));
            }
        }
        Ok(())
    }

    fn expect_flushed(&self, span: &Span) -> Result<(), String> {
        let wanted = self.find(span).map_err(said)?;
        match self.host.told().1.flushed() {
            Some(flushed) if flushed == wanted => Ok(()),
            Some(flushed) => Err(format!("{flushed} was flushed, must be {wanted}")),
            None => Err("nothing was flushed".to_owned()),
        }
    }

    /// What a counter has counted since the last mark.
    fn counted(&self, counter: Counter) -> u64 {
        let now = self.host.told().0.total(counter);
        let index = Counter::ALL.iter().position(|other| *other == counter);
        let since = locked(&self.since);
        now - index
            .and_then(|index| since.counts.get(index))
            .copied()
            .unwrap_or(0)
    }
}

fn said(trouble: Trouble) -> String {
    match trouble {
        Trouble::Refused(what) | Trouble::Wrong(what) => what,
    }
}

fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn compare(what: &str, how: Compare, found: u64, wanted: u64) -> Result<(), String> {
    let (right, rule) = match how {
        Compare::Equal => (found == wanted, ""),
        Compare::AtLeast => (found >= wanted, "at least "),
        Compare::AtMost => (found <= wanted, "at most "),
    };
    if right {
        Ok(())
    } else {
        Err(format!("{found} {what}, must be {rule}{wanted}"))
    }
}

fn named_place(place: Placement) -> String {
    match place {
        Placement::System => "host memory".to_owned(),
        Placement::Device(PagemapId(id)) => format!("the memory of gpu{}", id - 1),
        Placement::Mixed => "several places".to_owned(),
    }
}

const fn block_of(found: Translation) -> u64 {
    match found {
        Translation::Vram { block, .. } | Translation::Bus { block, .. } => block,
    }
}

fn allows(found: Option<Translation>, wanted: Entries) -> bool {
    let rights = found.map(|found| match found {
        Translation::Vram { write, atomic, .. } | Translation::Bus { write, atomic, .. } => {
            (write, atomic)
        }
    });
    match wanted {
        Entries::None => rights.is_none(),
        Entries::Valid => rights.is_some(),
        Entries::Read => rights.is_some_and(|(write, _)| !write),
        Entries::Write => rights.is_some_and(|(write, _)| write),
        Entries::Atomic => rights == Some((true, true)),
        Entries::Plain => rights == Some((true, false)),
    }
}
