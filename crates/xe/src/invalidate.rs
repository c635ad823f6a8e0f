//! Host memory changes: entries go away (`svm-design.md` section 5.6).
//!
//! The framework calls [`zap`](Bindings::zap) for every range in the span and then
//! [`flush`](Bindings::flush) once. Each bound range remembers where its leaf entries stand, so a
//! zap walks no tables. **In here: no allocation, no host call, no lock.**

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use gpusvm::NotifierHeld;
use gpusvm::addr::HostSpan;
use gpusvm::event::Event;
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::{Platform, Seams};
use gpusvm::svm::{Bindings, Zapped};
use gpusvm::table::{self, LeafSlot};
use gpusvm_abi::bus::DevicePort;

use crate::device::Device;
use crate::store::VramTables;
use crate::vm::user_space;

/// How one range is bound.
#[derive(Debug, Default)]
pub struct Bound {
    /// Where its leaf entries stand, valid or zapped; empty before the first binding
    /// (`tile_present`).
    pub(crate) slots: Vec<LeafSlot>,
    /// The entries are valid (`tile_present & !tile_invalidated`).
    pub(crate) valid: bool,
    /// The entries allow atomics, when they are valid.
    pub(crate) atomic: bool,
}

/// What an invalidation needs of a VM.
pub struct XeBindings<P: Platform> {
    seams: Seams<P>,
    port: Arc<dyn DevicePort>,
    tables: Arc<VramTables<P::Env>>,
    asid: u32,
}

impl<P: Platform> fmt::Debug for XeBindings<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XeBindings({})", self.asid)
    }
}

impl<P: Platform> XeBindings<P> {
    pub(crate) fn new(device: &Device<P>, asid: u32) -> Self {
        Self {
            seams: device.seams.clone(),
            port: Arc::clone(&device.port),
            tables: Arc::clone(&device.tables),
            asid,
        }
    }

    /// Flushes the whole address space.
    pub(crate) fn flush_all(&self) {
        self.flush_span(user_space());
    }

    fn flush_span(&self, span: HostSpan) {
        let seqno = self
            .port
            .invalidate_tlb(self.asid, span.start().get(), span.bytes());
        let done = self.port.wait_tlb(seqno);
        for gt in 0..self.port.gt_count() {
            self.seams.emit(&Event::TlbInvalidate { gt });
            if done.is_err() {
                self.seams.emit(&Event::TlbTimeout { gt });
            }
        }
    }
}

impl<P: Platform> Bindings for XeBindings<P> {
    type Binding = Bound;

    fn zap(&self, binding: &mut Bound, held: &NotifierHeld<'_>) -> Zapped {
        if !core::mem::replace(&mut binding.valid, false) {
            return Zapped::Nothing;
        }
        table::zap(&binding.slots, &*self.tables, held);
        Zapped::Entries
    }

    fn flush(&self, span: HostSpan, _held: &NotifierHeld<'_>) {
        self.flush_span(span);
    }

    fn zapped(&self, span: HostSpan, started: Ns) {
        let took = self.seams.env.now().since(started);
        for gt in 0..self.port.gt_count() {
            self.seams.emit(&Event::Zapped { gt, span, took });
        }
    }
}
