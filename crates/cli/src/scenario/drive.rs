//! What drivers are told, and plain objects in device memory.

use std::sync::{Arc, Mutex};

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm::error::Interrupted;
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::env::Environment;
use gpusvm::vram::{Bo, BoRequest, Evict, From as End, Purpose};
use gpusvm_xe::vm::MirrorArea;

use crate::notes::{errno_of, errno_of_interrupted};
use crate::scenario::host::{Host, Node};
use crate::scenario::play::{Play, Trouble, locked};
use crate::scenario::text::Drive;
use crate::scenario::words::Object;

/// An object in device memory that no page of a process is in.
pub(super) struct Plain<E: Environment>(Mutex<Option<Arc<Bo<E>>>>);

impl<E: Environment> Evict for Plain<E> {
    fn evict(self: Arc<Self>) -> Result<(), Interrupted> {
        let bo = locked(&self.0).take();
        drop(bo);
        Ok(())
    }
}

impl<H: Host> Play<H> {
    pub(super) fn drive(&self, gpu: usize, drive: &Drive) -> Result<(), Trouble> {
        let node = self.node(gpu)?;
        let span = match drive {
            Drive::Prefetch(span) | Drive::Take(span, _) | Drive::Mirror(span, _) => {
                Some(self.find(span)?)
            }
            Drive::Evict | Drive::Close | Drive::Buy(..) | Drive::Fill(_) | Drive::Sell => None,
        };
        let span = span.unwrap_or(self.host.land());
        let ended = self.host.drive(|| self.drive_here(&node, drive, span));
        ended.map_err(|errno| Trouble::Refused(errno.to_owned()))
    }

    fn drive_here(
        &self,
        node: &Node<'_, H::Platform>,
        drive: &Drive,
        span: HostSpan,
    ) -> Result<(), &'static str> {
        let pagemap = node.device.pagemap();
        match drive {
            Drive::Prefetch(_) => node.vm.prefetch(span).map(drop).map_err(errno_of),
            Drive::Take(_, timeslice) => {
                let timeslice = *timeslice;
                let taken = pagemap.to_device(ToDevice { span, timeslice });
                taken.map_err(errno_of_interrupted)
            }
            Drive::Evict => {
                let _evicted = pagemap.vram().evict_all();
                Ok(())
            }
            Drive::Close => {
                node.vm.close();
                Ok(())
            }
            Drive::Mirror(_, rights) => {
                let rights = *rights;
                let area = MirrorArea { span, rights };
                node.vm.mirror(area).map_err(errno_of)
            }
            Drive::Buy(bytes, object) => self.buy(node, *bytes, *object),
            Drive::Fill(leaving) => {
                while pagemap.vram().size() - pagemap.vram().used() > *leaving {
                    self.buy(node, PAGE, Object::Pinned)?;
                }
                Ok(())
            }
            Drive::Sell => {
                self.sell();
                Ok(())
            }
        }
    }

    fn buy(
        &self,
        node: &Node<'_, H::Platform>,
        bytes: u64,
        object: Object,
    ) -> Result<(), &'static str> {
        let vram = node.device.pagemap().vram();
        let from = End::Bottom;
        let purpose = match object {
            Object::Evictable => Purpose::Pages,
            Object::Pinned => Purpose::Pinned,
        };
        let request = BoRequest {
            bytes,
            from,
            purpose,
        };
        let bo = vram.allocate(request).map_err(errno_of_interrupted)?;
        let plain = Arc::new(Plain(Mutex::new(Some(Arc::clone(&bo)))));
        if object == Object::Evictable {
            let weak = Arc::downgrade(&plain);
            vram.make_evictable(&bo, weak);
        }
        drop(bo);
        locked(&self.objects).push(plain);
        Ok(())
    }

    pub(super) fn sell(&self) {
        let sold = core::mem::take(&mut *locked(&self.objects));
        drop(sold);
    }
}
