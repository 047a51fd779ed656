//! Where things end, and those who waited try again: work that is done, pages, flushes, closing.

use super::flight::Flight;
use super::{Actor, Disk, Outcome, Payload, Work, WorkId, WorkKind};
use crate::error::Failure;
use crate::format::{OrderKind, Step, Wait};
use crate::ledger::{Next, Stamp, Tick};
use crate::pages::{Found, Key, PageRef, Pages};

/// How far closing has come.
#[derive(Clone, Copy, Debug)]
pub(super) enum Closing {
    /// The format leaves the image as others expect it.
    Format,
    /// What it changed last becomes durable.
    Sync(Stamp, Tick),
}

/// Times that those who wait for something try again although nothing is under way, before they are failed.
const IDLE_TRIES: u32 = 4;

impl Disk {
    /// Takes the end of a piece of work; for a read with [`super::Payload::Own`], `bytes` is what was read (shorter is followed by
    /// zeroes).
    pub fn done(&mut self, pages: &mut Pages, id: WorkId, result: Result<(), Failure>, bytes: &[u8]) {
        let Some(flight) = self.flights.take(id) else { return };
        match flight {
            Flight::PageIn(page) => self.page_read(pages, page, result, bytes),
            Flight::PageOut(page) => {
                self.shared.ledger.write_ended(pages, page, result);
                self.stuck = result.is_err();
                if let Err(failure) = result {
                    self.pages_failed(failure);
                }
            }
            Flight::Sync => {
                self.shared.ledger.sync_ended(pages, result);
                self.poke = true;
                if result.is_err() {
                    self.pages_failed(Failure::SyncFailed);
                    self.work_failed(pages, Failure::SyncFailed);
                }
            }
            Flight::InPlace(at) => {
                self.in_place_ended(at);
                if self.is_at_rest() {
                    return;
                }
            }
            Flight::Guest(at) | Flight::StatusOut(at) => self.part_ended(at, result),
            Flight::Payment(at) => self.payment_part(pages, at, result),
            Flight::FillIn { payment, bounce, to_bytes } => {
                self.fill_read(pages, payment, bounce, to_bytes, result.map(|()| bytes));
            }
            Flight::FillOut { payment, bounce } => {
                self.bounces.push(bounce);
                self.payment_part(pages, payment, result);
            }
            Flight::UnitIn { for_whom, layer, offset_bytes, cut } => {
                let result = self.unit_read(layer, offset_bytes, cut, result.map(|()| bytes));
                if let Err(failure) = result {
                    self.busy.retain(|actor| *actor != for_whom);
                    self.fail(pages, for_whom, failure);
                }
            }
            Flight::CopyUnit { request, .. } => {
                self.unpacker.busy = false;
                self.part_ended(request, result);
            }
            Flight::Turn(at) => {
                if let Some(active) = self.active(at) {
                    active.outstanding = active.outstanding.saturating_sub(1);
                }
                self.ready.push_back(Actor::Request(at));
            }
            Flight::Order { tag, .. } => {
                self.poke = true;
                let _ = self.ask(pages, 0, |leaf, cx| {
                    leaf.answered(cx, tag, result.map(|()| bytes));
                    Ok(())
                });
            }
        }
        self.ready.append(&mut self.busy);
        self.advance(pages);
    }

    /// Nobody waits for anything to end.
    fn is_at_rest(&self) -> bool {
        let nobody = self.ready.is_empty() && self.busy.is_empty() && self.epochs.flushes() == 0;
        nobody && !self.poke && !self.working && self.closing.is_none()
    }

    /// Runs whoever can run, until nobody can.
    pub(super) fn advance(&mut self, pages: &mut Pages) {
        self.run(pages);
        let length = self.layers.first().map_or(0, |leaf| leaf.format.page_bytes() as usize);
        pages.tell_keeper(length);
    }

    fn run(&mut self, pages: &mut Pages) {
        let mut tries = 0;
        loop {
            while let Some(actor) = self.ready.pop_front() {
                match actor {
                    Actor::Request(at) => self.run_request(pages, at),
                    Actor::Payment(at) => self.run_payment(pages, at),
                    Actor::Format => self.poke = true,
                }
            }
            self.work(pages);
            self.close_some(pages);
            self.start_flushes();
            self.write_pages(pages);
            self.end_flushes();
            if self.ready.is_empty() && (self.busy.is_empty() || self.flights.count() > 0) {
                return;
            }
            tries += 1;
            if tries > IDLE_TRIES {
                // Flushes may have waited for who is failed: once more, and nobody waits any longer.
                self.unstick(pages);
            }
            self.poke = true;
            self.ready.append(&mut self.busy);
        }
    }

    /// Nothing is under way, and yet somebody waits: better an error than a request without an end.
    fn unstick(&mut self, pages: &mut Pages) {
        if !self.paused {
            self.stalls += 1;
        }
        while let Some(actor) = self.busy.pop_front() {
            self.fail(pages, actor, self.failure);
        }
    }

