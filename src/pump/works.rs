//! What formats want done, as transfers: pieces of work that are out.
//!
//! The data of a request move to and from its own memory, in its guest's turn. What belongs to the image (its metadata, what
//! is copied on a write) moves through memory of our own, of which there is always some to come: no guest holds it.

use std::collections::VecDeque;

use formats::{Failure, Payload, Work, WorkId, WorkKind};

use super::chains::failure_of;
use super::memory::PIECE_BYTES;
use super::slab::Slab;
use super::{Pump, Token};
use crate::buffers::{Pool, Span};
use crate::hypervisor::Hypervisor;
use crate::limits::METADATA_MEMORY_BYTES;
use crate::storage::{FileId, Io, IoKind, Storage, StorageError};

/// No flow: nobody's turn is taken.
const NOBODY: u32 = u32::MAX;

/// A piece of work that is out.
#[derive(Debug)]
struct Piece {
    disk: u32,
    work: Work,
    /// Whose turn its transfers take.
    flow: u32,
    /// Transfers that have not ended.
    transfers: u32,
    error: Option<StorageError>,
    /// Memory of our own.
    memory: Span,
    /// What of it has been moved through such memory, in bytes.
    moved: u64,
    /// What was read, where it takes more than one transfer.
    bytes: Vec<u8>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Works {
    /// Made with the first piece that needs it.
    pool: Option<Pool>,
    pieces: Slab<Piece>,
    /// Pieces that wait for memory, in line.
    unfed: VecDeque<u32>,
    /// Pieces that are done when others had their turn.
    yielded: Vec<(u32, WorkId)>,
}

impl Works {
    fn at(&mut self, number: u32) -> Option<&mut Piece> {
        self.pieces.get_mut(number)
    }

    fn add(&mut self, disk: u32, work: Work, flow: u32) -> u32 {
        self.pieces.add(Piece {
            disk,
            work,
            flow,
            transfers: 0,
            error: None,
            memory: Span::EMPTY,
            moved: 0,
            bytes: Vec::new(),
        })
    }

    pub(super) fn waits_for_others(&self) -> bool {
        !self.yielded.is_empty()
    }

    /// Gives unused memory back to the system.
    pub(super) fn trim(&mut self) {
        if let Some(pool) = &mut self.pool {
            pool.trim();
        }
    }

    /// Copies into memory of our own.
    pub(super) fn fill(&mut self, memory: Span, bytes: &[u8]) -> bool {
        self.pool.as_mut().is_some_and(|pool| pool.copy_in(memory, bytes))
    }

    /// Memory of our own. `Err` where there never will be any.
    fn memory(&mut self, length: u32) -> Result<Option<Span>, StorageError> {
        if self.pool.is_none() {
            self.pool = Some(Pool::new(METADATA_MEMORY_BYTES).map_err(|_| StorageError::Os(libc::ENOMEM))?);
        }
        Ok(self.pool.as_mut().and_then(|pool| pool.alloc(length)))
    }
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Starts a piece of work.
    pub(super) fn start_work(&mut self, disk: u32, work: Work) {
        match (work.kind, work.payload) {
            (WorkKind::Yield, _) => self.chains.works.yielded.push((disk, work.id)),
            (WorkKind::ZeroGuest | WorkKind::CopyToGuest, Payload::Guest { token, offset_bytes }) => {
                let filled = self.fill_guest(disk, &work, token, offset_bytes);
                let result = if filled { Ok(()) } else { Err(Failure::Io(libc::EFAULT)) };
                self.chains.done(disk, work.id, result, &[]);
            }
            (WorkKind::Read | WorkKind::Write, Payload::Guest { token, offset_bytes }) => {
                self.queue_guest(disk, work, token, offset_bytes);
            }
            (WorkKind::Read | WorkKind::Write, Payload::Own) => {
                let number = self.chains.works.add(disk, work, NOBODY);
                self.feed_work(number);
            }
            (WorkKind::Zero, _) => {
                self.queue_plain(disk, work, IoKind::Zero { length_bytes: work.length_bytes })
            }
            (WorkKind::Punch, _) => {
                self.queue_plain(disk, work, IoKind::Discard { length_bytes: work.length_bytes });
            }
            (WorkKind::SetLength, _) => self.queue_plain(disk, work, IoKind::SetLength),
            (WorkKind::Sync, _) => self.queue_plain(disk, work, IoKind::Flush),
            // No format says such a thing.
            _ => self.chains.done(disk, work.id, Err(Failure::Unsupported), &[]),
        }
    }

