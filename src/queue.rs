//! One queue: a guest's ring, its event channel, and the requests in flight.
//!
//! A queue owns what it has taken from the ring until the answer is published; the pump (see `pump`) moves all queues
//! through the stages together, so that system calls are per batch and not per request.

use std::collections::VecDeque;
use std::time::Duration;

use rings::{Abi, BackRing, Operation, Overrun, Request, SECTOR_BYTES, Segments, Slot, Status};

use crate::buffers::Pool;
use crate::disk::Epoch;
use crate::grants::Grants;
use crate::hypervisor::{CopyDirection, CopySegment, DomainId, Port, RingMapping};
use crate::journal::{Journal, Owed};
use crate::limits::{EVENT_DELAY_MAX, EVENT_DELAY_MIN, IDLE_EVENTS_FREE};
use crate::pump::{Held, Rows};
use crate::storage::StorageError;

/// Where a request in flight stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A barrier holds it back.
    HeldBack,
    /// A barrier that waits for what came before it.
    Barrier,
    /// There was no memory for its data; tried again when some is freed.
    Starved,
    /// A flush or barrier with data waits for its flush before it writes.
    Preflush,
    /// With the storage.
    Storage,
    /// A flush or barrier whose data, if it has any, is written waits for its `fdatasync`.
    Flush,
    /// With the storage, which moves the data to or from the guest's own pages.
    Mapped,
    /// To be copied between the guest's pages and the file's own in this round.
    Direct,
}

/// A request between being taken and being answered.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub(crate) request: Request,
    pub(crate) held: Held,
    pub(crate) stage: Stage,
    pub(crate) epoch: Option<Epoch>,
    /// Of what is copied straight to or from an image with a format: what that is to be told afterwards.
    pub(crate) in_place: Option<formats::WorkId>,
    /// Transfers that storage has not answered.
    pub(crate) transfers: u16,
    /// The first error that one of them met.
    pub(crate) error: Option<StorageError>,
}

// `limits::QUEUE_BYTES_MAX` counts with this.
const _: () = assert!(size_of::<Option<InFlight>>() <= 256);

/// What the guest did that a frontend must not do. Named for the log; the guest itself sees an error status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendMisbehaved {
    /// Its producer index claims more requests than the ring holds. The ring is dead until it reconnects.
    RingOverrun(Overrun),
    /// A request's grant reference could not be copied.
    BadGrant(u32),
    /// A request that is malformed, out of range, or not offered.
    BadRequest(rings::Refusal),
    /// A write to a disk that was said to be read-only.
    WriteToReadOnly,
}

impl std::fmt::Display for FrontendMisbehaved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FrontendMisbehaved::RingOverrun(overrun) => write!(
                f,
                "the frontend's request index {} does not fit the ring (consumed {}, answered {}); the ring is not \
                 looked at again until the frontend reconnects",
                overrun.request_producer, overrun.requests_consumed, overrun.responses_produced
            ),
            FrontendMisbehaved::BadGrant(grant) => {
                write!(f, "a request names grant reference {grant}, which cannot be copied")
            }
            FrontendMisbehaved::BadRequest(refusal) => write!(f, "a malformed request: {refusal:?}"),
            FrontendMisbehaved::WriteToReadOnly => f.write_str("a write to a read-only disk"),
        }
    }
}

/// Counts since the queue was connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads answered.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Barriers answered.
    pub barriers: u64,
    /// Discards answered.
    pub discards: u64,
    /// How many of the reads and writes were indirect.
    pub indirect: u64,
    /// Bytes that reads brought.
    pub read_bytes: u64,
    /// Bytes that writes, flushes and barriers took.
    pub written_bytes: u64,
    /// Bytes that were discarded, as asked for: the medium does it by whole units.
    pub discarded_bytes: u64,
    /// Requests answered with an error because storage failed.
    pub storage_errors: u64,
    /// Requests answered with an error or as unsupported because of what the guest sent.
    pub refused: u64,
    /// Requests answered whose data went straight between the guest's pages and the file's.
    pub direct: u64,
    /// Events that came in.
    pub events: u64,
    /// Events sent to the guest.
    pub notifications: u64,
}

