//! Requests that come from no ring: those of network clients of a disk.
//!
//! They go to the same disks as the guests', beside them: a guest's barrier does not hold them back. A flush covers all
//! requests that were answered before it was asked, from wherever they came.

use std::collections::VecDeque;

use formats::{Extent, Op, StatusRun};

use super::memory::PIECE_BYTES;
use super::slab::Slab;
use super::{DiskId, Pump, Token};
use crate::buffers::Span;
use crate::hypervisor::Hypervisor;
use crate::storage::{Io, IoKind, Storage, StorageError};

/// A request that comes from no ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside {
    /// The caller's name for it.
    pub token: u64,
    /// What.
    pub op: Op,
    /// Where, in sectors; it lies on the disk. Means nothing to a flush.
    pub extent: Extent,
    /// Its memory, of [`Storage::buffers`]: as long as the extent, [`formats::STATUS_BYTES`] for a status, and empty for what
    /// moves no data.
    pub span: Span,
}

#[derive(Debug)]
struct Asked {
    request: Outside,
    transfers: u32,
    error: Option<StorageError>,
}

/// Those in flight, and the answers that were not taken.
#[derive(Debug, Default)]
pub(super) struct Outsiders {
    asked: Slab<Asked>,
    answers: VecDeque<(u64, Result<(), StorageError>)>,
}

impl Outsiders {
    fn at(&mut self, place: u32) -> Option<&mut Asked> {
        self.asked.get_mut(place)
    }

    pub(super) fn memory(&self, place: u32, at: u32, length: u32) -> Option<Span> {
        let span = self.asked.get(place)?.request.span;
        let left = span.length_bytes().checked_sub(at)?;
        span.part(at, length.min(left))
    }
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Takes a request. It is started in the next turn; its answer comes from [`Pump::next_answer`], until which its memory
    /// must stay. The caller bounds how many there are, and never writes to a disk that is read-only.
    pub fn ask(&mut self, disk: DiskId, request: Outside) {
        let place = self.outside.asked.add(Asked { request, transfers: 0, error: None });
        self.scratch.asked = true;
        let token = Token::Outside(place);
        let Some(open) = self.disks.get_mut(disk.0 as usize).and_then(Option::as_mut) else {
            return self.outside_done(place, Err(StorageError::Os(libc::ENODEV)));
        };
        if open.read_only && request.op.changes() {
            return self.outside_done(place, Err(StorageError::Os(libc::EROFS)));
        }
        if request.op == Op::Flush {
            open.flush_begins(token.encode());
            return self.scratch.look_at(disk.0);
        }
        if self.chains.has(disk.0) {
            return self.submit(disk.0, token, request.op, request.extent);
        }
        self.ask_raw(disk.0, place, request);
    }

    /// Queues the transfers of a request to a raw disk.
    fn ask_raw(&mut self, disk: u32, place: u32, request: Outside) {
        let Some(open) = self.disks.get(disk as usize).and_then(Option::as_ref) else { return };
        let file = open.file;
        let Some(offset_bytes) = open.offset_of(request.extent) else {
            return self.outside_done(place, Err(StorageError::PastEnd));
        };
        if request.op == Op::Status {
            return self.tell_status(place, request);
        }
        let token = Token::Outside(place).encode();
        let length_bytes = request.extent.sectors.saturating_mul(formats::SECTOR_BYTES);
        let plain = match request.op {
            Op::Discard => Some(IoKind::Discard { length_bytes }),
            Op::WriteZeroes => Some(IoKind::Zero { length_bytes }),
            _ => None,
        };
        if let Some(kind) = plain {
            self.outside_transfers(place, 1);
            return self.storage.queue(Io { token, file, kind, offset_bytes, span: Span::EMPTY });
        }
        let kind = if request.op == Op::Read { IoKind::Read } else { IoKind::Write };
        let length = request.span.length_bytes();
        self.outside_transfers(place, length.div_ceil(PIECE_BYTES));
        let mut at = 0;
        while let Some(span) = request.span.part(at, PIECE_BYTES.min(length - at))
            && span.length_bytes() > 0
        {
            self.storage.queue(Io { token, file, kind, offset_bytes: offset_bytes + u64::from(at), span });
            at += span.length_bytes();
        }
        if at == 0 {
            self.outside_done(place, Err(StorageError::Os(libc::EINVAL)));
        }
    }

    /// Of a raw disk nobody knows where it has holes: all of it counts as data.
    fn tell_status(&mut self, place: u32, request: Outside) {
        let all = StatusRun { sectors: request.extent.sectors, zero: false };
        let pool = self.storage.buffers();
        let first = all.to_bytes();
        pool.fill_zero(request.span);
        let told = match pool.bytes_mut(request.span).get_mut(..first.len()) {
            Some(run) => {
                run.copy_from_slice(&first);
                Ok(())
            }
            None => Err(StorageError::Os(libc::EINVAL)),
        };
        self.outside_done(place, told);
    }

    fn outside_transfers(&mut self, place: u32, transfers: u32) {
        if let Some(asked) = self.outside.at(place) {
            asked.transfers = transfers;
        }
    }

    /// A transfer of a raw disk has ended.
    pub(super) fn outside_transfer_done(&mut self, place: u32, result: Result<(), StorageError>) {
        let Some(asked) = self.outside.at(place) else { return };
        asked.transfers = asked.transfers.saturating_sub(1);
        if let (Err(error), None) = (result, &asked.error) {
            asked.error = Some(error);
        }
        if asked.transfers > 0 {
            return;
        }
        let result = match (asked.error.take(), asked.request.op) {
            // To keep what nobody needs is no failure.
            (Some(error), Op::Discard) if error.is_unsupported() => Ok(()),
            (error, _) => error.map_or(Ok(()), Err),
        };
        self.outside_done(place, result);
    }

    pub(super) fn outside_done(&mut self, place: u32, result: Result<(), StorageError>) {
        let Some(asked) = self.outside.asked.take(place) else { return };
        self.outside.answers.push_back((asked.request.token, result));
    }

    /// The next answer to a request that came from no ring.
    pub fn next_answer(&mut self) -> Option<(u64, Result<(), StorageError>)> {
        self.outside.answers.pop_front()
    }
}
