//! Marks in the header: that the image is open, that it is corrupt, where its refcount table is.
//!
//! Others edit cluster 0 too (XCP-ng's storage manager, while a disk is in use): so the sector is read again each time, single
//! fields are changed, and it is written back at once.

use crate::bytes::{be32, be64, put};
use crate::error::Failure;
use crate::format::{Context, Order, OrderKind, Step, Wait};
use crate::ledger::Tick;
use crate::qcow2::Qcow2;
use crate::qcow2::header::{
    BITMAPS_CONSISTENT, Bitmaps, CORRUPT, DIRTY, Header, MAGIC, bitmap_entries, field,
};

pub(super) const TAG: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// Every persistent bitmap is being used: what it says is not to be trusted until it is saved.
    Bitmaps,
    /// Dirty, and autoclear bits that nobody here knows cleared.
    Open,
    Clean,
    Corrupt,
    Reftable(u64, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Reading,
    Writing,
    Syncing(Tick),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Marks {
    current: Option<(Mark, Phase)>,
    failure: Option<Failure>,
    /// Something was to be written.
    wanted: bool,
    has_bits: bool,
    open: bool,
    bitmaps: Option<Bitmaps>,
    corrupt: bool,
    reftable: Option<(u64, u32)>,
    reftable_written: bool,
    reftable_switched: bool,
}

impl Marks {
    pub(super) fn new(header: &Header) -> Marks {
        let has_bits = header.shape.version >= 3;
        Marks {
            current: None,
            failure: None,
            wanted: false,
            has_bits,
            open: !has_bits,
            bitmaps: header.trusted_bitmaps(),
            corrupt: false,
            reftable: None,
            reftable_written: false,
            reftable_switched: false,
        }
    }

    /// The image is not marked as being open: a planted bug.
    pub(super) fn leave_out(&mut self, planted: bool) {
        self.open |= planted;
    }

    /// Something is to be written.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    /// Whether something is to be written and the image is marked as being open: before that, not even space is reserved.
    pub(super) fn ready(&self) -> bool {
        self.open && self.wanted
    }

    /// Whether anything can have been written.
    pub(super) fn touched(&self) -> bool {
        self.wanted
    }

    pub(super) fn mark_corrupt(&mut self) {
        self.corrupt = self.has_bits;
    }

    pub(super) fn switch_reftable(&mut self, offset_bytes: u64, clusters: u32) {
        self.reftable = Some((offset_bytes, clusters));
        self.reftable_written = false;
        self.reftable_switched = false;
    }

    /// Whether the switch is durable (or, `hasty`, only written).
    pub(super) fn reftable_switched(&self, hasty: bool) -> bool {
        self.reftable_switched || hasty && self.reftable_written
    }

    fn next(&self) -> Option<Mark> {
        if self.corrupt {
            return Some(Mark::Corrupt);
        }
        if let Some((offset_bytes, clusters)) = self.reftable {
            return Some(Mark::Reftable(offset_bytes, clusters));
        }
        if self.open || !self.wanted {
            return None;
        }
        Some(if self.bitmaps.is_some() { Mark::Bitmaps } else { Mark::Open })
    }
}

impl Qcow2 {
    /// Goes on with marks; `Ok` when none is under way.
    pub(super) fn work_on_marks(&mut self, cx: &mut Context<'_>) -> Step<()> {
        loop {
            if let Some(failure) = self.marks.failure.take() {
                self.marks.current = None;
                return Err(failure.into());
            }
            match self.marks.current {
                Some((mark, Phase::Syncing(tick))) => {
                    if !cx.synced(tick) {
                        return Err(Wait::Busy);
                    }
                    self.marks.current = None;
                    self.marked(mark);
                }
                Some(_) => return Err(Wait::Busy),
                None => {
                    let Some(mark) = self.marks.next() else { return Ok(()) };
                    self.start_mark(cx, mark);
                }
            }
        }
    }

    /// Removes the mark of being open, durably.
    pub(super) fn clean(&mut self, cx: &mut Context<'_>) -> Step<()> {
        if !self.marks.has_bits || !self.marks.open && self.marks.current.is_none() {
            return Ok(());
        }
        if self.marks.current.is_none() && self.marks.failure.is_none() {
            self.start_mark(cx, Mark::Clean);
        }
        self.work_on_marks(cx)?;
        Ok(())
    }

    fn start_mark(&mut self, cx: &mut Context<'_>, mark: Mark) {
        let (offset_bytes, length) = match (mark, self.marks.bitmaps) {
            (Mark::Bitmaps, Some(bitmaps)) => {
                (bitmaps.directory_offset, bitmaps.directory_bytes.next_multiple_of(512))
            }
            _ => (0, 512),
        };
        self.marks.current = Some((mark, Phase::Reading));
        let kind = OrderKind::Read(crate::bytes::narrow(length));
        cx.order(Order { tag: TAG, offset_bytes, kind });
    }

    /// The sector was read, or written.
    pub(super) fn mark_answered(&mut self, cx: &mut Context<'_>, result: Result<&[u8], Failure>) {
        let Some((mark, phase)) = self.marks.current else { return };
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(failure) => {
                self.marks.failure = Some(failure);
                return;
            }
        };
        if phase == Phase::Writing {
            if let Mark::Reftable(..) = mark {
                self.marks.reftable_written = true;
            }
            self.marks.current = Some((mark, Phase::Syncing(cx.tick())));
            return;
        }
        let (mut bytes, mut offset_bytes) = (alloc::vec::Vec::from(bytes), 0);
        let known = match (mark, self.marks.bitmaps) {
            (Mark::Bitmaps, Some(bitmaps)) => {
                offset_bytes = bitmaps.directory_offset;
                bytes.resize(crate::bytes::index(bitmaps.directory_bytes.next_multiple_of(512)), 0);
                mark_bitmaps(&mut bytes, bitmaps)
            }
            _ => change_header(&mut bytes, mark),
        };
        if let Err(failure) = known {
            self.marks.failure = Some(failure);
            return;
        }
        self.marks.current = Some((mark, Phase::Writing));
        cx.order(Order { tag: TAG, offset_bytes, kind: OrderKind::Write(bytes) });
    }

    fn marked(&mut self, mark: Mark) {
        match mark {
            Mark::Bitmaps => self.marks.bitmaps = None,
            Mark::Open => self.marks.open = true,
            Mark::Clean => {
                self.marks.open = false;
                self.marks.wanted = false;
            }
            Mark::Corrupt => self.marks.corrupt = false,
            Mark::Reftable(..) => {
                self.marks.reftable = None;
                self.marks.reftable_switched = true;
            }
        }
    }
}

