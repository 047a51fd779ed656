//! Requests and replies of one client, once it has chosen an export. Bytes in, requests out; answers in, bytes out.
//!
//! A request has a place in a table from its header until the last byte of its reply is sent. Its memory is of the pool
//! that storage uses, so data are copied between the socket and there, by the kernel, and nowhere else; data of a write
//! that were received together with its header are moved once more.

use formats::{Extent, Op, SECTOR_BYTES, STATUS_BYTES};

use super::exports::Export;
use super::handshake::Agreed;
use super::output::Output;
use super::{Cx, Disks, replies};
use crate::buffers::Span;
use crate::limits::{NBD_REQUEST_BYTES_MAX, NBD_REQUESTS_MAX, NBD_UNSENT_BYTES_MAX};
use crate::nbd::wire::{self, command, error, flag};
use crate::pump::{DiskId, Outside};
use crate::storage::StorageError;

/// Data of a write that is refused are thrown away up to this many bytes; whoever sends more is cut off.
const REFUSED_BYTES_MAX: u32 = 32 << 20;

/// How much a write of zeroes that must leave no hole writes at a time, in bytes.
const ZEROES_BYTES: u32 = 256 << 10;

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// What came is no request.
    Magic,
    /// A write longer than anyone could mean.
    TooLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its data are coming.
    Receiving,
    /// The disk has it.
    Asked,
    /// It is done, and the disk makes it durable.
    Flushing,
    /// Its reply is being sent.
    Replying,
}

/// A request that has a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Active {
    pub(super) cookie: u64,
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u32,
    /// What is before the asked bytes in the memory, because sectors are whole.
    pub(super) skip_bytes: u32,
    pub(super) span: Span,
    stage: Stage,
    /// Bytes of a write of zeroes without holes that are done.
    zeroed_bytes: u32,
}

/// What is to be done with a request that was read.
enum Verdict {
    /// The disk is asked; with so much memory, of which the first bytes are before the asked ones.
    Ask { op: Op, extent: Extent, memory_bytes: u32, skip_bytes: u32 },
    /// Nothing need be done.
    Done,
    /// It is refused: error and reason.
    Refuse(u32, &'static str),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) agreed: Agreed,
    disk: DiskId,
    size_bytes: u64,
    read_only: bool,
    table: Vec<Option<Active>>,
    free: Vec<u16>,
    /// The write whose data come next, and how much of them is there.
    receiving: Option<(u16, u32)>,
    /// Data of refused writes that are still to come.
    skip: u32,
    /// Memory that its requests have.
    pub(super) held_bytes: u64,
    /// A message has become whole since this was looked at.
    pub(super) whole: bool,
    /// It waits for memory, or for a place.
    pub(super) waits: bool,
    /// The client has said good-bye, or nothing more: what it asked for is answered.
    pub(super) closing: bool,
}

impl Session {
    pub(super) fn new(agreed: Agreed, export: &Export) -> Session {
        Session {
            agreed,
            disk: export.disk,
            size_bytes: export.size_bytes(),
            read_only: export.read_only,
            table: Vec::new(),
            free: Vec::new(),
            receiving: None,
            skip: 0,
            held_bytes: 0,
            whole: false,
            waits: false,
            closing: false,
        }
    }

    /// Requests that are not over, replies that are being sent included.
    pub(super) fn in_flight(&self) -> usize {
        self.table.len() - self.free.len()
    }

    /// The message that comes is not complete.
    pub(super) fn mid_message(&self) -> bool {
        self.receiving.is_some() || self.skip > 0
    }

    /// Where the next bytes belong, if they are data of a write.
    pub(super) fn destination(&self) -> Option<Span> {
        let (place, at) = self.receiving?;
        let active = self.active(place)?;
        active.span.part(at, active.length_bytes - at)
    }

