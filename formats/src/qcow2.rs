//! QCOW2, versions 2 and 3.
//!
//! The order of all writes follows from three rules (`docs/design/formats.md`): clusters are handed out only when their refcount
//! is durable; an entry reaches the medium only behind the sync of what it points to; a cluster is given back only when no
//! durable entry names it and no request that could have seen one is left.

pub mod header;
pub mod map;
pub mod resize;
pub mod shape;

pub mod bitmaps;
pub mod check;
pub mod create;
pub mod parent;
pub mod snapshots;

mod blocks;
mod entries;
mod marks;
mod open;
mod refcounts;
mod space;
mod tables;
mod unpack;
mod walk;
mod write;

use alloc::vec::Vec;
use core::cell::Cell;

use crate::error::{Corruption, Failure};
use crate::format::{Context, Format, Payout, Prepared, Step, Wait, Zeroed};
use crate::ledger::Tick;
use crate::{Extent, Geometry, Run, SECTOR_BYTES};

pub use header::{Backing, Compression, Header};
pub use open::{Options, Repair};
pub use shape::Shape;
pub use unpack::unpack;

use entries::L1;
use marks::Marks;
use space::Space;
use tables::Tables;

/// Orders that a test leaves out, to see that it is noticed. All false outside tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planted {
    /// Entries do not wait for their data.
    pub no_data_barrier: bool,
    /// Clusters are handed out before their refcount is durable.
    pub no_refcount_barrier: bool,
    /// Clusters are freed before the entry that named them is durably gone.
    pub no_free_barrier: bool,
    /// Clusters are freed while requests may still use them.
    pub no_free_grace: bool,
    /// L1 entries do not wait for their tables.
    pub no_table_barrier: bool,
    /// The header does not wait for a new refcount table.
    pub no_reftable_barrier: bool,
    /// A refcount table entry does not wait for its block.
    pub no_block_barrier: bool,
    /// The dirty bit is not set.
    pub no_dirty_bit: bool,
    /// The dirty bit is cleared before refcounts are durable.
    pub no_clean_barrier: bool,
    /// A discarded cluster becomes unallocated although there is a parent.
    pub discard_shows_parent: bool,
    /// The old table is given back before the new one is durably in its place.
    pub no_switch_barrier: bool,
}

/// An open image. As a leaf it is written; as a parent it is only asked.
#[derive(Debug)]
pub struct Qcow2 {
    shape: Shape,
    sectors: u64,
    l1: Table,
    reftable: Table,
    compression: Compression,
    /// Entries that are not there mean another image, not zeroes.
    has_parent: bool,
    writable: bool,
    corruption: Option<Corruption>,
    space: Space,
    tables: Tables,
    /// The L1 entry that was looked at last: one covers 512 MiB at 64 KiB clusters, so it is the next one's too as a rule.
    recent: Cell<Option<L1>>,
    marks: Marks,
    /// Planted bugs, for tests that must find them.
    pub planted: Planted,
}

/// Where a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Table {
    offset_bytes: u64,
    entries: u64,
}

impl Qcow2 {
    /// Notes that the image contradicts itself: it is marked, and nothing more is written.
    fn corrupt(&mut self, what: &'static str, at_bytes: u64) -> Wait {
        self.found(Wait::Failed(Failure::Corrupt(Corruption { what, at_bytes })))
    }

    /// Notes a contradiction, if that is what the answer says.
    fn found(&mut self, wait: Wait) -> Wait {
        if let Wait::Failed(Failure::Corrupt(corruption)) = wait
            && self.corruption.is_none()
        {
            self.corruption = Some(corruption);
            self.marks.mark_corrupt();
        }
        wait
    }

    /// Whether changes are possible now.
    ///
    /// # Errors
    /// `Busy` until the image is marked as being open.
    fn writable(&self) -> Step<()> {
        if !self.writable {
            return Err(Failure::ReadOnly.into());
        }
        if let Some(corruption) = self.corruption {
            return Err(corruption.into());
        }
        if self.marks.ready() { Ok(()) } else { Err(Wait::Busy) }
    }

