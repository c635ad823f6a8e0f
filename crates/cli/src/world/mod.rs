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
use gpusvm_abi::bus::{DevicePort, FaultHandler, Park, VramStore};
use gpusvm_model::kernel::ModelSpace;
use gpusvm_model::sched::{ModelEnv, ModelMutex};
use gpusvm_softgpu::{FaultService, GpuConfig, SoftGpu};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, VmConfig, user_space};

use crate::atomics::Atomics;
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
    /// Where the device does its atomics.
    pub(crate) atomics: Atomics,
    /// What the device may do to the process.
    pub(crate) rights: Rights,
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
pub(crate) struct Node<P: Platform = ModelPlatform> {
    pub(crate) gpu: Arc<SoftGpu<ModelMutex>>,
    pub(crate) device: Arc<Device<P>>,
    pub(crate) vm: Arc<Vm<P>>,
    /// What has been written to the device's memory.
    pub(crate) written: Arc<Written>,
}

impl<P: Platform> fmt::Debug for Node<P> {
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
        let node = Self::behind(config, n, seams, wires, |device| Arc::new(Port(device)));
        let inline = Inline(Arc::<Device<ModelPlatform>>::clone(&node.device));
        node.serve(config.service, Arc::new(inline));
        node
    }
}

impl<P: Platform<Env = ModelEnv, Copy = XeCopy>> Node<P> {
    /// The same, with the driver behind a port of the caller's, and faults still to be
    /// [served](Self::serve).
    pub(crate) fn behind(
        config: &NodeConfig,
        n: u16,
        seams: &Seams<P>,
        wires: &Wires,
        port: impl FnOnce(Arc<dyn DevicePort>) -> Arc<dyn DevicePort>,
    ) -> Self {
        let written = Arc::<Written>::default();
        let gpu = GpuConfig {
            smem_atomics: config.atomics.smem(),
            ..config.gpu
        };
        let gpu = SoftGpu::new(
            gpu,
            config.content.vram(config.vram, wires, &written),
            Arc::clone(&wires.units),
            Arc::new(ModelEnv) as Arc<dyn Park>,
        );
        let gpu = gpu.expect("a world's device has units, a ring and address spaces");
        let port = port(Arc::<SoftGpu<ModelMutex>>::clone(&gpu));
        let copy = Arc::new(XeCopy::new(Arc::clone(&port)));
        let id = PagemapId(u32::from(n) + 1);
        let device = Device::new(seams.clone(), id, port, copy);
        let vm_config = VmConfig {
            window_bytes: config.window,
            atomics: config.atomics.policy(),
        };
        let vm = Vm::with(&device, u32::from(n) + 1, vm_config);
        let vm = vm.expect("a fresh device has room for a table");
        let area = MirrorArea {
            span: user_space(),
            rights: config.rights,
        };
        vm.mirror(area).expect("a fresh VM has no ranges");
        Self {
            gpu,
            device,
            vm,
            written,
        }
    }

    /// Lets `handler` serve faults where units do that themselves.
    pub(crate) fn serve(&self, service: Service, handler: Arc<dyn FaultHandler>) {
        self.gpu.set_fault_service(match service {
            Service::Inline => FaultService::Inline(handler),
            Service::Queue => FaultService::Queue,
        });
    }

    /// Parts device and driver, which refer to each other.
    pub(crate) fn part(&self) {
        self.gpu.set_fault_service(FaultService::Queue);
    }
}

#[cfg(test)]
mod tests;
