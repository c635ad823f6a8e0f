//! Page tables in device memory: each table is a pinned 4 KiB buffer object at the far end of
//! memory, away from the ranges (`svm-design.md` section 1.2).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::fmt;

use gpusvm::addr::{PAGE, VramAddr};
use gpusvm::error::{Failed, Interrupted};
use gpusvm::seam::env::{Environment, Mutex};
use gpusvm::seam::table::TableStore;
use gpusvm::vram::{Bo, BoRequest, From, Manager, Purpose};
use gpusvm_abi::bus::{CopyKind, CopyPiece, DevicePort};

/// The tables of one device.
pub struct VramTables<E: Environment> {
    port: Arc<dyn DevicePort>,
    vram: Arc<Manager<E>>,
    /// Leaf lock; the objects keep the tables' memory.
    tables: Mutex<E, BTreeMap<VramAddr, Arc<Bo<E>>>>,
}

impl<E: Environment> fmt::Debug for VramTables<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VramTables").finish_non_exhaustive()
    }
}

impl<E: Environment> VramTables<E> {
    /// Tables in the memory that `vram` manages, written through `port`.
    #[must_use]
    pub fn new(port: Arc<dyn DevicePort>, vram: Arc<Manager<E>>) -> Self {
        Self {
            port,
            vram,
            tables: Mutex::<E, _>::new(BTreeMap::new()),
        }
    }

    /// Bytes that the tables take.
    pub fn bytes(&self) -> u64 {
        self.tables.lock().keys().map(|_table| PAGE).sum()
    }
}

impl<E: Environment> TableStore for VramTables<E> {
    fn alloc_table(&self) -> Result<VramAddr, Interrupted> {
        let bo = self.vram.allocate(BoRequest {
            bytes: PAGE,
            from: From::Top,
            purpose: Purpose::Tables,
        })?;
        let at = bo.span().start();
        let clear = CopyPiece {
            kind: CopyKind::Zero,
            vram: at.get(),
            len: PAGE,
        };
        self.port
            .copy(&[clear])
            .map_err(|_no_memory| Failed::Copy)?;
        self.tables.lock().insert(at, bo);
        Ok(at)
    }

    fn free_table(&self, table: VramAddr) {
        let bo = self.tables.lock().remove(&table);
        debug_assert!(bo.is_some(), "table {table} freed twice");
    }

    fn write(&self, table: VramAddr, first: usize, entries: &[u64]) {
        let offset = u64::try_from(first).unwrap_or(u64::MAX).saturating_mul(8);
        self.port.write_entries(table.get() + offset, entries);
    }
}
