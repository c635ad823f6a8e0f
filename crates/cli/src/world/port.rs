//! The driver's way to its device, with switch points: units see what comes by it at once, and take
//! no lock for it.

use std::sync::Arc;

use gpusvm_abi::bus::{BusError, CopyPiece, DevicePort, FaultHandler, TlbTimeout};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use gpusvm_model::sched::{Kind, ModelEnv};

/// The port of a device.
pub(crate) struct Port(pub(crate) Arc<dyn DevicePort>);

impl DevicePort for Port {
    fn vram_size(&self) -> u64 {
        self.0.vram_size()
    }

    fn gt_count(&self) -> u16 {
        self.0.gt_count()
    }

    fn write_entries(&self, offset: u64, entries: &[u64]) {
        ModelEnv.point(Kind::Access);
        self.0.write_entries(offset, entries);
    }

    fn read_entry(&self, offset: u64) -> u64 {
        self.0.read_entry(offset)
    }

    fn set_root(&self, asid: u32, root: Option<u64>) {
        ModelEnv.point(Kind::Access);
        self.0.set_root(asid, root);
    }

    fn invalidate_tlb(&self, asid: u32, start: u64, len: u64) -> u32 {
        self.0.invalidate_tlb(asid, start, len)
    }

    fn wait_tlb(&self, seqno: u32) -> Result<(), TlbTimeout> {
        ModelEnv.point(Kind::Tlb);
        self.0.wait_tlb(seqno)
    }

    fn copy(&self, pieces: &[CopyPiece]) -> Result<(), BusError> {
        self.0.copy(pieces)
    }

    fn adopt(&self, vram: u64, len: u64) -> Option<u64> {
        self.0.adopt(vram, len)
    }

    fn surrender(&self, vram: u64, len: u64) -> Option<u64> {
        self.0.surrender(vram, len)
    }

    fn pop_fault(&self) -> Option<FaultRecord> {
        self.0.pop_fault()
    }

    fn ack_fault(&self, record: &FaultRecord, response: FaultResponse) {
        self.0.ack_fault(record, response);
    }
}

/// Serves faults on the unit that raised them. Much may happen before the unit tries again.
pub(crate) struct Inline(pub(crate) Arc<dyn FaultHandler>);

impl FaultHandler for Inline {
    fn handle(&self, record: &FaultRecord) -> FaultResponse {
        let answer = self.0.handle(record);
        ModelEnv.point(Kind::Access);
        answer
    }
}
