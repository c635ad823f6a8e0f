//! What drivers on the model host do right that no scenario can ask for.

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::error::Failed;
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::env::Ns;
use gpusvm::seam::mm::{AddressSpace, Placement};
use gpusvm_model::kernel::Kernel;
use gpusvm_model::mm::Shape;
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::sched::{Options, Picker, Sim, run};
use gpusvm_softgpu::SmemAtomics;

use super::*;
use crate::machine::Folds;
use crate::world::sink::Told;

const AT: HostVa = HostVa::new(1 << 40);

/// A process with one page, and a device.
struct World {
    space: Arc<ModelSpace<ModelEnv>>,
    node: Node,
}

impl World {
    fn new() -> Self {
        let shape = Shape {
            base: AT,
            words: u32::try_from(vram::WORDS).unwrap_or(1),
            ..Shape::default()
        };
        let kernel = Kernel::new(Arc::new(ModelEnv), shape);
        let space = ModelSpace::first(&kernel);
        let seams = Seams {
            env: Arc::new(ModelEnv),
            space: Arc::clone(&space),
            sink: Arc::new((Arc::<Told>::default(), None::<Arc<Folds>>)),
        };
        let wires = Wires::of(&kernel);
        let config = NodeConfig {
            vram: 16,
            content: Content::FewWords,
            gpu: GpuConfig {
                gts: 1,
                units_per_gt: 1,
                tlb_entries: 4,
                fault_ring: 1,
                asids: 4,
                tlb_timeout_ns: 1_000_000,
                smem_atomics: SmemAtomics::default(),
                planted: None,
            },
            service: Service::Inline,
            window: gpusvm_xe::vm::NOTIFIER_BYTES,
            atomics: Atomics::System,
            rights: Rights::ReadWrite,
        };
        let map = Map {
            place: Place::Fixed(AT),
            len: PAGE,
            prot: Prot::READ.with(Prot::WRITE),
            what: What::Private,
            extra: VmFlags::NONE,
        };
        space.mmap(&map).expect("room");
        Self {
            node: Node::new(&config, 0, &seams, &wires),
            space,
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.node.vm.close();
        self.node.part();
    }
}

fn in_worlds(seeds: core::ops::Range<u64>, case: impl Fn(Arc<World>, &Sim) + Sync) {
    for seed in seeds {
        let outcome = run(&Options::default(), &mut Picker::uniform(seed), |sim| {
            case(Arc::new(World::new()), sim);
        });
        let trouble = outcome.trouble.map(|trouble| trouble.failure.to_string());
        assert_eq!(trouble, None, "seed {seed}");
    }
}

#[test]
fn vm_that_cannot_be_made_leaves_no_table_behind() {
    in_worlds(0..1, |world, sim| {
        sim.spawn("driver", move || {
            let device = &world.node.device;
            let before = device.table_bytes();
            let odd = VmConfig {
                window_bytes: 3,
                ..VmConfig::default()
            };
            let refused = Vm::with(device, 3, odd).map(|_vm| ());
            assert!(matches!(refused, Err(Failed::OutOfArea(_))), "{refused:?}");
            let taken = Vm::new(device, world.node.vm.asid()).map(|_vm| ());
            assert_eq!(taken, Err(Failed::Closed));
            assert_eq!(device.table_bytes(), before);
        });
    });
}

#[test]
fn two_who_make_a_vm_with_one_id_do_not_both_get_it() {
    in_worlds(0..100, |world, sim| {
        for name in ["one", "other"] {
            let world = Arc::clone(&world);
            sim.spawn(name, move || {
                let device = &world.node.device;
                let Ok(vm) = Vm::new(device, 3) else { return };
                let again = Vm::new(device, 3).map(|_vm| ());
                assert_eq!(again, Err(Failed::Closed), "nobody else has it");
                vm.close();
            });
        }
    });
}

#[test]
fn cpu_that_waits_for_a_page_waits_for_its_timeslice_too() {
    in_worlds(0..200, |world, sim| {
        let span = HostSpan::at(AT, PAGE);
        let mover = Arc::clone(&world);
        sim.spawn("mover", move || {
            mover.space.store(AT, 7).expect("mapped");
            let pagemap = mover.node.device.pagemap();
            let wish = ToDevice {
                span,
                timeslice: Ns::from_millis(1000),
            };
            if pagemap.to_device(wish).is_ok() {
                let there = Placement::Device(pagemap.id());
                assert_eq!(mover.space.placement(span), there);
            }
        });
        sim.spawn("reader", move || {
            for _load in 0..4 {
                world.space.load(AT).expect("mapped");
            }
        });
    });
}
