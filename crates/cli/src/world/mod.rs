//! What worlds on the model host are made of: a device with its driver and VM, device memory, what is
//! told, and the rules that hold between any two steps. [`explore`](crate::explore), scenarios and
//! [`run`](crate::run) build their worlds of it.

pub(crate) mod machine;
pub(crate) mod mapped;
pub(crate) mod oracle;
mod port;
pub(crate) mod sink;
pub(crate) mod vram;

use std::fmt;
use std::sync::Arc;

use gpusvm::seam::mm::PagemapId;
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::{DevicePort, Park, VramStore};
use gpusvm_model::kernel::ModelSpace;
use gpusvm_model::sched::{ModelEnv, ModelMutex};
use gpusvm_softgpu::{FaultService, GpuConfig, SoftGpu};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, user_space};

use crate::world::port::{Inline, Port};
use crate::world::sink::Sink;
use crate::world::vram::{ModelVram, Wires, Written};

/// The model host, the Xe driver and its copy engine, as one platform.
#[derive(Debug)]
pub(crate) struct ModelPlatform;

impl Platform for ModelPlatform {
    type Env = ModelEnv;
    type Space = ModelSpace<ModelEnv>;
    type Copy = XeCopy;
    type Sink = Sink;
}

/// What a device of a world is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeConfig {
    /// Pages of device memory.
    pub(crate) vram: usize,
    /// How much of each page there is.
    pub(crate) content: Content,
    /// The device.
    pub(crate) gpu: GpuConfig,
    /// Where faults are served.
    pub(crate) service: Service,
    /// Bytes of a notifier window.
    pub(crate) window: u64,
}

/// How much of each page of device memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The first [`WORDS`](vram::WORDS) words.
    FewWords,
    /// All of it.
    Whole,
}

impl Content {
    /// Device memory of so many pages.
    fn vram(self, pages: usize, wires: &Wires, written: &Arc<Written>) -> Arc<dyn VramStore> {
        let (wires, written) = (wires.clone(), Arc::clone(written));
        match self {
            Self::FewWords => Arc::new(ModelVram::<{ vram::WORDS }>::new(pages, wires, written)),
            Self::Whole => Arc::new(ModelVram::<{ vram::ALL_WORDS }>::new(pages, wires, written)),
        }
    }
}

/// Where device faults are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// By the unit that faulted.
    Inline,
    /// By an actor, through the fault ring.
    Queue,
}

/// One device with its driver and the VM on it, which mirrors the whole process.
pub(crate) struct Node {
    pub(crate) gpu: Arc<SoftGpu<ModelMutex>>,
    pub(crate) device: Arc<Device<ModelPlatform>>,
    pub(crate) vm: Arc<Vm<ModelPlatform>>,
    /// What has been written to the device's memory.
    pub(crate) written: Arc<Written>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("gpu", &self.gpu)
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Device `n` of a world.
    pub(crate) fn new(
        config: &NodeConfig,
        n: u16,
        seams: &Seams<ModelPlatform>,
        wires: &Wires,
    ) -> Self {
        let written = Arc::<Written>::default();
        let gpu = SoftGpu::new(
            config.gpu,
            config.content.vram(config.vram, wires, &written),
            Arc::clone(&wires.bus),
            Arc::new(ModelEnv) as Arc<dyn Park>,
        );
        let gpu = gpu.expect("a world's device has units, a ring and address spaces");
        let port = Arc::new(Port(Arc::<SoftGpu<ModelMutex>>::clone(&gpu))) as Arc<dyn DevicePort>;
        let copy = Arc::new(XeCopy::new(Arc::clone(&port)));
        let id = PagemapId(u32::from(n) + 1);
        let device = Device::new(seams.clone(), id, port, copy);
        let vm = Vm::with_windows(&device, u32::from(n) + 1, config.window);
        let vm = vm.expect("a fresh device has room for a table");
        let area = MirrorArea {
            span: user_space(),
            rights: Rights::ReadWrite,
        };
        vm.mirror(area).expect("a fresh VM has no ranges");
        let inline = Arc::new(Inline(Arc::<Device<ModelPlatform>>::clone(&device)));
        gpu.set_fault_service(match config.service {
            Service::Inline => FaultService::Inline(inline),
            Service::Queue => FaultService::Queue,
        });
        Self {
            gpu,
            device,
            vm,
            written,
        }
    }

    /// Parts device and driver, which refer to each other.
    pub(crate) fn part(&self) {
        self.gpu.set_fault_service(FaultService::Queue);
    }
}
