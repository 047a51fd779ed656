//! Reads, writes, discards: from the extent that was asked to the work that it takes.

use alloc::collections::VecDeque;

use super::flight::Flight;
use super::status::{STATUS_BYTES, Status};
use super::{Actor, Descent, Disk, Op, Outcome, Payload, Request, Work, WorkId, WorkKind, bytes_of};
use crate::error::Failure;
use crate::format::{Prepared, Step, Wait, Zeroed};
use crate::pages::Pages;
use crate::{Extent, Place};

/// Parts of a request that are looked up before others have their turn: a discard of a whole disk has millions.
const PARTS_PER_TURN: u32 = 64;

/// A request that has no outcome yet.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) request: Request,
    /// Its number: what was unlinked before it began is nothing to it.
    pub(super) user: u64,
    epoch: Option<u64>,
    /// The first sector that no work has been made for.
    cursor: u64,
    /// Sectors from the cursor on that are to be written although they are to become zero.
    zeroes_to_write: u64,
    /// Work and allocating writes that have not ended.
    pub(super) outstanding: u32,
    failed: Option<Failure>,
    descent: Descent,
    /// What a status has found so far.
    pub(super) status: Status,
}

impl Active {
    pub(super) fn new(request: Request, user: u64, epoch: Option<u64>) -> Active {
        let cursor = request.extent.sector;
        Active {
            request,
            user,
            epoch,
            cursor,
            zeroes_to_write: 0,
            outstanding: 0,
            failed: None,
            descent: Descent::default(),
            status: Status::default(),
        }
    }

    /// A request that needs no work.
    pub(super) fn in_place(request: Request, user: u64, epoch: Option<u64>) -> Active {
        let cursor = request.extent.end();
        Active { cursor, outstanding: 1, ..Active::new(request, user, epoch) }
    }

    /// Of a write: which flushes wait for it.
    pub(super) fn epoch(&self) -> Option<u64> {
        self.epoch
    }

    fn rest(&self) -> Extent {
        Extent { sector: self.cursor, sectors: self.request.extent.end().saturating_sub(self.cursor) }
    }

    fn fail(&mut self, failure: Failure) {
        self.failed = self.failed.or(Some(failure));
        self.cursor = self.request.extent.end();
    }
}

/// Which writes a flush waits for: every one that was submitted before it.
#[derive(Debug, Default)]
pub(super) struct Epochs {
    current: u64,
    writes_in_current: u32,
    closed: VecDeque<(u32, u64)>,
    /// Flushes whose writes have ended: token, and what must be durable.
    pub(super) syncing: VecDeque<(u64, crate::Stamp, crate::Tick)>,
}

impl Epochs {
    pub(super) fn write_begins(&mut self) -> u64 {
        self.writes_in_current += 1;
        self.current
    }

    pub(super) fn write_ends(&mut self, epoch: u64) {
        let age = crate::bytes::index(self.current.saturating_sub(epoch));
        let count = match self.closed.len().checked_sub(age) {
            Some(place) if age > 0 => self.closed.get_mut(place).map(|(writes, _)| writes),
            _ => Some(&mut self.writes_in_current),
        };
        if let Some(count) = count {
            *count = count.saturating_sub(1);
        }
    }

    pub(super) fn flush_begins(&mut self, token: u64) {
        self.closed.push_back((self.writes_in_current, token));
        self.current += 1;
        self.writes_in_current = 0;
    }

    /// Takes the next flush whose writes have ended.
    pub(super) fn flush_ready(&mut self) -> Option<u64> {
        let (_, token) = *self.closed.front().filter(|(writes, _)| *writes == 0)?;
        self.closed.pop_front();
        Some(token)
    }

    pub(super) fn flushes(&self) -> usize {
        self.closed.len() + self.syncing.len()
    }
}

impl Disk {
    pub(super) fn active(&mut self, at: u32) -> Option<&mut Active> {
        self.actives.get_mut(at as usize)?.as_mut()
    }

