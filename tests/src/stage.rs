//! What scenarios on whole machines share: the machine, memory, a kernel, and what must hold after.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gpusvm_cli::machine::{Machine, MachineConfig, ServiceMode};
use gpusvm_live::{AnonMapping, Huge, VramMode};
use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::skipped;

static TURN: Mutex<()> = Mutex::new(());
/// Bytes of a MiB.
pub const MIB: usize = 1 << 20;

/// A process has one live space, so tests take turns.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine, or nothing and the reason.
#[must_use]
pub fn start(config: MachineConfig) -> Option<Machine> {
    Machine::start(config).map_err(|error| skipped(&error)).ok()
}

/// Every way in which pages move and faults are served.
#[must_use]
pub fn modes() -> Vec<MachineConfig> {
    let mut modes = Vec::new();
    for migration in [VramMode::Adopt, VramMode::Copy] {
        for service in [ServiceMode::Inline, ServiceMode::Queue] {
            modes.push(MachineConfig {
                vram: 16 << 20,
                migration,
                service,
                ..Default::default()
            });
        }
    }
    modes
}

/// Memory whose words hold `value`.
///
/// # Panics
/// Where there is no memory.
#[must_use]
pub fn filled(bytes: usize, value: u64) -> AnonMapping {
    let mut map = AnonMapping::new(bytes, Huge::Advise).expect("memory can be mapped");
    map.words_mut().fill(value);
    map
}

/// Addresses of a mapping.
#[must_use]
pub fn span_of(map: &AnonMapping) -> Range<u64> {
    let bytes = u64::try_from(map.bytes().len()).expect("64-bit");
    map.address()..map.address() + bytes
}

fn words(bytes: usize) -> u64 {
    u64::try_from(bytes / 8).expect("64-bit")
}

/// Adds to every word of a span; one group per MiB.
#[derive(Clone, Copy, Debug)]
pub struct Add {
    /// First address.
    pub at: u64,
    /// What is added.
    pub by: u64,
}

impl Kernel for Add {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let mut buffer = vec![0_u64; 4096];
        for block in 0..words(MIB) / 4096 {
            let at = self.at + (u64::from(group) * words(MIB) + block * 4096) * 8;
            tile.load(at, &mut buffer[..])?;
            buffer.iter_mut().for_each(|word| *word += self.by);
            tile.store(at, &buffer[..])?;
        }
        Ok(())
    }
}

/// The machine still works: a kernel on fresh memory gives the right answer.
///
/// # Panics
/// Where it does not.
pub fn assert_goes_on(machine: &Machine) {
    let mut map = filled(4 * MIB, 1);
    let at = map.address();
    machine
        .launch(&Add { at, by: 5 }, 4)
        .expect("later kernels go on");
    assert!(map.words_mut().iter().all(|word| *word == 6));
}

/// When everything is home and unused, device memory holds page tables and nothing else.
///
/// # Panics
/// Where something else is in it.
pub fn assert_nothing_leaks(machine: &Machine) {
    gpusvm_live::thread::run(|| machine.space().bring_everything_home());
    for node in machine.nodes() {
        let used = || node.device().pagemap().vram().used();
        // Whoever brought pages home wakes their users before it lets go of the memory.
        let mut looks = 0;
        while used() != node.device().table_bytes() && looks < 1_000_000 {
            std::thread::yield_now();
            looks += 1;
        }
        assert_eq!(used(), node.device().table_bytes(), "device memory leaks");
    }
}
