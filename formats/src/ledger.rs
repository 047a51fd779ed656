//! What of a disk's metadata is dirty, on its way, and durable.
//!
//! Two rules carry every order that formats need. A change of a page may have to wait for a **tick**: the sync behind which the
//! data that it points to are durable. And who must not act before a change is durable asks for its **stamp**. So any dirty
//! page may be written at any time once its tick is over, and pages never wait for pages.
//!
//! Dirty pages are written in batches: copies are taken of what is dirty; if one of them waits for a tick, a sync; the writes;
//! a sync. The sync that ends one batch is the one that the next batch and the guest's flushes wait for.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::error::Failure;
use crate::pages::{Key, PAGE_BYTES, PageRef, Pages};

/// Number of a sync of a disk: the first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub(crate) u64);

impl Tick {
    /// No sync: what waits for it may be written at once.
    pub const NONE: Tick = Tick(0);
}

/// Number of a change of a page of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(pub(crate) u64);

/// Pages in a batch at most; their copies are 256 KiB a disk that writes.
pub const BATCH_PAGES: usize = 64;

/// Full batches that are written before a sync: with their copies 2 MiB while it lasts.
const BATCHES_MAX: usize = 8;

/// A copy of a dirty page.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) page: PageRef,
    pub(crate) key: Key,
    pub(crate) bytes: Box<[u8; PAGE_BYTES]>,
    first: Stamp,
    after: Tick,
}

/// What is to be done next: see [`Ledger::next`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing until something ends.
    Nothing,
    /// An fdatasync, to be followed by [`Ledger::sync_ended`].
    Sync,
    /// [`Ledger::writing`] of this many copies, each to be followed by [`Ledger::write_ended`].
    Write(usize),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    disk: u32,
    changes: u64,
    /// Changes up to this number are durable.
    durable: u64,
    syncs_started: u64,
    syncs_ended: u64,
    syncing: bool,
    writes_in_flight: usize,
    dirty: VecDeque<PageRef>,
    staged: Vec<Copy>,
    written: Vec<Copy>,
    spare: Vec<Box<[u8; PAGE_BYTES]>>,
    wanted: u64,
    wanted_tick: u64,
    failed: bool,
    /// Planted bugs, for tests that must find them.
    pub(crate) planted: Planted,
}

/// Orders that a test leaves out, to see that it is noticed. All false outside tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planted {
    /// Pages are written without waiting for their tick.
    pub no_tick: bool,
    /// What was written counts as durable without a sync.
    pub no_sync_after_pages: bool,
    /// A flush is answered without a sync.
    pub no_flush: bool,
    /// A flush is answered without writing pages.
    pub no_flush_pages: bool,
}

impl Ledger {
    pub(crate) fn new(disk: u32) -> Ledger {
        Ledger { disk, ..Ledger::default() }
    }

