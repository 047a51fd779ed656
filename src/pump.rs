//! The data path: moves the requests of all queues through their stages, in batches.
//!
//! A turn takes requests from every ring that has some, copies the data of all writes in one call, hands all transfers
//! to storage in one submission, collects what is done, copies the data of all reads in one call, publishes the answers
//! ring by ring, and at last lets events through again. Nothing here waits, and nothing allocates once the tables have
//! grown to their working size.

mod attach;
mod chains;
mod copies;
mod ends;
mod fair;
mod mapped;
mod memory;
mod outside;
mod slab;
mod stages;
mod turn;
mod works;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use rings::{Abi, Offers};

use crate::disk::Disk;
use crate::hypervisor::{DomainId, GrantRef, Hypervisor, HypervisorError, Port};
use crate::journal::JournalStore;
use crate::keep::{Journals, Kept};
use crate::limits::REPORTS_MAX;
use crate::queue::{Counters, FrontendMisbehaved, Queue};
use crate::storage::{FileId, Storage};
pub(crate) use memory::{Held, Rows};
pub use outside::Outside;

/// Names a queue of the pump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(u32);

/// Names a disk of the pump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskId(pub u32);

/// What the pump tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PumpEvent {
    /// A queue that was closed or quiesced has answered everything, and may be detached.
    Drained(QueueId),
    /// A frontend did what it must not.
    Misbehaved(QueueId, FrontendMisbehaved),
    /// Storage failed a request of this queue: errno.
    StorageFailed(QueueId, StorageFailure),
    /// The `sync` or `close_disk` of a disk ended; false if the data may not be durable.
    Synced(DiskId, bool),
    /// An image contradicts itself: nothing is written to it any more. Once for each disk.
    Corrupt(DiskId, formats::Corruption),
}

/// What failed, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageFailure {
    /// `read`, `write`, `flush` or `discard`.
    pub what: &'static str,
    /// First byte of the request on the disk.
    pub offset_bytes: u64,
    /// Why.
    pub error: crate::storage::StorageError,
}

/// An open image, and how it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    /// The image.
    pub file: FileId,
    /// Its size, in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// What frontends are told that they may ask for. What is not offered is answered with -2.
    pub offers: Offers,
    /// The storage device below it, by any number: disks on one device share it fairly.
    pub device: u64,
    /// Answers go out in the order of taking, queue by queue: for frontends that match them by place and not by id.
    pub in_order: bool,
}

impl DiskPlan {
    /// A disk that offers reads, writes and flushes.
    #[must_use]
    pub fn new(file: FileId, size_sectors: u64, read_only: bool) -> DiskPlan {
        DiskPlan { file, size_sectors, read_only, offers: Offers::NONE, device: 0, in_order: false }
    }
}

/// Where a ring is, and whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingPlan {
    /// The guest.
    pub domain: DomainId,
    /// Its ring pages, in order.
    pub grants: Vec<GrantRef>,
    /// Its event channel.
    pub remote_port: u32,
    /// Its dialect.
    pub abi: Abi,
    /// The ring is live: a predecessor served it.
    pub resume: bool,
    /// The journal's name.
    pub journal: String,
}

/// Why a ring was not attached; nothing is mapped or bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachError {
    /// The hypervisor refused.
    Hypervisor(HypervisorError),
    /// A predecessor's ring has requests on it, and no journal tells which of them were taken: serving it could do a write
    /// twice that the guest has overtaken, or never answer one.
    Unrecorded,
}

/// Whose a transfer or a flush is, as storage carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// A request's transfer, or its flush.
    Request { queue: u32, place: u16 },
    /// An `fdatasync` of a disk.
    Flush(u32),
    /// A flush that the pump's owner asked for.
    Sync(u32),
    /// A transfer of a piece of work that a format wants done.
    Work(u32),
    /// A transfer, or the flush, of a request that came from no ring.
    Outside(u32),
}

impl Token {
    /// Packs it: kind in the top byte, the queue or disk above the place in the last two bytes. The byte between is of a
    /// transfer: see [`Token::of_transfer`].
    fn encode(self) -> u64 {
        match self {
            Token::Request { queue, place } => (u64::from(queue) << 16) | u64::from(place),
            Token::Flush(disk) => (1 << 56) | (u64::from(disk) << 16),
            Token::Sync(disk) => (2 << 56) | (u64::from(disk) << 16),
            Token::Work(number) => (3 << 56) | (u64::from(number) << 16),
            Token::Outside(place) => (4 << 56) | (u64::from(place) << 16),
        }
    }

