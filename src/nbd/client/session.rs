//! Requests to one export over one connection after the other: what is to be sent, what was received, and what has to be
//! done again when a connection was lost.
//!
//! ```text
//! push ─► waiting ─► outbox ─► sent ─► reply ─► Memory::done
//!            │ ▲                 │
//!            ▼ └── lost: again ──┴─ what was answered and not flushed is sent again first (see unflushed)
//!          held: writes for which there is no room among the unflushed
//! ```
//!
//! Whoever drives it sends [`Session::outgoing`] and says how much went ([`Session::sent`]), gives it what comes in
//! ([`Session::receive`]), or receives data straight to where they belong ([`Session::expects`], [`Session::received`]).

mod replies;
mod sending;

use std::collections::VecDeque;

use super::coverage::Coverage;
use super::greeting::Export;
use super::receiver::Receiver;
use super::unflushed::Unflushed;
use crate::nbd::wire::{Request as Header, error, transmission};

/// Requests that a server has to do at once, at most. Servers take 16 or so and leave the others in the socket.
const WINDOW: usize = 128;

/// Requests held, at most: what fits into a cookie's lower half. More are refused with `ENOMEM`.
const ENTRIES_MAX: usize = 1 << 15;

/// What an export is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It is read.
    Reading,
    /// It is written, and by nobody else.
    Writing,
    /// Others write it too. What they have written must not be overwritten by what was answered before.
    WritingShared,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Fill the memory.
    Read,
    /// Store the memory.
    Write,
    /// Make durable all that was answered before.
    Flush,
    /// Let go of a range.
    Trim,
    /// Make a range read as zero.
    WriteZeroes,
}

/// A caller's request. `M` names its memory.
#[derive(Clone, Copy, Debug)]
pub struct Request<M> {
    /// The caller's name for it.
    pub tag: u32,
    /// What to do.
    pub command: Command,
    /// Where, in bytes. Nothing for a flush.
    pub offset_bytes: u64,
    /// How much.
    pub length_bytes: u32,
    /// The memory of a read or write.
    pub memory: M,
}

/// The memory of requests, and those who wait for them.
pub trait Memory<M> {
    /// What a write stores: `length` bytes.
    fn bytes(&self, memory: M, length: u32) -> &[u8];

    /// Bytes of a read have come: they belong `at` bytes into its memory. Always within it.
    fn store(&mut self, memory: M, at: u32, bytes: &[u8]);

    /// So many bytes of a read, `at` bytes into its memory, are zero.
    fn zero(&mut self, memory: M, at: u32, length: u32);

    /// A request has ended: with the bytes that were moved, or with the protocol's number of an error. Told once for each.
    fn done(&mut self, tag: u32, result: Result<u32, u32>);
}

/// A server has broken the rules of the protocol: the connection is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misbehaved(pub &'static str);

/// Who wants it.
#[derive(Clone, Copy, Debug)]
enum Work<M> {
    Caller(Request<M>),
    /// We, so that what is kept of unflushed writes gets less.
    Flush,
    /// We, to give a new server what an old one may have lost: its number.
    Again(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Waiting or held.
    Queued,
    /// In the outbox: sent in part, or not yet.
    Out,
    Sent,
}

#[derive(Clone, Debug)]
struct Entry<M> {
    work: Work<M>,
    state: State,
    cookie: u64,
    header: [u8; Header::BYTES],
    command: Command,
    offset_bytes: u64,
    length_bytes: u32,
    /// Of a flush: the number of the first write that it does not cover.
    covers: u64,
    /// Of a read: what has come.
    coverage: Coverage,
    /// The first error that was told; 0 for none.
    error: u32,
}

/// How what was written becomes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    /// Nothing is written.
    Nothing,
    /// By flushes.
    Flush,
    /// With each write: a flush has nothing to do.
    EachWrite,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is no connection.
    Down,
    /// Unflushed writes are sent again: the number of the next.
    Again(u64),
    Up,
}

/// The requests to one export.
#[derive(Debug)]
pub struct Session<M> {
    export: Export,
    durability: Durability,
    entries: Vec<Entry<M>>,
    free: Vec<u16>,
    waiting: VecDeque<u16>,
    held: VecDeque<u16>,
    outbox: VecDeque<u16>,
    /// Bytes of the outbox's first that were sent.
    sent: usize,
    in_flight: usize,
    flushes: usize,
    /// Room among the unflushed that writes in flight will take.
    promised: u64,
    unflushed: Unflushed,
    serial: u64,
    phase: Phase,
    receiver: Receiver,
    /// A flush has failed: no later one can be believed.
    flush_error: Option<u32>,
    /// What was answered is lost: nothing can be believed.
    broken: bool,
    /// Callers' requests.
    pending: usize,
    /// Replies that were taken.
    replies: u64,
}