    /// So many bytes were received into [`Session::destination`].
    pub(super) fn received(&mut self, bytes: u32, cx: &mut Cx<'_, impl Disks>) {
        let Some((place, at)) = self.receiving.as_mut() else { return };
        *at += bytes;
        let (place, at) = (*place, *at);
        let Some(active) = self.active(place).filter(|active| at >= active.length_bytes) else { return };
        let extent = extent_of(active.offset_bytes, active.length_bytes);
        self.receiving = None;
        self.whole = true;
        self.ask(place, Op::Write, extent, cx);
    }

    /// Takes what it can of `input`. How much that was; the rest is to come again, with what follows it.
    pub(super) fn run(
        &mut self,
        input: &[u8],
        output: &mut Output,
        cx: &mut Cx<'_, impl Disks>,
    ) -> Result<usize, Broken> {
        let mut rest = input;
        self.waits = false;
        loop {
            let skipped = (self.skip as usize).min(rest.len());
            self.skip -= u32::try_from(skipped).unwrap_or(0);
            rest = rest.get(skipped..).unwrap_or_default();
            if let Some(place) = self.destination() {
                let length = rest.len().min(place.length_bytes() as usize);
                let (data, after) = rest.split_at(length);
                cx.disks.buffers().copy_in(place, data);
                rest = after;
                self.received(u32::try_from(length).unwrap_or(0), cx);
            }
            let Some((header, after)) = rest.split_first_chunk().filter(|_| !self.mid_message()) else {
                break;
            };
            if self.closing {
                // Nothing that comes after a good-bye means anything.
                rest = &[];
                break;
            }
            let request = wire::Request::from_bytes(header).ok_or(Broken::Magic)?;
            if !self.take(&request, output, cx)? {
                self.waits = true;
                break;
            }
            self.whole = true;
            rest = after;
        }
        Ok(input.len() - rest.len())
    }

    /// Starts a request. False if it must wait for memory or a place.
    fn take(
        &mut self,
        request: &wire::Request,
        output: &mut Output,
        cx: &mut Cx<'_, impl Disks>,
    ) -> Result<bool, Broken> {
        if self.in_flight() >= NBD_REQUESTS_MAX || output.heads_unsent() > NBD_UNSENT_BYTES_MAX {
            return Ok(false);
        }
        let mut active = Active {
            cookie: request.cookie,
            command: request.command,
            flags: request.flags,
            offset_bytes: request.offset_bytes,
            length_bytes: request.length_bytes,
            skip_bytes: 0,
            span: Span::EMPTY,
            stage: Stage::Asked,
            zeroed_bytes: 0,
        };
        if request.command == command::DISC {
            self.closing = true;
            return Ok(true);
        }
        let (op, extent, memory_bytes) = match self.judge(request) {
            Verdict::Ask { op, extent, memory_bytes, skip_bytes } => {
                active.skip_bytes = skip_bytes;
                (op, extent, memory_bytes)
            }
            Verdict::Done => {
                replies::done(&active, self.agreed, output);
                return Ok(true);
            }
            Verdict::Refuse(error, reason) => {
                if request.command == command::WRITE {
                    if request.length_bytes > REFUSED_BYTES_MAX {
                        return Err(Broken::TooLong);
                    }
                    self.skip = request.length_bytes;
                }
                replies::failed(&active, self.agreed, error, reason, output);
                return Ok(true);
            }
        };
        if memory_bytes > 0 {
            let Some(span) = cx.budget.take(self.held_bytes, memory_bytes, cx.disks.buffers()) else {
                return Ok(false);
            };
            self.held_bytes += super::budget::pages(span);
            active.span = span;
        }
        let is_write = request.command == command::WRITE;
        if is_write {
            active.stage = Stage::Receiving;
        } else if op == Op::Write {
            cx.disks.buffers().fill_zero(active.span);
        }
        let place = self.enter(active);
        if is_write {
            self.receiving = Some((place, 0));
        } else if op == Op::Write {
            self.ask_zeroes(place, cx);
        } else {
            self.ask(place, op, extent, cx);
        }
        Ok(true)
    }

