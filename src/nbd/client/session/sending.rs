//! What is asked of a server next, and the bytes of it.

use super::{Command, Durability, Entry, Header, Memory, Phase, Session, State, WINDOW, Work};
use crate::nbd::client::unflushed::Unflushed;
use crate::nbd::wire::{command, flag};

impl<M: Copy> Session<M> {
    /// The room among the unflushed that a request will take.
    pub(super) fn cost(&self, entry: &Entry<M>) -> u64 {
        match (entry.work, entry.command) {
            _ if self.durability != Durability::Flush => 0,
            (Work::Caller(_), Command::Write) => Unflushed::cost_of(entry.length_bytes.into()),
            (Work::Caller(_), Command::WriteZeroes) => Unflushed::cost_of(0),
            _ => 0,
        }
    }

    /// Puts into the outbox what may go now.
    pub(super) fn fill(&mut self) {
        let may_go = match self.phase {
            Phase::Down => false,
            Phase::Again(_) => self.fill_again(),
            Phase::Up => true,
        };
        if !may_go {
            return;
        }
        if self.wants_flush()
            && self.in_flight < WINDOW
            && let Some(place) = self.admit(Work::Flush)
        {
            self.put_out(place);
        }
        while self.in_flight < WINDOW {
            let from_held = self.held.front().copied().filter(|place| self.fits(*place));
            if let Some(place) = from_held {
                self.held.pop_front();
                self.put_out(place);
            } else if let Some(place) = self.waiting.pop_front() {
                let cost = self.at(place).map_or(0, |entry| self.cost(entry));
                if cost > 0 && (!self.held.is_empty() || !self.fits(place)) {
                    self.held.push_back(place);
                } else {
                    self.put_out(place);
                }
            } else {
                break;
            }
        }
        if self.wants_flush()
            && self.in_flight < WINDOW
            && let Some(place) = self.admit(Work::Flush)
        {
            self.put_out(place);
        }
    }

    fn fits(&self, place: u16) -> bool {
        let cost = self.at(place).map_or(0, |entry| self.cost(entry));
        let nothing_kept = self.unflushed.is_empty() && self.promised == 0;
        nothing_kept || self.unflushed.has_room(self.promised + cost)
    }

    /// Unflushed writes take too much room, and nobody else is about to change that.
    fn wants_flush(&self) -> bool {
        let crowded = self.unflushed.is_half_full() || (!self.held.is_empty() && !self.unflushed.is_empty());
        self.flushes == 0 && crowded && self.flush_error.is_none() && self.durability == Durability::Flush
    }

    /// Puts unflushed writes into the outbox once more. Two that overlap are never out at once, as a server may do them in
    /// any order. True when all of them have been answered.
    fn fill_again(&mut self) -> bool {
        while let Phase::Again(number) = self.phase {
            let Some(kept) = self.unflushed.get(number) else {
                if self.in_flight == 0 {
                    self.phase = Phase::Up;
                    return true;
                }
                return false;
            };
            let (from, to) = (kept.offset_bytes, kept.offset_bytes.saturating_add(kept.length_bytes.into()));
            let overlaps = |entry: &Entry<M>| {
                matches!(entry.state, State::Out | State::Sent)
                    && entry.offset_bytes < to
                    && from < entry.offset_bytes + u64::from(entry.length_bytes)
            };
            if self.in_flight >= WINDOW || self.entries.iter().any(overlaps) {
                return false;
            }
            let Some(place) = self.admit(Work::Again(number)) else { return false };
            self.phase = Phase::Again(number + 1);
            self.put_out(place);
        }
        true
    }

    fn put_out(&mut self, place: u16) {
        let (_, end) = self.unflushed.numbers();
        let each_write = self.durability == Durability::EachWrite;
        let Some(entry) = self.entries.get_mut(usize::from(place)) else { return };
        let (code, flags) = match entry.command {
            Command::Read => (command::READ, 0),
            Command::Write if each_write => (command::WRITE, flag::FUA),
            Command::Write => (command::WRITE, 0),
            Command::Flush => (command::FLUSH, 0),
            Command::Trim => (command::TRIM, 0),
            Command::WriteZeroes if each_write => (command::WRITE_ZEROES, flag::FUA),
            Command::WriteZeroes => (command::WRITE_ZEROES, 0),
        };
        let header = Header {
            flags,
            command: code,
            cookie: entry.cookie,
            offset_bytes: entry.offset_bytes,
            length_bytes: entry.length_bytes,
        };
        entry.header = header.to_bytes();
        entry.state = State::Out;
        entry.covers = end;
        self.flushes += usize::from(entry.command == Command::Flush);
        self.in_flight += 1;
        let cost = self.at(place).map_or(0, |entry| self.cost(entry));
        self.promised += cost;
        self.outbox.push_back(place);
    }

    /// The data that go with a request, in two parts.
    fn payload<'a>(&'a self, entry: &Entry<M>, memory: &'a impl Memory<M>) -> (&'a [u8], &'a [u8]) {
        match entry.work {
            Work::Caller(request) if request.command == Command::Write => {
                (memory.bytes(request.memory, request.length_bytes), &[])
            }
            Work::Again(number) => self.unflushed.get(number).and_then(|kept| kept.data).unwrap_or_default(),
            _ => (&[], &[]),
        }
    }

    /// What is to be sent next, from the first byte that was not sent yet; nothing is empty.
    pub fn outgoing<'a>(&'a self, memory: &'a impl Memory<M>) -> impl Iterator<Item = &'a [u8]> {
        let mut skip = self.sent;
        let entries = self.outbox.iter().filter_map(|place| self.at(*place));
        let pieces = entries.flat_map(|entry| {
            let (first, second) = self.payload(entry, memory);
            [&entry.header[..], first, second]
        });
        pieces.filter_map(move |piece| {
            let rest = piece.get(skip.min(piece.len())..)?;
            skip = skip.saturating_sub(piece.len());
            (!rest.is_empty()).then_some(rest)
        })
    }

    /// Whether there is anything to be sent.
    #[must_use]
    pub fn has_outgoing(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// So many bytes of it have been sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        while let Some(entry) =
            self.outbox.front().and_then(|place| self.entries.get_mut(usize::from(*place)))
        {
            let data = if entry.command == Command::Write { entry.length_bytes as usize } else { 0 };
            let whole = Header::BYTES + data;
            if self.sent < whole {
                return;
            }
            entry.state = State::Sent;
            self.sent -= whole;
            self.outbox.pop_front();
        }
    }
}
