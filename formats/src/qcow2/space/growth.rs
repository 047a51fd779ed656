//! Longer files: space at the end, refcount blocks for it, and a longer refcount table.

use alloc::vec::Vec;

use super::TAG_GROW;
use crate::bytes::{index, put};
use crate::error::Failure;
use crate::format::{Context, Order, OrderKind, Step, Wait};
use crate::ledger::{Stamp, Tick};
use crate::qcow2::shape::refcount_bytes;
use crate::qcow2::{Qcow2, Table};

/// A refcount table is at most this long, as qemu has it.
const REFTABLE_BYTES_MAX: u64 = 8 << 20;

/// How far growing has come.
#[derive(Debug)]
pub(super) enum Growth {
    Idle,
    Failed(Failure),
    /// The file is being made longer by these clusters: first, how many.
    Length(u64, u64),
    /// It is, behind this tick; their refcounts are next.
    Count(u64, u64, Tick),
    /// A refcount block is made at this cluster, which it counts itself: room for it,
    BlockLength(u64),
    /// its content,
    BlockWrite(u64),
    /// its entry in the table,
    BlockEntry(u64, Tick),
    /// which is to be durable.
    BlockDurable(Stamp),
    /// A longer refcount table is made: the old one is read,
    TableRead,
    /// room is made for the new one and the blocks that count it,
    TableLength(NewTable),
    /// they are written,
    TableWrite(NewTable),
    /// and durable,
    TableSync(NewTable, Tick),
    /// then the header is switched.
    TableSwitch(NewTable),
}

/// A refcount table to be: `blocks` clusters of refcounts at `first`, then the table.
#[derive(Debug, Default)]
pub(super) struct NewTable {
    first: u64,
    blocks: u64,
    clusters: u64,
    /// All of it, until it is written.
    bytes: Vec<u8>,
}

impl Growth {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self, Growth::Idle)
    }
}

impl Qcow2 {
    fn order_length(&self, cx: &mut Context<'_>, end: u64) {
        let offset_bytes = end << self.shape.cluster_bits;
        cx.order(Order { tag: TAG_GROW, offset_bytes, kind: OrderKind::SetLength });
    }

    /// Begins to make space at the end, if nothing of the kind is under way.
    pub(super) fn start_growth(&mut self, cx: &mut Context<'_>) -> Step<()> {
        if !self.space.growth.is_idle() {
            return Err(Wait::Busy);
        }
        let end = self.space.end;
        if self.space.grows && end >= 1 << (55 - self.shape.cluster_bits)
            || !self.space.grows && end >= self.space.bound
        {
            return if self.space.reserved() == 0 { Err(Failure::NoSpace.into()) } else { Ok(()) };
        }
        if end / self.shape.refcounts_per_block() >= self.reftable.entries {
            let length = crate::bytes::narrow(self.reftable.entries * 8);
            let offset_bytes = self.reftable.offset_bytes;
            self.space.growth = Growth::TableRead;
            cx.order(Order { tag: TAG_GROW, offset_bytes, kind: OrderKind::Read(length) });
            return Ok(());
        }
        if self.block_of(cx, end)?.is_none() {
            self.space.growth = Growth::BlockLength(end);
            self.order_length(cx, end + 1);
            return Ok(());
        }
        let per_page = self.counts_per_page();
        let within = end % self.shape.refcounts_per_block() % per_page;
        let mut count = (self.space.window - self.space.reserved()).min(per_page - within);
        if !self.space.grows {
            count = count.min(self.space.bound - end);
        }
        self.space.growth = Growth::Length(end, count);
        self.order_length(cx, end + count);
        Ok(())
    }

    /// Goes on with what waits for pages or for durability.
    pub(super) fn work_on_growth(&mut self, cx: &mut Context<'_>) -> Step<()> {
        match self.space.growth {
            Growth::Failed(failure) => {
                self.space.growth = Growth::Idle;
                Err(failure.into())
            }
            Growth::Count(first, count, after) => {
                let zero = self.space.new_is_zero;
                self.reserve(cx, (first, count), zero, after)?;
                self.space.growth = Growth::Idle;
                Ok(())
            }
            Growth::BlockEntry(cluster, tick) => {
                let number = cluster / self.shape.refcounts_per_block();
                let (page, within) = cx.page(self.reftable.offset_bytes + number * 8)?;
                let after = if self.planted.no_block_barrier { Tick::NONE } else { tick };
                cx.put(page, within, &(cluster << self.shape.cluster_bits).to_be_bytes(), after);
                self.space.growth = Growth::BlockDurable(cx.stamp());
                Err(Wait::Busy)
            }
            Growth::BlockDurable(stamp) => {
                if !cx.durable(stamp) {
                    return Err(Wait::Busy);
                }
                self.space.growth = Growth::Idle;
                Ok(())
            }
            Growth::TableSync(ref mut new, tick) => {
                if !cx.synced(tick) && !self.planted.no_reftable_barrier {
                    return Err(Wait::Busy);
                }
                let new = core::mem::take(new);
                let at = (new.first + new.blocks) << self.shape.cluster_bits;
                self.marks.switch_reftable(at, crate::bytes::narrow(new.clusters));
                self.space.growth = Growth::TableSwitch(new);
                Err(Wait::Busy)
            }
            Growth::TableSwitch(_) => self.finish_table(cx),
            Growth::Idle => Ok(()),
            _ => Err(Wait::Busy),
        }
    }

