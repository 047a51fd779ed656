//! Memory for requests in flight: who may have how much of it, and who waits.
//!
//! A request gets all the memory that it will need at once, or none, so that two of them never wait for each other. It
//! is had in pieces, so that a request of 1 MiB needs no megabyte in a row.

use std::time::Duration;

use rings::{Segments, Status};

use super::{Pump, extent_of};
use crate::buffers::{PAGE_BYTES, Pool, SPAN_BYTES_MAX, Span};
use crate::hypervisor::{CopyDirection, DomainId, Hypervisor};
use crate::limits::STARVED_PATIENCE;
use crate::queue::Stage;
use crate::storage::{IoKind, Storage};

/// Longest piece, in bytes; shorter ones, of whole pages, are taken where no such run is free.
pub(crate) const PIECE_BYTES: u32 = 128 << 10;

/// Most pieces of a request.
const PIECES_MAX: usize = 8;

const _: () = assert!(PIECE_BYTES as usize * PIECES_MAX >= rings::INDIRECT_SEGMENTS_MAX as usize * 4096);
const _: () = assert!(PIECE_BYTES <= SPAN_BYTES_MAX);

/// No row.
const NONE: u32 = u32::MAX;

/// The memory of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    first: Span,
    /// The first piece of its own while `first` names pages of a file: none if it has no memory.
    aside: Span,
    /// The row of [`Rows`] that has the other pieces.
    rest: u32,
    /// What the pool counts for all of it, in bytes.
    bytes: u32,
    /// The private copy of an indirect request's descriptors.
    pub(crate) descriptors: Span,
}

impl Held {
    pub(crate) const NONE: Held =
        Held { first: Span::EMPTY, aside: Span::EMPTY, rest: NONE, bytes: 0, descriptors: Span::EMPTY };
}

/// The pieces behind the first, of the requests that have more than one: as many rows as such requests were ever in flight
/// at once, 112 bytes each.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    rows: Vec<[Span; PIECES_MAX - 1]>,
    free: Vec<u32>,
}

impl Rows {
    fn take(&mut self) -> u32 {
        if let Some(row) = self.free.pop() {
            return row;
        }
        let row = u32::try_from(self.rows.len()).unwrap_or(NONE);
        self.rows.push([Span::EMPTY; PIECES_MAX - 1]);
        // A place for it when it comes back.
        self.free.reserve(self.rows.len());
        row
    }

    /// The pieces behind the first.
    fn of(&self, held: &Held) -> &[Span] {
        self.rows.get(held.rest as usize).map_or(&[], |row| row)
    }

    /// Memory for `length` bytes of data, and for `descriptors` bytes beside it. All of it or nothing.
    fn alloc(&mut self, pool: &mut Pool, length: u32, descriptors: u32) -> Option<Held> {
        let first = piece(pool, length)?;
        let mut held = Held { first, bytes: counted(first), ..Held::NONE };
        if self.alloc_rest(pool, &mut held, length, descriptors).is_none() {
            self.free(pool, held);
            return None;
        }
        Some(held)
    }

    fn alloc_rest(&mut self, pool: &mut Pool, held: &mut Held, length: u32, descriptors: u32) -> Option<()> {
        let mut left = length - held.first.length_bytes();
        if left > 0 {
            held.rest = self.take();
            for place in self.rows.get_mut(held.rest as usize)? {
                if left > 0 {
                    *place = piece(pool, left)?;
                    held.bytes += counted(*place);
                    left -= place.length_bytes();
                }
            }
        }
        if descriptors > 0 {
            held.descriptors = pool.alloc(descriptors)?;
            held.bytes += counted(held.descriptors);
        }
        (left == 0).then_some(())
    }

    /// Gives all of it back.
    fn free(&mut self, pool: &mut Pool, held: Held) {
        for span in self.of(&held).iter().chain([&held.first, &held.descriptors]) {
            if *span != Span::EMPTY {
                pool.free(*span);
            }
        }
        if let Some(row) = self.rows.get_mut(held.rest as usize) {
            *row = [Span::EMPTY; PIECES_MAX - 1];
            self.free.push(held.rest);
        }
    }

