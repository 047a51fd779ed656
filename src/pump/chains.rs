//! Disks whose image has a format: what `formats::Disk` wants done is done here, among the transfers of all other disks.
//!
//! A request that has its data goes in by [`Pump::submit`]; what it takes comes out as work, which becomes transfers (see
//! [`super::works`]); when it has its outcome it goes on like the transfer of a raw disk that has ended.

use std::collections::VecDeque;
use std::time::Duration;

use formats::{Extent, Failure, Limits, Op, Pages, Request};

use super::works::Works;
use super::{DiskId, DiskPlan, Pump, PumpEvent, Token};
use crate::buffers::Span;
use crate::hypervisor::Hypervisor;
use crate::keep::Kept;
use crate::limits::{METADATA_CACHE_MIB, WRITE_BACK_INTERVAL};
use crate::storage::{FileId, IoKind, Layer, Storage, StorageError};

/// An open chain of images, leaf first.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) disk: formats::Disk,
    /// Its files, by the numbers that work names.
    pub(super) files: Vec<FileId>,
    /// Requests that the disk had no room for, in line.
    waiting: VecDeque<Request>,
    /// Its leaf lies in memory.
    in_memory: bool,
    /// Work that is out.
    pub(super) out: u32,
    /// Something was changed since metadata were last written without need.
    changed: bool,
    closing: Closing,
    /// The log knows that the image is corrupt.
    told: bool,
}

/// How far closing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    No,
    /// Requests have no outcome yet.
    Waits,
    /// The image is being left clean.
    Runs,
}

/// All chains, and what they share.
#[derive(Debug)]
pub(super) struct Chains {
    pub(super) pages: Pages,
    /// By the number of their disk.
    open: Vec<Option<Box<Chain>>>,
    pub(super) works: Works,
    /// Changed metadata, for a successor of a killed process.
    kept: Kept,
    /// Disks that may have work or outcomes.
    touched: Vec<u32>,
    /// When changed metadata are written although nobody waits for it.
    write_back_at: Option<Duration>,
}

impl Chains {
    pub(super) fn new(kept: Kept) -> Chains {
        let mut chains = Chains {
            pages: Pages::of_pages(0),
            open: Vec::new(),
            works: Works::default(),
            kept,
            touched: Vec::new(),
            write_back_at: None,
        };
        chains.set_cache((METADATA_CACHE_MIB as usize) << 20);
        chains
    }

    fn set_cache(&mut self, bytes_max: usize) {
        self.pages = Pages::new(bytes_max);
        self.pages.set_keeper(Box::new(self.kept.clone()));
    }

    pub(super) fn get(&mut self, disk: u32) -> Option<&mut Chain> {
        self.open.get_mut(disk as usize)?.as_deref_mut()
    }

    pub(super) fn has(&self, disk: u32) -> bool {
        self.open.get(disk as usize).is_some_and(Option::is_some)
    }

    /// A chain, and the cache that its calls want.
    pub(super) fn both(&mut self, disk: u32) -> Option<(&mut Chain, &mut Pages)> {
        let chain = self.open.get_mut(disk as usize)?.as_deref_mut()?;
        Some((chain, &mut self.pages))
    }

    /// Where all of a request's bytes lie in a file that may be in memory, and what is to be told when they are moved.
    pub(super) fn begin_in_place(
        &mut self,
        disk: u32,
        kind: IoKind,
        extent: Extent,
    ) -> Option<(FileId, u64, formats::WorkId)> {
        let op = if kind == IoKind::Read { Op::Read } else { Op::Write };
        let (chain, pages) =
            self.both(disk).filter(|(chain, _)| chain.in_memory && chain.waiting.is_empty())?;
        let found = chain.disk.begin_in_place(pages, op, extent)?;
        let file = chain.files.get(found.image as usize).copied().unwrap_or(FileId::NONE);
        Some((file, found.offset_bytes, found.id))
    }

    pub(super) fn end_in_place(&mut self, disk: u32, id: formats::WorkId) {
        let Some((chain, pages)) = self.both(disk) else { return };
        chain.disk.done(pages, id, Ok(()), &[]);
        self.touch(disk);
    }

