//! Transfers of one batch that lie one behind the other in their file, made one.
//!
//! A transfer that could be merged is kept back until the next one shows whether it continues it, or until the batch is
//! submitted. The answer of a merged transfer is that of all of them if it moved every byte; otherwise each is done again by
//! itself, so that an error meets the request that it belongs to and no other.

use std::ptr;

use super::engine::{Action, Engine, Landed, Transfer};
use super::linux::LinuxStorage;
use super::slots::{Fifo, NONE};
use super::{FileId, calls};

/// Transfers that become one, at most: a page's ring full.
const MERGED_MAX: usize = 32;

/// Bytes of a merged transfer, at most.
const MERGED_BYTES_MAX: u32 = 1 << 20;

/// Merged transfers in flight, at most; more stay single. Each has a table of 32 × 16 bytes: 64 KiB.
const TABLES_MAX: usize = 128;

/// In a tag: the answer is that of several, and the number is the first one's. Slots are fewer (`slots::SLOTS_MAX`).
const MERGED: u32 = 1 << 31;

/// Where the parts of one merged transfer are in memory.
#[derive(Debug)]
struct Table(*mut [libc::iovec; MERGED_MAX]);

/// What lies one behind the other so far.
#[derive(Clone, Copy, Debug)]
struct Run {
    list: Fifo,
    count: usize,
    file: FileId,
    /// The first transfer, with the length of all.
    whole: Transfer,
}

/// Transfers that are being merged.
#[derive(Debug)]
pub(super) struct Merges {
    run: Option<Run>,
    /// Never given back to the system, as the kernel may read them as long as it likes.
    tables: Vec<Table>,
    free: Vec<u32>,
    /// Transfers that went along with another since the storage was made.
    pub merged: u64,
}

impl Merges {
    pub(super) fn new() -> Merges {
        let empty = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let table = |_| Table(Box::into_raw(Box::new([empty; MERGED_MAX])));
        let free = (0..u32::try_from(TABLES_MAX).unwrap_or(0)).collect();
        Merges { run: None, tables: (0..TABLES_MAX).map(table).collect(), free, merged: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.run.is_none()
    }

    fn table(&mut self) -> Option<u32> {
        self.free.pop()
    }
}

impl LinuxStorage {
    /// Takes a transfer that may be merged with its neighbours.
    #[inline]
    pub(super) fn join(&mut self, number: u32, file: FileId, transfer: Transfer) {
        if let Some(run) = &mut self.merges.run {
            let whole = &mut run.whole;
            let continues = run.file == file
                && whole.action == transfer.action
                && whole.offset_bytes + u64::from(whole.length_bytes) == transfer.offset_bytes
                && run.count < MERGED_MAX
                && whole.length_bytes + transfer.length_bytes <= MERGED_BYTES_MAX;
            if continues {
                whole.length_bytes += transfer.length_bytes;
                run.count += 1;
                run.list.push(&mut self.slots, number);
                return;
            }
            self.end_run();
        }
        let mut list = Fifo::EMPTY;
        list.push(&mut self.slots, number);
        self.merges.run = Some(Run { list, count: 1, file, whole: transfer });
    }

    /// Gives the engine what was kept back.
    pub(super) fn end_run(&mut self) {
        let Some(mut run) = self.merges.run.take() else { return };
        if run.count == 1 {
            run.list.pop(&self.slots);
            return self.push(run.whole.tag, &run.whole);
        }
        if self.unpushed.is_empty() && self.push_run(&run) {
            return;
        }
        while let Some(number) = run.list.pop(&self.slots) {
            self.slots.at_mut(number).alone = true;
            self.launch(number);
        }
    }

    fn push_run(&mut self, run: &Run) -> bool {
        let Some(number) = self.merges.table() else { return false };
        let Some(Table(table)) = self.merges.tables.get(number as usize) else { return false };
        let mut at = run.whole.tag;
        for place in 0..run.count {
            let slot = self.slots.at(at);
            let part = libc::iovec {
                iov_base: slot.memory.address().cast(),
                iov_len: slot.memory.length_bytes() as usize,
            };
            // SAFETY: `place` is below `MERGED_MAX`, and a table is written to only while it belongs to no transfer.
            unsafe { table.cast::<libc::iovec>().add(place).write(part) };
            at = slot.next;
        }
        let transfer = Transfer { tag: run.whole.tag | MERGED, address: table.cast(), ..run.whole };
        if !self.engine.push_vectored(&transfer, run.count) {
            self.merges.free.push(number);
            return false;
        }
        self.slots.at_mut(run.whole.tag).table = number;
        self.merges.merged += run.count as u64 - 1;
        true
    }

    /// Whether an answer is that of several transfers; if so, it is dealt with.
    #[inline]
    pub(super) fn land_merged(&mut self, landed: Landed) -> bool {
        if landed.tag & MERGED == 0 {
            return false;
        }
        let first = landed.tag & !MERGED;
        self.merges.free.push(self.slots.at(first).table);
        let (mut total, mut at) = (0, first);
        while at != NONE {
            let slot = self.slots.at(at);
            total += slot.memory.length_bytes();
            at = slot.next;
        }
        let whole = calls::answer(landed.result) == Ok(total);
        at = first;
        while at != NONE {
            let next = self.slots.at(at).next;
            if whole {
                self.moved_all(at);
            } else {
                self.slots.at_mut(at).alone = true;
                self.relaunch(at);
            }
            at = next;
        }
        true
    }

    /// Whether a transfer is one that may be merged.
    pub(super) fn may_merge(&self, number: u32, action: Action) -> bool {
        let slot = self.slots.at(number);
        let moves = action == Action::Read || action == Action::Write;
        moves && slot.moved == 0 && !slot.alone && slot.is_straight() && self.unpushed.is_empty()
    }
}
