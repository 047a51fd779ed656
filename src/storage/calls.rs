//! A transfer done at once by the calling thread: files in memory, and the helper threads.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::engine::{Action, Transfer};
use crate::buffers::Span;

/// Does `transfer` and waits for it. Bytes moved, or a negative errno, as the engines answer.
#[inline]
pub(super) fn now(transfer: &Transfer) -> i32 {
    let length = transfer.length_bytes as usize;
    // SAFETY: the file stays open until the transfer has landed (see `Transfer`).
    let fd = unsafe { BorrowedFd::borrow_raw(transfer.fd) };
    let moved = match transfer.action {
        Action::Read => {
            // SAFETY: the memory is valid for that length, initialised (by the kernel, with zeroes, at the latest), and
            // nobody else's until the transfer has landed (see `Transfer`).
            let memory = unsafe { std::slice::from_raw_parts_mut(transfer.address, length) };
            rustix::io::pread(fd, memory, transfer.offset_bytes)
        }
        Action::Write => {
            // SAFETY: as above, and nobody writes to it.
            let memory = unsafe { std::slice::from_raw_parts(transfer.address, length) };
            rustix::io::pwrite(fd, memory, transfer.offset_bytes)
        }
        Action::Sync => rustix::fs::fdatasync(fd).map(|()| 0),
    };
    match moved {
        Ok(count) => i32::try_from(count).unwrap_or(-libc::EIO),
        Err(errno) => -errno.raw_os_error(),
    }
}

/// Takes the locks of qemu's programs, which lock single bytes of an image for each thing that they do with it (from 100 on) or
/// let nobody else do (from 200 on): all of these, so that they leave the image alone, and whoever has one is noticed. They
/// belong to the open file. False if somebody has one.
pub(super) fn lock_like_qemu(fd: BorrowedFd<'_>) -> bool {
    qemu_locks(fd, libc::F_WRLCK)
}

/// Gives them back.
pub(super) fn unlock_like_qemu(fd: BorrowedFd<'_>) {
    qemu_locks(fd, libc::F_UNLCK);
}

fn qemu_locks(fd: BorrowedFd<'_>, how: i32) -> bool {
    // SAFETY: a structure of numbers, for which zeroes are values.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    let short = |number: i32| libc::c_short::try_from(number).unwrap_or(0);
    (range.l_type, range.l_whence) = (short(how), short(libc::SEEK_SET));
    (range.l_start, range.l_len) = (100, 200);
    // SAFETY: the descriptor is open, and the call reads the structure.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    let errno = std::io::Error::last_os_error().raw_os_error();
    // A file system without locks cannot be asked.
    result == 0 || !matches!(errno, Some(libc::EAGAIN | libc::EACCES))
}

/// The kernel's answer taken apart: bytes moved, or an errno.
#[inline]
pub(super) fn answer(result: i32) -> Result<u32, i32> {
    u32::try_from(result).map_err(|_| result.checked_neg().unwrap_or(libc::EIO))
}

/// A transfer on its way to a helper thread.
#[derive(Debug)]
pub(super) struct Job(pub Transfer);

// SAFETY: the address in it names memory that is valid until the transfer has ended, on whichever thread.
unsafe impl Send for Job {}

/// The bytes of a transfer's memory, at most `length` of them. For the owner of the transfer, until it has landed.
#[inline]
pub(super) fn bytes<'a>(memory: Span, length: usize) -> &'a [u8] {
    let length = length.min(memory.length_bytes() as usize);
    if length == 0 {
        return &[];
    }
    // SAFETY: the memory of a transfer lies in an arena that is mapped for ever and initialised, and nobody writes to that of
    // a write before it has landed; whoever calls keeps the slice no longer.
    unsafe { std::slice::from_raw_parts(memory.address(), length) }
}

/// The same to be filled.
#[inline]
pub(super) fn bytes_mut<'a>(memory: Span, length: usize) -> &'a mut [u8] {
    let length = length.min(memory.length_bytes() as usize);
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as above; and the memory of a read is nobody else's before it has landed.
    unsafe { std::slice::from_raw_parts_mut(memory.address(), length) }
}