impl Counters {
    /// What several queues have counted.
    #[must_use]
    pub fn sum(all: impl Iterator<Item = Counters>) -> Counters {
        all.fold(Counters::default(), |a, b| Counters {
            reads: a.reads + b.reads,
            writes: a.writes + b.writes,
            flushes: a.flushes + b.flushes,
            barriers: a.barriers + b.barriers,
            discards: a.discards + b.discards,
            indirect: a.indirect + b.indirect,
            read_bytes: a.read_bytes + b.read_bytes,
            written_bytes: a.written_bytes + b.written_bytes,
            discarded_bytes: a.discarded_bytes + b.discarded_bytes,
            storage_errors: a.storage_errors + b.storage_errors,
            refused: a.refused + b.refused,
            direct: a.direct + b.direct,
            events: a.events + b.events,
            notifications: a.notifications + b.notifications,
        })
    }

    fn count(&mut self, request: &Request) {
        let bytes = u64::from(request.length_bytes());
        self.indirect += u64::from(matches!(request.segments, Segments::Indirect(_)));
        match request.operation {
            Operation::Read => {
                self.reads += 1;
                self.read_bytes += bytes;
            }
            Operation::Write => {
                self.writes += 1;
                self.written_bytes += bytes;
            }
            Operation::Flush => {
                self.flushes += 1;
                self.written_bytes += bytes;
            }
            Operation::Barrier => {
                self.barriers += 1;
                self.written_bytes += bytes;
            }
            Operation::Discard => {
                self.discards += 1;
                self.discarded_bytes += request.sectors.saturating_mul(SECTOR_BYTES);
            }
        }
    }
}

/// What a queue may still take from its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intake {
    Open,
    /// Being disconnected: at most this many more, so that a guest that keeps sending cannot delay the end.
    Closing(u32),
    /// Nothing more: broken, stopped or aborted.
    Closed,
}

/// Answers in the order of taking, for a frontend that matches them by their place on the ring.
#[derive(Debug)]
struct InOrder {
    /// Places of what was taken, oldest first.
    order: VecDeque<u16>,
    /// What each place is to be answered, once that is known: id, operation, status.
    answers: Vec<Option<(u64, u8, Status)>>,
}

/// One ring of a connected vbd.
#[derive(Debug)]
pub struct Queue {
    pub(crate) disk: u32,
    pub(crate) domain: DomainId,
    /// The guest's number where its memory is counted.
    pub(crate) guest: u32,
    /// Where its transfers wait for their device.
    pub(crate) flow: u32,
    pub(crate) port: Port,
    /// Its pages that stay mapped, where both sides have agreed on that.
    pub(crate) grants: Option<Grants>,
    /// Gone when the guest is gone and only storage keeps the queue alive.
    pub(crate) ring: Option<BackRing>,
    pub(crate) mapping: Option<RingMapping>,
    pub(crate) intake: Intake,
    pub(crate) counters: Counters,
    /// True while the port is masked and the pump has yet to let events through again.
    pub(crate) masked: bool,
    /// An event came, and nobody has looked yet whether it brought work.
    pub(crate) announced: bool,
    /// True while the pump's list of queues with answers to publish names this one.
    pub(crate) touched: bool,
    /// True while the pump's list of queues to look at names this one.
    pub(crate) listed: bool,
    /// A request found no memory for its data: no further request is taken until it has.
    pub(crate) starved: bool,
    /// The owner waits to be told that everything is answered.
    pub(crate) closing: bool,
    journal: Option<Journal>,
    /// As long as the busiest moment needed; a ring has more places.
    in_flight: Vec<Option<InFlight>>,
    /// Places not in use, the next one last.
    free: Vec<u16>,
    places: usize,
    unpublished: Vec<u16>,
    in_order: Option<InOrder>,
    idle_events: u32,
}

impl Queue {
    /// A queue over an attached ring. `owed` are the requests that a predecessor took; the ring counts them as taken.
    pub(crate) fn new(
        disk: u32,
        (domain, guest): (DomainId, u32),
        port: Port,
        ring: BackRing,
        mapping: RingMapping,
        journal: Option<Journal>,
        in_order: bool,
    ) -> Queue {
        let entries = ring.entries();
        let slots = u16::try_from(entries).unwrap_or(u16::MAX);
        Queue {
            disk,
            domain,
            guest,
            flow: u32::MAX,
            port,
            grants: None,
            ring: Some(ring),
            mapping: Some(mapping),
            intake: Intake::Open,
            counters: Counters::default(),
            masked: true,
            announced: false,
            touched: false,
            listed: false,
            starved: false,
            closing: false,
            journal,
            in_flight: Vec::new(),
            free: (0..slots).rev().collect(),
            places: slots.into(),
            unpublished: Vec::with_capacity(slots.into()),
            in_order: in_order.then(|| InOrder {
                order: VecDeque::with_capacity(slots.into()),
                answers: vec![None; slots.into()],
            }),
            idle_events: 0,
        }
    }

