//! One device of a world, with the driver that serves it.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::mutant::Mutant;
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::PagemapId;
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::{DevicePort, FaultHandler, Park, SystemBus, VramStore};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use gpusvm_model::kernel::Kernel;
use gpusvm_model::sched::{Kind, ModelEnv, ModelMutex, Rank, Sim};
use gpusvm_softgpu::{FaultService, GpuConfig, Planted, SoftGpu};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, user_space};

use crate::explore::chaos::Site;
use crate::explore::doing::Doing;
use crate::explore::plan::{Plan, Service};
use crate::explore::port::Port;
use crate::explore::sink::Told;
use crate::explore::space::{Between, Space};
use crate::explore::vram::{ModelVram, Written};

/// The model host, the Xe driver and its copy engine, as one platform.
#[derive(Debug)]
pub(super) struct ModelPlatform;

impl Platform for ModelPlatform {
    type Env = ModelEnv;
    type Space = Space;
    type Copy = XeCopy;
    type Sink = Told;
}

/// What the devices of a world share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) kernel: Arc<Kernel<ModelEnv>>,
    pub(super) seams: Seams<ModelPlatform>,
    pub(super) between: Arc<Between>,
    pub(super) bus: Arc<dyn SystemBus>,
}

/// One device with its driver and the VM on it.
pub(super) struct Node {
    pub(super) gpu: Arc<SoftGpu<ModelMutex>>,
    pub(super) device: Arc<Device<ModelPlatform>>,
    pub(super) vm: Arc<Vm<ModelPlatform>>,
    pub(super) handler: Arc<Handler>,
    /// What has been written to the device's memory.
    pub(super) written: Arc<Written>,
}

/// Who serves the faults of a device. Much may happen before the unit tries again.
pub(super) struct Handler {
    device: Arc<Device<ModelPlatform>>,
    shared: Shared,
}

impl FaultHandler for Handler {
    fn handle(&self, record: &FaultRecord) -> FaultResponse {
        let Between { watch, chaos } = &*self.shared.between;
        let page = HostSpan::at(HostVa::new(record.address), 1);
        let _ends = watch.begin(Doing::Serve, page);
        chaos.delays(Site::Serve);
        chaos.starve(&self.shared.kernel);
        let answer = self.device.handle(record);
        ModelEnv.point(Kind::Access);
        answer
    }
}

impl Node {
    /// The `n`-th device of a world, and its driver.
    pub(super) fn new(plan: &Plan, n: u16, shared: &Shared) -> Self {
        let written = Arc::<Written>::default();
        let vram = ModelVram::new(
            plan.vram,
            Arc::clone(&shared.bus),
            Arc::clone(&written),
            Arc::clone(shared.kernel.generation()),
        );
        let gpu = SoftGpu::new(
            config(plan),
            Arc::new(vram) as Arc<dyn VramStore>,
            Arc::clone(&shared.bus),
            Arc::new(ModelEnv) as Arc<dyn Park>,
        );
        let gpu = gpu.expect("a plan's device has units, a ring and address spaces");
        let port = Port::new(
            Arc::clone(&gpu) as Arc<dyn DevicePort>,
            Arc::clone(&shared.between),
        );
        let port = Arc::new(port) as Arc<dyn DevicePort>;
        let copy = Arc::new(XeCopy::new(Arc::clone(&port)));
        let id = PagemapId(u32::from(n) + 1);
        let device = Device::new(shared.seams.clone(), id, port, copy);
        let vm = Vm::new(&device, u32::from(n) + 1).expect("a fresh device has room for a table");
        let area = MirrorArea {
            span: user_space(),
            rights: Rights::ReadWrite,
        };
        vm.mirror(area).expect("a fresh VM has no ranges");
        let handler = Arc::new(Handler {
            device: Arc::clone(&device),
            shared: shared.clone(),
        });
        gpu.set_fault_service(match plan.service {
            Service::Inline => FaultService::Inline(Arc::clone(&handler) as Arc<dyn FaultHandler>),
            Service::Queue => FaultService::Queue,
        });
        Self {
            gpu,
            device,
            vm,
            handler,
            written,
        }
    }

    /// Names the locks of the driver, in their order.
    pub(super) fn name_locks(&self, sim: &Sim) {
        sim.name_locks(&*self.vm, "vm", Rank::VM);
        sim.name_locks(&**self.vm.svm(), "notifier", Rank::NOTIFIER);
        sim.name_locks(&**self.device.pagemap().vram(), "vram", Rank::VRAM);
    }

    /// Parts device and driver, which refer to each other.
    pub(super) fn part(&self) {
        self.gpu.set_fault_service(FaultService::Queue);
    }
}

fn config(plan: &Plan) -> GpuConfig {
    let planted = [
        (Mutant::TlbKeepsEntries, Planted::KeepTlb),
        (Mutant::WalkOutsideGate, Planted::WalkOutsideGate),
        (Mutant::FaultWakesNobody, Planted::AnswerWakesNobody),
    ];
    let planted = planted
        .into_iter()
        .find(|(mutant, _)| ModelEnv.mutant(*mutant));
    GpuConfig {
        gts: 1,
        units_per_gt: 1,
        tlb_entries: 16,
        fault_ring: 2,
        asids: u32::from(plan.gpus) + 1,
        tlb_timeout_ns: 1_000_000,
        planted: planted.map(|(_, bug)| bug),
    }
}