    /// Lets the format go on with what is under way.
    fn work(&mut self, pages: &mut Pages) {
        if !(self.poke || self.working) || self.paused || self.read_only || self.closing.is_some() {
            return;
        }
        self.poke = false;
        // A request without work under way has no use for what it was told before.
        let using = self.actives.iter().flatten().filter(|active| active.outstanding > 0);
        let oldest = using.map(|active| active.user).min();
        self.shared.users.0 = oldest.map_or(self.shared.users.1, |user| user.saturating_sub(1));
        let step = self.ask(pages, 0, |leaf, cx| leaf.work(cx));
        self.working = step.is_err();
        self.send_orders();
        if let Err(wait) = step {
            self.format_waits(pages, wait);
        }
    }

    fn format_waits(&mut self, pages: &mut Pages, wait: Wait) {
        match wait {
            Wait::Need(_) => {
                if let Some(page) = self.awaited.take() {
                    self.waiting.push((page, Actor::Format));
                }
            }
            Wait::Busy => {}
            Wait::Failed(failure) => self.work_failed(pages, failure),
        }
    }

    fn send_orders(&mut self) {
        while let Some(order) = self.shared.orders.pop_front() {
            let (kind, length_bytes, payload, bytes) = match order.kind {
                OrderKind::Read(length) => {
                    (WorkKind::Read, u64::from(length), Payload::Own, alloc::vec::Vec::new())
                }
                OrderKind::Write(bytes) => (WorkKind::Write, bytes.len() as u64, Payload::Own, bytes),
                OrderKind::Zero(length) => (WorkKind::Zero, length, Payload::None, alloc::vec::Vec::new()),
                OrderKind::Punch(length) => (WorkKind::Punch, length, Payload::None, alloc::vec::Vec::new()),
                OrderKind::SetLength => (WorkKind::SetLength, 0, Payload::None, alloc::vec::Vec::new()),
            };
            let id = self.flights.add(Flight::Order { tag: order.tag, bytes });
            let image = self.leaf_image();
            self.out.push_back(Work {
                id,
                image,
                kind,
                offset_bytes: order.offset_bytes,
                length_bytes,
                payload,
            });
        }
    }

    /// Parks an actor. Says why it must fail instead, if it must.
    pub(super) fn wait(&mut self, actor: Actor, wait: Wait) -> Option<Failure> {
        match wait {
            Wait::Need(_) => match self.awaited.take() {
                Some(page) => self.waiting.push((page, actor)),
                None => self.busy.push_back(actor),
            },
            Wait::Busy => {
                self.poke = true;
                self.busy.push_back(actor);
            }
            Wait::Failed(failure) => return Some(failure),
        }
        None
    }

    /// Has a page read, unless it is being read already.
    pub(super) fn fetch(&mut self, pages: &mut Pages, layer: usize, offset_bytes: u64) -> Wait {
        let Some(layer) = self.layers.get(layer) else { return Wait::Busy };
        let key = Key { disk: self.shared.disk, image: layer.image, offset_bytes };
        let page = match pages.find(key) {
            Found::Ready(_) => return Wait::Busy,
            Found::Reading(page) => page,
            Found::Absent => {
                let Some(page) = pages.claim(key) else {
                    // Every page is dirty or being read: those of this disk can be written.
                    let stamp = self.shared.ledger.stamp();
                    self.shared.ledger.want(stamp);
                    if self.flights.count() == 0 && !self.pages_paused && !self.shared.ledger.failed() {
                        // They are all others': nothing of this disk's own will end, so it asks again in a while.
                        let id = self.flights.add(Flight::Turn(u32::MAX));
                        let (image, kind, payload) = (self.leaf_image(), WorkKind::Yield, Payload::None);
                        self.out.push_back(Work {
                            id,
                            image,
                            kind,
                            offset_bytes: 0,
                            length_bytes: 0,
                            payload,
                        });
                    }
                    return Wait::Busy;
                };
                let (image, length_bytes) = (layer.image, u64::from(layer.format.page_bytes()));
                self.read_own(Flight::PageIn(page), image, offset_bytes, length_bytes);
                page
            }
        };
        self.awaited = Some(page);
        Wait::Need(crate::format::PageAt(offset_bytes))
    }

    /// Has a part of an image read for the disk itself.
    pub(super) fn read_own(&mut self, flight: Flight, image: u32, offset_bytes: u64, length_bytes: u64) {
        let id = self.flights.add(flight);
        let (kind, payload) = (WorkKind::Read, Payload::Own);
        self.out.push_back(Work { id, image, kind, offset_bytes, length_bytes, payload });
    }

    fn page_read(&mut self, pages: &mut Pages, page: PageRef, result: Result<(), Failure>, bytes: &[u8]) {
        match result {
            Ok(()) => pages.fill(page, bytes),
            Err(_) => pages.abandon(page),
        }
        let mut at = 0;
        while let Some(&(awaited, actor)) = self.waiting.get(at) {
            if awaited != page {
                at += 1;
                continue;
            }
            self.waiting.remove(at);
            match result {
                Ok(()) => self.ready.push_back(actor),
                Err(failure) => self.fail(pages, actor, failure),
            }
        }
    }

