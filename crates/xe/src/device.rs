//! [`Device`]: one device, its memory, and the VMs that run on it.

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::sync::Arc;
use core::fmt;

use gpusvm::pagemap::Pagemap;
use gpusvm::seam::env::{Mutex, Work};
use gpusvm::seam::mm::PagemapId;
use gpusvm::seam::{Platform, Seams};
use gpusvm::vram::Manager;
use gpusvm_abi::bus::{DevicePort, FaultHandler};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};

use crate::store::VramTables;
use crate::vm::Vm;
use crate::{collect, fault};

/// One device.
pub struct Device<P: Platform> {
    pub(crate) seams: Seams<P>,
    pub(crate) port: Arc<dyn DevicePort>,
    pub(crate) pagemap: Arc<Pagemap<P>>,
    pub(crate) tables: Arc<VramTables<P::Env>>,
    /// VMs by address-space id. Leaf lock: a look-up clones the reference and lets go.
    vms: Mutex<P::Env, BTreeMap<u32, Arc<Vm<P>>>>,
}

impl<P: Platform> fmt::Debug for Device<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("pagemap", &self.pagemap)
            .finish_non_exhaustive()
    }
}

impl<P: Platform> Device<P> {
    /// Takes over the device behind `port`, whose engine is `copy`.
    #[must_use]
    pub fn new(
        seams: Seams<P>,
        id: PagemapId,
        port: Arc<dyn DevicePort>,
        copy: Arc<P::Copy>,
    ) -> Arc<Self> {
        let vram = Arc::new(Manager::new(Arc::clone(&seams.env), port.vram_size()));
        let pagemap = Pagemap::new(seams.clone(), id, copy, Arc::clone(&vram));
        let tables = Arc::new(VramTables::new(Arc::clone(&port), vram));
        let vms = Mutex::<P::Env, _>::new(BTreeMap::new());
        Arc::new(Self {
            seams,
            port,
            pagemap,
            tables,
            vms,
        })
    }

    /// The device's memory as a place for pages.
    #[must_use]
    pub const fn pagemap(&self) -> &Arc<Pagemap<P>> {
        &self.pagemap
    }

    /// Bytes of device memory that page tables take.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        self.tables.bytes()
    }

    /// Does the deferred `work` that concerns this device. Runs in the environment's worker.
    pub fn work(&self, work: Work) {
        let Work::CollectGarbage { vm } = work;
        if let Some(vm) = self.vm(vm) {
            collect::run_deferred(&vm);
        }
    }

    /// The VM with this address-space id.
    pub(crate) fn vm(&self, asid: u32) -> Option<Arc<Vm<P>>> {
        self.vms.lock().get(&asid).cloned()
    }

    /// Enters a VM, unless its id is in use; whether it did.
    pub(crate) fn add_vm(&self, vm: &Arc<Vm<P>>) -> bool {
        match self.vms.lock().entry(vm.asid()) {
            Entry::Vacant(place) => {
                place.insert(Arc::clone(vm));
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    pub(crate) fn remove_vm(&self, asid: u32) {
        let removed = self.vms.lock().remove(&asid);
        drop(removed);
    }
}

impl<P: Platform> FaultHandler for Device<P> {
    fn handle(&self, record: &FaultRecord) -> FaultResponse {
        fault::handle(self, record)
    }
}
