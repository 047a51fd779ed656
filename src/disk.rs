//! What a guest reads and writes: an open image, and the order of its flushes.
//!
//! A flush covers every write that was taken before it, in whatever queue. Writes are counted in epochs: a flush closes
//! the current epoch and waits until that epoch and all earlier ones have no write in flight; then one `fdatasync`
//! serves every flush that is ready. Writes that come later do not wait for it.
//!
//! A barrier waits until everything that was taken before it has ended, and holds back everything that comes after it
//! until it has ended itself.

use std::collections::VecDeque;

use formats::{Extent, Place, Raw, Run};
use rings::Offers;

use crate::pump::DiskPlan;
use crate::storage::{FileId, StorageError};

/// Names an epoch of a [`Disk`]: a free-running counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(u32);

/// A flush waiting for its turn: whose it is, in the caller's terms.
pub type FlushToken = u64;

/// A request, in the caller's terms.
pub type RequestToken = u64;

#[derive(Clone, Copy, Debug)]
struct Closing {
    writes_in_flight: u32,
    flush: FlushToken,
}

/// A barrier between being taken and being answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    /// Requests that came before it are in flight.
    Waits(RequestToken),
    /// It is alone.
    Runs,
}

/// An open image as the data path sees it.
#[derive(Debug)]
pub struct Disk {
    /// The image.
    pub file: FileId,
    /// Its size; and where its sectors lie in the image, if that has no format.
    pub image: Raw,
    /// The image has a format.
    pub is_chain: bool,
    /// Writes of nothing but zeroes take no space.
    pub detect_zeroes: bool,
    /// Writes are refused (XSA-142).
    pub read_only: bool,
    /// What frontends may ask for.
    pub offers: Offers,
    /// The storage device below it: see `DiskPlan`.
    pub device: u64,
    /// Answers go out in the order of taking.
    pub in_order: bool,
    current: u32,
    writes_in_current: u32,
    /// Epochs that a flush has closed, oldest first: `current - closed.len() .. current`.
    closed: VecDeque<Closing>,
    /// Flushes that the running `fdatasync` serves.
    serving: Vec<FlushToken>,
    /// The first failure of an `fdatasync`. A kernel that failed to write a page back forgets it, and the next
    /// `fdatasync` succeeds; so no later flush of this opening can promise anything.
    failed: Option<StorageError>,
    /// Requests that were let in and have not ended, a barrier aside.
    inside: u32,
    barrier: Option<Barrier>,
    /// Requests that a barrier holds back, in the order of taking.
    held_back: VecDeque<RequestToken>,
}

impl Disk {
    /// A disk with no write in flight. `flushes_max` of its flushes can wait without allocation.
    #[must_use]
    pub fn new(plan: &DiskPlan, flushes_max: usize) -> Disk {
        Disk {
            file: plan.file,
            image: Raw::of_sectors(plan.size_sectors),
            is_chain: false,
            detect_zeroes: false,
            read_only: plan.read_only,
            offers: plan.offers,
            device: plan.device,
            in_order: plan.in_order,
            current: 0,
            writes_in_current: 0,
            closed: VecDeque::with_capacity(flushes_max),
            serving: Vec::with_capacity(flushes_max),
            failed: None,
            inside: 0,
            barrier: None,
            held_back: VecDeque::new(),
        }
    }

    /// Where an extent of a raw disk lies in its file, in bytes. `None` where a format has to say, and for what lies beyond
    /// the disk: it may have shrunk since a request was checked.
    #[must_use]
    pub fn offset_of(&self, extent: Extent) -> Option<u64> {
        match self.image.map(extent) {
            Ok(Run { place: Place::Data { offset_bytes }, .. }) if !self.is_chain => Some(offset_bytes),
            _ => None,
        }
    }

