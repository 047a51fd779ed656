//! The client: jobs and watches in, requests out; replies in, events out.
//!
//! The owner moves the bytes and tells the time:
//! `receive` what arrived, write out what `transmit` shows (`transmitted` / `refused` say how that went), call
//! `handle_time` at the latest at `timeout`, and take every `event`. `disconnected` and `connected` tell it when a
//! connection ended and when the next one stands.

mod backoff;
mod edits;
mod jobs;
mod list;
mod transaction;
mod types;
mod watches;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use crate::path::Path;
use crate::wire::{self, Decoder, ErrorCode, Header, MessageType};
use backoff::Rng;
use jobs::{Clock, JobState, Request};
pub use types::{
    Config, Edit, Event, Failure, Guard, Job, JobId, Outcome, ProtocolError, Statistics, SubmitError,
    WatchToken,
};
use watches::Watches;

/// What bounds the client's memory and its use of the server.
pub mod limits {
    /// Requests without a reply. xenstored stops to read from a domain that has 20.
    pub const REQUESTS_OUTSTANDING_MAX: usize = 16;
    /// Transactions open at once. A domain may have 10, and the kernel's own drivers share them with us.
    pub const TRANSACTIONS_OPEN_MAX: usize = 4;
    /// Jobs submitted whose completion was not yet taken.
    pub const JOBS_MAX: usize = 1024;
    /// Nodes in one job: what a job may hold of values is this times 4 KiB.
    pub const NODES_PER_JOB_MAX: usize = 160;
    /// Watches, those about to be removed included. The server of an unprivileged domain takes 128.
    pub const WATCHES_MAX: usize = 4096;
    /// Different paths remembered for one watch between two looks of the owner; past that they become one event for
    /// the watched path itself.
    pub const EVENTS_PER_WATCH_MAX: usize = 32;
    /// Bytes of paths remembered for all watches together; past that events become one per watch.
    pub const EVENT_BYTES_MAX: usize = 256 * 1024;
    /// Bytes of names in the longest directory that is listed.
    pub const LIST_BYTES_MAX: usize = 256 * 1024;
    /// How often the listing of a long directory starts over because the directory changed meanwhile.
    pub const LIST_RESTARTS_MAX: u32 = 16;
    /// How often a transaction is tried before its job fails.
    pub const TRANSACTION_ATTEMPTS_MAX: u32 = 64;
    /// For how long a transaction is tried, in milliseconds, before its job fails.
    pub const TRANSACTION_AGE_MS_MAX: u64 = 30_000;
    /// The window of the first back-off, in milliseconds; it doubles with each attempt.
    pub const BACKOFF_FIRST_MS: u64 = 2;
    /// The widest window of a back-off, in milliseconds.
    pub const BACKOFF_MS_MAX: u64 = 1_000;
}

/// Whom a reply goes to.
#[derive(Debug)]
enum Owner {
    Job { id: JobId, step: usize },
    Watch(WatchToken, Path),
    Unwatch(WatchToken, Path),
}

#[derive(Debug)]
struct InFlight {
    kind: MessageType,
    owner: Owner,
}

/// A xenstore client. See the module's head for how to drive it.
#[derive(Debug)]
pub struct Client {
    config: Config,
    clock: Clock,
    connected: bool,
    broken: Option<ProtocolError>,
    decoder: Decoder,
    /// Whole messages, with the number of their request; the front one is written up to `out_written`.
    out: VecDeque<(u32, Vec<u8>)>,
    out_written: usize,
    last_request: u32,
    in_flight: BTreeMap<u32, InFlight>,
    last_job: u64,
    jobs: BTreeMap<JobId, JobState>,
    transactions_open: usize,
    watches: Watches,
    /// Resets and completions, in the order in which they came about.
    ready: VecDeque<Event>,
    statistics: Statistics,
}

impl Client {
    /// A client that is not connected yet.
    #[must_use]
    pub fn new(config: Config) -> Client {
        Client {
            clock: Clock { now_ms: 0, rng: Rng::new(config.seed) },
            config,
            connected: false,
            broken: None,
            decoder: Decoder::default(),
            out: VecDeque::new(),
            out_written: 0,
            last_request: 0,
            in_flight: BTreeMap::new(),
            last_job: 0,
            jobs: BTreeMap::new(),
            transactions_open: 0,
            watches: Watches::default(),
            ready: VecDeque::new(),
            statistics: Statistics::default(),
        }
    }

    /// A connection stands. All watches are registered anew, [`Event::Reset`] tells the owner to read the world again,
    /// and what was submitted since [`Client::disconnected`] is sent.
    pub fn connected(&mut self) {
        if self.connected {
            self.disconnected();
        }
        self.connected = true;
        self.ready.push_back(Event::Reset);
        self.watches.register_all();
        self.pump();
    }