    fn noted<T>(&mut self, step: Step<T>) -> Step<T> {
        step.map_err(|wait| self.found(wait))
    }
}

impl Format for Qcow2 {
    fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors }
    }

    fn page_bytes(&self) -> u32 {
        self.shape.page_bytes()
    }

    fn unit_bytes(&self) -> u64 {
        self.shape.subcluster_bytes()
    }

    fn map(&self, cx: &mut Context<'_>, extent: Extent) -> Step<Run> {
        self.find_run(cx, extent)
    }

    fn unpack(&mut self, at_bytes: u64, packed: &[u8], unit: &mut Vec<u8>) -> Result<(), Failure> {
        let length = crate::bytes::index(self.shape.cluster_bytes());
        if unpack(self.compression, packed, unit, length) {
            return Ok(());
        }
        // The entry may be sound: it is the data that are lost, so the image is not marked.
        Err(Failure::Corrupt(Corruption { what: "compressed cluster does not unpack", at_bytes }))
    }

    fn prepare(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Prepared> {
        self.marks.want();
        self.writable()?;
        let step = self.prepare_write(cx, extent);
        self.noted(step)
    }

    fn in_place(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Option<(u64, u64)>> {
        self.marks.want();
        self.writable()?;
        let step = self.in_place_write(cx, extent);
        self.noted(step)
    }

    fn commit(&mut self, cx: &mut Context<'_>, payout: &Payout, after: Tick) -> Step<()> {
        let after = if self.planted.no_data_barrier { Tick::NONE } else { after };
        let step = self.commit_write(cx, payout, after);
        self.noted(step)
    }

    fn release(&mut self, _: &mut Context<'_>, payout: &Payout) {
        self.release_write(payout);
    }

    fn zero(&mut self, cx: &mut Context<'_>, extent: Extent, discard: bool) -> Step<Zeroed> {
        self.marks.want();
        self.writable()?;
        let step = self.zero_write(cx, extent, discard);
        self.noted(step)
    }

    fn work(&mut self, cx: &mut Context<'_>) -> Step<()> {
        if !self.writable {
            return Ok(());
        }
        self.work_on_marks(cx)?;
        if self.corruption.is_some() || !self.marks.ready() {
            return Ok(());
        }
        let tables = self.work_on_tables(cx);
        let tables = self.noted(tables);
        let frees = self.work_on_frees(cx);
        let frees = self.noted(frees);
        let space = self.work_on_space(cx);
        let space = self.noted(space);
        // A page that is needed must be asked for last, as there can be only one.
        for step in [tables, frees, space] {
            match step {
                Ok(()) | Err(Wait::Busy) => {}
                Err(other) => return Err(other),
            }
        }
        if tables.is_ok() && frees.is_ok() && space.is_ok() { Ok(()) } else { Err(Wait::Busy) }
    }

    fn answered(&mut self, cx: &mut Context<'_>, tag: u64, result: Result<&[u8], Failure>) {
        match tag {
            marks::TAG => self.mark_answered(cx, result),
            space::TAG_GROW => self.growth_answered(cx, result),
            space::TAG_FREE => self.free_answered(result),
            _ => self.table_answered(cx, tag, result),
        }
    }

    fn close(&mut self, cx: &mut Context<'_>) -> Step<()> {
        if !self.writable {
            return Ok(());
        }
        if self.corruption.is_some() {
            return self.work_on_marks(cx);
        }
        if !self.marks.touched() {
            return Ok(());
        }
        let step = self.finish(cx);
        self.noted(step)
    }

    fn corruption(&self) -> Option<Corruption> {
        self.corruption
    }
}

/// Sectors as bytes.
fn bytes_of(sectors: u64) -> u64 {
    sectors.saturating_mul(SECTOR_BYTES)
}