    /// A request was taken. False if a barrier holds it back: it comes again from [`Disk::let_in`].
    pub fn enter(&mut self, request: RequestToken, is_barrier: bool) -> bool {
        if self.barrier.is_some() {
            self.held_back.push_back(request);
            return false;
        }
        self.admit(request, is_barrier);
        true
    }

    fn admit(&mut self, request: RequestToken, is_barrier: bool) {
        if is_barrier {
            self.barrier = Some(Barrier::Waits(request));
        } else {
            self.inside += 1;
        }
    }

    /// A request that was let in has ended.
    pub fn leave(&mut self, is_barrier: bool) {
        if is_barrier {
            self.barrier = None;
        } else {
            self.inside = self.inside.saturating_sub(1);
        }
    }

    /// The barrier whose turn has come: everything before it has ended. Once for each.
    pub fn start_barrier(&mut self) -> Option<RequestToken> {
        match self.barrier {
            Some(Barrier::Waits(request)) if self.inside == 0 => {
                self.barrier = Some(Barrier::Runs);
                Some(request)
            }
            _ => None,
        }
    }

    /// The next request that no barrier holds back any more; the caller says of it whether it is a barrier itself.
    pub fn let_in(&mut self, is_barrier: impl FnOnce(RequestToken) -> bool) -> Option<RequestToken> {
        if self.barrier.is_some() {
            return None;
        }
        let request = self.held_back.pop_front()?;
        self.admit(request, is_barrier(request));
        Some(request)
    }

    /// Forgets requests that are held back: their guest is gone.
    pub fn forget(&mut self, is_gone: impl Fn(RequestToken) -> bool) {
        self.held_back.retain(|request| !is_gone(*request));
    }

    /// True while a barrier waits or runs, or requests are held back.
    #[must_use]
    pub fn has_barrier(&self) -> bool {
        self.barrier.is_some() || !self.held_back.is_empty()
    }

    /// A write was taken: every flush from now on waits for it.
    pub fn write_begins(&mut self) -> Epoch {
        self.writes_in_current += 1;
        Epoch(self.current)
    }

    /// That write ended, well or badly. A flush may now be ready: see [`Disk::start_flush`].
    pub fn write_ends(&mut self, epoch: Epoch) {
        let age = self.current.wrapping_sub(epoch.0) as usize;
        let count = match self.closed.len().checked_sub(age) {
            Some(place) if age > 0 => self.closed.get_mut(place).map(|closing| &mut closing.writes_in_flight),
            _ => Some(&mut self.writes_in_current),
        };
        if let Some(count) = count {
            *count = count.saturating_sub(1);
        }
    }

    /// A flush was taken.
    pub fn flush_begins(&mut self, flush: FlushToken) {
        self.closed.push_back(Closing { writes_in_flight: self.writes_in_current, flush });
        self.current = self.current.wrapping_add(1);
        self.writes_in_current = 0;
    }

    /// True when an `fdatasync` should be started now, for the flushes whose writes have ended. To be followed by
    /// [`Disk::flush_ends`] when it is done; until then this answers false.
    #[must_use]
    pub fn start_flush(&mut self) -> bool {
        if !self.serving.is_empty() {
            return false;
        }
        while self.closed.front().is_some_and(|closing| closing.writes_in_flight == 0) {
            if let Some(closing) = self.closed.pop_front() {
                self.serving.push(closing.flush);
            }
        }
        !self.serving.is_empty()
    }

    /// The running `fdatasync` ended: appends the flushes that it served to `served`.
    pub fn flush_ends(&mut self, served: &mut Vec<FlushToken>) {
        served.append(&mut self.serving);
    }