/// Changes what a mark is about, and nothing else.
fn change_header(bytes: &mut [u8], mark: Mark) -> Result<(), Failure> {
    if be32(bytes, 0) != MAGIC {
        return Err(Failure::Corrupt(crate::error::Corruption { what: "the header is gone", at_bytes: 0 }));
    }
    let incompatible = be64(bytes, field::INCOMPATIBLE);
    let mut features = |value: u64| put(bytes, field::INCOMPATIBLE, &value.to_be_bytes());
    match mark {
        Mark::Open => {
            features(incompatible | DIRTY);
            let kept = be64(bytes, field::AUTOCLEAR) & BITMAPS_CONSISTENT;
            put(bytes, field::AUTOCLEAR, &kept.to_be_bytes());
        }
        Mark::Clean => features(incompatible & !DIRTY),
        Mark::Corrupt => features(incompatible | CORRUPT),
        Mark::Reftable(offset_bytes, clusters) => {
            put(bytes, field::REFTABLE_OFFSET, &offset_bytes.to_be_bytes());
            put(bytes, field::REFTABLE_CLUSTERS, &clusters.to_be_bytes());
        }
        Mark::Bitmaps => {}
    }
    Ok(())
}

/// Sets `in_use` on every bitmap of a directory.
pub(super) fn mark_bitmaps(directory: &mut [u8], bitmaps: Bitmaps) -> Result<(), Failure> {
    let entries = bitmap_entries(directory, bitmaps.count, bitmaps.directory_offset)?;
    for (at, _) in entries {
        let flags = be32(directory, at + 12) | 1;
        put(directory, at + 12, &flags.to_be_bytes());
    }
    Ok(())
}
