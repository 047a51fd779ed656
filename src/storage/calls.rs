//! A transfer done at once by the calling thread: files in memory, and the helper threads.

use std::os::fd::BorrowedFd;

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