    /// What the flushes that were just served may be told, given how the `fdatasync` ended.
    ///
    /// # Errors
    /// The failure of this or of an earlier one.
    pub fn judge_flush(&mut self, result: Result<(), StorageError>) -> Result<(), StorageError> {
        if self.failed.is_none() {
            self.failed = result.err();
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// True while a flush waits or runs.
    #[must_use]
    pub fn flushing(&self) -> bool {
        !self.serving.is_empty() || !self.closed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Disk {
        Disk::new(&DiskPlan::new(FileId(1), 100, false), 8)
    }

    fn served(disk: &mut Disk) -> Vec<FlushToken> {
        let mut served = Vec::new();
        disk.flush_ends(&mut served);
        served
    }

    #[test]
    fn a_flush_waits_for_the_writes_before_it_and_for_no_other() {
        let mut disk = disk();
        let before = disk.write_begins();
        disk.flush_begins(1);
        let after = disk.write_begins();
        assert!(!disk.start_flush());
        disk.write_ends(after);
        assert!(!disk.start_flush(), "only the earlier write counts");
        disk.write_ends(before);
        assert!(disk.start_flush() && !disk.start_flush());
        assert_eq!(served(&mut disk), [1]);
        assert!(!disk.flushing());
    }

    #[test]
    fn one_sync_serves_all_that_are_ready_and_none_that_came_while_it_ran() {
        let mut disk = disk();
        let slow = disk.write_begins();
        disk.flush_begins(1);
        disk.flush_begins(2);
        let later = disk.write_begins();
        disk.flush_begins(3);
        disk.write_ends(slow);
        assert!(disk.start_flush());
        disk.flush_begins(4);
        disk.write_ends(later);
        assert!(!disk.start_flush(), "a running sync may have missed what ended since");
        assert_eq!(served(&mut disk), [1, 2]);
        assert!(disk.start_flush());
        assert_eq!(served(&mut disk), [3, 4]);
    }

    #[test]
    fn after_a_failed_sync_no_flush_promises_anything() {
        let mut disk = disk();
        assert_eq!(disk.judge_flush(Ok(())), Ok(()));
        assert_eq!(disk.judge_flush(Err(StorageError::Os(5))), Err(StorageError::Os(5)));
        assert_eq!(disk.judge_flush(Ok(())), Err(StorageError::Os(5)));
    }

    #[test]
    fn a_barrier_waits_for_all_before_it_and_holds_back_all_after_it() {
        let mut disk = disk();
        assert!(disk.enter(1, false) && disk.enter(2, false) && disk.enter(3, true));
        assert!(!disk.enter(4, false) && !disk.enter(5, true) && !disk.enter(6, false));
        disk.leave(false);
        assert_eq!((disk.start_barrier(), disk.let_in(|_| false)), (None, None), "one is still inside");
        disk.leave(false);
        assert_eq!((disk.start_barrier(), disk.start_barrier()), (Some(3), None));
        assert_eq!(disk.let_in(|_| false), None, "the barrier runs");
        disk.leave(true);
        let second = |request| request == 5;
        assert_eq!((disk.let_in(second), disk.let_in(second), disk.let_in(second)), (Some(4), Some(5), None));
        assert_eq!(disk.start_barrier(), None, "4 is inside");
        disk.leave(false);
        assert_eq!(disk.start_barrier(), Some(5));
        disk.leave(true);
        assert_eq!((disk.let_in(second), disk.let_in(second), disk.has_barrier()), (Some(6), None, false));
    }

    #[test]
    fn what_is_held_back_for_a_guest_that_is_gone_is_forgotten() {
        let mut disk = disk();
        assert!(disk.enter(1, true) && !disk.enter(2, false) && !disk.enter(3, false));
        disk.forget(|request| request == 2);
        assert_eq!(disk.start_barrier(), Some(1));
        disk.leave(true);
        assert_eq!((disk.let_in(|_| false), disk.let_in(|_| false)), (Some(3), None));
    }

    #[test]
    fn an_old_write_holds_back_every_later_flush() {
        let mut disk = disk();
        let old = disk.write_begins();
        disk.flush_begins(1);
        disk.flush_begins(2);
        disk.flush_begins(3);
        assert!(!disk.start_flush());
        disk.write_ends(old);
        assert!(disk.start_flush());
        assert_eq!(served(&mut disk), [1, 2, 3]);
    }
}
