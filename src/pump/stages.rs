//! What happens to a request between its ring and storage: memory, grant copies, transfers, flushes.

use formats::{Extent, Op};
use rings::{Operation, Status};

use super::copies::Copies;
use super::{DiskId, Pump, PumpEvent, QueueId, StorageFailure, Token, extent_of};
use crate::buffers::Span;
use crate::disk::Disk;
use crate::hypervisor::{CopyDirection, Hypervisor, Port};
use crate::queue::{FrontendMisbehaved, Stage};
use crate::storage::{Done, Io, IoKind, Storage, StorageError};

/// Tables that every turn uses again.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) ports: Vec<Port>,
    pub(super) unmask: Vec<Port>,
    pub(super) resting: Vec<u32>,
    pub(super) copies: Copies,
    served: Vec<u64>,
    pub(super) segments: Vec<rings::Segment>,
    /// Requests whose copies to or from the file itself failed.
    retries: Vec<(u32, u16)>,
    /// Disks on which a flush or barrier may have become ready.
    flush_disks: Vec<u32>,
    /// A request has come from outside of the rings.
    pub(super) asked: bool,
    /// Disks on which a barrier has ended.
    pub(super) reopened: Vec<u32>,
}

impl Scratch {
    pub(super) fn look_at(&mut self, disk: u32) {
        if !self.flush_disks.contains(&disk) {
            self.flush_disks.push(disk);
        }
    }

    pub(super) fn has_flushes(&self) -> bool {
        !self.flush_disks.is_empty() || !self.reopened.is_empty()
    }
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Takes what storage has finished, and hands the data of reads to the guests.
    pub(super) fn collect(&mut self) -> bool {
        let mut progress = false;
        while let Some(done) = self.storage.done() {
            progress = true;
            match Token::decode(done.token) {
                Some(Token::Request { queue, place }) => self.transfer_done(queue, place, &done),
                Some(Token::Flush(disk)) => self.flush_done(disk, done.result),
                Some(Token::Work(number)) => self.work_transfer_done(number, done.token, done.result),
                Some(Token::Outside(place)) => self.outside_transfer_done(place, done.result),
                Some(Token::Sync(_)) | None => {}
            }
        }
        progress |= self.drive_chains();
        self.run_batch(|copies| &mut copies.outgoing, usize::MAX, Pump::handed_out);
        progress | self.retry()
    }

    /// Hands out the data of long reads, a part of it. True if there was some.
    pub(super) fn copy_out_long(&mut self) -> bool {
        let most = self.slice();
        self.run_batch(|copies| &mut copies.outgoing_long, most, Pump::handed_out)
    }

    fn handed_out(&mut self, id: u32, place: u16, failed: Option<u32>) {
        let direct = self.end_direct(id, place);
        match failed {
            None => self.copied(id, place, direct),
            Some(_) if direct => self.not_copied_straight(id, place),
            Some(grant) => self.bad_grant(id, place, grant),
        }
    }