    /// A page has changed.
    pub(crate) fn changed(&mut self, pages: &mut Pages, page: PageRef, after: Tick) {
        self.changes += 1;
        if pages.mark(page, Stamp(self.changes), after) {
            self.dirty.push_back(page);
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        Stamp(self.changes)
    }

    pub(crate) fn tick(&self) -> Tick {
        Tick(self.syncs_started + 1)
    }

    pub(crate) fn is_durable(&self, stamp: Stamp) -> bool {
        stamp.0 <= self.durable
    }

    pub(crate) fn is_synced(&self, tick: Tick) -> bool {
        tick.0 <= self.syncs_ended
    }

    pub(crate) fn want(&mut self, stamp: Stamp) -> bool {
        self.wanted = self.wanted.max(stamp.0);
        self.is_durable(stamp)
    }

    pub(crate) fn want_sync(&mut self, tick: Tick) -> bool {
        self.wanted_tick = self.wanted_tick.max(tick.0);
        self.is_synced(tick)
    }

    /// Nobody waits any more: after a failure, before the next try.
    pub(crate) fn want_nothing(&mut self) {
        self.wanted = 0;
        self.wanted_tick = 0;
    }

    pub(crate) fn failed(&self) -> bool {
        self.failed
    }

    /// Pages that have changed and are not on their way.
    pub(crate) fn dirty_pages(&self) -> usize {
        self.dirty.len()
    }

    /// True while a write or a sync is under way.
    pub(crate) fn in_flight(&self) -> bool {
        self.syncing || self.writes_in_flight > 0
    }

    /// What to do now. `limit` is the number of dirty pages above which they are written although nobody waits.
    pub(crate) fn next(&mut self, pages: &mut Pages, limit: usize) -> Next {
        if self.in_flight() || self.failed {
            return Next::Nothing;
        }
        let wanted = self.wanted > self.durable || self.dirty.len() > limit;
        if wanted && self.staged.is_empty() {
            self.stage(pages);
        }
        let ready = self.staged.iter().all(|copy| copy.after.0 <= self.syncs_ended);
        if !self.staged.is_empty() && (ready || self.planted.no_tick) && self.may_write_more() {
            return self.start_writes();
        }
        let unsynced = !self.written.is_empty() || !self.staged.is_empty();
        if unsynced || self.wanted_tick > self.syncs_ended {
            self.syncs_started += 1;
            self.syncing = true;
            return Next::Sync;
        }
        Next::Nothing
    }

    fn stage(&mut self, pages: &mut Pages) {
        while self.staged.len() < BATCH_PAGES {
            let Some(page) = self.dirty.pop_front() else { return };
            let mut bytes = self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE_BYTES]));
            match pages.stage(page, self.disk, bytes.as_mut_slice()) {
                Some((key, first, after)) => self.staged.push(Copy { page, key, bytes, first, after }),
                None => self.spare.push(bytes),
            }
        }
    }

    /// A batch follows another without a sync only while there is more than a batch holds: pages that become dirty again and
    /// again would put the sync off for ever.
    fn may_write_more(&self) -> bool {
        let written = self.written.len();
        written == 0 || (written.is_multiple_of(BATCH_PAGES) && written < BATCHES_MAX * BATCH_PAGES)
    }

    /// Copies that were written before and not yet synced stay in front.
    fn start_writes(&mut self) -> Next {
        let count = self.staged.len();
        self.writes_in_flight = count;
        self.written.append(&mut self.staged);
        Next::Write(count)
    }

    /// The copies to write now: the last `count` of all.
    pub(crate) fn writing(&self, count: usize) -> impl Iterator<Item = &Copy> {
        self.written.iter().skip(self.written.len().saturating_sub(count))
    }

    /// The copy of a page that is being written.
    pub(crate) fn copy_of(&self, page: PageRef) -> Option<&Copy> {
        self.written.iter().rev().find(|copy| copy.page == page)
    }

    /// A write of a page ended. After a failure the page is dirty again.
    pub(crate) fn write_ended(&mut self, pages: &mut Pages, page: PageRef, result: Result<(), Failure>) {
        self.writes_in_flight = self.writes_in_flight.saturating_sub(1);
        pages.unpin(page);
        if result.is_ok() {
            if self.planted.no_sync_after_pages && self.writes_in_flight == 0 {
                self.find_durable(pages);
            }
            return;
        }
        let Some(at) = self.written.iter().rposition(|copy| copy.page == page) else { return };
        let copy = self.written.swap_remove(at);
        if pages.mark(page, copy.first, copy.after) {
            self.dirty.push_back(page);
        }
        self.spare.push(copy.bytes);
    }

    /// The sync ended. After a failure nothing more is written or promised.
    pub(crate) fn sync_ended(&mut self, pages: &Pages, result: Result<(), Failure>) {
        self.syncing = false;
        if result.is_err() {
            self.failed = true;
            return;
        }
        self.syncs_ended = self.syncs_started;
        self.spare.extend(self.written.drain(..).map(|copy| copy.bytes));
        self.spare.truncate(BATCH_PAGES);
        self.find_durable(pages);
    }

    fn find_durable(&mut self, pages: &Pages) {
        let dirty = self.dirty.iter().filter_map(|&page| pages.first_change(page, self.disk));
        let written = if self.planted.no_sync_after_pages { &[] } else { self.written.as_slice() };
        let kept = self.staged.iter().chain(written).map(|copy| copy.first);
        let oldest = dirty.chain(kept).min();
        self.durable = oldest.map_or(self.changes, |stamp| stamp.0.saturating_sub(1));
    }
}