    fn fail(&mut self, pages: &mut Pages, actor: Actor, failure: Failure) {
        match actor {
            Actor::Request(at) => self.fail_request(at, failure),
            Actor::Payment(at) => self.fail_payment(pages, at, failure),
            Actor::Format => self.work_failed(pages, failure),
        }
    }

    /// The format cannot go on: whoever may wait for it fails. The next request makes it try again.
    fn work_failed(&mut self, pages: &mut Pages, failure: Failure) {
        self.paused = true;
        self.working = true;
        self.failure = failure;
        if self.closing.take().is_some() {
            self.closed = Some(Err(failure));
        }
        for _ in 0..self.busy.len() {
            let Some(actor) = self.busy.pop_front() else { return };
            let reads = match actor {
                Actor::Request(at) => self.active(at).is_some_and(|active| !active.request.op.changes()),
                _ => false,
            };
            if reads {
                self.busy.push_back(actor);
            } else {
                self.fail(pages, actor, failure);
            }
        }
    }

    /// A page could not be written, or a sync failed: flushes that wait fail.
    fn pages_failed(&mut self, failure: Failure) {
        self.paused = true;
        self.pages_paused = true;
        self.shared.ledger.want_nothing();
        while let Some((token, _, _)) = self.epochs.syncing.pop_front() {
            self.outcomes.push_back(Outcome { token, result: Err(failure) });
        }
        if self.closing.take().is_some() {
            self.closed = Some(Err(failure));
        }
        self.failure = failure;
    }

    fn start_flushes(&mut self) {
        while let Some(token) = self.epochs.flush_ready() {
            let (stamp, tick) = (self.shared.ledger.stamp(), self.shared.ledger.tick());
            self.epochs.syncing.push_back((token, stamp, tick));
        }
    }

    fn end_flushes(&mut self) {
        if self.pages_paused {
            return self.pages_failed(self.failure);
        }
        let ledger = &self.shared.ledger;
        let planted = ledger.planted;
        while let Some(&(token, stamp, tick)) = self.epochs.syncing.front() {
            let durable = ledger.is_durable(stamp) || planted.no_flush_pages;
            let synced = ledger.is_synced(tick) || planted.no_flush;
            if !(ledger.failed() || durable && synced) {
                return;
            }
            self.epochs.syncing.pop_front();
            let result = if ledger.failed() { Err(Failure::SyncFailed) } else { Ok(()) };
            self.outcomes.push_back(Outcome { token, result });
        }
    }

    /// Starts what the ledger wants to write.
    fn write_pages(&mut self, pages: &mut Pages) {
        if self.pages_paused {
            return;
        }
        if let Some(&(_, stamp, tick)) = self.epochs.syncing.back() {
            self.shared.ledger.want(stamp);
            self.shared.ledger.want_sync(tick);
        }
        let image = self.leaf_image();
        let length_bytes = self.layers.first().map_or(0, |leaf| u64::from(leaf.format.page_bytes()));
        let limit = if pages.crowded() { 0 } else { self.limits.dirty_pages };
        match self.shared.ledger.next(pages, limit) {
            Next::Nothing => {}
            Next::Sync => {
                let id = self.flights.add(Flight::Sync);
                let (kind, payload) = (WorkKind::Sync, Payload::None);
                self.out.push_back(Work { id, image, kind, offset_bytes: 0, length_bytes: 0, payload });
            }
            Next::Write(count) => {
                for copy in self.shared.ledger.writing(count) {
                    let id = self.flights.add(Flight::PageOut(copy.page));
                    let (kind, payload) = (WorkKind::Write, Payload::Own);
                    let offset_bytes = copy.key.offset_bytes;
                    self.out.push_back(Work { id, image, kind, offset_bytes, length_bytes, payload });
                }
            }
        }
    }

    fn close_some(&mut self, pages: &mut Pages) {
        if self.in_flight() > 0 {
            return;
        }
        if self.closing.is_some() && self.shared.ledger.failed() {
            self.closing = None;
            self.closed = Some(Err(Failure::SyncFailed));
        }
        if let Some(Closing::Format) = self.closing {
            self.shared.users.0 = self.shared.users.1;
            let step: Step<()> =
                if self.read_only { Ok(()) } else { self.ask(pages, 0, |leaf, cx| leaf.close(cx)) };
            self.send_orders();
            match step {
                Ok(()) => {
                    let ledger = &mut self.shared.ledger;
                    self.closing = Some(Closing::Sync(ledger.stamp(), ledger.tick()));
                }
                Err(wait) => self.format_waits(pages, wait),
            }
        }
        if let Some(Closing::Sync(stamp, tick)) = self.closing {
            let durable = self.shared.ledger.want(stamp) & self.shared.ledger.want_sync(tick);
            if durable || self.read_only {
                self.closing = None;
                self.closed = Some(Ok(()));
            }
        }
    }
}