    /// True if another slot can be filed: each has a place until its answer is published.
    pub(crate) fn has_place(&self) -> bool {
        !self.free.is_empty()
    }

    /// Files a slot that was taken, before anybody reads it. `None` if there is no place: see [`Queue::has_place`].
    pub(crate) fn file(&mut self, slot: &Slot) -> Option<u16> {
        let place = self.free.pop()?;
        if let Some(journal) = &mut self.journal {
            journal.taken(place.into(), slot.bytes());
        }
        if let Some(in_order) = &mut self.in_order {
            in_order.order.push_back(place);
        }
        Some(place)
    }

    /// Takes over what a predecessor owed: each in the place where the journal has it.
    pub(crate) fn inherit(&mut self, owed: &[Owed], abi: Abi) -> Vec<(u16, Slot)> {
        let mut inherited = Vec::with_capacity(owed.len());
        for one in owed {
            if let Some(at) = self.free.iter().position(|place| u32::from(*place) == one.entry) {
                let place = self.free.remove(at);
                if let Some(in_order) = &mut self.in_order {
                    in_order.order.push_back(place);
                }
                inherited.push((place, Slot::new(one.bytes, abi)));
            }
        }
        inherited
    }

    /// Puts a well-formed request into its place.
    pub(crate) fn keep(&mut self, place: u16, request: Request, stage: Stage) {
        if self.in_flight.len() <= usize::from(place) {
            self.in_flight.resize_with(usize::from(place) + 1, || None);
        }
        if let Some(entry) = self.in_flight.get_mut(usize::from(place)) {
            let (held, epoch) = (Held::NONE, None);
            let one = InFlight { request, held, stage, epoch, in_place: None, transfers: 0, error: None };
            *entry = Some(one);
        }
    }

    pub(crate) fn in_flight(&mut self, place: u16) -> Option<&mut InFlight> {
        self.in_flight.get_mut(usize::from(place)).and_then(Option::as_mut)
    }

    /// A request in flight that waits for memory.
    pub(crate) fn next_starved(&self) -> Option<u16> {
        self.next_at(Stage::Starved)
    }

    /// A request in flight that a barrier holds back.
    pub(crate) fn next_held_back(&self) -> Option<u16> {
        self.next_at(Stage::HeldBack)
    }

    fn next_at(&self, stage: Stage) -> Option<u16> {
        let stands = |entry: &Option<InFlight>| entry.as_ref().is_some_and(|one| one.stage == stage);
        let place = self.in_flight.iter().position(stands)?;
        u16::try_from(place).ok()
    }

    /// Requests taken whose answers are not published.
    pub(crate) fn unanswered(&self) -> usize {
        self.places - self.free.len()
    }

    /// Answers a request and forgets it. The answer is visible after [`Queue::publish`]. Returns its memory.
    pub(crate) fn answer(&mut self, place: u16, status: Status) -> Held {
        let Some(one) = self.in_flight.get_mut(usize::from(place)).and_then(Option::take) else {
            return Held::NONE;
        };
        if status == Status::Okay {
            self.counters.count(&one.request);
        }
        self.respond(place, one.request.id, response_operation(one.request.operation), status);
        one.held
    }

    /// Answers a slot that was filed and never became a request.
    pub(crate) fn refuse(&mut self, place: u16, slot: &Slot, status: Status) {
        self.counters.refused += 1;
        self.respond(place, slot.id(), slot.response_operation(), status);
    }

    fn respond(&mut self, place: u16, id: u64, operation: u8, status: Status) {
        let Some(in_order) = &mut self.in_order else { return self.write(place, id, operation, status) };
        if let Some(answer) = in_order.answers.get_mut(usize::from(place)) {
            *answer = Some((id, operation, status));
        }
        while let Some((place, (id, operation, status))) = self.in_order.as_mut().and_then(InOrder::next) {
            self.write(place, id, operation, status);
        }
    }

    fn write(&mut self, place: u16, id: u64, operation: u8, status: Status) {
        // The place is used again only when the answer is out: until then its entry in the journal is needed.
        self.unpublished.push(place);
        if let Some(ring) = &mut self.ring {
            if let Some(journal) = &mut self.journal {
                journal.answered(place.into(), ring.next_response());
            }
            ring.respond(id, operation, status);
        }
    }