    /// Gives back the pieces that `length` bytes, at least one, do not need.
    fn shorten(&mut self, pool: &mut Pool, held: &mut Held, length: u32) {
        let mut at = held.first.length_bytes();
        let Some(row) = self.rows.get_mut(held.rest as usize) else { return };
        for place in row {
            let end = at + place.length_bytes();
            if at >= length && *place != Span::EMPTY {
                held.bytes -= counted(*place);
                pool.free(std::mem::replace(place, Span::EMPTY));
            }
            at = end;
        }
    }

    /// Whether a write's data, which are here, are nothing but zeroes.
    pub(crate) fn is_zero(&self, pool: &mut Pool, held: &Held, request: &rings::Request) -> bool {
        let (length, mut at) = (request.length_bytes(), 0);
        let is_write = request.operation == rings::Operation::Write;
        while let Some(span) =
            self.part(held, at, length - at).filter(|span| is_write && span.length_bytes() > 0)
        {
            let or = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum | byte) == 0;
            if !pool.bytes(span).chunks(512).all(or) {
                return false;
            }
            at += span.length_bytes();
        }
        at == length && length > 0
    }

    /// What of `length` bytes from `at` on lies in one piece; `None` past the end.
    #[inline]
    pub(crate) fn part(&self, held: &Held, at: u32, length: u32) -> Option<Span> {
        let mut room = held.first.length_bytes();
        if at < room {
            return held.first.part(at, length.min(room - at));
        }
        let mut from = at - room;
        for piece in self.of(held) {
            room = piece.length_bytes();
            if from < room {
                return piece.part(from, length.min(room - from));
            }
            from -= room;
        }
        None
    }
}

/// What the pool counts for a span, in bytes.
fn counted(span: Span) -> u32 {
    span.length_bytes().next_multiple_of(PAGE_BYTES)
}

/// The longest piece that can be had for `left` bytes.
fn piece(pool: &mut Pool, left: u32) -> Option<Span> {
    let mut length = left.min(PIECE_BYTES);
    loop {
        if let Some(span) = pool.alloc(length) {
            return Some(span);
        }
        if length <= PAGE_BYTES {
            return None;
        }
        length = (length / 2).next_multiple_of(PAGE_BYTES);
    }
}

/// What one guest holds of the memory that all share, over all its queues.
#[derive(Clone, Copy, Debug)]
struct Guest {
    domain: DomainId,
    queues: u32,
    held_bytes: u64,
}

/// All guests that have a queue.
#[derive(Debug, Default)]
pub(super) struct Guests(Vec<Guest>);

impl Guests {
    /// Counts a queue of `domain`; the guest's number, until [`Guests::leave`].
    pub(super) fn join(&mut self, domain: DomainId) -> u32 {
        let known = self.0.iter().position(|guest| guest.domain == domain && guest.queues > 0);
        let place = known.or_else(|| self.0.iter().position(|guest| guest.queues == 0));
        let place = place.unwrap_or(self.0.len());
        match self.0.get_mut(place) {
            Some(guest) if known.is_some() => guest.queues += 1,
            Some(guest) => *guest = Guest { domain, queues: 1, held_bytes: 0 },
            None => self.0.push(Guest { domain, queues: 1, held_bytes: 0 }),
        }
        u32::try_from(place).unwrap_or(u32::MAX)
    }

    /// One of its queues is gone.
    pub(super) fn leave(&mut self, guest: u32) {
        if let Some(guest) = self.0.get_mut(guest as usize) {
            guest.queues = guest.queues.saturating_sub(1);
        }
    }

    /// How many queues the guest has.
    pub(super) fn queues(&self, guest: u32) -> u32 {
        self.0.get(guest as usize).map_or(0, |guest| guest.queues)
    }

    /// True if the guest may hold `wanted` bytes more of the `free` ones: whoever holds some leaves at least as much free
    /// as it then holds. So a guest whose disk hangs takes a part of what the others left, never all; see
    /// `limits::DATA_MEMORY_BYTES`.
    fn may_hold(&self, guest: u32, wanted: u64, free: u64) -> bool {
        let held = self.0.get(guest as usize).map_or(0, |guest| guest.held_bytes);
        held == 0 || held + wanted <= free.saturating_sub(wanted)
    }

    fn holds(&mut self, guest: u32, bytes: u64) {
        if let Some(guest) = self.0.get_mut(guest as usize) {
            guest.held_bytes += bytes;
        }
    }

    fn gives_back(&mut self, guest: u32, bytes: u64) {
        if let Some(guest) = self.0.get_mut(guest as usize) {
            guest.held_bytes = guest.held_bytes.saturating_sub(bytes);
        }
    }
}