    /// Copies a part of what a piece of work is to write.
    pub(super) fn load(&mut self, disk: u32, id: formats::WorkId, from: u64, memory: Span) -> bool {
        let Some(chain) = self.open.get(disk as usize).and_then(Option::as_deref) else { return false };
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let to = from.saturating_add(memory.length_bytes() as usize);
        let part = chain.disk.bytes(id).get(from..to);
        part.is_some_and(|part| self.works.fill(memory, part))
    }

    pub(super) fn touch(&mut self, disk: u32) {
        if !self.touched.contains(&disk) {
            self.touched.push(disk);
        }
    }

    pub(super) fn has_work(&self) -> bool {
        !self.touched.is_empty() || self.works.waits_for_others()
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.write_back_at
    }

    /// Answers a piece of work.
    pub(super) fn done(&mut self, disk: u32, id: formats::WorkId, result: Result<(), Failure>, bytes: &[u8]) {
        let Some((chain, pages)) = self.both(disk) else { return };
        chain.disk.done(pages, id, result, bytes);
        chain.out = chain.out.saturating_sub(1);
        self.touch(disk);
    }
}

/// What a transfer's error means to a format.
pub(super) fn failure_of(error: &StorageError) -> Failure {
    match error {
        StorageError::Os(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Failure::NoSpace,
        StorageError::Os(errno) => Failure::Io(*errno),
        StorageError::PastEnd => Failure::Io(libc::EIO),
    }
}

/// What a format's failure is told as, where errors are errnos.
fn error_of(failure: Failure) -> StorageError {
    StorageError::Os(match failure {
        Failure::Io(0) | Failure::SyncFailed => libc::EIO,
        Failure::Io(errno) => errno,
        Failure::NoSpace => libc::ENOSPC,
        // "Structure needs cleaning": what file systems say of themselves.
        Failure::Corrupt(_) => libc::EUCLEAN,
        Failure::ReadOnly => libc::EROFS,
        Failure::OutOfRange => libc::EINVAL,
        Failure::Unsupported => libc::EOPNOTSUPP,
    })
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Changed metadata are not kept for a successor from now on: those who use the disks have flushed what must outlive this
    /// process. Before the first disk is added, and after the cache's size is set.
    pub fn keep_nothing(&mut self) {
        self.chains.pages.forget_keeper();
    }

    /// Bounds the memory for cached metadata of all disks, in bytes. Before the first disk is added.
    pub fn set_metadata_cache(&mut self, bytes_max: usize) {
        self.chains.set_cache(bytes_max);
    }

    /// Puts an open image with a format, and its parents, behind a disk.
    pub fn add_chain(&mut self, plan: &DiskPlan, layers: Vec<Layer>) -> DiskId {
        let disk = self.add_disk(plan);
        if let Some(open) = self.disk(disk.0) {
            open.is_chain = true;
        }
        if let Some(leaf) = layers.first() {
            // What a predecessor had left of it was written when it was opened.
            if !plan.read_only {
                self.chains.kept.written(leaf.identity);
            }
            self.chains.kept.name(disk.0, Some(leaf.identity));
        }
        let (mut files, mut images) = (Vec::new(), Vec::new());
        for (number, layer) in (0..).zip(layers) {
            files.push(layer.file);
            images.push((number, layer.format));
        }
        let chain = Chain {
            disk: formats::Disk::new(disk.0, images, plan.read_only, Limits::default()),
            files,
            waiting: VecDeque::new(),
            in_memory: self.storage.takes_pages(plan.file),
            out: 0,
            changed: false,
            closing: Closing::No,
            told: false,
        };
        let place = disk.0 as usize;
        if self.chains.open.len() <= place {
            self.chains.open.resize_with(place + 1, || None);
        }
        if let Some(slot) = self.chains.open.get_mut(place) {
            *slot = Some(Box::new(chain));
        }
        disk
    }

    /// Makes all that was written durable and the image such as others expect it: no leak, no mark of being open. Answered by
    /// [`PumpEvent::Synced`], after which the disk is to be removed. No request may follow.
    pub fn close_disk(&mut self, disk: DiskId) {
        match self.chains.get(disk.0) {
            Some(chain) => {
                chain.closing = Closing::Waits;
                self.chains.touch(disk.0);
            }
            None => self.sync(disk),
        }
    }

    /// Closes the files of a chain. False where the disk has none.
    pub(super) fn remove_chain(&mut self, disk: u32) -> bool {
        let Some(chain) = self.chains.open.get_mut(disk as usize).and_then(Option::take) else {
            return false;
        };
        self.chains.pages.forget_disk(disk);
        self.chains.kept.name(disk, None);
        self.chains.touched.retain(|other| *other != disk);
        chain.files.iter().for_each(|file| self.storage.close(*file));
        true
    }

    /// Hands a request to a disk that is a chain.
    pub(super) fn submit(&mut self, disk: u32, token: Token, op: Op, extent: Extent) {
        let now = self.now;
        let Some((chain, pages)) = self.chains.both(disk) else { return };
        let request = Request { token: token.encode(), op, extent };
        if !chain.waiting.is_empty() || !chain.disk.submit(pages, request) {
            chain.waiting.push_back(request);
        }
        if op.changes() {
            chain.changed = true;
            self.chains.write_back_at.get_or_insert(now + WRITE_BACK_INTERVAL);
        }
        self.chains.touch(disk);
    }

    /// Starts what chains want done, and ends what they have done. True if there was anything.
    pub(super) fn drive_chains(&mut self) -> bool {
        let mut progress = false;
        while let Some(disk) = self.chains.touched.pop() {
            progress |= self.drive(disk);
        }
        progress
    }

    fn drive(&mut self, disk: u32) -> bool {
        let mut progress = false;
        loop {
            let Some((chain, pages)) = self.chains.both(disk) else { return progress };
            if let Some(work) = chain.disk.next_work() {
                chain.out += 1;
                self.start_work(disk, work);
            } else if let Some(outcome) = chain.disk.next_outcome() {
                let result = outcome.result.map_err(error_of);
                self.settle(outcome.token, result);
            } else if let Some(request) = chain.waiting.front().copied()
                && chain.disk.submit(pages, request)
            {
                chain.waiting.pop_front();
            } else {
                break;
            }
            progress = true;
        }
        self.tell_corruption(disk);
        self.go_on_closing(disk);
        progress
    }

    /// A request has its outcome.
    fn settle(&mut self, token: u64, result: Result<(), StorageError>) {
        match Token::decode(token) {
            Some(Token::Request { queue, place }) => self.moved(queue, place, result),
            Some(Token::Flush(disk)) => self.flush_done(disk, result),
            Some(Token::Outside(place)) => self.outside_done(place, result),
            Some(Token::Sync(_) | Token::Work(_)) | None => {}
        }
    }

    fn tell_corruption(&mut self, disk: u32) {
        let Some(chain) = self.chains.get(disk).filter(|chain| !chain.told) else { return };
        if let Some(corruption) = chain.disk.corruption() {
            chain.told = true;
            self.report(PumpEvent::Corrupt(DiskId(disk), corruption));
        }
    }

    fn go_on_closing(&mut self, disk: u32) {
        let Some((chain, pages)) = self.chains.both(disk) else { return };
        match chain.closing {
            Closing::Waits if chain.waiting.is_empty() && chain.disk.in_flight() == 0 => {
                chain.closing = Closing::Runs;
                chain.disk.close(pages);
                self.chains.touch(disk);
            }
            Closing::Runs if chain.out == 0 => {
                if let Some(result) = chain.disk.closed() {
                    chain.closing = Closing::No;
                    self.report(PumpEvent::Synced(DiskId(disk), result.is_ok()));
                }
            }
            _ => {}
        }
    }

    /// Has changed metadata written once a second, so that they do not keep the cache's pages from others.
    pub(super) fn write_back(&mut self) {
        let now = self.now;
        if self.chains.write_back_at.is_none_or(|at| now < at) {
            return;
        }
        self.chains.write_back_at = None;
        for disk in 0..u32::try_from(self.chains.open.len()).unwrap_or(u32::MAX) {
            let Some((chain, pages)) = self.chains.both(disk) else { continue };
            if std::mem::take(&mut chain.changed) {
                chain.disk.write_back(pages);
                // What ends later changes more.
                chain.changed = chain.disk.in_flight() > 0;
                let again = chain.changed.then_some(now + WRITE_BACK_INTERVAL);
                self.chains.write_back_at = self.chains.write_back_at.or(again);
                self.chains.touch(disk);
            }
        }
    }
}