    /// A request's transfer of 512 bytes to 128 KiB, with its length in sectors less one.
    fn of_transfer(queue: u32, place: u16, length_bytes: u32) -> u64 {
        Token::Request { queue, place }.with_length(length_bytes)
    }

    /// The same of a piece of work.
    fn of_work(number: u32, length_bytes: u32) -> u64 {
        Token::Work(number).with_length(length_bytes)
    }

    fn with_length(self, length_bytes: u32) -> u64 {
        let sectors = u64::from(length_bytes / 512).saturating_sub(1) & 0xFF;
        self.encode() | (sectors << 48)
    }

    /// The length that a transfer's token was given, in bytes.
    fn transfer_bytes(token: u64) -> u32 {
        (u32::from(token.to_be_bytes()[1]) + 1) * 512
    }

    fn decode(token: u64) -> Option<Token> {
        let number = u32::try_from((token >> 16) & 0xFFFF_FFFF).ok()?;
        match token >> 56 {
            0 => Some(Token::Request { queue: number, place: u16::try_from(token & 0xFFFF).ok()? }),
            1 => Some(Token::Flush(number)),
            2 => Some(Token::Sync(number)),
            3 => Some(Token::Work(number)),
            4 => Some(Token::Outside(number)),
            _ => None,
        }
    }
}

/// The data path over one hypervisor and one storage.
pub struct Pump<H, S> {
    /// The hypervisor.
    pub hypervisor: H,
    /// The storage.
    pub storage: S,
    journals: Journals,
    /// A ring without a journal was left with everything answered: the administrator says so.
    assume_clean: bool,
    queues: Vec<Option<Queue>>,
    names: Vec<String>,
    disks: Vec<Option<Disk>>,
    chains: chains::Chains,
    outside: outside::Outsiders,
    by_port: BTreeMap<Port, u32>,
    /// Queues whose ring should be looked at.
    ready: VecDeque<u32>,
    /// Queues whose event channel stays masked until then.
    delayed: Vec<(Duration, u32)>,
    /// Queues with answers to publish.
    touched: Vec<u32>,
    guests: memory::Guests,
    fair: fair::Fair,
    rows: Rows,
    /// Queues with requests that wait for memory, in line.
    starved: VecDeque<u32>,
    /// The first of them that waits for others, and since when.
    first_in_line: Option<(u32, Duration)>,
    /// When the last turn began.
    now: Duration,
    events: VecDeque<PumpEvent>,
    scratch: stages::Scratch,
    pages_mapped: usize,
    /// Inside [`Pump::turn`].
    turning: bool,
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// A data path without queues.
    #[must_use]
    pub fn new(hypervisor: H, mut storage: S, journals: Box<dyn JournalStore>) -> Pump<H, S> {
        let journals: Journals = Rc::new(RefCell::new(journals));
        let kept = Kept::new(Rc::clone(&journals));
        storage.set_left(kept.left());
        Pump {
            hypervisor,
            storage,
            journals,
            assume_clean: false,
            queues: Vec::new(),
            names: Vec::new(),
            disks: Vec::new(),
            chains: chains::Chains::new(kept),
            outside: outside::Outsiders::default(),
            by_port: BTreeMap::new(),
            ready: VecDeque::new(),
            delayed: Vec::new(),
            touched: Vec::new(),
            guests: memory::Guests::default(),
            fair: fair::Fair::default(),
            rows: Rows::default(),
            starved: VecDeque::new(),
            first_in_line: None,
            now: Duration::ZERO,
            events: VecDeque::new(),
            scratch: stages::Scratch::default(),
            pages_mapped: 0,
            turning: false,
        }
    }

    /// From now on, a predecessor's ring without a journal is taken for one that was left with everything answered.
    pub fn assume_clean(&mut self) {
        self.assume_clean = true;
    }

    /// Puts an open image behind a disk.
    pub fn add_disk(&mut self, plan: &DiskPlan) -> DiskId {
        // Every request of a queue of 32 may be a flush; more queues make the tables grow once.
        DiskId(place_in(&mut self.disks, Disk::new(plan, 32)))
    }

    /// Says what the frontend that is about to connect was offered, and whether it needs its answers in order. For the
    /// queues that are attached from now on. And whether writes of nothing but zeroes are to take no space, where the image has
    /// a format.
    pub fn set_terms(&mut self, disk: DiskId, offers: Offers, in_order: bool, detect_zeroes: bool) {
        if let Some(disk) = self.disk(disk.0) {
            (disk.offers, disk.in_order) = (offers, in_order);
            disk.detect_zeroes = detect_zeroes && disk.is_chain;
        }
    }

