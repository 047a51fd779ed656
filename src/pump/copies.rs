//! Grant copies: short requests in one batch, long ones a slice at a time.
//!
//! A copy of 1 MiB keeps the process for 0.1 ms, and several guests' together for longer. So what has more data than a plain
//! request is copied behind the others, and while guests share the process only `limits::SLICE_SEGMENTS` of it at a time.

use std::collections::VecDeque;

use super::Pump;
use crate::hypervisor::{CopyDirection, CopySegment, Hypervisor};
use crate::limits::{COLLECT_SEGMENTS, SLICE_SEGMENTS};
use crate::storage::Storage;

/// A request whose data is being copied; the segments of a batch lie in the order of its requests.
#[derive(Clone, Copy, Debug)]
struct Copying {
    queue: u32,
    place: u16,
    segments: u16,
}

/// Requests with their copies, in one direction.
#[derive(Debug, Default)]
pub(super) struct Batch {
    segments: Vec<CopySegment>,
    requests: VecDeque<Copying>,
    /// First segment of the first request; before it lie those of requests that are done.
    start: usize,
    /// First segment that is not copied.
    at: usize,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Adds a request whose segments `write` appends.
    pub(super) fn push(&mut self, queue: u32, place: u16, write: impl FnOnce(&mut Vec<CopySegment>)) {
        let before = self.segments.len();
        write(&mut self.segments);
        let segments = u16::try_from(self.segments.len() - before).unwrap_or(0);
        self.requests.push_back(Copying { queue, place, segments });
    }

    /// Takes the requests of a queue out; their places go to `dropped`.
    fn forget(&mut self, queue: u32, dropped: &mut Vec<u16>) {
        let (mut from, mut at, segments) = (self.start, self.at, &mut self.segments);
        self.requests.retain(|request| {
            let to = (from + usize::from(request.segments)).min(segments.len());
            if request.queue != queue {
                from = to;
                return true;
            }
            at -= at.clamp(from, to) - from;
            segments.drain(from..to);
            dropped.push(request.place);
            false
        });
        self.at = at;
    }

    /// The first request of which everything is copied, and the grant that failed, if one did.
    fn next_done(&mut self) -> Option<(Copying, Option<u32>)> {
        let first = *self.requests.front()?;
        let end = self.start + usize::from(first.segments);
        if end > self.at {
            return None;
        }
        let own = self.segments.get(self.start..end).unwrap_or(&[]);
        let failed = own.iter().find(|segment| !segment.copied).map(|segment| segment.grant);
        self.requests.pop_front();
        self.start = end;
        Some((first, failed))
    }

    /// Forgets the segments of requests that are done, when that is cheap.
    fn tidy(&mut self) {
        if self.requests.is_empty() {
            self.segments.clear();
            (self.start, self.at) = (0, 0);
        } else if self.start * 2 > self.segments.len() {
            self.segments.drain(..self.start);
            self.at -= self.start;
            self.start = 0;
        }
    }
}

/// The batches of a pump.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// Descriptors of indirect requests.
    pub(super) described: Batch,
    pub(super) incoming: Batch,
    pub(super) incoming_long: Batch,
    pub(super) outgoing: Batch,
    pub(super) outgoing_long: Batch,
    /// Segments copied in this round.
    pub(super) copied: usize,
    /// Batches that failed as a whole.
    failed: u64,
    /// Whether a part of the batch that was copied last failed as a whole even by itself.
    pub(super) call_failed: bool,
}

impl Copies {
    /// The batch for a request of so many segments.
    pub(super) fn of(&mut self, direction: CopyDirection, segments: usize) -> &mut Batch {
        match (direction, segments > rings::DIRECT_SEGMENTS) {
            (CopyDirection::FromGuest, false) => &mut self.incoming,
            (CopyDirection::FromGuest, true) => &mut self.incoming_long,
            (CopyDirection::ToGuest, false) => &mut self.outgoing,
            (CopyDirection::ToGuest, true) => &mut self.outgoing_long,
        }
    }

    /// Whether copies wait for the next round.
    pub(super) fn wait(&self) -> bool {
        !self.incoming_long.is_empty() || !self.outgoing_long.is_empty()
    }
}

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Segments of long requests that are copied in a round, in each direction.
    pub(super) fn slice(&self) -> usize {
        if self.fair.is_shared(self.now) { SLICE_SEGMENTS } else { COLLECT_SEGMENTS }
    }

    /// Drops the copies that a queue has ordered and not got: its guest is gone. Their places go to `dropped`.
    pub(super) fn drop_copies(&mut self, id: u32, dropped: &mut Vec<u16>) {
        let Copies { described, incoming, incoming_long, outgoing, outgoing_long, .. } =
            &mut self.scratch.copies;
        for batch in [described, incoming, incoming_long, outgoing, outgoing_long] {
            batch.forget(id, dropped);
        }
    }

    /// Copies the next `most` segments of a batch, and calls `then` for each request of which everything is copied, with the
    /// grant that failed, if one did. False if there was nothing to copy.
    pub(super) fn run_batch(
        &mut self,
        which: fn(&mut Copies) -> &mut Batch,
        most: usize,
        then: fn(&mut Self, u32, u16, Option<u32>),
    ) -> bool {
        let mut batch = std::mem::take(which(&mut self.scratch.copies));
        let progress = !batch.is_empty();
        if progress {
            let end = batch.segments.len().min(batch.at.saturating_add(most));
            self.copy(batch.segments.get_mut(batch.at..end).unwrap_or(&mut []));
            self.scratch.copies.copied += end - batch.at;
            batch.at = end;
            while let Some((request, failed)) = batch.next_done() {
                then(self, request.queue, request.place, failed);
            }
            batch.tidy();
        }
        *which(&mut self.scratch.copies) = batch;
        progress
    }

    /// Copies segments; if that fails as a whole, a request's worth after the other: what is wrong with one, or with so large a
    /// batch while memory is short, is no reason to fail the requests of every guest.
    fn copy(&mut self, segments: &mut [CopySegment]) {
        self.scratch.copies.call_failed = false;
        let Err(error) = self.hypervisor.copy(segments) else { return };
        self.scratch.copies.failed += 1;
        let failed = self.scratch.copies.failed;
        if failed.is_power_of_two() {
            let count = segments.len();
            log::warn!(
                "a batch of {count} grant copies failed, as {failed} have: {error:?}; copying by parts"
            );
        }
        // What is copied to or from a file itself may fail for the file's reason, and takes no other request with it.
        let pool = self.storage.buffers();
        let go_together = |one: &CopySegment, next: &CopySegment| {
            one.domain == next.domain && pool.contains(one.local) == pool.contains(next.local)
        };
        for own in segments.chunk_by_mut(go_together) {
            for part in own.chunks_mut(rings::DIRECT_SEGMENTS) {
                if self.hypervisor.copy(part).is_err() {
                    self.scratch.copies.call_failed = true;
                    // On failure of the call the statuses mean nothing.
                    part.iter_mut().for_each(|segment| segment.copied = false);
                }
            }
        }
    }
}