    /// Goes on with a request until it waits, or ends.
    pub(super) fn run_request(&mut self, pages: &mut Pages, at: u32) {
        for _ in 0..PARTS_PER_TURN {
            let Some(active) = self.active(at) else { return };
            let rest = active.rest();
            let op = active.request.op;
            if rest.sectors == 0 {
                return if op == Op::Status { self.tell_status(at) } else { self.end_request(at) };
            }
            if !self.flights.room() {
                self.busy.push_back(Actor::Request(at));
                return;
            }
            let step = match op {
                Op::Read => self.read_some(pages, at, rest),
                Op::Status => self.status_some(pages, at, rest),
                _ if self.read_only => Err(Failure::ReadOnly.into()),
                _ if self.shared.ledger.failed() => Err(Failure::SyncFailed.into()),
                // Pages that cannot be written stay in the cache of all disks: there must not be more and more of them.
                _ if self.stuck && self.shared.ledger.dirty_pages() > self.limits.dirty_pages => {
                    Err(self.failure.into())
                }
                _ => self.write_some(pages, at, rest, op),
            };
            match step {
                Ok(sectors) => {
                    let Some(active) = self.active(at) else { return };
                    active.cursor = active.cursor.saturating_add(sectors);
                }
                Err(wait) => {
                    if let Some(failure) = self.wait(Actor::Request(at), wait) {
                        self.fail_request(at, failure);
                    }
                    return;
                }
            }
        }
        let id = self.flights.add(Flight::Turn(at));
        if let Some(active) = self.active(at) {
            active.outstanding += 1;
        }
        let (image, kind, payload) = (self.leaf_image(), WorkKind::Yield, Payload::None);
        self.out.push_back(Work { id, image, kind, offset_bytes: 0, length_bytes: 0, payload });
    }

    /// Makes work for the first part of what is left of a read.
    fn read_some(&mut self, pages: &mut Pages, at: u32, rest: Extent) -> Step<u64> {
        let Some(active) = self.active(at) else { return Ok(rest.sectors) };
        let mut descent = core::mem::take(&mut active.descent);
        let found = self.resolve(pages, rest, &mut descent);
        if let Some(active) = self.active(at) {
            active.descent = descent;
        }
        let (run, layer) = found?;
        let image = self.layers.get(layer).map_or(0, |layer| layer.image);
        let length_bytes = bytes_of(run.sectors);
        match run.place {
            Place::Data { offset_bytes } => {
                let payload = self.guest_memory(at, rest.sector);
                self.start_guest(
                    at,
                    Work { id: WorkId(0), image, kind: WorkKind::Read, offset_bytes, length_bytes, payload },
                );
            }
            Place::Zero | Place::Parent => {
                let payload = self.guest_memory(at, rest.sector);
                let kind = WorkKind::ZeroGuest;
                self.start_guest(
                    at,
                    Work { id: WorkId(0), image, kind, offset_bytes: 0, length_bytes, payload },
                );
            }
            Place::Compressed { offset_bytes, bytes, skip_bytes } => {
                self.unpack_for(Actor::Request(at), layer, offset_bytes, bytes)?;
                let from = skip_bytes as usize;
                let length = crate::bytes::index(length_bytes);
                let payload = self.guest_memory(at, rest.sector);
                let id = self.flights.add(Flight::CopyUnit { request: at, from, length });
                self.unpacker.busy = true;
                self.out.push_back(Work {
                    id,
                    image,
                    kind: WorkKind::CopyToGuest,
                    offset_bytes: 0,
                    length_bytes,
                    payload: match payload {
                        Payload::Guest { .. } => payload,
                        _ => Payload::Own,
                    },
                });
                if let Some(active) = self.active(at) {
                    active.outstanding += 1;
                }
            }
        }
        Ok(run.sectors)
    }

    /// Looks up the first part of what is left of a status; all of it, when no more can be told.
    fn status_some(&mut self, pages: &mut Pages, at: u32, rest: Extent) -> Step<u64> {
        let Some(active) = self.active(at) else { return Ok(rest.sectors) };
        let mut descent = core::mem::take(&mut active.descent);
        let found = self.resolve(pages, rest, &mut descent);
        let Some(active) = self.active(at) else { return Ok(rest.sectors) };
        active.descent = descent;
        let (run, _) = found?;
        let zero = matches!(run.place, Place::Zero | Place::Parent);
        Ok(if active.status.add(run.sectors, zero) { run.sectors } else { rest.sectors })
    }

    /// Has what was found copied to the request's memory.
    fn tell_status(&mut self, at: u32) {
        let Some(active) = self.active(at) else { return };
        active.status.finish();
        active.outstanding += 1;
        let payload = Payload::Guest { token: active.request.token, offset_bytes: 0 };
        let id = self.flights.add(Flight::StatusOut(at));
        let (image, kind, length_bytes) = (self.leaf_image(), WorkKind::CopyToGuest, STATUS_BYTES as u64);
        self.out.push_back(Work { id, image, kind, offset_bytes: 0, length_bytes, payload });
    }