    /// Removes a disk that no queue uses, and closes its image.
    pub fn remove_disk(&mut self, disk: DiskId) {
        if let Some(open) = self.disks.get_mut(disk.0 as usize).and_then(Option::take)
            && !self.remove_chain(disk.0)
            && open.file != FileId::NONE
        {
            self.storage.close(open.file);
        }
    }

    /// Tells a disk its new size. Requests past it are refused from now on.
    pub fn resize_disk(&mut self, disk: DiskId, size_sectors: u64) {
        if let Some(disk) = self.disk(disk.0) {
            disk.image = formats::Raw::of_sectors(size_sectors);
        }
    }

    /// Makes all that was written durable; answered by [`PumpEvent::Synced`].
    pub fn sync(&mut self, disk: DiskId) {
        if let Some(open) = self.disk(disk.0) {
            open.flush_begins(Token::Sync(disk.0).encode());
            self.scratch.look_at(disk.0);
        }
    }

    /// The next thing that the owner should know.
    pub fn event(&mut self) -> Option<PumpEvent> {
        self.events.pop_front()
    }

    /// Counts of a queue since it was attached.
    #[must_use]
    pub fn counters(&self, queue: QueueId) -> Option<Counters> {
        self.queues.get(queue.0 as usize)?.as_ref().map(|queue| queue.counters)
    }

    /// Requests of a queue that were taken, and whose answers are not published.
    #[must_use]
    pub fn unanswered(&self, queue: QueueId) -> usize {
        self.queues.get(queue.0 as usize).and_then(Option::as_ref).map_or(0, Queue::unanswered)
    }

    /// True when [`Pump::turn`] would do something: a ring to look at or a flush to start, for something was asked of the
    /// pump since.
    #[must_use]
    pub fn has_work(&self) -> bool {
        let has_chains = self.chains.has_work() || self.scratch.asked;
        !self.ready.is_empty() || self.scratch.has_flushes() || self.scratch.copies.wait() || has_chains
    }

    /// Gives the memory of past load back, tables and data. Meant for moments without load.
    pub fn trim(&mut self) {
        self.queues.iter_mut().flatten().for_each(Queue::trim);
        self.chains.works.trim();
        self.storage.trim();
    }

    /// When [`Pump::turn`] wants to be called though nothing happens: an event channel's delay ends, or
    /// those behind the first in line for memory may pass.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let delays = self.delayed.iter().map(|(deadline, _)| *deadline);
        delays.chain(self.line_deadline()).chain(self.chains.deadline()).min()
    }

    fn queue(&mut self, id: u32) -> Option<&mut Queue> {
        self.queues.get_mut(id as usize).and_then(Option::as_mut)
    }

    fn disk(&mut self, id: u32) -> Option<&mut Disk> {
        self.disks.get_mut(id as usize).and_then(Option::as_mut)
    }

    /// Has the queue's ring looked at in the next turn.
    fn list(&mut self, id: u32) {
        if let Some(queue) = self.queue(id)
            && !queue.listed
        {
            queue.listed = true;
            self.ready.push_back(id);
        }
    }

    /// Files an event for the owner. What a guest can cause at will is dropped when the owner is behind; what the owner
    /// waits for is not.
    fn report(&mut self, event: PumpEvent) {
        let owed = matches!(event, PumpEvent::Drained(_) | PumpEvent::Synced(..) | PumpEvent::Corrupt(..));
        if owed || self.events.len() < REPORTS_MAX {
            self.events.push_back(event);
        }
    }

    fn touch(&mut self, id: u32) {
        if let Some(queue) = self.queue(id)
            && !queue.touched
        {
            queue.touched = true;
            self.touched.push(id);
        }
    }
}

/// What a request is about.
fn extent_of(request: &rings::Request) -> formats::Extent {
    formats::Extent { sector: request.sector, sectors: request.sectors }
}

/// Puts `value` into the first empty place.
fn place_in<T>(places: &mut Vec<Option<T>>, value: T) -> u32 {
    let place = places.iter().position(Option::is_none).unwrap_or(places.len());
    if place == places.len() {
        places.push(Some(value));
    } else if let Some(empty) = places.get_mut(place) {
        *empty = Some(value);
    }
    u32::try_from(place).unwrap_or(u32::MAX)
}
