//! [`Node`]: one device of a machine.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gpusvm::seam::Seams;
use gpusvm::seam::mm::PagemapId;
use gpusvm_abi::bus::{DevicePort, FaultHandler, Park, SystemBus, VramStore};
use gpusvm_live::{LiveBus, thread};
use gpusvm_softgpu::{FaultService, GpuConfig, Planted, SoftGpu};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, VmConfig, user_space};

use super::{LivePlatform, MachineConfig, MachineError, ServiceMode};

/// Faults that wait in the ring.
const FAULT_RING: usize = 64;
/// Translations that one unit caches per page size.
const TLB_ENTRIES: usize = 512;
/// Time within which a unit must acknowledge an invalidation.
const TLB_TIMEOUT_NS: u64 = 10_000_000_000;

/// The software GPU with the live host's locks.
type Gpu = SoftGpu<gpusvm_live::RawFutexMutex>;

/// A software GPU, its driver, and the VMs on it.
pub struct Node {
    gpu: Arc<Gpu>,
    device: Arc<Device<LivePlatform>>,
    /// At least one.
    vms: Vec<Arc<Vm<LivePlatform>>>,
    service: Option<thread::RuntimeThread>,
    stopping: Arc<AtomicBool>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("gpu", &self.gpu)
            .field("vms", &self.vms)
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Builds device number `index` of a machine, with VMs that mirror the whole process.
    pub(super) fn new(
        config: &MachineConfig,
        seams: Seams<LivePlatform>,
        index: u16,
    ) -> Result<Self, MachineError> {
        let vram = seams
            .space
            .create_vram(config.vram, config.migration)
            .map_err(MachineError::Host)?;
        let gpu = SoftGpu::new(
            gpu_config(config),
            vram as Arc<dyn VramStore>,
            Arc::new(LiveBus) as Arc<dyn SystemBus>,
            Arc::clone(&seams.env) as Arc<dyn Park>,
        )
        .map_err(MachineError::Device)?;
        let port = Arc::clone(&gpu) as Arc<dyn DevicePort>;
        let copy = Arc::new(XeCopy::new(Arc::clone(&port)));
        let device = Device::new(seams, PagemapId(u32::from(index) + 1), port, copy);
        let first = 1 + u32::from(index) * u32::from(config.vms);
        let vms = (first..first + u32::from(config.vms)).map(|asid| mirror(&device, asid, config));
        let mut node = Self {
            vms: vms.collect::<Result<_, _>>()?,
            gpu,
            device,
            service: None,
            stopping: Arc::new(AtomicBool::new(false)),
        };
        node.start_service(config.service)?;
        Ok(node)
    }

    fn start_service(&mut self, mode: ServiceMode) -> Result<(), MachineError> {
        let handler = Arc::clone(&self.device);
        if mode == ServiceMode::Inline {
            self.gpu.set_fault_service(FaultService::Inline(handler));
            return Ok(());
        }
        self.gpu.set_fault_service(FaultService::Queue);
        let (gpu, stopping) = (Arc::clone(&self.gpu), Arc::clone(&self.stopping));
        let serve = move || {
            while !stopping.load(Ordering::Acquire) {
                gpu.wait_fault();
                while let Some(record) = gpu.pop_fault() {
                    let answer = handler.handle(&record);
                    gpu.ack_fault(&record, answer);
                }
            }
        };
        let thread = thread::spawn("gpusvm-service", serve)
            .map_err(|error| MachineError::Host(error.into()))?;
        self.service = Some(thread);
        Ok(())
    }

    /// Ends the thread that serves faults, where there is one.
    pub(super) fn stop_service(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.gpu.kick_service();
        if let Some(service) = self.service.take() {
            service.join();
        }
    }

    /// Parts device and driver, which refer to each other.
    pub(super) fn part(&self) {
        self.gpu.set_fault_service(FaultService::Queue);
    }

    /// The device.
    pub(crate) const fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Address-space id of the VM with this number.
    pub(super) fn asid(&self, vm: usize) -> Option<u32> {
        self.vms.get(vm).map(|vm| vm.asid())
    }

    /// A reference to the driver that can be kept.
    pub(super) fn driver(&self) -> Arc<Device<LivePlatform>> {
        Arc::clone(&self.device)
    }

    /// The device's driver.
    #[must_use]
    pub const fn device(&self) -> &Arc<Device<LivePlatform>> {
        &self.device
    }

    /// The VMs, at least one.
    #[must_use]
    pub fn vms(&self) -> &[Arc<Vm<LivePlatform>>] {
        &self.vms
    }
}

/// A VM that mirrors the whole process.
fn mirror(
    device: &Arc<Device<LivePlatform>>,
    asid: u32,
    config: &MachineConfig,
) -> Result<Arc<Vm<LivePlatform>>, MachineError> {
    let config = VmConfig {
        window_bytes: config.window,
        atomics: config.atomics.policy(),
    };
    let vm = Vm::with(device, asid, config).map_err(MachineError::Driver)?;
    let area = MirrorArea {
        span: user_space(),
        rights: Rights::ReadWrite,
    };
    vm.mirror(area).map_err(MachineError::Driver)?;
    Ok(vm)
}

fn gpu_config(config: &MachineConfig) -> GpuConfig {
    GpuConfig {
        gts: 1,
        units_per_gt: config.units,
        tlb_entries: TLB_ENTRIES,
        fault_ring: FAULT_RING,
        asids: u32::from(config.devices) * u32::from(config.vms) + 1,
        tlb_timeout_ns: TLB_TIMEOUT_NS,
        smem_atomics: config.atomics.smem(),
        planted: config.plant_stale_tlb.then_some(Planted::KeepTlb),
    }
}
