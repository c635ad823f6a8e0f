//! What a host has to be able to do, so that scenarios run on it. All else is common: devices and
//! drivers are the same on both.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::seam::Platform;
use gpusvm::seam::env::{Environment, Ns, Point};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{SoftGpu, Stop, Tile};
use gpusvm_xe::device::Device;
use gpusvm_xe::stats::DeviceStats;
use gpusvm_xe::vm::Vm;

use crate::notes::Notes;
use crate::scenario::HostKind;
use crate::scenario::play::Play;
use crate::scenario::text::Often;
use crate::scenario::words::{Advice, Backing, Deed, Huge, Rights};

/// The software GPU with the locks of a platform's environment.
pub(super) type Gpu<P> = SoftGpu<<<P as Platform>::Env as Environment>::RawMutex>;

/// One device, its driver, and the VM that scenarios use.
pub(super) struct Node<'a, P: Platform> {
    pub(super) gpu: &'a Arc<Gpu<P>>,
    pub(super) device: &'a Arc<Device<P>>,
    pub(super) vm: &'a Arc<Vm<P>>,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// With this errno, or by this signal.
    With(String),
    /// The host cannot do such a thing: the scenario has to say so.
    Unable(&'static str),
}

/// A change of the address space, with addresses.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    Map(HostSpan, Rights, Backing, Huge),
    Unmap(HostSpan),
    Protect(HostSpan, Rights),
    Advise(HostSpan, Advice),
    Move(HostSpan, HostVa),
    MoveLeaving(HostSpan, HostVa),
    Deed(Deed, HostSpan),
    /// The process ends.
    Die,
    /// The copy of a page fails, counted from 1.
    FailCopy(u64),
}

/// What a child does to one word.
#[derive(Clone, Debug)]
pub(super) struct ChildStep {
    pub(super) at: HostVa,
    pub(super) does: ChildDoes,
}

/// A load that must find one of these, or a store.
#[derive(Clone, Debug)]
pub(super) enum ChildDoes {
    Load(Vec<u64>),
    Store(u64),
}

/// A host that scenarios run on.
pub(super) trait Host: Sized + Send + Sync + 'static {
    /// Host, driver and engine.
    type Platform: Platform;

    /// Which one it is.
    const KIND: HostKind;

    /// First address of the stretch that scenarios map things in, aligned to 2 MiB.
    fn land(&self) -> HostSpan;

    /// The devices.
    fn node(&self, n: usize) -> Option<Node<'_, Self::Platform>>;

    /// The address space.
    fn space(&self) -> &Arc<<Self::Platform as Platform>::Space>;

    /// Counters of all devices, and notes.
    fn told(&self) -> (&DeviceStats, &Notes);

    /// Changes the address space.
    fn call(&self, call: &Call) -> Result<(), Refusal>;

    /// Loads a word.
    fn load(&self, at: HostVa) -> Result<u64, Refusal>;

    /// Stores a word.
    fn store(&self, at: HostVa, value: u64) -> Result<(), Refusal>;

    /// Updates a word.
    fn atomic(&self, at: HostVa, op: AtomicOp) -> Result<(), Refusal>;

    /// Runs `act` on unit `unit` of a device.
    fn launch(
        &self,
        device: usize,
        unit: usize,
        act: &(dyn Fn(&mut Tile<'_>) + Sync),
    ) -> Result<(), Stop>;

    /// Runs what belongs to the driver, where it may run.
    fn drive<R: Send>(&self, act: impl FnOnce() -> R + Send) -> R;

    /// Now.
    fn now(&self) -> Ns;

    /// Looks until `right`, where the host does some things a moment later; else once.
    fn settle<T: Send>(
        &self,
        look: impl Fn() -> T + Send + Sync,
        right: impl Fn(&T) -> bool + Send + Sync,
    ) -> T;

    /// Lets time pass.
    fn sleep(&self, time: Ns);

    /// Makes a child that does these steps, and ends; whether it found what it must.
    fn fork(&self, steps: &[ChildStep]) -> Result<(), String>;

    /// Does each line of the block that stands in the `index`th line, all at once.
    fn together(play: &Arc<Play<Self>>, index: usize) -> Result<(), String>;

    /// Has the block that stands in the `index`th line done at a point.
    fn arm(&self, index: usize, point: Point, often: Often) -> Result<(), String>;

    /// Waits for what was done at points, and forgets what was not.
    fn disarm(play: &Arc<Play<Self>>) -> Result<(), String>;

    /// Keeps what CPU page tables say, for [`kept`](Self::kept).
    fn keep(&self);

    /// Whether they still say so of a span.
    fn kept(&self, span: HostSpan) -> Result<(), String>;

    /// Rules that hold between any two lines.
    fn check(&self) -> Result<(), String>;
}