    pub(super) fn guest_memory(&mut self, at: u32, sector: u64) -> Payload {
        self.active(at).map_or(Payload::None, |active| Payload::Guest {
            token: active.request.token,
            offset_bytes: bytes_of(sector.saturating_sub(active.request.extent.sector)),
        })
    }

    /// Sends out work whose end is a part of the end of a request.
    fn start_guest(&mut self, at: u32, mut work: Work) {
        work.id = self.flights.add(Flight::Guest(at));
        self.out.push_back(work);
        if let Some(active) = self.active(at) {
            active.outstanding += 1;
        }
    }

    /// Makes work for the first part of what is left of a write, discard or write-zeroes.
    fn write_some(&mut self, pages: &mut Pages, at: u32, rest: Extent, op: Op) -> Step<u64> {
        let mut rest = self.unlocked(rest)?;
        let image = self.leaf_image();
        if op != Op::Write {
            let left = self.active(at).map_or(0, |active| active.zeroes_to_write);
            if left == 0 {
                let zeroed = self.ask(pages, 0, |leaf, cx| leaf.zero(cx, rest, op == Op::Discard))?;
                self.poke = true;
                match zeroed {
                    Zeroed::Done { sectors } => {
                        self.remap(pages, Extent { sector: rest.sector, sectors });
                        return Ok(sectors);
                    }
                    Zeroed::InPlace { offset_bytes, sectors } => {
                        let kind = if op == Op::Discard { WorkKind::Punch } else { WorkKind::Zero };
                        let length_bytes = bytes_of(sectors);
                        let payload = Payload::None;
                        self.start_guest(
                            at,
                            Work { id: WorkId(0), image, kind, offset_bytes, length_bytes, payload },
                        );
                        return Ok(sectors);
                    }
                    Zeroed::Write { sectors } => rest.sectors = rest.sectors.min(sectors),
                }
            } else {
                rest.sectors = rest.sectors.min(left);
            }
            if let Some(active) = self.active(at) {
                active.zeroes_to_write = rest.sectors;
            }
        }
        let sectors = self.store_some(pages, at, rest, op)?;
        if let Some(active) = self.active(at) {
            active.zeroes_to_write = active.zeroes_to_write.saturating_sub(sectors);
        }
        Ok(sectors)
    }

    /// Makes work to store data, or zeroes like data.
    fn store_some(&mut self, pages: &mut Pages, at: u32, rest: Extent, op: Op) -> Step<u64> {
        let Some(place) = self.payments.iter().position(Option::is_none) else { return Err(Wait::Busy) };
        match self.ask(pages, 0, |leaf, cx| leaf.prepare(cx, rest))? {
            Prepared::InPlace { offset_bytes, sectors } => {
                let image = self.leaf_image();
                let payload =
                    if op == Op::Write { self.guest_memory(at, rest.sector) } else { Payload::None };
                let kind = if op == Op::Write { WorkKind::Write } else { WorkKind::Zero };
                let length_bytes = bytes_of(sectors);
                self.start_guest(
                    at,
                    Work { id: WorkId(0), image, kind, offset_bytes, length_bytes, payload },
                );
                Ok(sectors)
            }
            Prepared::Allocated(payout) => Ok(self.start_payment(place, at, payout, rest, op == Op::Write)),
        }
    }

    /// Part of a request has ended.
    pub(super) fn part_ended(&mut self, at: u32, result: Result<(), Failure>) {
        let Some(active) = self.active(at) else { return };
        active.outstanding = active.outstanding.saturating_sub(1);
        if let Err(failure) = result {
            active.fail(failure);
        }
        self.end_request(at);
    }

    pub(super) fn fail_request(&mut self, at: u32, failure: Failure) {
        if let Some(active) = self.active(at) {
            active.fail(failure);
        }
        self.end_request(at);
    }

    /// Gives a request its outcome, if nothing of it is left.
    fn end_request(&mut self, at: u32) {
        let Some(slot) = self.actives.get_mut(at as usize) else { return };
        let Some(active) = slot.as_ref().filter(|one| one.outstanding == 0 && one.rest().sectors == 0) else {
            return;
        };
        let (token, result) = (active.request.token, active.failed.map_or(Ok(()), Err));
        let epoch = active.epoch;
        *slot = None;
        self.free_actives.push(at);
        self.outcomes.push_back(Outcome { token, result });
        if let Some(epoch) = epoch {
            self.epochs.write_ends(epoch);
        }
    }
}
