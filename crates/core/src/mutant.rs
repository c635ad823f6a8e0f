//! Known bugs, to be re-introduced one at a time: the exam of whoever claims to find them.
//!
//! A test world makes its environment answer yes to one of them
//! ([`Environment::mutant`](crate::seam::env::Environment::mutant)). Everywhere else the answer is a
//! constant no, and the compiler removes what asks.

macro_rules! mutants {
    (
        worlds { $($(#[$doc:meta])* $id:ident = $name:literal: $what:literal,)* }
        calls { $($call_id:ident = $call_name:literal: $call_what:literal,)* }
    ) => {
        /// One bug: most are from the history of drivers and of the mm, the others break a rule that
        /// this framework states.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Mutant {
            $(#[doc = $what] $id,)*
            $(#[doc = $call_what] $call_id,)*
        }

        impl Mutant {
            /// Those that worlds under a scheduler show.
            pub const ALL: &[Self] = &[$(Self::$id,)*];

            /// Those that a comparison of single calls with Linux shows.
            pub const CALLS: &[Self] = &[$(Self::$call_id,)*];

            /// Name, as the command line has it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* $(Self::$call_id => $call_name,)* }
            }

            /// What goes wrong, in a sentence.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self { $(Self::$id => $what,)* $(Self::$call_id => $call_what,)* }
            }
        }
    };
}

mutants! {
    worlds {
        // The notifier protocol.
        RecheckDropped = "recheck-dropped": "A binding is committed without asking whether the sequence has moved.",
        SeqTakenLate = "seq-taken-late": "The sequence is taken after the pages were looked up.",
        SeqNotSet = "seq-not-set": "An invalidation that finds nothing bound takes no note of its sequence.",
        ReadBeginDoesNotWait = "read-begin-does-not-wait": "A reader does not wait for the invalidation that runs.",
        ZapAfterFlush = "zap-after-flush": "The TLBs are flushed before the entries are zapped.",
        FlushSpanOverwritten = "flush-span-overwritten": "The TLB flush covers the last zapped range instead of all.",
        FlushSkipped = "flush-skipped": "Entries are zapped and the TLBs are left alone.",
        ProtectUnflushed = "protect-unflushed": "An invalidation that only takes rights away leaves the TLBs alone.",
        DeviceRightsKept = "device-rights-kept": "An invalidation that only takes rights away leaves entries for device memory as they are.",
        CommitWithoutGuard = "commit-without-guard": "Entries are written after the notifier lock was let go.",
        // Ranges and their collector.
        CollectorSkipped = "collector-skipped": "A fault looks ranges up before the dead ones were collected.",
        CloseKeepsGarbage = "close-keeps-garbage": "A VM that closes forgets the ranges that wait for the collector.",
        DeviceMemoryShortcut = "device-memory-shortcut": "A range in device memory passes for bound whether it is or not.",
        AckedAfterFailure = "acked-after-failure": "A fault whose pages could not be had is answered with success.",
        RemovedUnflushed = "removed-unflushed": "A range that is removed while it is bound leaves its translations in the TLBs.",
        ReadOnlyAreaStored = "read-only-area-stored": "A store is served in an area that a device may only read.",
        SubscriptionKept = "subscription-kept": "The last range of a window goes, and the window stays watched.",
        ClosedVmKept = "closed-vm-kept": "A VM that is closed keeps its id.",
        WritableAnyway = "writable-anyway": "Entries allow stores whatever their pages were gathered for.",
        CloseKeepsTlbs = "close-keeps-tlbs": "A VM that closes leaves its translations in the TLBs.",
        CloseKeepsRoot = "close-keeps-root": "A VM that closes leaves its tables where the device finds them.",
        // Migration and device memory.
        SharedDevicePages = "shared-device-pages": "A device writes to pages in its memory that its process shares with a child.",
        HolesKeepContent = "holes-keep-content": "Device memory for pages without content is not cleared.",
        FinalizeBeforeCopyOut = "finalize-before-copy-out": "Entries point to device memory before the content is there.",
        FinalizeBeforeCopyHome = "finalize-before-copy-home": "Pages are given back before the copy from the device has ended.",
        HomeCountedTwice = "home-counted-twice": "Pages that come home are told as copied and as adopted.",
        FreedTwice = "freed-twice": "Device memory is freed, and a moment later once more.",
        AloneNotEvictable = "alone-not-evictable": "After a migration of which only some pages moved, those cannot be evicted.",
        PlanNotAborted = "plan-not-aborted": "A binding that comes too late keeps the tables that were made for it.",
        FreeWakesNobody = "free-wakes-nobody": "Whoever waits for device memory is not told that some is free.",
        // Atomics.
        ExclusiveNotRechecked = "exclusive-not-rechecked": "An exclusive page is bound without asking whether the CPU has taken it back.",
        ExclusiveEndedQuietly = "exclusive-ended-quietly": "A CPU takes an exclusive page back and tells no notifier.",
        ExclusiveEventOfOthers = "exclusive-event-of-others": "A VM takes the exclusive events of others for its own.",
        AtomicsOnPlainPages = "atomics-on-plain-pages": "Entries allow atomics on host memory that the CPU has as well.",
        // The device.
        TlbKeepsEntries = "tlb-keeps-entries": "A unit acknowledges a TLB invalidation and keeps its entries.",
        WalkOutsideGate = "walk-outside-gate": "A unit fills its TLB from a walk that an invalidation has overtaken.",
        FaultWakesNobody = "fault-wakes-nobody": "The unit whose fault was answered is not woken.",
        // The host.
        NotBracketed = "not-bracketed": "munmap tells no notifier.",
        ForkNotBracketed = "fork-not-bracketed": "fork tells no notifier, and devices go on writing to shared pages.",
        NewerPageOverwritten = "newer-page-overwritten": "A page that came while its device copy was away is overwritten by it.",
        GuardFilled = "guard-filled": "A guard takes part in a migration as if it were a hole.",
        PinIgnored = "pin-ignored": "A pinned page migrates.",
        DirtyForgotten = "dirty-forgotten": "Pages that a device may write do not count as written.",
        UndoSkipped = "undo-skipped": "A migration that is given up does not put its pages back.",
        PinnedReclaimed = "pinned-reclaimed": "Reclaim takes a page away that was pinned meanwhile.",
        LateBlockDropped = "late-block-dropped": "Dropping a part of a large page that came in meanwhile drops all of it.",
        ReleaseForgotten = "release-forgotten": "The last page of an allocation goes, and the host keeps its reference.",
        ForkDropsReference = "fork-drops-reference": "fork copies a device entry and counts no reference for it.",
    }
    calls {
        GuardsSwept = "guards-swept": "MADV_DONTNEED takes guards away.",
        AdviceUnchecked = "advice-unchecked": "An advice that does not exist is taken for one.",
        BatchOverrun = "batch-overrun": "process_madvise goes on behind a span that failed.",
        ForkStaysWritable = "fork-stays-writable": "fork leaves the parent the right to write to shared pages.",
        WipeForgotten = "wipe-forgotten": "A child gets pages that it was to find empty.",
        LockSurvivesMove = "lock-survives-move": "What a move leaves behind stays locked.",
        ShrinkKeepsTail = "shrink-keeps-tail": "mremap answers a smaller size and unmaps nothing.",
        HoleKeepsFile = "hole-keeps-file": "MADV_REMOVE empties page tables and leaves the file as it was.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_distinct_and_sentences_end() {
        let all = || Mutant::ALL.iter().chain(Mutant::CALLS);
        let names: BTreeSet<_> = all().map(|mutant| mutant.name()).collect();
        assert_eq!(names.len(), all().count());
        assert!(all().all(|mutant| mutant.what().ends_with('.')));
    }
}
