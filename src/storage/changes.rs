//! Calls that change what space a file has: holes, ranges of zeroes, its length.
//!
//! They may take long, so threads make them. Zeroes and lengths of one file are changed one after the other, in the order
//! in which they came; discards have a queue of their own (see `discards`). What only moves bytes waits for neither.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::engine::Landed;
use super::linux::LinuxStorage;
use super::medium::{self, Path};
use super::slots::Stage;
use super::{Identity, Io, StorageError};
use crate::nbd::client::Command;

/// The most that is let go of, or zeroed, at once by the calling thread, in bytes, where the file lives in memory: 256 pages.
pub(super) const AT_ONCE_BYTES: u64 = 1 << 20;

/// `BLKDISCARD` and `BLKZEROOUT` of `linux/fs.h`, `_IO(0x12, 119)` and `_IO(0x12, 127)`: a pair of offset and length in bytes.
const BLKDISCARD: u32 = 0x1277;
const BLKZEROOUT: u32 = 0x127f;

/// What is to be changed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// A hole in a file; its length stays.
    Hole,
    /// Let go of a device's content.
    Discard,
    /// A range of a file that keeps its space and reads as zero.
    ZeroRange,
    /// A range of a device that reads as zero.
    ZeroDevice,
    /// The file ends at the offset. The other descriptor, if there is one, has written to its old end through the page
    /// cache, where direct transfers go from now on.
    Length(Option<RawFd>),
}

/// A call on its way to a thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    pub tag: u32,
    pub fd: RawFd,
    pub change: Change,
    pub offset: u64,
    pub length: u64,
}

impl Order {
    /// Does it and waits for it.
    pub(super) fn now(&self) -> Landed {
        // SAFETY: the file stays open until the call has landed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let result = match self.change {
            Change::Hole => punch(fd, self.offset, self.length),
            Change::Discard => on_device(fd, BLKDISCARD, self.offset, self.length),
            Change::ZeroRange => {
                let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(fd, flags, self.offset, self.length)
            }
            Change::ZeroDevice => on_device(fd, BLKZEROOUT, self.offset, self.length),
            Change::Length(tail) => {
                if let Some(tail) = tail {
                    // SAFETY: as above. An error is told again by the next flush, which goes by the other descriptor.
                    let _ = rustix::fs::fdatasync(unsafe { BorrowedFd::borrow_raw(tail) });
                }
                rustix::fs::ftruncate(fd, self.offset)
            }
        };
        Landed { tag: self.tag, result: result.map_or_else(|errno| -errno.raw_os_error(), |()| 0) }
    }
}

/// Makes a hole in a file; its size stays.
pub(super) fn punch(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(fd, flags, offset, length)
}

fn on_device(fd: BorrowedFd<'_>, request: u32, offset: u64, length: u64) -> Result<(), Errno> {
    let range = [offset, length];
    // SAFETY: both calls read two numbers at the address; the descriptor is open.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

impl LinuxStorage {
    /// A new length has been asked for.
    pub(super) fn queue_length(&mut self, io: &Io) {
        let Some(file) = self.files.at(io.file) else {
            return self.end(io.token, Err(StorageError::Os(libc::EBADF)));
        };
        if !matches!(file.identity, Identity::File { .. }) {
            let fits = io.offset_bytes <= file.shape.size;
            return self.end(io.token, if fits { Ok(()) } else { Err(StorageError::Os(libc::ENOSPC)) });
        }
        let Some(number) = self.slots.take(*io) else {
            return self.end(io.token, Err(StorageError::Os(libc::ENOBUFS)));
        };
        file.in_flight += 1;
        self.slots.at_mut(number).stage = Stage::Length;
        self.change_in_turn(number);
    }

    /// Starts a change of a file's space when those before it are over.
    pub(super) fn change_in_turn(&mut self, number: u32) {
        let Some(file) = self.files.at(self.slots.at(number).io.file) else { return };
        if std::mem::replace(&mut file.changing, true) {
            return file.changes.push(&mut self.slots, number);
        }
        self.start_change(number);
    }

    fn start_change(&mut self, number: u32) {
        if self.starts_remotely(number, Command::WriteZeroes) {
            return;
        }
        let (order, at_once) = match self.slots.at(number).stage {
            Stage::Length => self.length_order(number),
            _ => self.zero_order(number),
        };
        if at_once {
            self.stillborn.push_back(order.now());
        } else if self.changers.give(order).is_err() {
            self.stillborn.push_back(Landed { tag: number, result: -libc::ENOMEM });
        }
    }

    /// The call that changes a file's length, and whether it is short enough to be made at once. What is to be cut off is
    /// neither written nor mapped from here on.
    fn length_order(&mut self, number: u32) -> (Order, bool) {
        let length = self.slots.at(number).io.offset_bytes;
        let nothing = Order { tag: number, fd: -1, change: Change::Length(None), offset: length, length: 0 };
        let Some(file) = self.files.at(self.slots.at(number).io.file) else { return (nothing, false) };
        let cut = file.shape.size.saturating_sub(length);
        let was_ragged = file.shape.tail != u64::MAX;
        if cut > 0 {
            self.maps.punched(&file.mapped, length, cut);
            file.resize(length);
        }
        let tail = was_ragged.then(|| file.descriptor(true));
        let order = Order { fd: file.descriptor(false), change: Change::Length(tail), ..nothing };
        (order, file.path == Path::Memory && cut <= AT_ONCE_BYTES)
    }

    /// A change has ended: the next one of its file has its turn.
    pub(super) fn change_landed(&mut self, number: u32, result: Result<u32, i32>) {
        if result == Err(libc::EINTR) {
            return self.start_change(number);
        }
        let Some(file) = self.files.at(self.slots.at(number).io.file) else { return };
        let next = file.changes.pop(&self.slots);
        file.changing = next.is_some();
        // Its own end first, so that the next one finds the file as it left it.
        match self.slots.at(number).stage {
            Stage::Length => self.length_landed(number, result),
            _ => self.zero_landed(number, result),
        }
        if let Some(next) = next {
            self.start_change(next);
        }
    }

    fn length_landed(&mut self, number: u32, result: Result<u32, i32>) {
        let io = self.slots.at(number).io;
        let Some(file) = self.files.at(io.file) else { return };
        match result {
            Ok(_) => file.resize(io.offset_bytes),
            // Perhaps it was cut all the same.
            Err(_) => {
                if let Some(size) = medium::size_now(&file.fd) {
                    file.resize(size);
                }
            }
        }
        self.finish(number, result.map(|_| ()).map_err(StorageError::Os));
    }
}