    /// The header names the new table, durably: the old one is free.
    fn finish_table(&mut self, cx: &mut Context<'_>) -> Step<()> {
        if !self.marks.reftable_switched(self.planted.no_switch_barrier) {
            return Err(Wait::Busy);
        }
        let Growth::TableSwitch(new) = core::mem::replace(&mut self.space.growth, Growth::Idle) else {
            return Ok(());
        };
        let bits = self.shape.cluster_bits;
        let (old, count) = (self.reftable.offset_bytes >> bits, (self.reftable.entries * 8) >> bits);
        self.reftable =
            Table { offset_bytes: (new.first + new.blocks) << bits, entries: (new.clusters << bits) / 8 };
        self.space.free(cx, old, count);
        if self.planted.no_switch_barrier {
            self.space.frees.iter_mut().for_each(|freed| freed.gone = Stamp(0));
        }
        Ok(())
    }

    /// A transfer of growing, or the cut of closing, ended.
    pub(in crate::qcow2) fn growth_answered(&mut self, cx: &mut Context<'_>, result: Result<&[u8], Failure>) {
        if self.space.finish == super::Finish::Trim {
            // That the file could not be cut costs space, nothing else.
            self.space.finish = super::Finish::Trimmed;
            return;
        }
        let growth = core::mem::replace(&mut self.space.growth, Growth::Idle);
        self.space.growth = match result {
            Ok(bytes) => self.grow_on(cx, growth, bytes),
            Err(failure) => Growth::Failed(failure),
        };
    }

    fn grow_on(&mut self, cx: &mut Context<'_>, growth: Growth, bytes: &[u8]) -> Growth {
        let cluster_bytes = self.shape.cluster_bytes();
        match growth {
            Growth::Length(first, count) => {
                self.space.extend(first + count);
                Growth::Count(first, count, cx.tick())
            }
            Growth::BlockLength(cluster) => {
                self.space.extend(cluster + 1);
                let mut block = alloc::vec![0; index(cluster_bytes)];
                self.count_once(&mut block, cluster % self.shape.refcounts_per_block());
                let offset_bytes = cluster << self.shape.cluster_bits;
                cx.forget(offset_bytes, cluster_bytes);
                cx.order(Order { tag: TAG_GROW, offset_bytes, kind: OrderKind::Write(block) });
                Growth::BlockWrite(cluster)
            }
            Growth::BlockWrite(cluster) => Growth::BlockEntry(cluster, cx.tick()),
            Growth::TableRead => self.plan_table(cx, bytes),
            Growth::TableLength(mut new) => {
                self.space.extend(new.first + new.blocks + new.clusters);
                let offset_bytes = new.first << self.shape.cluster_bits;
                let bytes = core::mem::take(&mut new.bytes);
                cx.forget(offset_bytes, bytes.len() as u64);
                cx.order(Order { tag: TAG_GROW, offset_bytes, kind: OrderKind::Write(bytes) });
                Growth::TableWrite(new)
            }
            Growth::TableWrite(new) => Growth::TableSync(new, cx.tick()),
            other => other,
        }
    }

    fn count_once(&self, block: &mut [u8], number: u64) {
        let (at, bytes, length) = refcount_bytes(block, self.shape.refcount_order, number, 1);
        put(block, at, bytes.get(..length).unwrap_or_default());
    }

    /// Lays out a refcount table half as long again, behind everything, with the blocks that count it and themselves.
    fn plan_table(&mut self, cx: &mut Context<'_>, old: &[u8]) -> Growth {
        let per_block = self.shape.refcounts_per_block();
        let (bits, cluster_bytes) = (self.shape.cluster_bits, self.shape.cluster_bytes());
        // What is counted by the old table ends with a block: the gap, if any, is free space like any other.
        let first = self.space.end.next_multiple_of(per_block);
        let number = first / per_block;
        let (mut blocks, mut clusters) = (1, 1);
        loop {
            let entries = (number + blocks + 1).max(self.reftable.entries * 3 / 2);
            clusters = (entries * 8).div_ceil(cluster_bytes).max(clusters);
            if blocks * per_block >= blocks + clusters
                || clusters << bits > REFTABLE_BYTES_MAX.max(cluster_bytes)
            {
                break;
            }
            blocks += 1;
        }
        let device_full = !self.space.grows && first + blocks + clusters > self.space.bound;
        if clusters << bits > REFTABLE_BYTES_MAX.max(cluster_bytes) || device_full {
            return Growth::Failed(Failure::NoSpace);
        }
        let mut bytes = alloc::vec![0; index((blocks + clusters) << bits)];
        for cluster in 0..blocks + clusters {
            let block = index((cluster / per_block) << bits);
            if let Some(block) = bytes.get_mut(block..) {
                self.count_once(block, cluster % per_block);
            }
        }
        let table = index(blocks << bits);
        let old_bytes = old.get(..index(self.reftable.entries * 8)).unwrap_or_default();
        put(&mut bytes, table, old_bytes);
        for block in 0..blocks {
            let at = table + index((number + block) * 8);
            put(&mut bytes, at, &((first + block) << bits).to_be_bytes());
        }
        self.order_length(cx, first + blocks + clusters);
        self.space.scan = self.space.scan.min(self.space.end);
        Growth::TableLength(NewTable { first, blocks, clusters, bytes })
    }
}
