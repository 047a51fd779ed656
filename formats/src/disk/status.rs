//! Where a disk has data and where it reads as zero because there is nothing: the answer to [`super::Op::Status`].
//!
//! The answer is in the request's memory: runs of eight bytes each, the first starting where the extent does, each where the
//! one before it ends. It may cover less than the extent, if that has more runs than there is room for, or takes long to look up.

use alloc::vec::Vec;

/// Memory of a request for status, in bytes.
pub const STATUS_BYTES: usize = 4096;

/// Runs in one answer; behind the last is one of no sector.
const RUNS_MAX: usize = STATUS_BYTES / RUN_BYTES - 1;
const RUN_BYTES: usize = 8;

/// Parts of an extent that are looked up for one answer: what 512 MiB of scattered clusters of 64 KiB have, and what takes
/// about a millisecond.
const PARTS_MAX: u32 = 8192;

/// The bit of a run that reads as zero; the others are its length in sectors.
const ZERO: u64 = 1 << 63;

/// A part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// How long, in sectors.
    pub sectors: u64,
    /// It reads as zero, and no image of the chain holds bytes of it.
    pub zero: bool,
}

impl StatusRun {
    /// As it stands in a request's memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; RUN_BYTES] {
        let zero = if self.zero { ZERO } else { 0 };
        (self.sectors & !ZERO | zero).to_be_bytes()
    }

    /// The runs in a request's memory.
    pub fn all(memory: &[u8]) -> impl Iterator<Item = StatusRun> {
        memory
            .chunks_exact(RUN_BYTES)
            .map(|run| {
                let run = crate::bytes::be64(run, 0);
                StatusRun { sectors: run & !ZERO, zero: run & ZERO != 0 }
            })
            .take_while(|run| run.sectors > 0)
    }
}

/// An answer that is being put together.
#[derive(Debug, Default)]
pub(super) struct Status {
    memory: Vec<u8>,
    last: Option<StatusRun>,
    parts: u32,
}

impl Status {
    /// Adds a part. False when no more can be told.
    pub(super) fn add(&mut self, sectors: u64, zero: bool) -> bool {
        self.parts += 1;
        match &mut self.last {
            Some(last) if last.zero == zero => last.sectors = last.sectors.saturating_add(sectors),
            last => {
                let ended = last.replace(StatusRun { sectors, zero });
                self.store(ended);
            }
        }
        self.parts < PARTS_MAX && self.memory.len() < (RUNS_MAX - 1) * RUN_BYTES
    }

    fn store(&mut self, run: Option<StatusRun>) {
        if let Some(run) = run {
            self.memory.extend_from_slice(&run.to_bytes());
        }
    }

    /// No part will be added.
    pub(super) fn finish(&mut self) {
        let last = self.last.take();
        self.store(last);
        self.memory.resize(STATUS_BYTES, 0);
    }

    /// The request's memory.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(status: &mut Status) -> Vec<StatusRun> {
        status.finish();
        StatusRun::all(status.bytes()).collect()
    }

    #[test]
    fn neighbours_of_a_kind_are_one_run() {
        let mut status = Status::default();
        for (sectors, zero) in [(8, false), (u64::MAX >> 2, false), (1, true), (7, true), (1, false)] {
            assert!(status.add(sectors, zero));
        }
        let expected = [(8 + (u64::MAX >> 2), false), (8, true), (1, false)];
        assert_eq!(runs(&mut status), expected.map(|(sectors, zero)| StatusRun { sectors, zero }));
        assert_eq!(StatusRun::all(&[]).count(), 0);
    }

    #[test]
    fn an_answer_ends_when_it_is_full_or_took_long() {
        let mut status = Status::default();
        let added = 1 + (0..).take_while(|at| status.add(1, at % 2 == 0)).count();
        let all = runs(&mut status);
        assert_eq!((all.len(), added, status.bytes().len()), (RUNS_MAX, RUNS_MAX, STATUS_BYTES));
        let mut status = Status::default();
        let added = 1 + (0..).take_while(|_| status.add(3, true)).count();
        assert_eq!((added, runs(&mut status).len()), (PARTS_MAX as usize, 1));
    }
}