/// Why a request has no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    /// There is too little, or somebody else is first in line.
    Memory,
    /// Its guest holds its share: what the guest has in flight must end first, and nobody waits for that but itself.
    Share,
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Finds memory for a request's data and sends it on; without memory it stays starved. Where somebody is first in
    /// line, it waits behind: small requests would take what a large one needs, page by page, for ever.
    pub(super) fn start(&mut self, id: u32, place: u16) {
        let is_described = self
            .queue(id)
            .and_then(|queue| queue.in_flight(place))
            .is_some_and(|one| matches!(one.request.segments, Segments::Direct(_)));
        if is_described && (self.go_mapped(id, place) || self.go_direct(id, place)) {
            return;
        }
        self.start_buffered(id, place);
    }

    pub(super) fn start_buffered(&mut self, id: u32, place: u16) {
        let allowed = !self.line_is_blocked();
        if self.try_start(id, place, allowed).is_some()
            && let Some(queue) = self.queue(id)
            && !queue.starved
        {
            queue.starved = true;
            self.starved.push_back(id);
        }
    }

    /// Whether the first in line keeps the others waiting. It does so for a time only: what it waits for may be held by
    /// storage that never answers.
    fn line_is_blocked(&self) -> bool {
        self.first_in_line.is_some_and(|(_, since)| self.now < since + STARVED_PATIENCE)
    }

    /// When those behind the first in line may pass, if they wait.
    pub(super) fn line_deadline(&self) -> Option<Duration> {
        let (_, since) = self.first_in_line?;
        (self.line_is_blocked() && self.starved.len() > 1).then_some(since + STARVED_PATIENCE)
    }

    fn try_start(&mut self, id: u32, place: u16, allowed: bool) -> Option<Lack> {
        let queue = self.queues.get_mut(id as usize).and_then(Option::as_mut)?;
        let guest = queue.guest;
        let one = queue.in_flight(place)?;
        let descriptors = match &one.request.segments {
            Segments::Indirect(indirect) => indirect.descriptor_bytes(),
            Segments::Direct(_) => 0,
        };
        let length = one.request.length_bytes();
        let pool = self.storage.buffers();
        let wanted = u64::from(length.next_multiple_of(4096) + descriptors.next_multiple_of(4096));
        let capacity = pool.capacity_bytes() as u64;
        if wanted > capacity {
            self.finish(id, place, Status::Error);
            return None;
        }
        if !self.guests.may_hold(guest, wanted, capacity - pool.used_bytes()) {
            one.stage = Stage::Starved;
            return Some(Lack::Share);
        }
        let held = if allowed { self.rows.alloc(pool, length, descriptors) } else { None };
        let Some(held) = held else {
            one.stage = Stage::Starved;
            return Some(Lack::Memory);
        };
        self.guests.holds(guest, held.bytes.into());
        one.held = held;
        one.stage = Stage::Storage;
        if descriptors > 0 {
            self.fetch_descriptors(id, place);
        } else {
            self.move_buffered(id, place);
        }
        None
    }

    /// Has the data of a request copied straight between the guest's pages and the file's, where the storage has these in
    /// memory: no transfer, and no memory of ours. False where it must go the usual way.
    fn go_direct(&mut self, id: u32, place: u16) -> bool {
        // What is copied must be copied before anybody else can unmap it: in this turn.
        if !self.turning {
            return false;
        }
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return false };
        let queue_disk = queue.disk;
        let Some(disk) = self.disks.get(queue_disk as usize).and_then(Option::as_ref) else { return false };
        let Some(one) = queue.in_flight(place) else { return false };
        let length = one.request.length_bytes();
        // What is looked at for zeroes must be in our memory.
        let looked_at = disk.detect_zeroes && one.request.operation == rings::Operation::Write;
        if length == 0 || looked_at {
            return false;
        }
        let (kind, direction) = match one.request.operation {
            rings::Operation::Read => (IoKind::Read, CopyDirection::ToGuest),
            rings::Operation::Write => (IoKind::Write, CopyDirection::FromGuest),
            // More than the data has to be done in order.
            _ => return false,
        };
        let extent = extent_of(&one.request);
        let (file, offset_bytes, in_place) = match disk.offset_of(extent) {
            Some(offset_bytes) => (disk.file, offset_bytes, None),
            None => match self.chains.begin_in_place(queue_disk, kind, extent) {
                Some((file, offset_bytes, id)) => (file, offset_bytes, Some(id)),
                None => return false,
            },
        };
        let Some(span) = self.storage.direct(file, kind, offset_bytes, length) else {
            if let Some(id) = in_place {
                self.chains.end_in_place(queue_disk, id);
            }
            return false;
        };
        one.in_place = in_place;
        // The file's pages are no memory of the pool's: they are not counted, and given back by nobody. What the request has
        // of the pool it keeps, should this way fail.
        one.held.aside = std::mem::replace(&mut one.held.first, span);
        one.stage = Stage::Direct;
        self.queue_copy(id, place, direction);
        true
    }

    /// A request's copies are over. True if they were to or from the file itself, whose pages it then has no more.
    pub(super) fn end_direct(&mut self, id: u32, place: u16) -> bool {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return false };
        let disk = queue.disk;
        let Some(one) = queue.in_flight(place).filter(|one| one.stage == Stage::Direct) else { return false };
        if let Some(id) = one.in_place.take() {
            self.chains.end_in_place(disk, id);
        }
        one.held.first = std::mem::replace(&mut one.held.aside, Span::EMPTY);
        one.stage = Stage::Storage;
        true
    }

    /// The straight way failed, for whatever reason: the usual way tells which, and may do better.
    pub(super) fn retry_buffered(&mut self, id: u32, place: u16) {
        let Some(one) = self.queue(id).and_then(|queue| queue.in_flight(place)) else { return };
        // An indirect request has had memory since before its descriptors were read, which must not be read again.
        if one.held.bytes == 0 { self.start_buffered(id, place) } else { self.move_buffered(id, place) }
    }

    /// Starts to move the data of a request that has memory and whose segments are known.
    pub(super) fn move_data(&mut self, id: u32, place: u16) {
        if !self.go_mapped(id, place) && !self.go_direct(id, place) {
            self.move_buffered(id, place);
        }
    }

    fn move_buffered(&mut self, id: u32, place: u16) {
        let Some(one) = self.queue(id).and_then(|queue| queue.in_flight(place)) else { return };
        if one.request.operation == rings::Operation::Read {
            self.queue_transfer(id, place, IoKind::Read);
        } else {
            self.queue_copy(id, place, CopyDirection::FromGuest);
        }
    }

    /// Gives back what a described request does not need.
    pub(super) fn shorten(&mut self, id: u32, place: u16) {
        let Some(queue) = self.queues.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let guest = queue.guest;
        let Some(one) = queue.in_flight(place) else { return };
        let before = one.held.bytes;
        self.rows.shorten(self.storage.buffers(), &mut one.held, one.request.length_bytes());
        let given = before - one.held.bytes;
        self.guests.gives_back(guest, given.into());
    }

    /// Takes the memory of a request back.
    pub(super) fn release(&mut self, guest: u32, held: Held) {
        if held.bytes > 0 {
            self.rows.free(self.storage.buffers(), held);
            self.guests.gives_back(guest, held.bytes.into());
        }
    }

    /// Tries again for the requests that found no memory. Queues take their turns; nobody overtakes the first in line,
    /// unless that one waits for its own share or has waited too long.
    pub(super) fn feed_starved(&mut self) -> bool {
        let mut progress = false;
        let mut first = None;
        for _ in 0..self.starved.len() {
            let Some(id) = self.starved.pop_front() else { break };
            match self.feed(id, first.is_none() || !self.line_is_blocked(), &mut progress) {
                Some(lack) => {
                    self.starved.push_back(id);
                    if lack == Lack::Memory && first.is_none() {
                        let since = self.first_in_line.filter(|(queue, _)| *queue == id);
                        first = Some(since.unwrap_or((id, self.now)));
                        self.first_in_line = first;
                    }
                }
                None => {
                    if let Some(queue) = self.queue(id) {
                        queue.starved = false;
                    }
                    self.list(id);
                }
            }
        }
        self.first_in_line = first;
        progress
    }

    /// Starts what a queue has waiting, until something still lacks memory.
    fn feed(&mut self, id: u32, allowed: bool, progress: &mut bool) -> Option<Lack> {
        while let Some(place) = self.queue(id).and_then(|queue| queue.next_starved()) {
            let lack = self.try_start(id, place, allowed);
            if lack.is_some() {
                return lack;
            }
            *progress = true;
        }
        None
    }
}
