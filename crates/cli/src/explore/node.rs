//! One device of a world, with what stands between its driver and everything else.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::mutant::Mutant;
use gpusvm::seam::env::Environment;
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::FaultHandler;
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use gpusvm_model::kernel::Kernel;
use gpusvm_model::sched::{Kind, ModelEnv, Rank, Sim};
use gpusvm_softgpu::{GpuConfig, Planted, SmemAtomics};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::vm::NOTIFIER_BYTES;

use crate::explore::chaos::Site;
use crate::explore::doing::Doing;
use crate::explore::plan::Plan;
use crate::explore::port::Port;
use crate::explore::space::{Between, Space};
use crate::world::sink::Told;
use crate::world::vram::Wires;
use crate::world::{Content, NodeConfig};

/// The model host behind [`Space`], the Xe driver and its copy engine, as one platform.
#[derive(Debug)]
pub(super) struct WatchedPlatform;

impl Platform for WatchedPlatform {
    type Env = ModelEnv;
    type Space = Space;
    type Copy = XeCopy;
    type Sink = Told;
}

/// What the devices of a world share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) kernel: Arc<Kernel<ModelEnv>>,
    pub(super) seams: Seams<WatchedPlatform>,
    pub(super) between: Arc<Between>,
    pub(super) wires: Wires,
}

/// One device with its driver and the VM on it.
pub(super) type Node = crate::world::Node<WatchedPlatform>;

/// Who serves the faults of a device. Much may happen before the unit tries again.
pub(super) struct Handler {
    device: Arc<Device<WatchedPlatform>>,
    shared: Shared,
}

impl FaultHandler for Handler {
    fn handle(&self, record: &FaultRecord) -> FaultResponse {
        let Between { watch, chaos, .. } = &*self.shared.between;
        let page = HostSpan::at(HostVa::new(record.address), 1);
        let _ends = watch.begin(Doing::Serve, page);
        chaos.delays(Site::Serve);
        chaos.starve(&self.shared.kernel);
        let answer = self.device.handle(record);
        ModelEnv.point(Kind::Access);
        answer
    }
}

/// The `n`-th device of a world with its driver, and who serves its faults.
pub(super) fn make(plan: &Plan, n: u16, shared: &Shared) -> (Node, Arc<Handler>) {
    let config = config(plan);
    let port = |device| Arc::new(Port::new(device, Arc::clone(&shared.between))) as Arc<_>;
    let node = Node::behind(&config, n, &shared.seams, &shared.wires, port);
    let handler = Arc::new(Handler {
        device: Arc::clone(&node.device),
        shared: shared.clone(),
    });
    node.serve(config.service, Arc::<Handler>::clone(&handler));
    (node, handler)
}

/// Names the locks of a driver, in their order.
pub(super) fn name_locks(node: &Node, sim: &Sim) {
    sim.name_locks(&*node.vm, "vm", Rank::VM);
    sim.name_locks(&**node.vm.svm(), "notifier", Rank::NOTIFIER);
    sim.name_locks(&**node.device.pagemap().vram(), "vram", Rank::VRAM);
}

fn config(plan: &Plan) -> NodeConfig {
    let planted = [
        (Mutant::TlbKeepsEntries, Planted::KeepTlb),
        (Mutant::WalkOutsideGate, Planted::WalkOutsideGate),
        (Mutant::FaultWakesNobody, Planted::AnswerWakesNobody),
    ];
    let planted = planted
        .into_iter()
        .find(|(mutant, _)| ModelEnv.mutant(*mutant));
    let gpu = GpuConfig {
        gts: 1,
        units_per_gt: 1,
        tlb_entries: 16,
        fault_ring: 2,
        asids: u32::from(plan.gpus) + 1,
        tlb_timeout_ns: 1_000_000,
        smem_atomics: SmemAtomics::default(),
        planted: planted.map(|(_, bug)| bug),
    };
    NodeConfig {
        vram: plan.vram,
        content: Content::FewWords,
        gpu,
        service: plan.service,
        window: NOTIFIER_BYTES,
        atomics: plan.atomics,
        rights: plan.rights,
    }
}
