//! One turn of the pump: rings are looked at, batches pass the stages, answers go out, events are let through again.

use std::time::Duration;

use rings::{Operation, Slot, Status};

use super::{Pump, PumpEvent, QueueId, Token};
use crate::hypervisor::Hypervisor;
use crate::limits::{
    BYTES_PER_TURN, REQUESTS_PER_TURN, REQUESTS_PER_TURN_MIN, ROUNDS_PER_TURN, SLICE_SEGMENTS,
};
use crate::queue::{FrontendMisbehaved, Intake, Stage};
use crate::storage::Storage;

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Reads which event channels have events. To be called when the hypervisor's descriptor is readable.
    pub fn take_events(&mut self) {
        let mut ports = std::mem::take(&mut self.scratch.ports);
        self.hypervisor.pending(&mut ports);
        for port in ports.drain(..) {
            let Some(id) = self.by_port.get(&port).copied() else { continue };
            if let Some(queue) = self.queue(id) {
                queue.masked = true;
                queue.announced = true;
                queue.counters.events += 1;
            }
            self.list(id);
        }
        self.scratch.ports = ports;
    }

    /// Does all that can be done without waiting. `now` is any clock that does not go back. True when there is more to
    /// do at once: the caller looks at its other duties and comes back.
    pub fn turn(&mut self, now: Duration) -> bool {
        self.now = now;
        self.scratch.asked = false;
        self.end_delays(now);
        self.write_back();
        self.turning = true;
        let more = self.rounds(now);
        self.turning = false;
        more
    }

    fn rounds(&mut self, now: Duration) -> bool {
        for _ in 0..ROUNDS_PER_TURN {
            let mut progress = self.end_yields();
            progress |= self.feed_starved();
            progress |= self.take_requests(now);
            progress |= self.let_in();
            progress |= self.describe();
            progress |= self.copy_in();
            self.start_flushes();
            progress |= self.drive_chains();
            self.fair.dispatch(&mut self.storage, now);
            self.storage.submit();
            progress |= self.collect();
            self.publish();
            if self.fair.dispatch(&mut self.storage, now) {
                // Before the long copies, so that the device is not idle meanwhile.
                self.storage.submit();
            }
            let long = self.copy_out_long();
            if long {
                self.publish();
            }
            progress |= self.rest();
            progress |= self.scratch.has_flushes();
            let copied = std::mem::take(&mut self.scratch.copies.copied);
            if self.fair.is_shared(now) && (self.scratch.copies.wait() || copied > SLICE_SEGMENTS) {
                // Others may have come meanwhile.
                return true;
            }
            if !(progress || long) {
                return false;
            }
        }
        true
    }

    /// Takes requests from the rings that may have some, a bounded number from each.
    fn take_requests(&mut self, now: Duration) -> bool {
        let mut progress = false;
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            self.touch(id);
            progress |= self.take_from(id, now);
        }
        progress
    }

    fn take_from(&mut self, id: u32, now: Duration) -> bool {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return false };
        queue.listed = false;
        if queue.starved {
            return false;
        }
        let share = REQUESTS_PER_TURN / self.guests.queues(queue.guest).max(1);
        let share = share.max(REQUESTS_PER_TURN_MIN);
        let limit = match queue.intake {
            Intake::Open => share,
            Intake::Closing(left) => left.min(share),
            Intake::Closed => return false,
        };
        let waiting = match queue.ring.as_mut().map_or(Ok(0), rings::BackRing::look) {
            Ok(waiting) => waiting,
            Err(overrun) => {
                self.broken(id, FrontendMisbehaved::RingOverrun(overrun));
                return false;
            }
        };
        // Work that was found before its event was read counts too: a busy guest's events come late again and again.
        let announced = std::mem::take(&mut queue.announced);
        if waiting > 0 {
            queue.work_found();
        } else if announced {
            let delay = queue.idle_event();
            if !delay.is_zero() {
                self.delayed.push((now + delay, id));
            }
        }
        let (mut taken, mut bytes) = (0, 0);
        while taken < waiting.min(limit) && bytes < BYTES_PER_TURN {
            let Some(length) = self.take_one(id) else { break };
            taken += 1;
            bytes += length;
        }
        let Some(queue) = self.queue(id) else { return false };
        if let Intake::Closing(left) = &mut queue.intake {
            *left = left.saturating_sub(taken);
            if waiting == 0 || *left == 0 {
                queue.intake = Intake::Closed;
            }
        }
        if waiting > taken {
            self.list(id);
        }
        taken > 0
    }

    /// Takes one request; the length of its data in bytes, or `None` if there is neither request, nor memory, nor place.
    fn take_one(&mut self, id: u32) -> Option<u32> {
        let queue = self.queue(id).filter(|queue| !queue.starved && queue.has_place())?;
        let slot = queue.ring.as_mut().and_then(rings::BackRing::take)?;
        let Some(place) = queue.file(&slot) else { return Some(0) };
        self.admit(id, place, &slot);
        let one = self.queue(id).and_then(|queue| queue.in_flight(place));
        Some(one.map_or(0, |one| one.request.length_bytes()))
    }

    pub(super) fn broken(&mut self, id: u32, misdeed: FrontendMisbehaved) {
        if let Some(queue) = self.queue(id) {
            queue.intake = Intake::Closed;
        }
        self.report(PumpEvent::Misbehaved(QueueId(id), misdeed));
    }

    /// Reads a slot that was filed, and starts what it asks for.
    pub(super) fn admit(&mut self, id: u32, place: u16, slot: &Slot) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let disk_id = queue.disk;
        let Some(disk) = self.disks.get_mut(disk_id as usize).and_then(Option::as_mut) else { return };
        let size_sectors = disk.image.geometry().sectors;
        let parsed = slot.parse(&disk.offers);
        let parsed = parsed.and_then(|request| request.check_range(size_sectors).map(|()| request));
        let request = match parsed {
            Ok(request) => request,
            Err(refusal) => {
                return self.refuse(
                    id,
                    place,
                    slot,
                    refusal.status(),
                    FrontendMisbehaved::BadRequest(refusal),
                );
            }
        };
        let changes = request.has_data() || request.operation == Operation::Discard;
        if disk.read_only && changes && request.operation != Operation::Read {
            return self.refuse(id, place, slot, Status::Error, FrontendMisbehaved::WriteToReadOnly);
        }
        let is_barrier = request.operation == Operation::Barrier;
        queue.keep(place, request, Stage::HeldBack);
        if disk.enter(Token::Request { queue: id, place }.encode(), is_barrier) {
            self.begin(id, place);
        }
    }

    /// Starts a request that no barrier holds back.
    fn begin(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let disk_id = queue.disk;
        let Some(disk) = self.disks.get_mut(disk_id as usize).and_then(Option::as_mut) else { return };
        let Some(one) = queue.in_flight(place) else { return };
        match one.request.operation {
            Operation::Read => {
                one.stage = Stage::Starved;
                self.start(id, place);
            }
            Operation::Write => {
                one.stage = Stage::Starved;
                self.begin_epoch(id, place);
                self.start(id, place);
            }
            Operation::Discard => {
                one.stage = Stage::Storage;
                self.begin_epoch(id, place);
                self.queue_discard(id, place);
            }
            Operation::Flush => {
                one.stage = if one.request.has_data() { Stage::Preflush } else { Stage::Flush };
                disk.flush_begins(Token::Request { queue: id, place }.encode());
                self.scratch.look_at(disk_id);
            }
            Operation::Barrier => {
                one.stage = Stage::Barrier;
                self.scratch.look_at(disk_id);
            }
        }
    }

    /// Starts what a barrier has held back, on the disks where one has ended.
    fn let_in(&mut self) -> bool {
        let mut progress = false;
        while let Some(disk) = self.scratch.reopened.pop() {
            while let Some((queue, place)) = self.next_let_in(disk) {
                self.begin(queue, place);
                progress = true;
            }
        }
        progress
    }

    fn next_let_in(&mut self, disk: u32) -> Option<(u32, u16)> {
        let disk = self.disks.get_mut(disk as usize).and_then(Option::as_mut)?;
        let queues = &mut self.queues;
        let is_barrier = |request| {
            let Some(Token::Request { queue, place }) = Token::decode(request) else { return false };
            let queue = queues.get_mut(queue as usize).and_then(Option::as_mut);
            let one = queue.and_then(|queue| queue.in_flight(place));
            one.is_some_and(|one| one.request.operation == Operation::Barrier)
        };
        match Token::decode(disk.let_in(is_barrier)?) {
            Some(Token::Request { queue, place }) => Some((queue, place)),
            _ => None,
        }
    }

    fn refuse(&mut self, id: u32, place: u16, slot: &Slot, status: Status, misdeed: FrontendMisbehaved) {
        if let Some(queue) = self.queue(id) {
            queue.refuse(place, slot, status);
        }
        self.touch(id);
        self.report(PumpEvent::Misbehaved(QueueId(id), misdeed));
    }

    /// Makes answers visible and tells the guests.
    fn publish(&mut self) {
        let mut touched = std::mem::take(&mut self.touched);
        for id in touched.drain(..) {
            let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { continue };
            queue.touched = false;
            if queue.publish() {
                self.hypervisor.notify(queue.port);
            }
            let rests = queue.intake == Intake::Open && !queue.listed && !queue.starved;
            if queue.closing && queue.intake == Intake::Closed && queue.unanswered() == 0 {
                queue.closing = false;
                self.report(PumpEvent::Drained(QueueId(id)));
            } else if rests {
                self.scratch.resting.push(id);
            } else if matches!(queue.intake, Intake::Closing(_)) && !queue.starved {
                // A starved one is listed when there is memory; until then it has nothing to do.
                self.list(id);
            }
        }
        self.touched = touched;
    }

    /// Lets events through again for queues that have nothing waiting, then looks at their rings once more: what came
    /// before the port was unmasked may not have been announced. True if something had come.
    fn rest(&mut self) -> bool {
        let mut resting = std::mem::take(&mut self.scratch.resting);
        let mut ports = std::mem::take(&mut self.scratch.unmask);
        if !self.delayed.is_empty() {
            resting.retain(|id| !self.delayed.iter().any(|(_, delayed)| delayed == id));
        }
        for id in &resting {
            if let Some(queue) = self.queue(*id).filter(|queue| queue.masked) {
                queue.masked = false;
                ports.push(queue.port);
            }
        }
        if !ports.is_empty() {
            self.hypervisor.unmask(&ports);
            ports.clear();
        }
        let mut more = false;
        for id in resting.drain(..) {
            let Some(ring) = self.queue(id).and_then(|queue| queue.ring.as_mut()) else { continue };
            match ring.rest() {
                Ok(0) => {}
                Ok(_) => {
                    more = true;
                    self.list(id);
                }
                Err(overrun) => self.broken(id, FrontendMisbehaved::RingOverrun(overrun)),
            }
        }
        self.scratch.resting = resting;
        self.scratch.unmask = ports;
        more
    }

    fn end_delays(&mut self, now: Duration) {
        while let Some(at) = self.delayed.iter().position(|(deadline, _)| *deadline <= now) {
            let (_, id) = self.delayed.swap_remove(at);
            self.list(id);
        }
    }
}