    fn file_of(&mut self, disk: u32, work: &Work) -> FileId {
        let chain = self.chains.get(disk);
        chain.and_then(|chain| chain.files.get(work.image as usize).copied()).unwrap_or(FileId::NONE)
    }

    /// A part of a request's memory: what lies in one piece of it, up to `length` bytes from `at` on.
    fn guest_memory(&mut self, token: u64, at: u64, length: u64) -> Option<Span> {
        let length = u32::try_from(length.min(u64::from(PIECE_BYTES))).ok()?;
        let at = u32::try_from(at).ok()?;
        match Token::decode(token)? {
            Token::Request { queue, place } => {
                let queue = self.queues.get_mut(queue as usize)?.as_mut()?;
                self.rows.part(&queue.in_flight(place)?.held, at, length)
            }
            Token::Outside(place) => self.outside.memory(place, at, length),
            _ => None,
        }
        .filter(|span| span.length_bytes() > 0)
    }

    /// Fills a part of a request's memory with zeroes, or with bytes that the disk has.
    fn fill_guest(&mut self, disk: u32, work: &Work, token: u64, offset_bytes: u64) -> bool {
        let mut at = 0;
        while at < work.length_bytes {
            let memory = self.guest_memory(token, offset_bytes + at, work.length_bytes - at);
            let Some(span) = memory else { return false };
            let pool = self.storage.buffers();
            if work.kind == WorkKind::ZeroGuest {
                pool.fill_zero(span);
            } else {
                let bytes = self.chains.get(disk).map_or(&[][..], |chain| chain.disk.bytes(work.id));
                let from = usize::try_from(at).unwrap_or(usize::MAX);
                let part = from.checked_add(span.length_bytes() as usize).and_then(|to| bytes.get(from..to));
                if !part.is_some_and(|part| pool.copy_in(span, part)) {
                    return false;
                }
            }
            at += u64::from(span.length_bytes());
        }
        true
    }

    /// Queues the transfers between a request's memory and an image.
    fn queue_guest(&mut self, disk: u32, work: Work, token: u64, offset_bytes: u64) {
        let flow = match Token::decode(token) {
            Some(Token::Request { queue, .. }) => self.queue(queue).map_or(NOBODY, |queue| queue.flow),
            _ => NOBODY,
        };
        let kind = if work.kind == WorkKind::Read { IoKind::Read } else { IoKind::Write };
        let file = self.file_of(disk, &work);
        let number = self.chains.works.add(disk, work, flow);
        let (mut at, mut transfers) = (0, 0);
        while let Some(span) = self.guest_memory(token, offset_bytes + at, work.length_bytes - at) {
            let token = Token::of_work(number, span.length_bytes());
            let io = Io { token, file, kind, offset_bytes: work.offset_bytes + at, span };
            if let Some(io) = self.fair.queue(flow, io, self.now) {
                self.storage.queue(io);
            }
            transfers += 1;
            at += u64::from(span.length_bytes());
        }
        let Some(piece) = self.chains.works.at(number) else { return };
        piece.transfers = transfers;
        if at < work.length_bytes {
            // Never: the request was given memory for all of it.
            piece.error = Some(StorageError::Os(libc::EFAULT));
        }
        if transfers == 0 {
            self.end_work(number);
        }
    }

    /// Queues what moves no bytes.
    fn queue_plain(&mut self, disk: u32, work: Work, kind: IoKind) {
        let file = self.file_of(disk, &work);
        let number = self.chains.works.add(disk, work, NOBODY);
        if let Some(piece) = self.chains.works.at(number) {
            piece.transfers = 1;
        }
        let token = Token::Work(number).encode();
        self.storage.queue(Io { token, file, kind, offset_bytes: work.offset_bytes, span: Span::EMPTY });
    }