    /// Makes the answers visible. True when the guest wants an event.
    pub(crate) fn publish(&mut self) -> bool {
        let notify = self.ring.as_mut().is_some_and(BackRing::publish);
        if let (Some(journal), Some(ring)) = (&mut self.journal, &self.ring) {
            journal.produced(ring.next_response());
        }
        for place in self.unpublished.drain(..) {
            if let Some(journal) = &mut self.journal {
                journal.published(place.into());
            }
            self.free.push(place);
        }
        self.counters.notifications += u64::from(notify);
        notify
    }

    /// How many segments a request has.
    pub(crate) fn segments(&self, place: u16) -> usize {
        let one = self.in_flight.get(usize::from(place)).and_then(Option::as_ref);
        one.map_or(0, |one| match &one.request.segments {
            Segments::Direct(direct) => direct.len(),
            Segments::Indirect(indirect) => indirect.count().into(),
        })
    }

    /// The copies that move a request's data, appended to `segments`. `rows` and `pool` tell of its memory.
    pub(crate) fn copies(
        &self,
        place: u16,
        direction: CopyDirection,
        (rows, pool): (&Rows, &Pool),
        segments: &mut Vec<CopySegment>,
    ) {
        let Some(one) = self.in_flight.get(usize::from(place)).and_then(Option::as_ref) else { return };
        let mut at = 0;
        for segment in one.request.segments.iter(pool.bytes(one.held.descriptors)) {
            let mut offset_bytes = segment.offset_bytes();
            let end = at + u32::from(segment.length_bytes());
            while at < end {
                // A segment may lie across the end of a piece.
                let Some(local) = rows.part(&one.held, at, end - at) else { return };
                let (domain, grant) = (self.domain, segment.grant);
                segments.push(CopySegment { domain, grant, offset_bytes, local, direction, copied: false });
                at += local.length_bytes();
                offset_bytes += u16::try_from(local.length_bytes()).unwrap_or(0);
            }
        }
    }

    /// The copy that fetches the descriptors of an indirect request.
    pub(crate) fn descriptor_copy(&self, place: u16) -> Option<CopySegment> {
        let one = self.in_flight.get(usize::from(place)).and_then(Option::as_ref)?;
        let Segments::Indirect(indirect) = &one.request.segments else { return None };
        let (domain, grant, local) = (self.domain, indirect.grant, one.held.descriptors);
        let direction = CopyDirection::FromGuest;
        Some(CopySegment { domain, grant, offset_bytes: 0, local, direction, copied: false })
    }

    /// A look at the ring found requests: events before it were no storm.
    pub(crate) fn work_found(&mut self) {
        self.idle_events = 0;
    }

    /// An event came and brought no work. Returns how long its port should stay masked: a guest that sends events without
    /// requests pays with latency of its own (XSA-332).
    pub(crate) fn idle_event(&mut self) -> Duration {
        self.idle_events = self.idle_events.saturating_add(1);
        match self.idle_events.checked_sub(IDLE_EVENTS_FREE) {
            None | Some(0) => Duration::ZERO,
            Some(excess) => (EVENT_DELAY_MIN * (1 << (excess - 1).min(16))).min(EVENT_DELAY_MAX),
        }
    }

    /// Gives up the table's memory that a busy moment took, as far as no request is in it.
    pub(crate) fn trim(&mut self) {
        let used = self.in_flight.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.in_flight.truncate(used);
        self.in_flight.shrink_to(used);
    }

    /// Gives up the journal, to be closed.
    pub(crate) fn take_journal(&mut self) -> Option<Journal> {
        self.journal.take()
    }
}

impl InOrder {
    /// The oldest answer, if it is known.
    fn next(&mut self) -> Option<(u16, (u64, u8, Status))> {
        let place = *self.order.front()?;
        let answer = self.answers.get_mut(usize::from(place)).and_then(Option::take)?;
        self.order.pop_front();
        Some((place, answer))
    }
}

fn response_operation(operation: Operation) -> u8 {
    match operation {
        Operation::Read => rings::request::operation::READ,
        Operation::Write => rings::request::operation::WRITE,
        Operation::Flush => rings::request::operation::FLUSH,
        Operation::Barrier => rings::request::operation::BARRIER,
        Operation::Discard => rings::request::operation::DISCARD,
    }
}
