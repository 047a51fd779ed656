//! What a server answers. It may answer anything.

use super::super::receiver::{Fixed, Head, Next, Receiver, fixed_bytes, is_possible};
use super::{Command, Durability, Entry, Memory, Misbehaved, Phase, Session, State, Work};
use crate::nbd::wire::{Chunk, SimpleReply, chunk, error};

impl<M: Copy> Session<M> {
    /// Takes bytes that were received. They may end anywhere.
    ///
    /// # Errors
    /// [`Misbehaved`] if a server may not say that: the connection is to be closed, and [`Session::lost`] be called.
    pub fn receive(&mut self, bytes: &[u8], memory: &mut impl Memory<M>) -> Result<(), Misbehaved> {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            match self.receiver.next {
                Next::Data { place, at, left, .. } => {
                    let (data, rest) = bytes.split_at(bytes.len().min(left as usize));
                    bytes = rest;
                    if let Some(Entry { work: Work::Caller(request), .. }) = self.at(place) {
                        memory.store(request.memory, at, data);
                    }
                    self.received(data.len(), memory);
                }
                Next::Skip { place, left, done } => {
                    let (skipped, rest) = bytes.split_at(bytes.len().min(left as usize));
                    bytes = rest;
                    let left = left - u32::try_from(skipped.len()).unwrap_or(left);
                    self.receiver.next = Next::Skip { place, left, done };
                    if left == 0 {
                        self.chunk_over(place, done, memory)?;
                    }
                }
                _ => match self.receiver.head(&mut bytes) {
                    None | Some(Head::Goes) => {}
                    Some(Head::Nonsense) => return Err(Misbehaved("it sends what is no reply")),
                    Some(Head::Simple(reply)) => self.simple(reply, memory)?,
                    Some(Head::Chunk(header)) => self.chunk(header, memory)?,
                    Some(Head::Fixed { place, header, fixed }) => self.fixed(place, header, fixed, memory)?,
                },
            }
            if self.broken {
                return Err(Misbehaved("it does not take what it had answered before"));
            }
        }
        Ok(())
    }

    /// The memory to which the next bytes belong that come, how far in they do, and how many they are: they may be received
    /// there.
    #[must_use]
    pub fn expects(&self) -> Option<(M, u32, u32)> {
        let Next::Data { place, at, left, .. } = self.receiver.next else { return None };
        match self.at(place)?.work {
            Work::Caller(request) => Some((request.memory, at, left)),
            _ => None,
        }
    }

    /// So many of them have been received there.
    pub fn received(&mut self, bytes: usize, memory: &mut impl Memory<M>) {
        let Next::Data { place, at, left, done } = self.receiver.next else { return };
        let count = u32::try_from(bytes).unwrap_or(left).min(left);
        self.receiver.next = Next::Data { place, at: at + count, left: left - count, done };
        if left == count {
            self.receiver = Receiver::START;
            if done {
                self.end(place, memory);
            }
        }
    }

    /// The request that a reply names.
    fn named(&self, cookie: u64) -> Result<u16, Misbehaved> {
        let place = u16::try_from(cookie & 0xffff).unwrap_or(u16::MAX);
        match self.at(place) {
            Some(entry) if entry.state == State::Sent && entry.cookie == cookie => Ok(place),
            _ => Err(Misbehaved("it answers what was not asked")),
        }
    }

    fn simple(&mut self, reply: SimpleReply, memory: &mut impl Memory<M>) -> Result<(), Misbehaved> {
        let place = self.named(reply.cookie)?;
        self.receiver = Receiver::START;
        let Some(entry) = self.entries.get_mut(usize::from(place)) else { return Ok(()) };
        if entry.command == Command::Read && self.export.structured {
            return Err(Misbehaved(
                "it gives a simple reply to a read, where structured ones were agreed upon",
            ));
        }
        if reply.error == error::ESHUTDOWN {
            return Err(Misbehaved("it is shutting down"));
        }
        entry.error = reply.error;
        if entry.command == Command::Read && reply.error == 0 {
            let left = entry.length_bytes;
            entry.coverage.add(0, left);
            self.receiver.next = Next::Data { place, at: 0, left, done: true };
            return Ok(());
        }
        self.end(place, memory);
        Ok(())
    }

    fn chunk(&mut self, header: Chunk, memory: &mut impl Memory<M>) -> Result<(), Misbehaved> {
        let place = self.named(header.cookie)?;
        if !self.export.structured {
            return Err(Misbehaved("it gives a structured reply, which was not agreed upon"));
        }
        let is_read = self.at(place).is_some_and(|entry| entry.command == Command::Read);
        let is_content = matches!(header.kind, chunk::OFFSET_DATA | chunk::OFFSET_HOLE);
        if !is_possible(&header) || (is_content && !is_read) {
            return Err(Misbehaved("it sends a chunk that cannot be"));
        }
        if header.length_bytes == 0 {
            return self.chunk_over(place, true, memory);
        }
        self.receiver.next = Next::Fixed { place, header };
        Ok(())
    }

    fn fixed(
        &mut self,
        place: u16,
        header: Chunk,
        fixed: Fixed,
        memory: &mut impl Memory<M>,
    ) -> Result<(), Misbehaved> {
        let done = header.flags & chunk::DONE != 0;
        let rest = header.length_bytes - u32::try_from(fixed_bytes(header.kind)).unwrap_or(0);
        match fixed {
            Fixed::Data { offset_bytes } => {
                let at = self.within(place, offset_bytes, rest)?;
                // An error in an earlier chunk, or a gap, counts when the last byte is there.
                self.receiver.next = Next::Data { place, at, left: rest, done };
            }
            Fixed::Hole { offset_bytes, length_bytes } => {
                let at = self.within(place, offset_bytes, length_bytes)?;
                if let Some(Entry { work: Work::Caller(request), .. }) = self.at(place) {
                    memory.zero(request.memory, at, length_bytes);
                }
                self.chunk_over(place, done, memory)?;
            }
            Fixed::Error { error } => {
                if error == error::ESHUTDOWN {
                    return Err(Misbehaved("it is shutting down"));
                }
                if let Some(entry) = self.entries.get_mut(usize::from(place))
                    && entry.error == 0
                {
                    entry.error = if error == 0 { error::EIO } else { error };
                }
                self.receiver.next = Next::Skip { place, left: rest, done };
            }
        }
        Ok(())
    }

    /// Where content of a read belongs: never outside of it, and never to where some has come before.
    fn within(&mut self, place: u16, offset_bytes: u64, length: u32) -> Result<u32, Misbehaved> {
        let outside = Misbehaved("it sends data that were not asked for");
        let entry = self.entries.get_mut(usize::from(place)).ok_or(outside)?;
        let at = offset_bytes.checked_sub(entry.offset_bytes).and_then(|at| u32::try_from(at).ok());
        let at = at.ok_or(outside)?;
        let end =
            at.checked_add(length).filter(|end| *end <= entry.length_bytes && length > 0).ok_or(outside)?;
        if !entry.coverage.add(at, end) {
            return Err(Misbehaved("it sends data twice, or in too many pieces"));
        }
        Ok(at)
    }

    fn chunk_over(&mut self, place: u16, done: bool, memory: &mut impl Memory<M>) -> Result<(), Misbehaved> {
        self.receiver = Receiver::START;
        if done {
            self.end(place, memory);
        }
        Ok(())
    }

    /// The last byte of a reply has come.
    fn end(&mut self, place: u16, memory: &mut impl Memory<M>) {
        let Some(entry) = self.entries.get_mut(usize::from(place)) else { return };
        if entry.command == Command::Read && entry.error == 0 && !entry.coverage.is_whole(entry.length_bytes)
        {
            // Nobody may read what was in that memory before.
            entry.error = error::EIO;
        }
        entry.state = State::Free;
        self.replies += 1;
        let entry = entry.clone();
        self.free.push(place);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.promised = self.promised.saturating_sub(self.cost(&entry));
        self.flushes = self.flushes.saturating_sub(usize::from(entry.command == Command::Flush));
        let mut result = if entry.error == 0 { Ok(()) } else { Err(entry.error) };
        if let (Command::Flush, Some(error)) = (entry.command, self.flush_error) {
            // An earlier one has failed: this one cannot know what it has covered.
            result = Err(error);
        }
        match entry.work {
            Work::Again(_) if result.is_err() => return self.give_up(memory),
            Work::Again(_) => {}
            Work::Flush => self.flushed(&entry, result),
            Work::Caller(request) => {
                match entry.command {
                    Command::Flush => self.flushed(&entry, result),
                    _ if result.is_err() || !self.keeps() => {}
                    Command::Write => {
                        let data = memory.bytes(request.memory, request.length_bytes);
                        self.unflushed.keep(entry.offset_bytes, data);
                    }
                    Command::WriteZeroes => {
                        self.unflushed.keep_zeroes(entry.offset_bytes, entry.length_bytes)
                    }
                    Command::Read | Command::Trim => {}
                }
                self.pending -= 1;
                let moves = matches!(entry.command, Command::Read | Command::Write);
                memory.done(request.tag, result.map(|()| if moves { entry.length_bytes } else { 0 }));
            }
        }
        if self.phase != Phase::Down {
            self.fill();
        }
    }

    /// Whether unflushed writes are kept.
    fn keeps(&self) -> bool {
        self.durability == Durability::Flush && self.flush_error.is_none()
    }

    fn flushed(&mut self, entry: &Entry<M>, result: Result<(), u32>) {
        match result {
            Ok(()) => self.unflushed.drop_before(entry.covers),
            Err(error) => {
                self.flush_error = Some(error);
                self.unflushed.drop_before(u64::MAX);
            }
        }
    }
}
