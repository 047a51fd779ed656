//! L2 tables: new ones, and copies of those that a snapshot shares.

use alloc::vec::Vec;

use crate::error::Failure;
use crate::format::{Context, Order, OrderKind, Step, Wait};
use crate::ledger::{Stamp, Tick};
use crate::qcow2::Qcow2;
use crate::qcow2::entries::L1;
use crate::qcow2::shape::COPIED;

/// Tables under way at once; more wait.
const TABLES_MAX: usize = 8;
/// Pages that are copied before they are to be durable: a table must not fill the cache with dirty pages.
const COPIES_MAX: u64 = 16;
/// Orders of tables: this plus the number of the L1 entry.
const TAG: u64 = 16;

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Its space is being zeroed.
    Zeroing,
    Zeroed(Tick),
    Failed(Failure),
    /// Copied up to this byte.
    Copying(u64),
    /// And what was copied is to be durable.
    Waiting(u64, Stamp),
}

#[derive(Clone, Copy, Debug)]
struct Job {
    number: u64,
    /// The new table's cluster.
    cluster: u64,
    /// The old table, or 0.
    old: u64,
    stage: Stage,
}

/// Tables under way.
#[derive(Debug, Default)]
pub(super) struct Tables {
    jobs: Vec<Job>,
}

impl Qcow2 {
    /// A table of this tree's own in place of none, or of a shared one.
    ///
    /// # Errors
    /// `Busy` until it is there.
    pub(super) fn own_table(&mut self, cx: &mut Context<'_>, l1: L1, guest: u64) -> Step<L1> {
        let known = self.tables.jobs.iter().any(|job| job.number == l1.index);
        if known || self.tables.jobs.len() >= TABLES_MAX {
            return Err(Wait::Busy);
        }
        let (cluster, _, zero) = self.take(cx, 1)?;
        let (table, length) = (cluster << self.shape.cluster_bits, self.shape.cluster_bytes());
        cx.forget(table, length);
        if l1.table == 0 && zero {
            self.set_l1(cx, l1.index, table, Tick::NONE)?;
            // Only a read is spared by this: no matter if there is no page.
            let number = (guest >> self.shape.cluster_bits) % self.shape.l2_entries();
            let _ = cx.new_page(table + number * self.shape.entry_bytes());
            return Ok(L1 { table, copied: true, ..l1 });
        }
        let stage = if l1.table == 0 { Stage::Zeroing } else { Stage::Copying(0) };
        if l1.table == 0 {
            let kind = OrderKind::Zero(length);
            cx.order(Order { tag: TAG + l1.index, offset_bytes: table, kind });
        }
        self.tables.jobs.push(Job { number: l1.index, cluster, old: l1.table, stage });
        Err(Wait::Busy)
    }

    fn set_l1(&self, cx: &mut Context<'_>, number: u64, table: u64, after: Tick) -> Step<()> {
        let (page, within) = cx.page(self.l1.offset_bytes + number * 8)?;
        cx.put(page, within, &(table | COPIED).to_be_bytes(), after);
        self.recent.set(None);
        Ok(())
    }

    /// Space for a table was zeroed.
    pub(super) fn table_answered(&mut self, cx: &Context<'_>, tag: u64, result: Result<&[u8], Failure>) {
        let tick = cx.tick();
        if let Some(job) = self.tables.jobs.iter_mut().find(|job| job.number + TAG == tag) {
            job.stage = result.map_or_else(Stage::Failed, |_| Stage::Zeroed(tick));
        }
    }

    /// Goes on with tables.
    pub(super) fn work_on_tables(&mut self, cx: &mut Context<'_>) -> Step<()> {
        let (mut at, mut waits) = (0, None);
        while let Some(&job) = self.tables.jobs.get(at) {
            match self.work_on_table(cx, at, job) {
                Ok(()) => {
                    self.tables.jobs.swap_remove(at);
                }
                Err(wait) => {
                    at += 1;
                    if waits.is_none() || matches!(wait, Wait::Need(_)) {
                        waits = Some(wait);
                    }
                }
            }
        }
        waits.map_or(Ok(()), Err)
    }

    /// `Ok` when the job is over.
    fn work_on_table(&mut self, cx: &mut Context<'_>, at: usize, job: Job) -> Step<()> {
        let table = job.cluster << self.shape.cluster_bits;
        let planted = self.planted.no_table_barrier;
        match job.stage {
            Stage::Zeroing => Err(Wait::Busy),
            Stage::Zeroed(tick) => {
                self.set_l1(cx, job.number, table, if planted { Tick::NONE } else { tick })
            }
            Stage::Failed(failure) => {
                self.tables.jobs.swap_remove(at);
                self.space.give_back(job.cluster, 1);
                Err(failure.into())
            }
            Stage::Copying(from) => {
                let copied = self.copy_pages(cx, at, job, from)?;
                self.set_stage(at, Stage::Waiting(copied, cx.stamp()));
                Err(Wait::Busy)
            }
            Stage::Waiting(copied, stamp) => {
                if !cx.durable(stamp) && !planted {
                    return Err(Wait::Busy);
                }
                if copied < self.shape.cluster_bytes() {
                    self.set_stage(at, Stage::Copying(copied));
                    return Err(Wait::Busy);
                }
                self.set_l1(cx, job.number, table, Tick::NONE)?;
                self.space.free(cx, job.old >> self.shape.cluster_bits, 1);
                Ok(())
            }
        }
    }

    fn set_stage(&mut self, at: usize, stage: Stage) {
        if let Some(job) = self.tables.jobs.get_mut(at) {
            job.stage = stage;
        }
    }

    /// Copies pages of a shared table, and says up to where.
    fn copy_pages(&mut self, cx: &mut Context<'_>, at: usize, job: Job, from: u64) -> Step<u64> {
        let page_bytes = u64::from(self.shape.page_bytes());
        let end = (from / page_bytes + COPIES_MAX) * page_bytes;
        let end = (end - end % (COPIES_MAX * page_bytes)).min(self.shape.cluster_bytes());
        let mut done = from;
        while done < end {
            let (page, _) = cx.page(job.old + done)?;
            let bytes: Vec<u8> =
                cx.bytes(page).iter().take(crate::bytes::index(page_bytes)).copied().collect();
            let page = cx.new_page((job.cluster << self.shape.cluster_bits) + done)?;
            cx.put(page, 0, &bytes, Tick::NONE);
            done += page_bytes;
            // Pages that are copied stay copied when the next must be read first.
            self.set_stage(at, Stage::Copying(done));
        }
        Ok(done)
    }
}
