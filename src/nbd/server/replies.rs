//! Replies, in the words that were agreed on.

use formats::{SECTOR_BYTES, StatusRun};

use super::handshake::{Agreed, CONTEXT_ID};
use super::output::Output;
use super::session::Active;
use crate::buffers::{Pool, Span};
use crate::nbd::wire::{Chunk, SimpleReply, chunk, command, error, flag, state};
use crate::storage::StorageError;

/// The unit in which a long read is searched for zeroes, in bytes: whoever copies a disk leaves out what comes as a hole. A
/// chunk more costs some 30 bytes and a look at the data.
const HOLE_BYTES: u32 = 64 << 10;

/// Whether the client expects a request's reply in chunks.
fn in_chunks(active: &Active, agreed: Agreed) -> bool {
    agreed.structured && matches!(active.command, command::READ | command::BLOCK_STATUS)
}

/// A request that needed nothing done.
pub(super) fn done(active: &Active, agreed: Agreed, output: &mut Output) {
    if in_chunks(active, agreed) {
        let flags = chunk::DONE;
        let last = Chunk { flags, kind: chunk::NONE, cookie: active.cookie, length_bytes: 0 };
        output.head(&last.to_bytes());
    } else {
        output.head(&SimpleReply { error: 0, cookie: active.cookie }.to_bytes());
    }
}

/// A request that failed; in chunks there is room for a reason.
pub(super) fn failed(active: &Active, agreed: Agreed, error: u32, reason: &str, output: &mut Output) {
    if !in_chunks(active, agreed) {
        return output.head(&SimpleReply { error, cookie: active.cookie }.to_bytes());
    }
    let length = u16::try_from(reason.len()).unwrap_or(0);
    let length_bytes = 6 + u32::from(length);
    let (flags, kind, cookie) = (chunk::DONE, chunk::ERROR, active.cookie);
    output.head(&Chunk { flags, kind, cookie, length_bytes }.to_bytes());
    output.head(&error.to_be_bytes());
    output.head(&length.to_be_bytes());
    output.head(reason.as_bytes().get(..usize::from(length)).unwrap_or_default());
}

/// The protocol's number for a failure of storage, and words for people.
pub(super) fn error_of(failure: &StorageError) -> (u32, &'static str) {
    match failure {
        StorageError::Os(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => (error::ENOSPC, "no space is left"),
        StorageError::Os(libc::EPERM | libc::EROFS) => (error::EPERM, "the image is read-only"),
        StorageError::Os(libc::ENOMEM) => (error::ENOMEM, "no memory"),
        StorageError::Os(libc::EINVAL) => (error::EINVAL, "refused by the disk"),
        error if error.is_unsupported() => (error::ENOTSUP, "the disk cannot do that"),
        StorageError::Os(_) | StorageError::PastEnd => (error::EIO, "input/output error"),
    }
}

/// A request that succeeded. True if its memory is a part of the reply, which says when it is free.
pub(super) fn succeeded(
    active: &Active,
    place: u16,
    agreed: Agreed,
    pool: &mut Pool,
    output: &mut Output,
) -> bool {
    match active.command {
        command::READ => {
            let Some(data) = active.span.part(active.skip_bytes, active.length_bytes) else {
                failed(active, agreed, error::EIO, "lost", output);
                return false;
            };
            if agreed.structured {
                return read_in_chunks(active, place, data, pool, output);
            }
            output.head(&SimpleReply { error: 0, cookie: active.cookie }.to_bytes());
            output.data(data, Some(place));
            true
        }
        command::BLOCK_STATUS => {
            status(active, place, pool, output);
            true
        }
        _ => {
            done(active, agreed, output);
            false
        }
    }
}

/// Data and holes. What is zero as a whole is a hole; what is longer than a unit is searched unit by unit.
fn read_in_chunks(active: &Active, place: u16, data: Span, pool: &Pool, output: &mut Output) -> bool {
    let length = data.length_bytes();
    let unit = if active.flags & flag::DF != 0 { length } else { HOLE_BYTES };
    let count = length.div_ceil(unit).min(u32::BITS);
    let holes = (0..count).fold(0_u32, |holes, at| {
        let part = data.part(at * unit, unit.min(length - at * unit)).unwrap_or(Span::EMPTY);
        holes | u32::from(is_zero(pool.bytes(part))) << at
    });
    let is_hole = |at: u32| holes >> at & 1 == 1;
    let last_data = (0..count).rev().find(|at| !is_hole(*at));
    let mut from = 0;
    while from < count {
        let to = (from + 1..count).find(|at| is_hole(*at) != is_hole(from)).unwrap_or(count);
        let (start, end) = (from * unit, length.min(to * unit));
        let offset = (active.offset_bytes + u64::from(start)).to_be_bytes();
        let (flags, cookie) = (if to == count { chunk::DONE } else { 0 }, active.cookie);
        if is_hole(from) {
            output.head(&Chunk { flags, kind: chunk::OFFSET_HOLE, cookie, length_bytes: 12 }.to_bytes());
            output.head(&offset);
            output.head(&(end - start).to_be_bytes());
        } else {
            let (kind, length_bytes) = (chunk::OFFSET_DATA, 8 + end - start);
            output.head(&Chunk { flags, kind, cookie, length_bytes }.to_bytes());
            output.head(&offset);
            let last_of = (last_data == Some(to - 1)).then_some(place);
            output.data(data.part(start, end - start).unwrap_or(Span::EMPTY), last_of);
        }
        from = to;
    }
    last_data.is_some()
}

fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The extents that a disk has told, cut to what was asked for; written over the disk's own words, which are as long.
fn status(active: &Active, place: u16, pool: &mut Pool, output: &mut Output) {
    let memory = pool.bytes_mut(active.span);
    let mut skip = u64::from(active.skip_bytes);
    let mut left = u64::from(active.length_bytes);
    let most = if active.flags & flag::REQ_ONE != 0 { 1 } else { usize::MAX };
    let mut count: u32 = 0;
    for words in memory.as_chunks_mut::<8>().0.iter_mut().take(most) {
        let run = StatusRun::all(words).next().unwrap_or(match count {
            // A disk that does not know says that everything may be data.
            0 => StatusRun { sectors: u64::MAX, zero: false },
            _ => StatusRun { sectors: 0, zero: false },
        });
        let bytes = run.sectors.saturating_mul(SECTOR_BYTES).saturating_sub(std::mem::take(&mut skip));
        let bytes = bytes.min(left);
        if bytes == 0 {
            break;
        }
        left -= bytes;
        let flags = if run.zero { state::HOLE | state::ZERO } else { 0 };
        *words = (bytes << 32 | u64::from(flags)).to_be_bytes();
        count += 1;
    }
    let (flags, kind, cookie) = (chunk::DONE, chunk::BLOCK_STATUS, active.cookie);
    output.head(&Chunk { flags, kind, cookie, length_bytes: 4 + count * 8 }.to_bytes());
    output.head(&CONTEXT_ID.to_be_bytes());
    output.data(active.span.part(0, count * 8).unwrap_or(Span::EMPTY), Some(place));
}