    fn transfer_done(&mut self, id: u32, place: u16, done: &Done) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let flow = queue.flow;
        let Some(one) = queue.in_flight(place) else { return };
        if one.request.operation != Operation::Discard {
            self.fair.done(flow, Token::transfer_bytes(done.token), self.now);
        }
        one.transfers = one.transfers.saturating_sub(1);
        if let (Err(error), None) = (&done.result, &one.error) {
            one.error = Some(error.clone());
        }
        if one.transfers > 0 {
            return;
        }
        let result = one.error.take().map_or(Ok(()), Err);
        self.moved(id, place, result);
    }

    /// Storage, or the disk's format, has done what a request asks for.
    pub(super) fn moved(&mut self, id: u32, place: u16, result: Result<(), StorageError>) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let has_ring = queue.ring.is_some();
        let Some(one) = queue.in_flight(place) else { return };
        one.transfers = 0;
        let (operation, sector) = (one.request.operation, one.request.sector);
        let in_place = one.stage == Stage::Mapped;
        self.end_epoch(id, place);
        match (result, operation) {
            (Err(error), Operation::Discard) if error.is_unsupported() => self.discards_no_more(id, place),
            (Err(error), _) => {
                let what = match operation {
                    Operation::Read => "read",
                    Operation::Discard => "discard",
                    _ => "write",
                };
                self.storage_failed(id, what, sector, error);
                self.finish(id, place, Status::Error);
            }
            (Ok(()), Operation::Read) if has_ring && !in_place => {
                self.queue_copy(id, place, CopyDirection::ToGuest)
            }
            // What came along with a flush or barrier is durable with the answer.
            (Ok(()), Operation::Flush | Operation::Barrier) => self.queue_flush(id, place, Stage::Flush),
            (Ok(()), _) => self.finish(id, place, Status::Okay),
        }
    }

    /// Has a request wait for an `fdatasync` that covers everything until now, at `stage`.
    fn queue_flush(&mut self, id: u32, place: u16, stage: Stage) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let disk_id = queue.disk;
        let Some(disk) = self.disks.get_mut(disk_id as usize).and_then(Option::as_mut) else { return };
        let Some(one) = queue.in_flight(place) else { return };
        one.stage = stage;
        disk.flush_begins(Token::Request { queue: id, place }.encode());
        self.scratch.look_at(disk_id);
    }

    /// The medium knows no discard after all.
    fn discards_no_more(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let disk = queue.disk;
        if let Some(open) = self.disk(disk) {
            open.offers.discard = false;
        }
        self.finish(id, place, Status::Unsupported);
    }

    fn storage_failed(&mut self, id: u32, what: &'static str, sector: u64, error: StorageError) {
        if let Some(queue) = self.queue(id) {
            queue.counters.storage_errors += 1;
        }
        let failure = StorageFailure { what, offset_bytes: sector.saturating_mul(512), error };
        self.report(PumpEvent::StorageFailed(QueueId(id), failure));
    }

    pub(super) fn queue_copy(&mut self, id: u32, place: u16, direction: CopyDirection) {
        let is_direct = self.is_direct(id, place);
        let Some(queue) = self.queues.get(id as usize).and_then(Option::as_ref) else { return };
        // What goes straight to a file must be copied in this turn: its mapping stays no longer.
        let count = if is_direct { 0 } else { queue.segments(place) };
        let batch = self.scratch.copies.of(direction, count);
        batch.push(id, place, |segments| {
            queue.copies(place, direction, (&self.rows, self.storage.buffers()), segments)
        });
    }

    /// A request's data is where it was to go.
    fn copied(&mut self, id: u32, place: u16, direct: bool) {
        if let Some(queue) = self.queue(id) {
            queue.counters.direct += u64::from(direct);
        }
        self.finish(id, place, Status::Okay);
    }

    /// Sends what could not be copied straight the usual way. True if there was any.
    fn retry(&mut self) -> bool {
        let mut retries = std::mem::take(&mut self.scratch.retries);
        let any = !retries.is_empty();
        for (id, place) in retries.drain(..) {
            self.retry_buffered(id, place);
        }
        self.scratch.retries = retries;
        any
    }

    /// Has the descriptors of an indirect request copied in the next batch of them.
    pub(super) fn fetch_descriptors(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get(id as usize).and_then(Option::as_ref) else { return };
        let Some(copy) = queue.descriptor_copy(place) else { return };
        self.scratch.copies.described.push(id, place, |segments| segments.push(copy));
    }

    /// Fetches the descriptors of all indirect requests of this round from the guests, and reads them from the copy.
    pub(super) fn describe(&mut self) -> bool {
        self.run_batch(
            |copies| &mut copies.described,
            usize::MAX,
            |pump, queue, place, failed| match failed {
                None => pump.described(queue, place),
                Some(grant) => pump.bad_grant(queue, place, grant),
            },
        )
    }

    fn described(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let Some(disk) = self.disks.get(queue.disk as usize).and_then(Option::as_ref) else { return };
        let Some(one) = queue.in_flight(place) else { return };
        let described = one.request.describe(self.storage.buffers().bytes(one.held.descriptors));
        let size_sectors = disk.image.geometry().sectors;
        if let Err(refusal) = described.and_then(|()| one.request.check_range(size_sectors)) {
            queue.counters.refused += 1;
            self.report(PumpEvent::Misbehaved(QueueId(id), FrontendMisbehaved::BadRequest(refusal)));
            return self.finish(id, place, refusal.status());
        }
        self.shorten(id, place);
        self.move_data(id, place);
    }

    /// Drops the copies that a queue has ordered and not got: its guest is gone.
    pub(super) fn forget_copies(&mut self, id: u32) {
        let mut dropped = Vec::new();
        self.drop_copies(id, &mut dropped);
        for place in dropped {
            self.end_direct(id, place);
            self.finish(id, place, Status::Error);
        }
    }

    fn is_direct(&mut self, id: u32, place: u16) -> bool {
        let one = self.queue(id).and_then(|queue| queue.in_flight(place));
        one.is_some_and(|one| one.stage == Stage::Direct)
    }

    /// A copy to or from a file's own pages failed: tried again the usual way, which tells what is wrong.
    fn not_copied_straight(&mut self, id: u32, place: u16) {
        if self.scratch.copies.call_failed {
            // The pages of the queue's file cannot be had: from now on it is read and written by calls.
            let disk = self.queue(id).map(|queue| queue.disk);
            if let Some(file) = disk.and_then(|disk| self.disk(disk)).map(|disk| disk.file) {
                self.storage.not_direct(file);
            }
        }
        self.scratch.retries.push((id, place));
    }

    /// Fetches the data of the writes of this round from the guests, of long ones a part, and queues their transfers.
    pub(super) fn copy_in(&mut self) -> bool {
        let most = self.slice();
        let short = self.run_batch(|copies| &mut copies.incoming, usize::MAX, Pump::fetched);
        let long = self.run_batch(|copies| &mut copies.incoming_long, most, Pump::fetched);
        self.retry();
        short | long
    }

    fn fetched(&mut self, id: u32, place: u16, failed: Option<u32>) {
        let direct = self.end_direct(id, place);
        match failed {
            None if direct => self.copied(id, place, true),
            None => self.queue_transfer(id, place, IoKind::Write),
            Some(_) if direct => self.not_copied_straight(id, place),
            Some(grant) => self.bad_grant(id, place, grant),
        }
    }

    fn bad_grant(&mut self, id: u32, place: u16, grant: u32) {
        if let Some(queue) = self.queue(id) {
            queue.counters.refused += 1;
        }
        self.report(PumpEvent::Misbehaved(QueueId(id), FrontendMisbehaved::BadGrant(grant)));
        self.finish(id, place, Status::Error);
    }

    /// Hands a request's data to storage, a transfer for each piece, or has it wait for its turn there.
    pub(super) fn queue_transfer(&mut self, id: u32, place: u16, kind: IoKind) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let Some(disk) = self.disks.get(queue.disk as usize).and_then(Option::as_ref) else { return };
        let flow = queue.flow;
        let Some(one) = queue.in_flight(place) else { return };
        let extent = extent_of(&one.request);
        if disk.is_chain {
            one.transfers = 1;
            let zeroes =
                disk.detect_zeroes && self.rows.is_zero(self.storage.buffers(), &one.held, &one.request);
            let op = match kind {
                IoKind::Read => Op::Read,
                _ if zeroes => Op::WriteZeroes,
                _ => Op::Write,
            };
            let (disk, token) = (queue.disk, Token::Request { queue: id, place });
            return self.submit(disk, token, op, extent);
        }
        // The range was checked when the request was taken; a disk that has shrunk since refuses it here.
        let Some(offset_bytes) = disk.offset_of(extent) else {
            return self.finish(id, place, Status::Error);
        };
        let (length, mut at) = (one.request.length_bytes(), 0);
        while let Some(span) =
            self.rows.part(&one.held, at, length - at).filter(|span| span.length_bytes() > 0)
        {
            let offset_bytes = offset_bytes + u64::from(at);
            let token = Token::of_transfer(id, place, span.length_bytes());
            let io = Io { token, file: disk.file, kind, offset_bytes, span };
            one.transfers += 1;
            if let Some(io) = self.fair.queue(flow, io, self.now) {
                self.storage.queue(io);
            }
            at += span.length_bytes();
        }
        if one.transfers == 0 {
            self.finish(id, place, Status::Error);
        }
    }

    /// Hands a discard to storage.
    pub(super) fn queue_discard(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let Some(disk) = self.disks.get(queue.disk as usize).and_then(Option::as_ref) else { return };
        let Some(one) = queue.in_flight(place) else { return };
        let extent = extent_of(&one.request);
        let token = Token::Request { queue: id, place };
        one.transfers = 1;
        if disk.is_chain {
            let disk = queue.disk;
            return self.submit(disk, token, Op::Discard, extent);
        }
        let Some(offset_bytes) = disk.offset_of(extent) else {
            return self.finish(id, place, Status::Error);
        };
        let token = token.encode();
        let kind = IoKind::Discard { length_bytes: extent.sectors.saturating_mul(rings::SECTOR_BYTES) };
        self.storage.queue(Io { token, file: disk.file, kind, offset_bytes, span: Span::EMPTY });
    }

    /// Answers a request and gives its memory back.
    pub(super) fn finish(&mut self, id: u32, place: u16, status: Status) {
        self.end_mapped(id, place);
        self.end_epoch(id, place);
        self.leave(id, place);
        let Some(queue) = self.queue(id) else { return };
        let guest = queue.guest;
        let held = queue.answer(place, status);
        self.release(guest, held);
        self.touch(id);
    }

    /// Tells the disk that a request ends which it had let in.
    fn leave(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let disk_id = queue.disk;
        let Some(disk) = self.disks.get_mut(disk_id as usize).and_then(Option::as_mut) else { return };
        let Some(one) = queue.in_flight(place).filter(|one| one.stage != Stage::HeldBack) else { return };
        let is_barrier = one.request.operation == Operation::Barrier;
        disk.leave(is_barrier);
        if is_barrier {
            self.scratch.reopened.push(disk_id);
        } else if disk.has_barrier() {
            self.scratch.look_at(disk_id);
        }
    }

    /// From now on, flushes wait for this write.
    pub(super) fn begin_epoch(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let Some(disk) = self.disks.get_mut(queue.disk as usize).and_then(Option::as_mut) else { return };
        if let Some(one) = queue.in_flight(place) {
            one.epoch = Some(disk.write_begins());
        }
    }

    /// Flushes wait for this write no longer. Does nothing for what is no write, or has ended before.
    fn end_epoch(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let disk = queue.disk;
        let Some(epoch) = queue.in_flight(place).and_then(|one| one.epoch.take()) else { return };
        if let Some(open) = self.disk(disk) {
            open.write_ends(epoch);
            if open.flushing() {
                self.scratch.look_at(disk);
            }
        }
    }

    pub(super) fn start_flushes(&mut self) {
        while let Some(id) = self.scratch.flush_disks.pop() {
            self.start_barrier(id);
            let Some(disk) = self.disk(id) else { continue };
            if !disk.start_flush() {
                continue;
            }
            if disk.read_only {
                self.flush_done(id, Ok(()));
                continue;
            }
            if disk.is_chain {
                self.submit(id, Token::Flush(id), Op::Flush, Extent { sector: 0, sectors: 0 });
                continue;
            }
            let (token, file) = (Token::Flush(id).encode(), disk.file);
            self.storage.queue(Io { token, file, kind: IoKind::Flush, offset_bytes: 0, span: Span::EMPTY });
        }
    }

    /// Starts the barrier that waited for everything before it, if that has ended.
    fn start_barrier(&mut self, disk: u32) {
        let Some(request) = self.disk(disk).and_then(Disk::start_barrier) else { return };
        let Some(Token::Request { queue, place }) = Token::decode(request) else { return };
        let one = self.queue(queue).and_then(|queue| queue.in_flight(place));
        let has_data = one.is_some_and(|one| one.request.has_data());
        self.queue_flush(queue, place, if has_data { Stage::Preflush } else { Stage::Flush });
    }

    pub(super) fn flush_done(&mut self, id: u32, result: Result<(), StorageError>) {
        let mut served = std::mem::take(&mut self.scratch.served);
        let Some(disk) = self.disk(id) else { return };
        disk.flush_ends(&mut served);
        // A format judges by itself, and may recover: a full medium is no failed `fdatasync`.
        let result = if disk.is_chain { result } else { disk.judge_flush(result) };
        for token in served.drain(..) {
            match Token::decode(token) {
                Some(Token::Request { queue, place }) => self.flushed(queue, place, &result),
                Some(Token::Sync(disk)) => self.report(PumpEvent::Synced(DiskId(disk), result.is_ok())),
                Some(Token::Outside(place)) => self.outside_done(place, result.clone()),
                Some(Token::Flush(_) | Token::Work(_)) | None => {}
            }
        }
        self.scratch.served = served;
        self.scratch.look_at(id);
    }

    fn flushed(&mut self, id: u32, place: u16, result: &Result<(), StorageError>) {
        let Some(queue) = self.queue(id) else { return };
        let has_ring = queue.ring.is_some();
        let Some(one) = queue.in_flight(place) else { return };
        let (stage, sector) = (one.stage, one.request.sector);
        match (result, stage) {
            (Err(error), _) => {
                self.storage_failed(id, "flush", sector, error.clone());
                self.finish(id, place, Status::Error);
            }
            (Ok(()), Stage::Preflush) if has_ring => {
                self.begin_epoch(id, place);
                // Not straight: this round's copies are made, and the next round may be in another turn.
                self.start_buffered(id, place);
            }
            // The guest is gone: what its grants name now may be anything, and must not be written.
            (Ok(()), Stage::Preflush) => self.finish(id, place, Status::Error),
            (Ok(()), _) => self.finish(id, place, Status::Okay),
        }
    }
}
