//! The driver's way to its device, with switch points: units see what comes by it at once, and take
//! no lock for it. Copies fail where there is [chaos](super::chaos).

use std::sync::Arc;

use gpusvm::error::Failed;
use gpusvm_abi::bus::{BusError, CopyKind, CopyPiece, DevicePort, TlbTimeout};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use gpusvm_model::sched::{Kind, ModelEnv};

use crate::explore::chaos::Site;
use crate::explore::space::Between;

/// The port of a device, whose copies fail at times.
pub(super) struct Port {
    device: Arc<dyn DevicePort>,
    between: Arc<Between>,
}

impl Port {
    pub(super) const fn new(device: Arc<dyn DevicePort>, between: Arc<Between>) -> Self {
        Self { device, between }
    }
}

impl DevicePort for Port {
    fn vram_size(&self) -> u64 {
        self.device.vram_size()
    }

    fn gt_count(&self) -> u16 {
        self.device.gt_count()
    }

    fn write_entries(&self, offset: u64, entries: &[u64]) {
        ModelEnv.point(Kind::Access);
        self.device.write_entries(offset, entries);
    }

    fn read_entry(&self, offset: u64) -> u64 {
        self.device.read_entry(offset)
    }

    fn set_root(&self, asid: u32, root: Option<u64>) {
        ModelEnv.point(Kind::Access);
        self.device.set_root(asid, root);
    }

    fn invalidate_tlb(&self, asid: u32, start: u64, len: u64) -> u32 {
        self.device.invalidate_tlb(asid, start, len)
    }

    fn wait_tlb(&self, seqno: u32) -> Result<(), TlbTimeout> {
        ModelEnv.point(Kind::Tlb);
        self.device.wait_tlb(seqno)
    }

    /// What comes before the piece that fails is copied.
    fn copy(&self, pieces: &[CopyPiece]) -> Result<(), BusError> {
        let chaos = &self.between.chaos;
        chaos.must_be_outside("a copy");
        if !chaos.fails(Site::Copy) {
            return self.device.copy(pieces);
        }
        let count = u32::try_from(pieces.len()).unwrap_or(1);
        let (done, rest) = pieces.split_at(ModelEnv.choose(count) as usize);
        self.device.copy(done)?;
        let mut kinds = rest.iter().map(|piece| &piece.kind);
        if kinds.any(|kind| !matches!(kind, CopyKind::FromBus(_))) {
            let _failed = chaos.excuse(Failed::Copy);
        }
        Err(BusError { address: 0 })
    }

    fn adopt(&self, vram: u64, len: u64) -> Option<u64> {
        self.device.adopt(vram, len)
    }

    fn surrender(&self, vram: u64, len: u64) -> Option<u64> {
        self.device.surrender(vram, len)
    }

    fn pop_fault(&self) -> Option<FaultRecord> {
        self.device.pop_fault()
    }

    fn ack_fault(&self, record: &FaultRecord, response: FaultResponse) {
        self.device.ack_fault(record, response);
    }
}