    fn enter(&mut self, active: Active) -> u16 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.table.push(None);
            u16::try_from(self.table.len() - 1).unwrap_or(u16::MAX)
        });
        if let Some(slot) = self.table.get_mut(usize::from(place)) {
            *slot = Some(active);
        }
        place
    }

    /// What is to be done with a request.
    fn judge(&self, request: &wire::Request) -> Verdict {
        let (offset, length) = (request.offset_bytes, request.length_bytes);
        let allowed = match request.command {
            command::READ if self.agreed.structured => flag::FUA | flag::DF,
            command::READ | command::WRITE | command::FLUSH | command::TRIM => flag::FUA,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            _ => return Verdict::Refuse(error::EINVAL, "the command is not known"),
        };
        if request.flags & !allowed != 0 {
            return Verdict::Refuse(error::EINVAL, "a flag is not known, or not for this command");
        }
        let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && self.read_only {
            return Verdict::Refuse(error::EPERM, "the export is read-only");
        }
        if request.command == command::FLUSH {
            return self.flush();
        }
        let has_data = matches!(request.command, command::READ | command::WRITE);
        if has_data && length > NBD_REQUEST_BYTES_MAX {
            return Verdict::Refuse(error::EOVERFLOW, "longer than the largest block");
        }
        if offset.checked_add(u64::from(length)).is_none_or(|end| end > self.size_bytes) {
            let error = if writes { error::ENOSPC } else { error::EINVAL };
            return Verdict::Refuse(error, "beyond the end of the disk");
        }
        if length == 0 {
            return if request.command == command::BLOCK_STATUS {
                Verdict::Refuse(error::EINVAL, "nothing has no status")
            } else {
                Verdict::Done
            };
        }
        if request.command == command::TRIM {
            return trim(offset, length);
        }
        let extent = extent_of(offset, length);
        let inside = to_u32(offset % SECTOR_BYTES);
        let sectors_bytes = extent.sectors * SECTOR_BYTES;
        let whole = inside == 0 && u64::from(length) == sectors_bytes;
        let ask = |op, memory_bytes| Verdict::Ask { op, extent, memory_bytes, skip_bytes: inside };
        match request.command {
            command::READ if sectors_bytes > u64::from(NBD_REQUEST_BYTES_MAX) => {
                Verdict::Refuse(error::EOVERFLOW, "longer than the largest block, with whole sectors")
            }
            command::READ => ask(Op::Read, to_u32(sectors_bytes)),
            command::BLOCK_STATUS if !self.agreed.status => {
                Verdict::Refuse(error::EINVAL, "no context was agreed on")
            }
            command::BLOCK_STATUS => ask(Op::Status, to_u32(STATUS_BYTES as u64)),
            _ if !whole => Verdict::Refuse(error::EINVAL, "only whole sectors of 512 bytes can be written"),
            command::WRITE => ask(Op::Write, length),
            // Whether zeroes are faster than data is not known before they are written.
            _ if request.flags & flag::FAST_ZERO != 0 => {
                Verdict::Refuse(error::ENOTSUP, "zeroes may be as slow as data")
            }
            _ if request.flags & flag::NO_HOLE != 0 => ask(Op::Write, length.min(ZEROES_BYTES)),
            _ => ask(Op::WriteZeroes, 0),
        }
    }

    fn flush(&self) -> Verdict {
        if self.read_only {
            return Verdict::Done;
        }
        Verdict::Ask { op: Op::Flush, extent: NOTHING, memory_bytes: 0, skip_bytes: 0 }
    }

    fn ask(&mut self, place: u16, op: Op, extent: Extent, cx: &mut Cx<'_, impl Disks>) {
        let disk = self.disk;
        let Some(active) = self.active_mut(place) else { return };
        if active.stage == Stage::Receiving {
            active.stage = Stage::Asked;
        }
        let span = match op {
            Op::Read | Op::Write | Op::Status => {
                active.span.part(0, to_u32(extent.sectors * SECTOR_BYTES)).unwrap_or(active.span)
            }
            _ => Span::EMPTY,
        };
        let span = if op == Op::Status { active.span } else { span };
        cx.disks.ask(disk, Outside { token: cx.token(place), op, extent, span });
    }

    /// The next part of zeroes that must be written like data.
    fn ask_zeroes(&mut self, place: u16, cx: &mut Cx<'_, impl Disks>) {
        let Some(active) = self.active(place) else { return };
        let rest = active.length_bytes - active.zeroed_bytes;
        let offset = active.offset_bytes + u64::from(active.zeroed_bytes);
        let extent = extent_of(offset, rest.min(active.span.length_bytes()));
        self.ask(place, Op::Write, extent, cx);
    }

    /// The disk has answered a request. Its memory is free when the reply is sent.
    pub(super) fn answered(
        &mut self,
        place: u16,
        result: Result<(), StorageError>,
        output: &mut Output,
        cx: &mut Cx<'_, impl Disks>,
    ) {
        let agreed = self.agreed;
        let Some(active) = self.active_mut(place) else { return };
        let result = match result {
            // To keep what is not needed any more is no failure.
            Err(error) if active.command == command::TRIM && error.is_unsupported() => Ok(()),
            result => result,
        };
        if let Err(error) = result {
            let (error, reason) = replies::error_of(&error);
            replies::failed(active, agreed, error, reason, output);
            return self.over(place, cx);
        }
        if active.stage == Stage::Asked && active.command == command::WRITE_ZEROES && !is_empty(active.span) {
            let rest = active.length_bytes - active.zeroed_bytes;
            active.zeroed_bytes += rest.min(active.span.length_bytes());
            if active.zeroed_bytes < active.length_bytes {
                return self.ask_zeroes(place, cx);
            }
        }
        let Some(active) = self.active_mut(place) else { return };
        let changes = matches!(active.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if active.stage == Stage::Asked && changes && active.flags & flag::FUA != 0 {
            active.stage = Stage::Flushing;
            return self.ask(place, Op::Flush, NOTHING, cx);
        }
        active.stage = Stage::Replying;
        let active = *active;
        if !replies::succeeded(&active, place, agreed, cx.disks.buffers(), output) {
            self.over(place, cx);
        }
    }

    /// A request is over, and its memory and place are free.
    pub(super) fn over(&mut self, place: u16, cx: &mut Cx<'_, impl Disks>) {
        let slot = self.table.get_mut(usize::from(place));
        let Some(active) = slot.and_then(Option::take) else { return };
        self.free.push(place);
        cx.budget.progress();
        if !is_empty(active.span) {
            cx.budget.give_back(self.held_bytes, active.span, cx.disks.buffers());
            self.held_bytes -= super::budget::pages(active.span);
        }
    }

    /// The client is gone: what it was sending will never be whole.
    pub(super) fn abandon(&mut self, cx: &mut Cx<'_, impl Disks>) {
        self.closing = true;
        self.waits = false;
        self.skip = 0;
        if let Some((place, _)) = self.receiving.take() {
            self.over(place, cx);
        }
    }

    fn active(&self, place: u16) -> Option<&Active> {
        self.table.get(usize::from(place))?.as_ref()
    }

    fn active_mut(&mut self, place: u16) -> Option<&mut Active> {
        self.table.get_mut(usize::from(place))?.as_mut()
    }
}

const NOTHING: Extent = Extent { sector: 0, sectors: 0 };

fn is_empty(span: Span) -> bool {
    span.length_bytes() == 0
}

/// The whole sectors that some bytes lie in.
fn extent_of(offset_bytes: u64, length_bytes: u32) -> Extent {
    let sector = offset_bytes / SECTOR_BYTES;
    let end = (offset_bytes + u64::from(length_bytes)).div_ceil(SECTOR_BYTES);
    Extent { sector, sectors: end - sector }
}

/// The whole sectors within; there may be none.
fn trim(offset_bytes: u64, length_bytes: u32) -> Verdict {
    let sector = offset_bytes.div_ceil(SECTOR_BYTES);
    let end = (offset_bytes + u64::from(length_bytes)) / SECTOR_BYTES;
    if end <= sector {
        return Verdict::Done;
    }
    let extent = Extent { sector, sectors: end - sector };
    Verdict::Ask { op: Op::Discard, extent, memory_bytes: 0, skip_bytes: 0 }
}

fn to_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
