//! The seams: traits only. Each method says whether it may sleep, which locks may be held, and
//! whether it may call back into the framework.
//!
//! Lock order, outer to inner: **vm → host mm → notifier → vram → leaf**.

pub mod copy;
pub mod env;
pub mod mm;
pub mod table;

use alloc::sync::Arc;

use crate::event::{Event, EventSink};
use crate::seam::env::Environment;

/// One choice of host, copy engine, environment and event sink: the single generic parameter of
/// the framework.
pub trait Platform: Sized + Send + Sync + 'static {
    /// Clock, locks, waiting, deferred work.
    type Env: Environment;
    /// The process whose memory is shared.
    type Space: mm::AddressSpace;
    /// Moves bytes between host and device memory.
    type Copy: copy::CopyEngine;
    /// Where events go.
    type Sink: EventSink;
}

/// The seam objects that the parts of one framework instance share.
#[derive(Debug)]
pub struct Seams<P: Platform> {
    /// Clock, locks, waiting, deferred work.
    pub env: Arc<P::Env>,
    /// The process whose memory is shared.
    pub space: Arc<P::Space>,
    /// Where events go.
    pub sink: Arc<P::Sink>,
}

impl<P: Platform> Clone for Seams<P> {
    fn clone(&self) -> Self {
        Self {
            env: Arc::clone(&self.env),
            space: Arc::clone(&self.space),
            sink: Arc::clone(&self.sink),
        }
    }
}

impl<P: Platform> Seams<P> {
    /// Reports `event` with the current time.
    pub fn emit(&self, event: &Event) {
        self.sink.record(self.env.now(), event);
    }
}
