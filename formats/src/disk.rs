//! A disk: an open chain of images, and the requests on it that are in flight.
//!
//! Requests go in by [`Disk::submit`]; what is to be done comes out of [`Disk::next_work`]; each piece of work is answered
//! once, by [`Disk::done`]; what became of requests comes out of [`Disk::next_outcome`]. Nothing here waits or moves bytes.
//!
//! Inside, an **actor** (a request, or an allocating write that it made) runs until it has no more to ask, or waits: for a
//! page, or for *something* to end. [`Disk::done`] is where things end, and where those who wait try again.

mod chain;
mod flight;
mod in_place;
mod payouts;
mod requests;
mod settle;
pub mod status;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::error::{Corruption, Failure};
use crate::format::{Context, Format, Order, Step, Wait};
use crate::ledger::{Ledger, Planted};
use crate::pages::{PageRef, Pages};
use crate::{Extent, Geometry, SECTOR_BYTES};

use flight::{Flight, Flights};
use payouts::Payment;
use requests::{Active, Epochs};

pub(crate) use chain::Descent;
pub use in_place::InPlace;

/// What a guest wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the request's memory.
    Read,
    /// Store the request's memory.
    Write,
    /// Read as zero from now on, or (of what no format can drop) as before. Never as the parent's data.
    Discard,
    /// Read as zero from now on.
    WriteZeroes,
    /// Make durable every write that was submitted before. The extent means nothing.
    Flush,
    /// Fill the request's memory, of [`status::STATUS_BYTES`], with where data lie and where there is nothing: see [`status`].
    Status,
}

impl Op {
    /// Whether the disk may be another afterwards.
    #[must_use]
    pub fn changes(self) -> bool {
        !matches!(self, Op::Read | Op::Flush | Op::Status)
    }
}

/// A guest's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The caller's name for it; names its memory in [`Payload::Guest`].
    pub token: u64,
    /// What.
    pub op: Op,
    /// Where.
    pub extent: Extent,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The caller's name for it.
    pub token: u64,
    /// Success, or why not. After the failure of a write any part of it may have been written.
    pub result: Result<(), Failure>,
}

/// Names a piece of work until it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkId(pub u32);

/// Something to be done. Work that is out at the same time may be done in any order; what must not be, is not out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name for [`Disk::done`].
    pub id: WorkId,
    /// In which image: the number given to [`Disk::new`].
    pub image: u32,
    /// What.
    pub kind: WorkKind,
    /// Where in the image, a multiple of 512 (except for the packed bytes of compressed units, which are read so too).
    pub offset_bytes: u64,
    /// How much; zero for [`WorkKind::Sync`] and [`WorkKind::SetLength`].
    pub length_bytes: u64,
    /// The memory.
    pub payload: Payload,
}

/// What is to be done with a part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkKind {
    /// Fill memory from the image; what lies past its end is zero.
    Read,
    /// Store memory in the image.
    Write,
    /// Make a range of the image read as zero.
    Zero,
    /// Give a range of the image back to the file system, if it takes it; to do nothing is success.
    Punch,
    /// Make the file end at `offset_bytes`; new space reads as zero. To keep a longer one when it is not cut is success.
    SetLength,
    /// `fdatasync`: covers all work that was done before this came out.
    Sync,
    /// Zero the guest's memory. The image has no part in it.
    ZeroGuest,
    /// Copy [`Disk::bytes`] to the guest's memory. The image has no part in it.
    CopyToGuest,
    /// Nothing: a long request lets others have their turn, and goes on when this is answered.
    Yield,
}

/// Which memory a piece of work is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// None.
    None,
    /// The memory of a request, from `offset_bytes` within it on.
    Guest {
        /// Whose.
        token: u64,
        /// Where in it.
        offset_bytes: u64,
    },
    /// The disk's own: a write stores [`Disk::bytes`], a read hands its bytes to [`Disk::done`].
    Own,
}

/// Bounds of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight.
    pub requests: usize,
    /// Allocating writes in flight; more wait.
    pub payouts: usize,
    /// Pieces of work in flight; more wait. At least 64 more than `requests` let everyone go on at once.
    pub work: usize,
    /// Buffers for copy-on-write, of [`BOUNCE_BYTES`] each; more wait.
    pub bounces: usize,
    /// Dirty pages above which they are written although nobody waits for it. Well below the cache's size.
    pub dirty_pages: usize,
}

/// Size of a buffer for copy-on-write.
pub const BOUNCE_BYTES: usize = 64 << 10;

