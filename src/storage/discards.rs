//! Letting go of content: holes in files, `BLKDISCARD` on devices.
//!
//! Both may take long, so they run on threads of their own, a part at a time, and one at a time for each file: a guest that
//! discards a lot keeps its own discards waiting, and neither transfers nor the others' discards.

use super::changes::{AT_ONCE_BYTES, Change, Order};
use super::engine::Landed;
use super::linux::LinuxStorage;
use super::medium::Path;
use super::slots::Stage;
use super::{Identity, Io, StorageError};
use crate::nbd::client::Command;

/// The most that one call lets go of, in bytes: a call cannot be interrupted, and a disk that is detached waits for it.
const PART_BYTES: u64 = 256 << 20;

impl LinuxStorage {
    /// A discard has arrived: where it covers no whole unit there is nothing to do.
    pub(super) fn queue_discard(&mut self, io: &Io, length: u64) {
        let Some(file) = self.files.at(io.file) else {
            return self.end(io.token, Err(StorageError::Os(libc::EBADF)));
        };
        let Some(unit) = file.discard else {
            return self.end(io.token, Err(StorageError::Os(libc::EOPNOTSUPP)));
        };
        let (from, to) = unit.within(io.offset_bytes, length);
        if from == to {
            return self.end(io.token, Ok(()));
        }
        let Some(number) = self.slots.take(*io) else {
            return self.end(io.token, Err(StorageError::Os(libc::ENOBUFS)));
        };
        file.in_flight += 1;
        let slot = self.slots.at_mut(number);
        (slot.stage, slot.place, slot.until) = (Stage::Discard, from, to);
        if std::mem::replace(&mut file.discarding, true) {
            return file.discards.push(&mut self.slots, number);
        }
        self.discard_part(number);
    }

    /// Has the next part of a discard done.
    fn discard_part(&mut self, number: u32) {
        let slot = self.slots.at_mut(number);
        slot.piece = (slot.until - slot.place).min(PART_BYTES);
        if self.starts_remotely(number, Command::Trim) {
            return;
        }
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        let length = slot.piece;
        let is_device = matches!(file.identity, Identity::Device { .. });
        let change = if is_device { Change::Discard } else { Change::Hole };
        let order = Order { tag: number, fd: file.descriptor(false), change, offset: slot.place, length };
        self.maps.punched(&file.mapped, slot.place, length);
        if file.path == Path::Memory && length <= AT_ONCE_BYTES {
            self.stillborn.push_back(order.now());
        } else if self.discarders.give(order).is_err() {
            self.stillborn.push_back(Landed { tag: number, result: -libc::ENOMEM });
        }
    }

    /// A part of a discard has ended.
    pub(super) fn discard_landed(&mut self, number: u32, result: Result<u32, i32>) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        let place = slot.place + slot.piece;
        // What was written meanwhile may have been marked as there, and be gone.
        self.maps.punched(&file.mapped, slot.place, place - slot.place);
        match result {
            Err(libc::EINTR) => return self.discard_part(number),
            Ok(_) if place < slot.until => {
                self.slots.at_mut(number).place = place;
                return self.discard_part(number);
            }
            _ => {}
        }
        let error = result.err().map(StorageError::Os);
        if error.as_ref().is_some_and(StorageError::is_unsupported) {
            file.discard = None;
        }
        let next = file.discards.pop(&self.slots);
        file.discarding = next.is_some();
        if let Some(next) = next {
            self.discard_part(next);
        }
        self.finish(number, error.map_or(Ok(()), Err));
    }
}
