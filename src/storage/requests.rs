//! The life of a request between its arrival and its answer: legs, bounces, short transfers, errors, waiting writes.

use rustix::fs::OFlags;

use super::calls::{self, Job};
use super::engine::{Action, Engine, Landed, Transfer};
use super::legs::{self, BOUNCE_BYTES, Next, Way};
use super::linux::LinuxStorage;
use super::medium::Path;
use super::slots::{Fifo, NONE, Slot, Stage};
use super::{Io, IoKind, StorageError};
use crate::buffers::Span;

/// Tries of a transfer that moves nothing (EINTR, EAGAIN, short by less than a block) before it counts as failed.
const TRIES_MAX: u8 = 16;

impl LinuxStorage {
    /// Starts the next leg of a request, or ends it.
    pub(super) fn advance(&mut self, number: u32) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else {
            return self.finish(number, Err(StorageError::Os(libc::EBADF)));
        };
        match slot.io.kind {
            IoKind::Flush => {
                self.slots.at_mut(number).stage = Stage::Sync;
                return self.launch(number);
            }
            // It has waited for other writes.
            IoKind::Zero { .. } => return self.zero_next(number),
            _ => {}
        }
        let offset = slot.io.offset_bytes + u64::from(slot.at);
        let left = slot.io.span.length_bytes() - slot.at;
        let address = slot.io.span.address() as usize + slot.at as usize;
        match legs::next(&file.shape, offset, address, left) {
            Next::Nothing => self.finish(number, Ok(())),
            Next::Zeroes => {
                slot.io.span.part(slot.at, left).unwrap_or(Span::EMPTY).zero();
                self.finish(number, Ok(()));
            }
            Next::Leg(leg) => {
                let place = self.slots.at_mut(number);
                place.leg = leg;
                if matches!(leg.way, Way::Bounce { .. }) {
                    return self.bounce(number);
                }
                place.memory = slot.io.span.part(slot.at, leg.length).unwrap_or(Span::EMPTY);
                place.stage = Stage::Move;
                place.place = leg.offset;
                self.launch(number);
            }
        }
    }

    /// Starts a bounced leg, as soon as there is a buffer.
    fn bounce(&mut self, number: u32) {
        let slot = *self.slots.at(number);
        let Way::Bounce { from, to } = slot.leg.way else { return };
        let Some(buffer) = slot.bounce.or_else(|| self.bounces.alloc(BOUNCE_BYTES)) else {
            self.unbounced.push(&mut self.slots, number);
            return;
        };
        let length = u32::try_from(to - from).unwrap_or(0);
        let place = self.slots.at_mut(number);
        place.bounce = Some(buffer);
        place.memory = buffer.part(0, length).unwrap_or(Span::EMPTY);
        place.place = from;
        let whole = slot.leg.offset == from && u64::from(slot.leg.length) == to - from;
        place.stage = match (slot.io.kind, whole) {
            (IoKind::Read, _) => Stage::Fetch,
            (_, false) => Stage::Fill,
            (_, true) => Stage::Store,
        };
        if whole && place.stage == Stage::Store {
            Self::overlay(place);
        }
        self.launch(number);
    }

    /// The part of the bounce buffer that a leg covers, and the part of the caller's memory.
    fn both_sides(slot: &Slot) -> (Span, Span) {
        let Way::Bounce { from, .. } = slot.leg.way else { return (Span::EMPTY, Span::EMPTY) };
        let skip = u32::try_from(slot.leg.offset - from).unwrap_or(0);
        let inner = slot.bounce.and_then(|buffer| buffer.part(skip, slot.leg.length));
        let outer = slot.io.span.part(slot.at, slot.leg.length);
        (inner.unwrap_or(Span::EMPTY), outer.unwrap_or(Span::EMPTY))
    }

    fn overlay(slot: &Slot) {
        let (inner, outer) = Self::both_sides(slot);
        inner.copy_from(&outer);
    }

    /// Starts the current transfer of a request from where it stands.
    #[inline]
    pub(super) fn launch(&mut self, number: u32) {
        let slot = self.slots.at(number);
        let tail = slot.leg.way == Way::Tail && slot.stage == Stage::Move;
        let Some(file) = self.files.at(slot.io.file) else { return };
        if file.path == Path::Remote {
            return self.launch_remotely(number);
        }
        let action = match slot.stage {
            Stage::Sync | Stage::Discard | Stage::Zero | Stage::Length => Action::Sync,
            Stage::Fetch | Stage::Fill => Action::Read,
            Stage::Store => Action::Write,
            Stage::Move if slot.io.kind == IoKind::Read => Action::Read,
            Stage::Move => Action::Write,
        };
        let transfer = Transfer {
            tag: number,
            action,
            fd: file.descriptor(tail),
            attached: if tail { None } else { file.attached },
            offset_bytes: slot.place + u64::from(slot.moved),
            address: slot.memory.address().wrapping_add(slot.moved as usize),
            length_bytes: slot.memory.length_bytes() - slot.moved,
        };
        let cached = tail || file.path == Path::Cached;
        let synchronous = match action {
            // Zeroes that a file in memory has to be given by writing, and that are too many to be given at once.
            _ if file.path == Path::Memory => true,
            Action::Sync => !self.engine.syncs(),
            _ => cached && self.engine.blocks_on_cached_files(),
        };
        if synchronous {
            if self.helpers.give(Job(transfer)).is_err() {
                self.stillborn.push_back(Landed { tag: number, result: -libc::EAGAIN });
            }
        } else if self.may_merge(number, action) {
            let file = self.slots.at(number).io.file;
            self.join(number, file, transfer);
        } else {
            self.push(number, &transfer);
        }
    }

    /// Gives a transfer to the engine, or has it wait for room there.
    #[inline]
    pub(super) fn push(&mut self, number: u32, transfer: &Transfer) {
        if !self.unpushed.is_empty() || !self.engine.push(transfer) {
            self.unpushed.push(&mut self.slots, number);
        }
    }

    /// Pushes what waited for room in the engine.
    pub(super) fn push_more(&mut self) {
        let mut waiting = std::mem::replace(&mut self.unpushed, Fifo::EMPTY);
        while let Some(number) = waiting.pop(&self.slots) {
            // There is little room: it is not kept back any longer.
            self.slots.at_mut(number).alone = true;
            self.launch(number);
            if !self.unpushed.is_empty() {
                // It went back to the end of an empty list: put the rest behind it, in order.
                self.unpushed.append(&mut self.slots, waiting);
                return;
            }
        }
    }

    /// An answer has come.
    pub(super) fn land(&mut self, landed: Landed) {
        if self.land_merged(landed) {
            return;
        }
        let number = landed.tag;
        let slot = *self.slots.at(number);
        match slot.stage {
            Stage::Discard => return self.discard_landed(number, calls::answer(landed.result)),
            Stage::Zero | Stage::Length => return self.change_landed(number, calls::answer(landed.result)),
            Stage::Move | Stage::Fetch | Stage::Fill | Stage::Store | Stage::Sync => {}
        }
        let Some(file) = self.files.at(slot.io.file) else { return };
        match calls::answer(landed.result) {
            // The usual end: all of it.
            Ok(count) if slot.moved + count >= slot.memory.length_bytes() => self.moved_all(number),
            Ok(count) => {
                let moved = slot.moved + count;
                let aligned = if file.path == Path::Direct { moved & !(file.shape.block - 1) } else { moved };
                let reads = matches!(slot.stage, Stage::Fetch | Stage::Fill)
                    || (slot.stage == Stage::Move && slot.io.kind == IoKind::Read);
                if reads && slot.place + u64::from(moved) >= file.shape.size {
                    // The end that the file had when it was opened: nothing but zeroes behind it.
                    let rest = slot.memory.length_bytes() - moved;
                    slot.memory.part(moved, rest).unwrap_or(Span::EMPTY).zero();
                    return self.moved_all(number);
                }
                let file_shrank = count == 0 && reads && slot.tries > 0;
                let stuck = aligned <= slot.moved && slot.tries >= TRIES_MAX;
                if file_shrank || stuck {
                    self.warn(number, "moved fewer bytes than there were: was the file cut short?");
                    return self.finish(number, Err(StorageError::Os(libc::EIO)));
                }
                let place = self.slots.at_mut(number);
                place.tries = if aligned > slot.moved { 0 } else { slot.tries + 1 };
                place.moved = aligned;
                self.relaunch(number);
            }
            Err(errno) => self.failed(number, errno),
        }
    }

    pub(super) fn relaunch(&mut self, number: u32) {
        self.continued = true;
        self.launch(number);
    }

    fn failed(&mut self, number: u32, errno: i32) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        match errno {
            libc::EINTR | libc::EAGAIN if slot.tries < TRIES_MAX => {
                self.slots.at_mut(number).tries += 1;
                return self.relaunch(number);
            }
            // The file system took O_DIRECT when the file was opened, and does not keep the promise.
            libc::EINVAL if file.path == Path::Direct && slot.stage != Stage::Sync => {
                if let Ok(flags) = rustix::fs::fcntl_getfl(&file.fd)
                    && rustix::fs::fcntl_setfl(&file.fd, flags - OFlags::DIRECT).is_ok()
                {
                    file.path = Path::Cached;
                    file.shape = file.shape.cached();
                    self.warn(
                        number,
                        "refuses direct transfers after all: it goes through the page cache now",
                    );
                    return self.relaunch(number);
                }
            }
            // In flight while another transfer of the file met the same refusal.
            libc::EINVAL if file.path == Path::Cached && slot.tries == 0 && slot.stage != Stage::Sync => {
                self.slots.at_mut(number).tries += 1;
                return self.relaunch(number);
            }
            _ => {}
        }
        self.finish(number, Err(StorageError::Os(errno)));
    }

    /// Tells the log once per file.
    fn warn(&mut self, number: u32, text: &str) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        if !std::mem::replace(&mut file.warned, true) {
            log::warn!("image {:?} at byte {}: {text}", file.identity, slot.place);
        }
    }

    /// The current transfer of a request has moved all that it was to move.
    pub(super) fn moved_all(&mut self, number: u32) {
        let place = self.slots.at_mut(number);
        place.moved = 0;
        place.tries = 0;
        match place.stage {
            Stage::Sync => return self.finish(number, Ok(())),
            Stage::Fill => {
                Self::overlay(place);
                place.stage = Stage::Store;
                return self.relaunch(number);
            }
            Stage::Fetch => {
                let (inner, outer) = Self::both_sides(place);
                outer.copy_from(&inner);
            }
            Stage::Move | Stage::Store | Stage::Discard | Stage::Zero | Stage::Length => {}
        }
        place.at += place.leg.length;
        if place.at == place.io.span.length_bytes() {
            return self.finish(number, Ok(()));
        }
        self.continued = true;
        self.advance(number);
    }

    /// A request has ended: its answer, and whoever waited for it.
    pub(super) fn finish(&mut self, number: u32, result: Result<(), StorageError>) {
        let slot = *self.slots.at(number);
        let piece = (slot.parent != NONE).then(|| result.clone());
        if piece.is_none() {
            self.end(slot.io.token, result);
        }
        if let Some(buffer) = slot.bounce {
            self.bounces.free(buffer);
        }
        let mut close = false;
        if let Some(file) = self.files.at(slot.io.file) {
            file.in_flight = file.in_flight.saturating_sub(1);
            close = file.closing && file.in_flight == 0;
            if slot.listed.is_some() {
                self.unblock(number);
            }
        }
        self.slots.give(number);
        if close {
            self.put_away(slot.io.file);
        }
        if slot.bounce.is_some()
            && let Some(next) = self.unbounced.pop(&self.slots)
        {
            self.continued = true;
            self.bounce(next);
        }
        if let Some(result) = piece {
            self.piece_zeroed(slot.parent, result);
        }
    }

    /// Starts the writes that waited for this one.
    fn unblock(&mut self, number: u32) {
        let file = self.slots.at(number).io.file;
        if let Some(hazards) = self.files.at(file).and_then(|file| file.hazards.as_mut()) {
            hazards.leave(&mut self.slots, number);
        }
        loop {
            let Some(hazards) = self.files.at(file).and_then(|file| file.hazards.as_mut()) else { return };
            let Some(next) = hazards.freed(&mut self.slots) else { return };
            self.continued = true;
            self.advance(next);
        }
    }

    /// A transfer on a file in memory: a copy, done at once.
    #[inline]
    pub(super) fn copy_now(&mut self, io: &Io) -> Result<(), StorageError> {
        let Some(file) = self.files.at(io.file) else { return Err(StorageError::Os(libc::EBADF)) };
        let action = match io.kind {
            IoKind::Read => Action::Read,
            IoKind::Write => Action::Write,
            _ => Action::Sync,
        };
        let room = file.shape.limit.saturating_sub(io.offset_bytes);
        let length = io.span.length_bytes().min(u32::try_from(room).unwrap_or(u32::MAX));
        let fd = file.descriptor(false);
        let mut moved = 0;
        while moved < length || action == Action::Sync {
            let transfer = Transfer {
                tag: 0,
                action,
                fd,
                attached: None,
                offset_bytes: io.offset_bytes + u64::from(moved),
                address: io.span.address().wrapping_add(moved as usize),
                length_bytes: length - moved,
            };
            match calls::answer(calls::now(&transfer)) {
                Err(libc::EINTR) => {}
                Ok(_) if action == Action::Sync => return Ok(()),
                Ok(0) if io.offset_bytes + u64::from(moved) >= file.shape.size => break,
                Ok(0) => return Err(StorageError::Os(libc::EIO)),
                Ok(count) => moved += count,
                Err(errno) => return Err(StorageError::Os(errno)),
            }
        }
        if action == Action::Write {
            self.maps.wrote(&file.mapped, io.offset_bytes, moved);
        }
        if io.span.length_bytes() > moved {
            io.span.part(moved, io.span.length_bytes() - moved).unwrap_or(Span::EMPTY).zero();
        }
        Ok(())
    }
}