impl Default for Limits {
    /// 256 requests; 8 × 64 KiB of buffers.
    fn default() -> Limits {
        Limits { requests: 256, payouts: 64, work: 512, bounces: 8, dirty_pages: 256 }
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
    image: u32,
    format: Box<dyn Format>,
    sectors: u64,
}

/// Who runs, and waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Actor {
    Request(u32),
    Payment(u32),
    Format,
}

/// What contexts are made of: everything but the images and the cache.
#[derive(Debug)]
struct Shared {
    ledger: Ledger,
    orders: VecDeque<Order>,
    disk: u32,
    users: (u64, u64),
}

/// A buffer and the last unit that was unpacked into it.
#[derive(Debug, Default)]
struct Unpacker {
    busy: bool,
    unit: Vec<u8>,
    /// Image and offset that `unit` is of.
    holds: Option<(u32, u64)>,
}

/// See the module.
#[derive(Debug)]
pub struct Disk {
    layers: Vec<Layer>,
    shared: Shared,
    limits: Limits,
    read_only: bool,
    sectors: u64,
    actives: Vec<Option<Active>>,
    free_actives: Vec<u32>,
    payments: Vec<Option<Payment>>,
    /// How many of them there are.
    payments_out: usize,
    flights: Flights,
    out: VecDeque<Work>,
    outcomes: VecDeque<Outcome>,
    ready: VecDeque<Actor>,
    busy: VecDeque<Actor>,
    waiting: Vec<(PageRef, Actor)>,
    epochs: Epochs,
    bounces: Vec<Vec<u8>>,
    bounces_made: usize,
    unpacker: Unpacker,
    /// Counts changes of the leaf's map: an answer found before one must not enter the merged map after it.
    version: u64,
    /// The format is to be asked to go on.
    poke: bool,
    /// It was not finished when it was asked last.
    working: bool,
    /// The page that the last question needs.
    awaited: Option<PageRef>,
    /// The format could not go on: it is not asked before the next request.
    paused: bool,
    /// A page could not be written: none is tried before the next request.
    pages_paused: bool,
    /// The last page that was to be written could not be.
    stuck: bool,
    /// Why.
    failure: Failure,
    closing: Option<settle::Closing>,
    closed: Option<Result<(), Failure>>,
    /// Requests that nothing in flight would ever have woken: always 0.
    pub stalls: u64,
}

impl Disk {
    /// A disk on a chain, leaf first, each image with the number by which [`Work`] names it. `disk` tells its pages from others' in
    /// the cache that all calls are to be given.
    #[must_use]
    pub fn new(disk: u32, images: Vec<(u32, Box<dyn Format>)>, read_only: bool, limits: Limits) -> Disk {
        let layers: Vec<Layer> = images
            .into_iter()
            .map(|(image, format)| Layer { image, sectors: format.geometry().sectors, format })
            .collect();
        let sectors = layers.first().map_or(0, |leaf| leaf.sectors);
        Disk {
            layers,
            shared: Shared { ledger: Ledger::new(disk), orders: VecDeque::new(), disk, users: (0, 0) },
            read_only,
            sectors,
            actives: (0..limits.requests).map(|_| None).collect(),
            free_actives: (0..crate::bytes::narrow(limits.requests as u64)).rev().collect(),
            payments: (0..limits.payouts).map(|_| None).collect(),
            payments_out: 0,
            flights: Flights::new(limits.work),
            out: VecDeque::with_capacity(limits.work),
            outcomes: VecDeque::with_capacity(limits.requests),
            ready: VecDeque::with_capacity(limits.requests),
            busy: VecDeque::with_capacity(limits.requests),
            waiting: Vec::with_capacity(limits.requests),
            epochs: Epochs::default(),
            bounces: Vec::new(),
            bounces_made: 0,
            unpacker: Unpacker::default(),
            version: 0,
            poke: false,
            working: false,
            awaited: None,
            paused: false,
            pages_paused: false,
            stuck: false,
            failure: Failure::Io(0),
            closing: None,
            closed: None,
            stalls: 0,
            limits,
        }
    }

