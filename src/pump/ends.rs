//! How a queue ends: drained for a frontend that leaves, aborted for one that is gone, quiesced for a successor.

use rings::Status;

use super::{Pump, PumpEvent, QueueId, Token};
use crate::hypervisor::Hypervisor;
use crate::queue::Intake;
use crate::storage::Storage;

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// The frontend leaves: what it has put on the ring until now is served, at most one ring's length more is taken,
    /// then [`PumpEvent::Drained`] comes.
    pub fn close(&mut self, queue: QueueId) {
        if let Some(open) = self.queue(queue.0) {
            open.closing = true;
            if open.intake == Intake::Open {
                let entries = open.ring.as_ref().map_or(0, rings::BackRing::entries);
                open.intake = Intake::Closing(entries);
            }
        }
        self.list(queue.0);
    }

    /// Takes no more requests, and answers those in flight. [`PumpEvent::Drained`] comes; the ring stays as it is.
    pub fn quiesce(&mut self, queue: QueueId) {
        if let Some(open) = self.queue(queue.0) {
            open.closing = true;
            open.intake = Intake::Closed;
        }
        self.list(queue.0);
    }

    /// The guest is gone: its ring is unmapped at once, so that nothing keeps its memory. [`PumpEvent::Drained`] comes
    /// when storage is done with what was in flight.
    pub fn abort(&mut self, queue: QueueId) {
        let id = queue.0;
        let Some(open) = self.queue(id) else { return };
        open.closing = true;
        open.intake = Intake::Closed;
        open.starved = false;
        open.ring = None;
        let mapping = open.mapping.take();
        self.forget_copies(id);
        self.forget_held_back(id);
        while let Some(place) = self.queue(id).and_then(|open| open.next_starved()) {
            self.finish(id, place, Status::Error);
        }
        if let Some(mapping) = mapping {
            self.hypervisor.unmap(mapping);
        }
        self.unmap_pages(id, false);
        self.starved.retain(|starved| *starved != id);
        self.first_in_line = self.first_in_line.filter(|(first, _)| *first != id);
        self.list(id);
    }

    /// Ends what barriers hold back of a queue: nothing of it may be started any more.
    fn forget_held_back(&mut self, id: u32) {
        let Some(open) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        if let Some(disk) = self.disks.get_mut(open.disk as usize).and_then(Option::as_mut) {
            let is_gone =
                |request| matches!(Token::decode(request), Some(Token::Request { queue, .. }) if queue == id);
            disk.forget(is_gone);
        }
        while let Some(place) = self.queue(id).and_then(|open| open.next_held_back()) {
            self.finish(id, place, Status::Error);
        }
    }

    /// Unmaps and unbinds a queue that was drained. `forget` says that no successor will take the ring over.
    /// Returns false, and does nothing, if it still owes answers.
    pub fn detach(&mut self, queue: QueueId, forget: bool) -> bool {
        let id = queue.0;
        if self.queue(id).is_none_or(|open| open.unanswered() > 0) {
            return false;
        }
        self.unmap_pages(id, true);
        let Some(mut open) = self.queues.get_mut(id as usize).and_then(Option::take) else { return false };
        self.guests.leave(open.guest);
        self.fair.leave(open.flow);
        // The ring goes before its pages.
        open.ring = None;
        if let Some(mapping) = open.mapping.take() {
            self.hypervisor.unmap(mapping);
        }
        self.by_port.remove(&open.port);
        self.hypervisor.unbind(open.port);
        if let Some(journal) = open.take_journal() {
            let name = self.names.get_mut(id as usize).map(std::mem::take).unwrap_or_default();
            self.journals.borrow_mut().close(&name, journal.memory(), forget);
        }
        self.ready.retain(|other| *other != id);
        self.touched.retain(|other| *other != id);
        self.delayed.retain(|(_, other)| *other != id);
        self.events.retain(|event| !matches!(event, PumpEvent::Drained(other) if *other == queue));
        true
    }
}
