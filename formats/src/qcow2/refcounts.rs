//! Where a cluster's refcount is, and changing it.

use crate::bytes::be64;
use crate::error::Corruption;
use crate::format::{Context, Step};
use crate::ledger::Tick;
use crate::pages::PageRef;
use crate::qcow2::Qcow2;
use crate::qcow2::shape::{refcount, refcount_bytes};

/// The page with a cluster's refcount.
#[derive(Clone, Copy, Debug)]
pub(super) struct CountAt {
    pub(super) page: PageRef,
    /// Which of the page's refcounts.
    pub(super) number: u64,
    /// Refcounts from this one to the page's end.
    pub(super) left: u64,
}

impl Qcow2 {
    /// The refcount block for a cluster; `None` where there is none, and all its refcounts are zero.
    pub(super) fn block_of(&self, cx: &mut Context<'_>, cluster: u64) -> Step<Option<u64>> {
        let number = cluster / self.shape.refcounts_per_block();
        if number >= self.reftable.entries {
            return Ok(None);
        }
        let at_bytes = self.reftable.offset_bytes + number * 8;
        let (page, within) = cx.page(at_bytes)?;
        let entry = be64(cx.bytes(page), within);
        if entry == 0 {
            return Ok(None);
        }
        if entry & 0x1ff != 0 {
            return Err(Corruption { what: "reserved bits of a refcount table entry", at_bytes }.into());
        }
        self.check_host(entry, self.shape.cluster_bytes(), at_bytes)?;
        Ok(Some(entry))
    }

    /// Refcounts of a page.
    pub(super) fn counts_per_page(&self) -> u64 {
        (u64::from(self.shape.page_bytes()) * 8) >> self.shape.refcount_order
    }

    /// Where a cluster's refcount is.
    pub(super) fn count_at(&self, cx: &mut Context<'_>, cluster: u64) -> Step<Option<CountAt>> {
        let Some(block) = self.block_of(cx, cluster)? else { return Ok(None) };
        let per_page = self.counts_per_page();
        let within_block = cluster % self.shape.refcounts_per_block();
        let number = within_block % per_page;
        let left = (per_page - number).min(self.shape.refcounts_per_block() - within_block);
        let (page, _) = cx.page(block + within_block / per_page * u64::from(self.shape.page_bytes()))?;
        Ok(Some(CountAt { page, number, left }))
    }

    /// The refcount `further` behind `at`.
    pub(super) fn count(&self, cx: &Context<'_>, at: CountAt, further: u64) -> u64 {
        refcount(cx.bytes(at.page), self.shape.refcount_order, at.number + further)
    }

    /// Changes it.
    pub(super) fn set_count(&self, cx: &mut Context<'_>, at: CountAt, further: u64, value: u64, after: Tick) {
        let order = self.shape.refcount_order;
        let (from, bytes, length) = refcount_bytes(cx.bytes(at.page), order, at.number + further, value);
        cx.put(at.page, from, bytes.get(..length).unwrap_or_default(), after);
    }
}