    /// Moves the next part of what belongs to the image, as soon as there is memory.
    fn feed_work(&mut self, number: u32) {
        let works = &mut self.chains.works;
        let Some(piece) = works.at(number) else { return };
        let (disk, work, moved) = (piece.disk, piece.work, piece.moved);
        let length = (work.length_bytes - moved).min(u64::from(PIECE_BYTES));
        let length = u32::try_from(length).unwrap_or(PIECE_BYTES);
        let memory = match works.memory(length) {
            Ok(Some(memory)) => memory,
            Ok(None) => return works.unfed.push_back(number),
            Err(error) => {
                piece_failed(works, number, error);
                return self.end_work(number);
            }
        };
        if let Some(piece) = works.at(number) {
            piece.memory = memory;
            piece.transfers = 1;
        }
        if work.kind == WorkKind::Write && !self.chains.load(disk, work.id, moved, memory) {
            // Never: the disk has as many bytes as it says.
            piece_failed(&mut self.chains.works, number, StorageError::Os(libc::EFAULT));
            return self.end_work(number);
        }
        let kind = if work.kind == WorkKind::Read { IoKind::Read } else { IoKind::Write };
        let (file, token) = (self.file_of(disk, &work), Token::Work(number).encode());
        self.storage.queue(Io { token, file, kind, offset_bytes: work.offset_bytes + moved, span: memory });
    }

    /// A transfer of a piece of work has ended.
    pub(super) fn work_transfer_done(&mut self, number: u32, token: u64, result: Result<(), StorageError>) {
        let Some(piece) = self.chains.works.at(number) else { return };
        piece.transfers = piece.transfers.saturating_sub(1);
        if let (Err(error), None) = (result, &piece.error) {
            piece.error = Some(error);
        }
        if piece.flow != NOBODY {
            let flow = piece.flow;
            self.fair.done(flow, Token::transfer_bytes(token), self.now);
        }
        let Some(piece) = self.chains.works.at(number).filter(|piece| piece.transfers == 0) else { return };
        if piece.memory == Span::EMPTY {
            return self.end_work(number);
        }
        let length = u64::from(piece.memory.length_bytes());
        if piece.error.is_some() || (piece.moved == 0 && length == piece.work.length_bytes) {
            return self.end_work(number);
        }
        // One of several parts.
        let memory = std::mem::replace(&mut piece.memory, Span::EMPTY);
        piece.moved += length;
        let (is_read, is_over) = (piece.work.kind == WorkKind::Read, piece.moved >= piece.work.length_bytes);
        let mut bytes = std::mem::take(&mut piece.bytes);
        if let Some(pool) = &mut self.chains.works.pool {
            if is_read {
                bytes.extend_from_slice(pool.bytes(memory));
            }
            pool.free(memory);
        }
        if let Some(piece) = self.chains.works.at(number) {
            piece.bytes = bytes;
        }
        if is_over {
            self.end_work(number)
        } else {
            self.feed_work(number)
        }
        self.feed_more();
    }

    /// Nothing more is to come of a piece of work.
    fn end_work(&mut self, number: u32) {
        let Some(piece) = self.chains.works.pieces.take(number) else { return };
        let Piece { disk, work, memory, bytes, error, .. } = piece;
        let result = match (work.kind, error) {
            // To keep what nobody needs is no failure.
            (_, None) | (WorkKind::Punch, _) => Ok(()),
            (_, Some(error)) => Err(failure_of(&error)),
        };
        let pool = self.chains.works.pool.take();
        let read = match &pool {
            Some(pool) if memory != Span::EMPTY && work.kind == WorkKind::Read => pool.bytes(memory),
            _ => &bytes,
        };
        self.chains.done(disk, work.id, result, read);
        self.chains.works.pool = pool;
        if memory != Span::EMPTY {
            if let Some(pool) = &mut self.chains.works.pool {
                pool.free(memory);
            }
            self.feed_more();
        }
    }

    /// Goes on with what waits for memory.
    fn feed_more(&mut self) {
        if let Some(number) = self.chains.works.unfed.pop_front() {
            self.feed_work(number);
        }
    }

    /// Others had their turn. True if somebody waited for that.
    pub(super) fn end_yields(&mut self) -> bool {
        let mut yielded = std::mem::take(&mut self.chains.works.yielded);
        let any = !yielded.is_empty();
        for (disk, id) in yielded.drain(..) {
            self.chains.done(disk, id, Ok(()), &[]);
        }
        if self.chains.works.yielded.is_empty() {
            self.chains.works.yielded = yielded;
        }
        any
    }
}

fn piece_failed(works: &mut Works, number: u32, error: StorageError) {
    if let Some(piece) = works.at(number) {
        piece.error = Some(error);
    }
}
