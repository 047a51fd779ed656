//! A transfer done at once by the calling thread: files in memory, and the helper threads.

use super::engine::{Action, Transfer};

/// Does `transfer` and waits for it. Bytes moved, or a negative errno, as the engines answer.
#[inline]
pub(super) fn now(transfer: &Transfer) -> i32 {
    let Ok(offset) = i64::try_from(transfer.offset_bytes) else { return -libc::EINVAL };
    let length = transfer.length_bytes as usize;
    let moved = match transfer.action {
        // SAFETY: the memory is valid for writes of that length until the transfer has ended (see `Transfer`).
        Action::Read => unsafe { libc::pread64(transfer.fd, transfer.address.cast(), length, offset) },
        // SAFETY: the memory is valid for reads of that length until the transfer has ended (see `Transfer`).
        Action::Write => unsafe { libc::pwrite64(transfer.fd, transfer.address.cast(), length, offset) },
        // SAFETY: takes a number and touches no memory.
        Action::Sync => unsafe { libc::fdatasync(transfer.fd) as isize },
    };
    if moved < 0 {
        return -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    i32::try_from(moved).unwrap_or(-libc::EIO)
}

/// A transfer on its way to a helper thread.
#[derive(Debug)]
pub(super) struct Job(pub Transfer);

// SAFETY: the address in it names memory that is valid until the transfer has ended, on whichever thread.
unsafe impl Send for Job {}

/// The kernel's answer taken apart: bytes moved, or an errno.
#[inline]
pub(super) fn answer(result: i32) -> Result<u32, i32> {
    u32::try_from(result).map_err(|_| result.checked_neg().unwrap_or(libc::EIO))
}
