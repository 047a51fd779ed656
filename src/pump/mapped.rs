//! Requests whose data storage moves to and from the guest's own pages, which stay mapped: see [`crate::grants`].

use rings::{Operation, Segment};

use super::{Pump, QueueId, Token, extent_of};
use crate::buffers::Span;
use crate::grants::Grants;
use crate::hypervisor::Hypervisor;
use crate::queue::Stage;
use crate::storage::{Io, IoKind, Storage};

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// From now on the pages that the queue's requests name stay mapped: its frontend keeps granting them.
    pub fn keep_grants(&mut self, queue: QueueId) {
        if let Some(open) = self.queue(queue.0) {
            open.grants = Some(Grants::new(open.domain));
        }
    }

    /// Pages of guests that are mapped, rings aside.
    #[must_use]
    pub fn pages_mapped(&self) -> usize {
        self.pages_mapped
    }

    /// Has storage move a request's data to or from the guest's pages. False where they are not to be mapped, or the file
    /// takes no such memory: then nothing was done.
    pub(super) fn go_mapped(&mut self, id: u32, place: u16) -> bool {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return false };
        if queue.grants.is_none() {
            return false;
        }
        let Some(disk) = self.disks.get(queue.disk as usize).and_then(Option::as_ref) else { return false };
        let Some(one) = queue.in_flight(place) else { return false };
        let kind = match one.request.operation {
            Operation::Read => IoKind::Read,
            Operation::Write => IoKind::Write,
            _ => return false,
        };
        let Some(offset_bytes) = disk.offset_of(extent_of(&one.request)) else { return false };
        let file = disk.file;
        if !self.storage.takes_pages(file) {
            return false;
        }
        let segments = self.segments(id, place);
        let is_pinned = self.pin(id, &segments);
        if is_pinned {
            self.queue_pages(
                id,
                place,
                &segments,
                Io { token: 0, file, kind, offset_bytes, span: Span::EMPTY },
            );
        }
        self.scratch.segments = segments;
        is_pinned
    }

    /// Queues a transfer for each segment of a request whose pages are pinned. `first` says what, and where it starts.
    fn queue_pages(&mut self, id: u32, place: u16, segments: &[Segment], first: Io) {
        let mut io = Io { token: Token::Request { queue: id, place }.encode(), ..first };
        for segment in segments {
            let Some(queue) = self.queue(id) else { return };
            let (offset, length) = (segment.offset_bytes(), segment.length_bytes());
            let bytes = queue.grants.as_ref().and_then(|grants| grants.bytes(segment.grant, offset, length));
            let (Some(span), Some(one)) = (bytes, queue.in_flight(place)) else { return };
            one.stage = Stage::Mapped;
            one.transfers += 1;
            self.storage.queue(Io { span, ..io });
            io.offset_bytes += u64::from(span.length_bytes());
        }
    }

    /// Pins the pages of a request: all, of which there is at least one, or none.
    fn pin(&mut self, id: u32, segments: &[Segment]) -> bool {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return false };
        let Some(grants) = queue.grants.as_mut() else { return false };
        for (number, segment) in segments.iter().enumerate() {
            if !grants.pin(segment.grant, &mut self.hypervisor, &mut self.pages_mapped) {
                segments.iter().take(number).for_each(|pinned| grants.unpin(pinned.grant));
                return false;
            }
        }
        !segments.is_empty()
    }

    /// A request that used mapped pages is about to be answered.
    pub(super) fn end_mapped(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queue(id) else { return };
        let is_gone = queue.ring.is_none();
        if queue.in_flight(place).is_none_or(|one| one.stage != Stage::Mapped) {
            return;
        }
        let segments = self.segments(id, place);
        if let Some(grants) = self.queue(id).and_then(|queue| queue.grants.as_mut()) {
            segments.iter().for_each(|segment| grants.unpin(segment.grant));
        }
        self.scratch.segments = segments;
        if is_gone {
            self.unmap_pages(id, false);
        }
    }

    /// Unmaps the pages of a queue that no request uses; with `all`, those that one uses too.
    pub(super) fn unmap_pages(&mut self, id: u32, all: bool) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let Some(grants) = queue.grants.as_mut() else { return };
        if all {
            grants.unmap_all(&mut self.hypervisor, &mut self.pages_mapped);
        } else {
            grants.unmap_unused(&mut self.hypervisor, &mut self.pages_mapped);
        }
    }

    /// The segments of a request, in a table to be given back to [`super::stages::Scratch`].
    fn segments(&mut self, id: u32, place: u16) -> Vec<Segment> {
        let mut segments = std::mem::take(&mut self.scratch.segments);
        segments.clear();
        if let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut)
            && let Some(one) = queue.in_flight(place)
        {
            let descriptors = self.storage.buffers().bytes(one.held.descriptors);
            segments.extend(one.request.segments.iter(descriptors));
        }
        segments
    }
}