impl<M: Copy> Session<M> {
    /// For an export that has just been agreed upon. `unflushed_bytes` bounds the memory for writes that no flush has covered.
    ///
    /// # Errors
    /// A sentence, where the export cannot be used so.
    pub fn new(export: Export, purpose: Purpose, unflushed_bytes: u64) -> Result<Session<M>, &'static str> {
        let (flush, each_write) = (export.can(transmission::SEND_FLUSH), export.can(transmission::SEND_FUA));
        let durability = match purpose {
            Purpose::Reading => Durability::Nothing,
            _ if export.can(transmission::READ_ONLY) => return Err("the server lets it only be read"),
            Purpose::Writing if flush => Durability::Flush,
            Purpose::Writing | Purpose::WritingShared if each_write => Durability::EachWrite,
            Purpose::Writing => {
                return Err(
                    "the server cannot make data durable (it offers neither flush nor FUA), so it may only be read",
                );
            }
            Purpose::WritingShared => {
                return Err(
                    "others write it too, and the server offers no FUA, without which that is not safe",
                );
            }
        };
        Ok(Session {
            export,
            durability,
            entries: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            held: VecDeque::new(),
            outbox: VecDeque::new(),
            sent: 0,
            in_flight: 0,
            flushes: 0,
            promised: 0,
            unflushed: Unflushed::new(unflushed_bytes),
            serial: 0,
            phase: Phase::Up,
            receiver: Receiver::START,
            flush_error: None,
            broken: false,
            pending: 0,
            replies: 0,
        })
    }

    /// What the server says of the export.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Callers' requests that have not ended.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Whole replies that have come over all connections, to callers' requests and to our own.
    #[must_use]
    pub fn replies(&self) -> u64 {
        self.replies
    }

    /// Whether nothing is asked of the server at present.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Memory taken by writes that no flush has covered yet, in bytes.
    #[must_use]
    pub fn unflushed_bytes(&self) -> u64 {
        self.unflushed.cost_bytes()
    }

    /// How much memory they may take from now on.
    pub fn bound_unflushed(&mut self, bytes: u64) {
        self.unflushed.bound(bytes);
    }

    /// Gives memory back that is not needed now.
    pub fn trim(&mut self) {
        self.unflushed.trim();
    }

    /// Takes a request. What cannot be done at all is answered at once.
    pub fn push(&mut self, request: Request<M>, memory: &mut impl Memory<M>) {
        let flush = request.command == Command::Flush;
        let refusal = match self.flush_error {
            _ if self.broken => Some(error::EIO),
            Some(error) if flush => Some(error),
            _ => None,
        };
        if let Some(refusal) = refusal {
            return memory.done(request.tag, Err(refusal));
        }
        if flush && self.durability != Durability::Flush {
            return memory.done(request.tag, Ok(0));
        }
        let Some(place) = self.admit(Work::Caller(request)) else {
            return memory.done(request.tag, Err(error::ENOMEM));
        };
        self.pending += 1;
        self.waiting.push_back(place);
        self.fill();
    }

    fn admit(&mut self, work: Work<M>) -> Option<u16> {
        self.serial += 1;
        let (command, offset_bytes, length_bytes) = match work {
            Work::Caller(request) => (request.command, request.offset_bytes, request.length_bytes),
            Work::Flush => (Command::Flush, 0, 0),
            Work::Again(number) => {
                let kept = self.unflushed.get(number)?;
                let command = if kept.data.is_some() { Command::Write } else { Command::WriteZeroes };
                (command, kept.offset_bytes, kept.length_bytes)
            }
        };
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                u16::try_from(self.entries.len()).ok().filter(|place| usize::from(*place) < ENTRIES_MAX)?
            }
        };
        let entry = Entry {
            work,
            state: State::Queued,
            cookie: self.serial << 16 | u64::from(place),
            header: [0; Header::BYTES],
            command,
            offset_bytes,
            length_bytes,
            covers: 0,
            coverage: Coverage::default(),
            error: 0,
        };
        match self.entries.get_mut(usize::from(place)) {
            Some(old) => *old = entry,
            None => self.entries.push(entry),
        }
        Some(place)
    }

    fn at(&self, place: u16) -> Option<&Entry<M>> {
        self.entries.get(usize::from(place))
    }

    /// The connection is lost. What was not answered is sent again over the next one, oldest first.
    pub fn lost(&mut self, memory: &mut impl Memory<M>) {
        self.phase = Phase::Down;
        self.receiver = Receiver::START;
        self.outbox.clear();
        (self.sent, self.in_flight, self.flushes, self.promised) = (0, 0, 0, 0);
        let mut again: Vec<u16> = Vec::new();
        for (place, entry) in (0_u16..).zip(&mut self.entries) {
            if !matches!(entry.state, State::Out | State::Sent) {
                continue;
            }
            if let Work::Caller(_) = entry.work {
                (entry.state, entry.coverage, entry.error) = (State::Queued, Coverage::default(), 0);
                again.push(place);
            } else {
                entry.state = State::Free;
                self.free.push(place);
            }
        }
        again.sort_by_key(|place| self.at(*place).map(|entry| entry.cookie));
        again.into_iter().rev().for_each(|place| self.waiting.push_front(place));
        // What a failed flush should have saved is not kept any more, and may be gone with that server.
        if self.flush_error.is_some() {
            self.give_up(memory);
        }
    }

    /// There is a connection to the same export again.
    pub fn connected(&mut self, structured: bool) {
        self.export.structured = structured;
        self.phase = Phase::Again(self.unflushed.numbers().0);
        self.fill();
    }

    /// Ends all callers' requests with an error. The connection must be gone: their memory is theirs again.
    pub fn fail_all(&mut self, error: u32, memory: &mut impl Memory<M>) {
        self.lost_quietly();
        self.held.clear();
        self.waiting.clear();
        for (place, entry) in (0_u16..).zip(&mut self.entries) {
            if entry.state != State::Free {
                entry.state = State::Free;
                self.free.push(place);
                if let Work::Caller(request) = entry.work {
                    self.pending -= 1;
                    memory.done(request.tag, Err(error));
                }
            }
        }
    }

    fn lost_quietly(&mut self) {
        self.phase = Phase::Down;
        self.receiver = Receiver::START;
        self.outbox.clear();
        (self.sent, self.in_flight, self.flushes, self.promised) = (0, 0, 0, 0);
    }

    /// Nothing of this export can be believed any more, until it is opened anew.
    fn give_up(&mut self, memory: &mut impl Memory<M>) {
        self.broken = true;
        self.fail_all(error::EIO, memory);
    }

    /// Whether that is so.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
mod tests;