    /// The connection is gone. Every unfinished job fails with [`Failure::ConnectionLost`]: none is redone behind the
    /// owner's back, for what it was meant for may have changed.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.broken = None;
        self.decoder.reset();
        self.out.clear();
        self.out_written = 0;
        self.in_flight.clear();
        self.transactions_open = 0;
        self.ready.retain(|event| *event != Event::Reset);
        self.watches.disconnected();
        for (id, job) in core::mem::take(&mut self.jobs) {
            let failure = Failure::ConnectionLost { maybe_applied: job.maybe_applied() };
            self.ready.push_back(Event::Job { id, outcome: Outcome::Failed(failure) });
        }
    }

    /// Whether a connection stands and can be used.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected && self.broken.is_none()
    }

    /// Submits a job. Its completion is one [`Event::Job`]. Jobs run side by side: whoever needs the effect of one
    /// before another waits for its completion.
    ///
    /// # Errors
    /// [`SubmitError`]: the job was not taken, and there will be no completion.
    pub fn submit(&mut self, job: Job) -> Result<JobId, SubmitError> {
        job.check(self.config.payload_bytes_max)?;
        if self.jobs.len() + self.ready.len() >= limits::JOBS_MAX {
            return Err(SubmitError::Full);
        }
        self.last_job += 1;
        let id = JobId(self.last_job);
        match JobState::new(job) {
            Ok(state) => {
                self.jobs.insert(id, state);
                self.pump();
            }
            Err(outcome) => self.ready.push_back(Event::Job { id, outcome }),
        }
        Ok(id)
    }

    /// Watches `path` and all below it. Fires once at registration, and again after each reconnection. A watch that the
    /// server refuses ends with [`Event::WatchFailed`]. Watching twice is as watching once, with one more event.
    ///
    /// # Errors
    /// [`SubmitError::Full`] past [`limits::WATCHES_MAX`], [`SubmitError::TooBig`] for a path that leaves no room.
    pub fn watch(&mut self, path: &Path, token: WatchToken) -> Result<(), SubmitError> {
        if watches::payload(path, token).len() > self.config.payload_bytes_max {
            return Err(SubmitError::TooBig(path.clone()));
        }
        self.watches.watch(path, token, self.connected)?;
        self.pump();
        Ok(())
    }

    /// Ends a watch. No event of it comes after this call.
    pub fn unwatch(&mut self, path: &Path, token: WatchToken) {
        self.watches.unwatch(path, token);
        self.pump();
    }

    /// Takes bytes that arrived, in any pieces.
    ///
    /// # Errors
    /// The server broke the protocol: close the connection and call [`Client::disconnected`]. Until then every further
    /// call fails the same way and nothing is taken in.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let mut input = bytes;
        let result = loop {
            match self.decoder.next(&mut input) {
                Ok(Some((header, payload))) => {
                    if let Err(error) = self.message(header, &payload) {
                        break Err(error);
                    }
                }
                Ok(None) => break Ok(()),
                Err(wire::TooLong(length)) => break Err(ProtocolError::PayloadTooLong(length)),
            }
        };
        if let Err(error) = result {
            self.broken = Some(error);
            self.out.clear();
            self.out_written = 0;
        }
        self.pump();
        result
    }

    /// What is to be written next: the rest of exactly one message. `/dev/xen/xenbus` takes one message per write.
    #[must_use]
    pub fn transmit(&self) -> Option<&[u8]> {
        self.out.front().map(|(_, message)| &message[self.out_written..])
    }

    /// Says how many bytes of [`Client::transmit`] were written.
    pub fn transmitted(&mut self, bytes: usize) {
        let Some((_, message)) = self.out.front() else { return };
        self.out_written += bytes;
        if self.out_written >= message.len() {
            self.out.pop_front();
            self.out_written = 0;
        }
    }

    /// Says that the message of [`Client::transmit`] was refused as a whole, as if the server had answered it with
    /// `code`: the kernel's device reports some errors so.
    ///
    /// # Errors
    /// None for a refusal of a message of ours; the type is that of [`Client::receive`].
    pub fn refused(&mut self, code: ErrorCode) -> Result<(), ProtocolError> {
        self.out_written = 0;
        let Some((request, _)) = self.out.pop_front() else { return Ok(()) };
        let result = match self.in_flight.remove(&request) {
            Some(entry) => self.answer(entry.owner, Err(code)),
            None => Ok(()),
        };
        self.pump();
        result
    }

    /// When [`Client::handle_time`] is due at the latest, in milliseconds of the caller's clock.
    #[must_use]
    pub fn timeout(&self) -> Option<u64> {
        self.jobs.values().filter_map(JobState::not_before).filter(|at| *at > self.clock.now_ms).min()
    }

    /// Tells the time, in milliseconds since any fixed instant. Never goes back.
    pub fn handle_time(&mut self, now_ms: u64) {
        self.clock.now_ms = self.clock.now_ms.max(now_ms);
        self.pump();
    }

    /// Takes one event. Completions come before watch events, so that a reply never overtakes an event that followed it
    /// on the wire.
    pub fn event(&mut self) -> Option<Event> {
        self.completion().or_else(|| self.watches.event())
    }

    /// Takes one event that is a [`Event::Reset`] or the end of a job, and leaves those of watches for later.
    pub fn completion(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    /// Whether [`Client::event`] has something to give.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.ready.is_empty() || self.watches.has_events()
    }

    /// Counters since the client was made.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        Statistics {
            events_coalesced: self.watches.coalesced,
            events_ignored: self.watches.ignored,
            ..self.statistics
        }
    }

    /// Requests that wait for a reply.
    #[must_use]
    pub fn requests_outstanding(&self) -> usize {
        self.in_flight.len()
    }

    fn message(&mut self, header: Header, payload: &[u8]) -> Result<(), ProtocolError> {
        let kind = MessageType::from_number(header.kind).ok_or(ProtocolError::UnknownType(header.kind))?;
        if kind == MessageType::WatchEvent {
            return self.watches.fired(payload);
        }
        let entry = self.in_flight.remove(&header.request);
        let entry = entry.ok_or(ProtocolError::UnknownRequest(header.request))?;
        if self.out.iter().any(|(request, _)| *request == header.request) {
            return Err(ProtocolError::UnknownRequest(header.request));
        }
        if kind == MessageType::Error {
            return self.answer(entry.owner, Err(ErrorCode::from_payload(payload)));
        }
        if kind != entry.kind {
            return Err(ProtocolError::WrongType { asked: entry.kind, answered: kind });
        }
        self.answer(entry.owner, Ok(payload))
    }

    fn answer(&mut self, owner: Owner, result: Result<&[u8], ErrorCode>) -> Result<(), ProtocolError> {
        match owner {
            Owner::Watch(token, path) => self.watches.registered(token, path, result.map(|_| ())),
            Owner::Unwatch(token, path) => self.watches.removed(token, path),
            Owner::Job { id, step } => {
                let Some(job) = self.jobs.get_mut(&id) else { return Ok(()) };
                let was_open = job.holds_transaction();
                let outcome = job.reply(step, result, &mut self.clock)?;
                if was_open && (outcome.is_some() || !job.holds_transaction()) {
                    self.transactions_open -= 1;
                }
                if let Some(outcome) = outcome {
                    self.statistics.transactions_redone += u64::from(job.retries());
                    self.jobs.remove(&id);
                    self.ready.push_back(Event::Job { id, outcome });
                }
            }
        }
        Ok(())
    }

    /// Makes messages as long as the pipeline has room and somebody has something to ask.
    fn pump(&mut self) {
        if !self.is_connected() {
            return;
        }
        let depth = self.config.requests_max.clamp(1, limits::REQUESTS_OUTSTANDING_MAX);
        while self.in_flight.len() < depth {
            let Some((owner, request)) = self.next_request() else { return };
            let number = self.request_number();
            let Some(message) = wire::encode(request.kind, number, request.transaction, &[&request.payload])
            else {
                // Job::check and Client::watch bound every payload, so there is no such message.
                return;
            };
            self.statistics.requests += 1;
            self.in_flight.insert(number, InFlight { kind: request.kind, owner });
            self.out.push_back((number, message));
        }
    }

    fn next_request(&mut self) -> Option<(Owner, Request)> {
        if let Some((kind, token, path)) = self.watches.next_request() {
            let request = Request { kind, transaction: 0, payload: watches::payload(&path, token), step: 0 };
            let owner = match kind {
                MessageType::Watch => Owner::Watch(token, path),
                _ => Owner::Unwatch(token, path),
            };
            return Some((owner, request));
        }
        for (id, job) in &mut self.jobs {
            let was_open = job.holds_transaction();
            let may_start = self.transactions_open < limits::TRANSACTIONS_OPEN_MAX;
            if let Some(request) = job.next_request(self.clock.now_ms, may_start) {
                if !was_open && job.holds_transaction() {
                    self.transactions_open += 1;
                }
                return Some((Owner::Job { id: *id, step: request.step }, request));
            }
        }
        None
    }

    /// A number that no request in flight has. Never 0, which servers and kernels put into watch events.
    fn request_number(&mut self) -> u32 {
        loop {
            self.last_request = self.last_request.wrapping_add(1);
            if self.last_request != 0 && !self.in_flight.contains_key(&self.last_request) {
                return self.last_request;
            }
        }
    }
}

#[cfg(test)]
mod tests;
