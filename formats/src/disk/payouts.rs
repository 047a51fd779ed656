//! Allocating writes: filling what the guest does not write, storing what it writes, committing.

use alloc::vec::Vec;

use super::flight::Flight;
use super::{Actor, BOUNCE_BYTES, Descent, Disk, Payload, Work, WorkKind, bytes_of};
use crate::error::Failure;
use crate::format::{Before, Payout, Step, Wait};
use crate::ledger::Tick;
use crate::pages::Pages;
use crate::{Extent, Place, SECTOR_BYTES};

/// An allocating write under way.
#[derive(Debug)]
pub(super) struct Payment {
    request: u32,
    payout: Payout,
    /// What is left to fill: before and behind what the guest writes.
    fills: [Extent; 2],
    outstanding: u32,
    failed: Option<Failure>,
    descent: Descent,
}

impl Disk {
    pub(super) fn payment(&mut self, at: u32) -> Option<&mut Payment> {
        self.payments.get_mut(at as usize)?.as_mut()
    }

    /// The part of an extent before the first sector whose mapping is being changed.
    pub(super) fn unlocked(&self, extent: Extent) -> Step<Extent> {
        if self.payments_out == 0 {
            return Ok(extent);
        }
        let locked = self.payments.iter().flatten().map(|payment| payment.payout.locked);
        let first = locked.filter(|lock| lock.overlaps(&extent)).map(|lock| lock.sector).min();
        match first {
            None => Ok(extent),
            Some(first) if first > extent.sector => {
                Ok(Extent { sector: extent.sector, sectors: first - extent.sector })
            }
            Some(_) => Err(Wait::Busy),
        }
    }

    /// Begins to write into new space, for the part of `rest` that it covers. Says how many sectors that is.
    pub(super) fn start_payment(
        &mut self,
        place: usize,
        request: u32,
        payout: Payout,
        rest: Extent,
        data: bool,
    ) -> u64 {
        let at = crate::bytes::narrow(place as u64);
        let end = payout.extent.end().min(rest.end());
        let sectors = end.saturating_sub(rest.sector);
        // What is to become zero is filled like what lies around it, except that nobody need ask what was there.
        let head = Extent {
            sector: payout.extent.sector,
            sectors: rest.sector.saturating_sub(payout.extent.sector),
        };
        let tail = Extent { sector: end, sectors: payout.extent.end().saturating_sub(end) };
        let payment = Payment {
            request,
            payout,
            fills: [head, tail],
            outstanding: 0,
            failed: None,
            descent: Descent::default(),
        };
        if let Some(slot) = self.payments.get_mut(place) {
            self.payments_out += 1;
            *slot = Some(payment);
        }
        if let Some(active) = self.active(request) {
            active.outstanding += 1;
        }
        let offset_bytes = payout.offset_bytes + bytes_of(rest.sector.saturating_sub(payout.extent.sector));
        let length_bytes = bytes_of(sectors);
        if data {
            let payload = self.guest_memory(request, rest.sector);
            self.start_paid(at, WorkKind::Write, offset_bytes, length_bytes, payload);
        } else if !payout.reads_zero {
            self.start_paid(at, WorkKind::Zero, offset_bytes, length_bytes, Payload::None);
        }
        self.ready.push_back(Actor::Payment(at));
        sectors
    }

    fn start_paid(
        &mut self,
        at: u32,
        kind: WorkKind,
        offset_bytes: u64,
        length_bytes: u64,
        payload: Payload,
    ) {
        let id = self.flights.add(Flight::Payment(at));
        let image = self.leaf_image();
        self.out.push_back(Work { id, image, kind, offset_bytes, length_bytes, payload });
        if let Some(payment) = self.payment(at) {
            payment.outstanding += 1;
        }
    }

    /// Goes on with an allocating write until it waits, or ends.
    pub(super) fn run_payment(&mut self, pages: &mut Pages, at: u32) {
        loop {
            let Some(payment) = self.payment(at) else { return };
            if payment.failed.is_some() {
                return self.end_payment(pages, at);
            }
            let fill = payment.fills.iter().copied().find(|fill| fill.sectors > 0);
            let Some(fill) = fill else { return self.commit(pages, at) };
            if let Err(wait) = self.fill_some(pages, at, fill) {
                if let Some(failure) = self.wait(Actor::Payment(at), wait) {
                    self.fail_payment(pages, at, failure);
                }
                return;
            }
        }
    }