    /// What the guest sees.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors }
    }

    /// What is wrong with the leaf, if something was found.
    #[must_use]
    pub fn corruption(&self) -> Option<Corruption> {
        self.layers.first().and_then(|leaf| leaf.format.corruption())
    }

    /// Requests that have no outcome yet, flushes among them.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.limits.requests.saturating_sub(self.free_actives.len()) + self.epochs.flushes()
    }

    /// Takes a request. False when it has to wait until another has its outcome.
    pub fn submit(&mut self, pages: &mut Pages, request: Request) -> bool {
        self.paused = false;
        self.pages_paused = false;
        if request.op == Op::Flush {
            if self.epochs.flushes() >= self.limits.requests {
                return false;
            }
            if self.read_only {
                self.outcomes.push_back(Outcome { token: request.token, result: Ok(()) });
                return true;
            }
            self.epochs.flush_begins(request.token);
            self.advance(pages);
            return true;
        }
        let Some(place) = self.free_actives.pop() else { return false };
        let extent = request.extent;
        if extent.end() > self.sectors || extent.sectors == 0 || extent.sector >= self.sectors {
            self.free_actives.push(place);
            self.outcomes.push_back(Outcome { token: request.token, result: Err(Failure::OutOfRange) });
            return true;
        }
        let epoch = request.op.changes().then(|| self.epochs.write_begins());
        self.shared.users.1 += 1;
        let user = self.shared.users.1;
        if let Some(slot) = self.actives.get_mut(place as usize) {
            *slot = Some(Active::new(request, user, epoch));
        }
        self.ready.push_back(Actor::Request(place));
        self.advance(pages);
        true
    }

    /// The next thing to be done, if there is any.
    pub fn next_work(&mut self) -> Option<Work> {
        self.out.pop_front()
    }

    /// The next request that has ended, if there is any.
    pub fn next_outcome(&mut self) -> Option<Outcome> {
        self.outcomes.pop_front()
    }

    /// The bytes of a piece of work whose payload is [`Payload::Own`]: what a write stores. Empty for a read.
    #[must_use]
    pub fn bytes(&self, id: WorkId) -> &[u8] {
        let Some(flight) = self.flights.find(id) else { return &[] };
        match flight {
            Flight::PageOut(page) => {
                let length = self.layers.first().map_or(0, |leaf| leaf.format.page_bytes() as usize);
                self.shared
                    .ledger
                    .copy_of(*page)
                    .and_then(|copy| copy.bytes.get(..length))
                    .unwrap_or_default()
            }
            Flight::FillOut { bounce, .. } => bounce,
            Flight::Order { bytes, .. } => bytes,
            Flight::StatusOut(at) => {
                let active = self.actives.get(*at as usize).and_then(Option::as_ref);
                active.map_or(&[], |active| active.status.bytes())
            }
            Flight::CopyUnit { from, length, .. } => {
                self.unpacker.unit.get(*from..from.saturating_add(*length)).unwrap_or_default()
            }
            _ => &[],
        }
    }

    /// Makes the leaf clean and durable; every request must have its outcome, and none may follow. The answer comes from
    /// [`Disk::closed`]. After a failure it can be tried again.
    pub fn close(&mut self, pages: &mut Pages) {
        self.paused = false;
        self.pages_paused = false;
        self.closed = None;
        self.closing = Some(settle::Closing::Format);
        self.poke = true;
        self.advance(pages);
    }

    /// Whether closing has ended, and how.
    #[must_use]
    pub fn closed(&self) -> Option<Result<(), Failure>> {
        self.closed
    }

    /// Writes dirty pages although nobody waits for it: to be called about once a second, so that a guest that neither flushes nor
    /// does anything else does not keep the cache's pages from others.
    pub fn write_back(&mut self, pages: &mut Pages) {
        self.pages_paused = false;
        let stamp = self.shared.ledger.stamp();
        self.shared.ledger.want(stamp);
        self.advance(pages);
    }

    /// Leaves out an order, for tests that must notice.
    pub fn plant(&mut self, planted: Planted) {
        self.shared.ledger.planted = planted;
    }

    /// Asks one image something.
    fn ask<T>(
        &mut self,
        pages: &mut Pages,
        layer: usize,
        question: impl FnOnce(&mut dyn Format, &mut Context<'_>) -> Step<T>,
    ) -> Step<T> {
        let Some(Layer { image, format, .. }) = self.layers.get_mut(layer) else {
            return Err(Failure::OutOfRange.into());
        };
        let mut cx = Context {
            pages,
            ledger: &mut self.shared.ledger,
            orders: &mut self.shared.orders,
            disk: self.shared.disk,
            image: *image,
            page_bytes: format.page_bytes(),
            users: self.shared.users,
        };
        match question(format.as_mut(), &mut cx) {
            Err(Wait::Need(at)) => Err(self.fetch(pages, layer, at.0)),
            answer => answer,
        }
    }

    fn leaf_image(&self) -> u32 {
        self.layers.first().map_or(0, |leaf| leaf.image)
    }
}

/// Sectors as bytes.
fn bytes_of(sectors: u64) -> u64 {
    sectors.saturating_mul(SECTOR_BYTES)
}
