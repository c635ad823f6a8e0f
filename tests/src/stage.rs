//! What scenarios on whole machines share: the machine, memory, a kernel, and what must hold after.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gpusvm_cli::machine::{Machine, MachineConfig, ServiceMode};
use gpusvm_live::{AnonMapping, BracketChoice, FaultLevel, Huge, LiveConfig, VramMode};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_xe::stats::Counter;

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
        let look = || {
            (
                node.device().pagemap().vram().used(),
                node.device().table_bytes(),
            )
        };
        // Whoever brought pages home wakes their users before it lets go of the memory, and the
        // collector may be freeing tables.
        let (mut looks, mut found) = (0, look());
        while found.0 != found.1 && looks < 1_000_000 {
            std::thread::yield_now();
            (looks, found) = (looks + 1, look());
        }
        assert_eq!(found.0, found.1, "device memory leaks");
    }
}

/// Bytes of data in device memory.
///
/// # Panics
/// Never: a machine has a device.
#[must_use]
pub fn away(machine: &Machine) -> u64 {
    let device = machine.device();
    let used = device.pagemap().vram().used();
    used.saturating_sub(device.table_bytes())
}

/// No change was seen late, and no page found its place taken or gone.
///
/// # Panics
/// Where it was otherwise.
pub fn assert_nothing_went_wrong(machine: &Machine) {
    let stats = machine.stats();
    for counter in [
        Counter::LateInvalidationCount,
        Counter::HostConflictCount,
        Counter::HostGoneCount,
        Counter::TlbTimeoutCount,
    ] {
        assert_eq!(stats.total(counter), 0, "{}", counter.name());
    }
}

/// Whether system calls on memory that is away are served; says why not.
#[must_use]
pub fn serves_system_calls(machine: &Machine) -> bool {
    let level = machine.space().level().faults;
    if level != FaultLevel::Full {
        skipped(&format!("{}: {}", level.name(), level.limits()));
    }
    level == FaultLevel::Full
}

/// Bytes of the memory of a [`Resident`].
pub const RESIDENT: usize = 4 * MIB;

/// A machine, and memory that is on its device; word `n` holds `n`, and what was added since.
#[derive(Debug)]
pub struct Resident {
    /// The machine.
    pub machine: Machine,
    /// The memory.
    pub map: AnonMapping,
}

impl Resident {
    /// Nothing, where there is no machine; then the reason was told.
    ///
    /// # Panics
    /// Where the memory does not get to the device.
    #[must_use]
    pub fn new(migration: VramMode, huge: Huge) -> Option<Self> {
        let machine = start(MachineConfig {
            vram: 16 << 20,
            migration,
            live: LiveConfig {
                brackets: BracketChoice::Patched,
                ..LiveConfig::default()
            },
            ..Default::default()
        })?;
        let mut map = AnonMapping::new(RESIDENT, huge).expect("memory can be mapped");
        let words = map.words_mut().iter_mut();
        words.zip(0..).for_each(|(word, n)| *word = n);
        let resident = Self { machine, map };
        resident.send();
        Some(resident)
    }

    /// Sends all of it to the device.
    ///
    /// # Panics
    /// Where it does not get there.
    pub fn send(&self) {
        self.add(0);
        let bytes = u64::try_from(RESIDENT).expect("64-bit");
        assert!(away(&self.machine) >= bytes, "all of it is on the device");
    }

    /// Lets the device add `by` to every word.
    ///
    /// # Panics
    /// Where the device is refused.
    pub fn add(&self, by: u64) {
        let at = self.map.address();
        let mibs = u32::try_from(RESIDENT / MIB).expect("small");
        self.machine.launch(&Add { at, by }, mibs).expect("mapped");
    }

    /// Asserts that word `n` holds `n + more`.
    ///
    /// # Panics
    /// Where one does not.
    pub fn check(&self, more: u64) {
        // The device has written behind the compiler's back.
        let words = std::hint::black_box(self.map.words());
        let wrong = words.iter().zip(more..).position(|(word, n)| *word != n);
        assert_eq!(wrong, None, "a word is not what was written to it");
    }

    /// Asserts the counters, unmaps the memory, and asserts that nothing is left of it.
    ///
    /// # Panics
    /// Where it is otherwise.
    pub fn end(self) {
        assert_nothing_went_wrong(&self.machine);
        drop(self.map);
        assert_goes_on(&self.machine);
        assert_nothing_leaks(&self.machine);
    }
}

/// Runs a scenario on memory that is on a device: pages handed over and copied, huge and small.
pub fn each_resident(scenario: impl Fn(&mut Resident)) {
    let _turn = turn();
    for migration in [VramMode::Adopt, VramMode::Copy] {
        for huge in [Huge::Advise, Huge::Never] {
            let Some(mut resident) = Resident::new(migration, huge) else {
                return;
            };
            scenario(&mut resident);
            resident.end();
        }
    }
}

/// A user who may do little.
const NOBODY: u32 = 65534;

/// Runs this test program once more as a user without privileges, all tests but `this` one, and
/// shows what they skip.
///
/// # Panics
/// Where one of them fails.
pub fn without_privileges(this: &str) {
    let _turn = turn();
    if !rustix::process::geteuid().is_root() {
        return skipped(&"only root can become somebody with less privileges");
    }
    let program = Copied::of(&std::env::current_exe().expect("a test is a program"));
    let mut command = program.command(NOBODY);
    let output = command.args(["--skip", this, "--nocapture"]).output();
    let output = match output {
        Ok(output) => output,
        Err(why) => return skipped(&format!("another user cannot run it: {why}")),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{told}");
    let mut reasons: Vec<&str> = said.lines().filter(|l| l.contains("skipped: ")).collect();
    reasons.sort_unstable();
    reasons.dedup();
    for reason in reasons {
        skipped(&format!("without privileges: {reason}"));
    }
}

/// A copy of a program in a place where every user finds it, until this is dropped.
#[derive(Debug)]
pub struct Copied {
    folder: std::path::PathBuf,
}

impl Copied {
    /// Copies it.
    ///
    /// # Panics
    /// Where there is no room for it.
    #[must_use]
    pub fn of(program: &std::path::Path) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let name = format!("gpusvm-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let all = std::fs::Permissions::from_mode(0o755);
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        let copy = Self { folder };
        std::fs::set_permissions(&copy.folder, all.clone()).expect("it is ours");
        std::fs::copy(program, copy.path()).expect("a program can be copied");
        std::fs::set_permissions(copy.path(), all).expect("it is ours");
        copy
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.join("program")
    }

    /// A command that runs it as `user`.
    #[must_use]
    pub fn command(&self, user: u32) -> std::process::Command {
        use std::os::unix::process::CommandExt;
        let mut command = std::process::Command::new(self.path());
        command.uid(user).gid(user).current_dir(&self.folder);
        command
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let _removed = std::fs::remove_dir_all(&self.folder);
    }
}