    /// Makes work for the first part of what is to be filled.
    fn fill_some(&mut self, pages: &mut Pages, at: u32, fill: Extent) -> Step<()> {
        if !self.flights.room() {
            return Err(Wait::Busy);
        }
        let Some(payment) = self.payment(at) else { return Ok(()) };
        let payout = payment.payout;
        let mut descent = core::mem::take(&mut payment.descent);
        let found = self.resolve(pages, fill, &mut descent);
        if let Some(payment) = self.payment(at) {
            payment.descent = descent;
        }
        let (run, layer) = found?;
        let image = self.layers.get(layer).map_or(0, |layer| layer.image);
        let to_bytes = payout.offset_bytes + bytes_of(fill.sector.saturating_sub(payout.extent.sector));
        let mut sectors = run.sectors;
        match run.place {
            Place::Zero | Place::Parent if payout.reads_zero => {}
            Place::Zero | Place::Parent => {
                self.start_paid(at, WorkKind::Zero, to_bytes, bytes_of(sectors), Payload::None);
            }
            Place::Data { offset_bytes } => {
                sectors = sectors.min(BOUNCE_BYTES as u64 / SECTOR_BYTES);
                let length_bytes = bytes_of(sectors);
                let bounce = self.bounce(crate::bytes::index(length_bytes))?;
                self.read_own(
                    Flight::FillIn { payment: at, bounce, to_bytes },
                    image,
                    offset_bytes,
                    length_bytes,
                );
                if let Some(payment) = self.payment(at) {
                    payment.outstanding += 1;
                }
            }
            Place::Compressed { offset_bytes, bytes, skip_bytes } => {
                self.unpack_for(Actor::Payment(at), layer, offset_bytes, bytes)?;
                sectors = sectors.min(BOUNCE_BYTES as u64 / SECTOR_BYTES);
                let length = crate::bytes::index(bytes_of(sectors));
                let mut bounce = self.bounce(length)?;
                let from = skip_bytes as usize;
                if let Some(part) = self.unpacker.unit.get(from..from.saturating_add(length)) {
                    bounce.copy_from_slice(part);
                }
                self.fill_out(at, bounce, to_bytes);
                if let Some(payment) = self.payment(at) {
                    payment.outstanding += 1;
                }
            }
        }
        let Some(payment) = self.payment(at) else { return Ok(()) };
        if let Some(fill) = payment.fills.iter_mut().find(|fill| fill.sectors > 0) {
            fill.sector += sectors;
            fill.sectors -= sectors;
        }
        Ok(())
    }

    /// A buffer of this length for copy-on-write.
    fn bounce(&mut self, length: usize) -> Step<Vec<u8>> {
        let mut bounce = match self.bounces.pop() {
            Some(bounce) => bounce,
            None if self.bounces_made < self.limits.bounces.max(1) => {
                self.bounces_made += 1;
                Vec::with_capacity(BOUNCE_BYTES)
            }
            None => return Err(Wait::Busy),
        };
        bounce.clear();
        bounce.resize(length, 0);
        Ok(bounce)
    }

    /// What is to be filled in has been read.
    pub(super) fn fill_read(
        &mut self,
        pages: &mut Pages,
        at: u32,
        mut bounce: Vec<u8>,
        to_bytes: u64,
        result: Result<&[u8], Failure>,
    ) {
        match result {
            Ok(bytes) => {
                for (to, from) in bounce.iter_mut().zip(bytes) {
                    *to = *from;
                }
                self.fill_out(at, bounce, to_bytes);
            }
            Err(failure) => {
                self.bounces.push(bounce);
                self.payment_part(pages, at, Err(failure));
            }
        }
    }

    fn fill_out(&mut self, at: u32, bounce: Vec<u8>, to_bytes: u64) {
        let length_bytes = bounce.len() as u64;
        let id = self.flights.add(Flight::FillOut { payment: at, bounce });
        let (image, kind) = (self.leaf_image(), WorkKind::Write);
        self.out.push_back(Work {
            id,
            image,
            kind,
            offset_bytes: to_bytes,
            length_bytes,
            payload: Payload::Own,
        });
    }

    /// Part of an allocating write has ended.
    pub(super) fn payment_part(&mut self, pages: &mut Pages, at: u32, result: Result<(), Failure>) {
        let Some(payment) = self.payment(at) else { return };
        payment.outstanding = payment.outstanding.saturating_sub(1);
        if let Err(failure) = result {
            payment.failed = payment.failed.or(Some(failure));
        }
        if payment.failed.is_some() {
            self.end_payment(pages, at);
        } else if payment.outstanding == 0 && payment.fills.iter().all(|fill| fill.sectors == 0) {
            self.ready.push_back(Actor::Payment(at));
        }
    }

    pub(super) fn fail_payment(&mut self, pages: &mut Pages, at: u32, failure: Failure) {
        if let Some(payment) = self.payment(at) {
            payment.failed = payment.failed.or(Some(failure));
        }
        self.end_payment(pages, at);
    }

    /// Everything is filled: once it is also written, reads are to find it.
    fn commit(&mut self, pages: &mut Pages, at: u32) {
        let Some(payment) = self.payment(at) else { return };
        if payment.outstanding > 0 {
            return;
        }
        let payout = payment.payout;
        // New space that reads as zero and held nothing before may be pointed to at once: after a crash each of its sectors is
        // what it was, zero, or what was written.
        let was_zero = match payout.before {
            Before::Zero => true,
            Before::Parent => self.layers.len() == 1,
            Before::Data => false,
        };
        let after = if payout.reads_zero && was_zero { Tick::NONE } else { self.shared.ledger.tick() };
        match self.ask(pages, 0, |leaf, cx| leaf.commit(cx, &payout, after)) {
            Ok(()) => {
                self.remap(pages, payout.extent);
                self.close_payment(at, Ok(()));
            }
            Err(wait) => {
                if let Some(failure) = self.wait(Actor::Payment(at), wait) {
                    self.fail_payment(pages, at, failure);
                }
            }
        }
    }

    /// Gives the space of a failed write back, once nothing is on its way there.
    fn end_payment(&mut self, pages: &mut Pages, at: u32) {
        let Some(payment) = self.payment(at) else { return };
        let Some(failure) = payment.failed.filter(|_| payment.outstanding == 0) else { return };
        let payout = payment.payout;
        let _ = self.ask(pages, 0, |leaf, cx| {
            leaf.release(cx, &payout);
            Ok(())
        });
        self.close_payment(at, Err(failure));
    }

    fn close_payment(&mut self, at: u32, result: Result<(), Failure>) {
        let Some(payment) = self.payments.get_mut(at as usize).and_then(Option::take) else { return };
        self.payments_out -= 1;
        self.poke = true;
        self.part_ended(payment.request, result);
    }
}
