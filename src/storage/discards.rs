//! Letting go of content: holes in files, `BLKDISCARD` on devices.
//!
//! Both may take long, so they run on threads of their own, a part at a time, and one at a time for each file: a guest that
//! discards a lot keeps its own discards waiting, and neither transfers nor the others' discards.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::engine::Landed;
use super::linux::LinuxStorage;
use super::medium::Path;
use super::slots::Stage;
use super::{Identity, Io, IoKind, StorageError};

/// The most that one call lets go of, in bytes: a call cannot be interrupted, and a disk that is detached waits for it.
const PART_BYTES: u64 = 256 << 20;

/// The most that is let go of at once by the calling thread, in bytes, where the file lives in memory: 256 pages.
const AT_ONCE_BYTES: u64 = 1 << 20;

/// `BLKDISCARD` of `linux/fs.h`, `_IO(0x12, 119)`: a pair of offset and length in bytes.
const BLKDISCARD: u32 = 0x1277;

/// A call on its way to a thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Discard {
    tag: u32,
    fd: RawFd,
    is_device: bool,
    offset: u64,
    length: u64,
}

impl Discard {
    /// Does it and waits for it.
    pub(super) fn now(&self) -> Landed {
        // SAFETY: the file stays open until the call has landed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let result = if self.is_device {
            discard(fd, self.offset, self.length)
        } else {
            punch(fd, self.offset, self.length)
        };
        Landed { tag: self.tag, result: result.map_or_else(|errno| -errno.raw_os_error(), |()| 0) }
    }
}

/// Makes a hole in a file; its size stays.
pub(super) fn punch(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(fd, flags, offset, length)
}

fn discard(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Errno> {
    let range = [offset, length];
    // SAFETY: the call reads two numbers at the address; the descriptor is open.
    match unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

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
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        let length = (slot.until - slot.place).min(PART_BYTES);
        let is_device = matches!(file.identity, Identity::Device { .. });
        let call = Discard { tag: number, fd: file.descriptor(false), is_device, offset: slot.place, length };
        self.maps.punched(&file.mapped, slot.place, length);
        if file.path == Path::Memory && length <= AT_ONCE_BYTES {
            self.stillborn.push_back(call.now());
        } else if self.discarders.give(call).is_err() {
            self.stillborn.push_back(Landed { tag: number, result: -libc::ENOMEM });
        }
    }

    /// A part of a discard has ended.
    pub(super) fn discard_landed(&mut self, number: u32, result: Result<u32, i32>) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        let place = slot.place + (slot.until - slot.place).min(PART_BYTES);
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

    /// Whether a request is a discard, and of how much.
    pub(super) fn discard_length(kind: IoKind) -> Option<u64> {
        match kind {
            IoKind::Discard { length_bytes } => Some(length_bytes),
            _ => None,
        }
    }
}
