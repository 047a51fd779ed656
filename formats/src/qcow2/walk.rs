//! All that an image's metadata name, one reference after another: what checking, repairing and sizing are made of.

use alloc::vec::Vec;

use crate::bytes::{be16, be32, be64, index};
use crate::error::{Corruption, Failure};
use crate::medium::Medium;
use crate::qcow2::header::{Header, bitmap_entries};
use crate::qcow2::shape::{COPIED, Cluster, OFFSET};

/// What a reference is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Header, tables, directories.
    Meta,
    /// L2 tables, or plain data clusters: the entry of the first lies at `entry_at`, the others' follow every `step` bytes, and all say
    /// whether they are the only one; `active` tree only.
    Entries { entry_at: u64, step: u64, copied: bool },
    /// Part of a compressed cluster.
    Packed,
}

/// Takes what a walk finds.
pub(crate) trait Visitor {
    /// `count` clusters from `first` on are named once.
    fn reference(&mut self, first: u64, count: u64, kind: Kind);
    /// Something cannot be followed.
    fn wrong(&mut self, what: Corruption);
}

/// Snapshots' L1 tables are bounded like the active one.
const L1_BYTES_MAX: u64 = 32 << 20;

pub(crate) struct Walk<'a> {
    pub(crate) medium: &'a mut dyn Medium,
    pub(crate) header: &'a Header,
    /// Clusters of the file.
    pub(crate) end: u64,
    pub(crate) effort: &'a mut Effort,
}

/// What a check may cost: an image can name one table millions of times, and a sparse file can be of any length.
#[derive(Debug)]
pub(crate) struct Effort(u64);

impl Effort {
    /// 256 GiB of tables: minutes. A sound image of 16 TiB with clusters of 64 KiB has 2 GiB of them, which are read 64 times.
    pub(crate) fn new() -> Effort {
        Effort(256 << 30)
    }

    #[cfg(test)]
    pub(crate) fn of(bytes: u64) -> Effort {
        Effort(bytes)
    }

    /// Looks at so many bytes.
    pub(crate) fn spend(&mut self, bytes: u64) -> Result<(), Failure> {
        let what = "more tables than can be checked in minutes";
        self.0 = self.0.checked_sub(bytes).ok_or(Failure::Corrupt(Corruption { what, at_bytes: 0 }))?;
        Ok(())
    }
}

impl Walk<'_> {
    fn wrong(visitor: &mut dyn Visitor, what: &'static str, at_bytes: u64) {
        visitor.wrong(Corruption { what, at_bytes });
    }

    fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.header.shape.cluster_bytes())
    }

    /// Names a range, if it lies in the file; says whether it does.
    fn name(&self, visitor: &mut dyn Visitor, offset: u64, bytes: u64, kind: Kind, at_bytes: u64) -> bool {
        let cluster = self.header.shape.cluster_bytes();
        let count = self.clusters(bytes);
        let first = offset / cluster;
        if !offset.is_multiple_of(cluster) || first.saturating_add(count) > self.end {
            Walk::wrong(visitor, "reference that is not aligned, or beyond the end of the file", at_bytes);
            return false;
        }
        visitor.reference(first, count, kind);
        true
    }

    fn read(&mut self, offset: u64, bytes: u64) -> Result<Vec<u8>, Failure> {
        self.effort.spend(bytes)?;
        let mut out = alloc::vec![0; index(bytes)];
        self.medium.read(offset, &mut out)?;
        Ok(out)
    }

    /// Everything but data: header, refcounts, snapshots, bitmaps; then all trees.
    pub(crate) fn all(&mut self, visitor: &mut dyn Visitor) -> Result<(), Failure> {
        let header = self.header;
        let cluster = header.shape.cluster_bytes();
        self.name(visitor, 0, cluster, Kind::Meta, 0);
        self.refcounts(visitor)?;
        self.name(visitor, header.l1_offset, u64::from(header.l1_entries) * 8, Kind::Meta, 40);
        self.tree(visitor, header.l1_offset, header.l1_entries, true)?;
        self.snapshots(visitor)?;
        self.bitmaps(visitor)
    }

    fn refcounts(&mut self, visitor: &mut dyn Visitor) -> Result<(), Failure> {
        let (from, to) = self.header.reftable_range();
        self.name(visitor, from, to - from, Kind::Meta, 48);
        let table = self.read(from, to - from)?;
        for (number, entry) in (0..).zip(table.chunks_exact(8).map(|entry| be64(entry, 0))) {
            if entry != 0 {
                self.name(visitor, entry, self.header.shape.cluster_bytes(), Kind::Meta, from + number * 8);
            }
        }
        Ok(())
    }

    /// An L1 table and all below it.
    fn tree(
        &mut self,
        visitor: &mut dyn Visitor,
        l1: u64,
        entries: u32,
        active: bool,
    ) -> Result<(), Failure> {
        let cluster = self.header.shape.cluster_bytes();
        let table = self.read(l1, u64::from(entries) * 8)?;
        for (number, entry) in (0..).zip(table.chunks_exact(8).map(|entry| be64(entry, 0))) {
            let (l2, entry_at) = (entry & OFFSET, l1 + number * 8);
            if entry & !(OFFSET | COPIED) != 0 {
                Walk::wrong(visitor, "reserved bits of an L1 entry", entry_at);
            }
            if l2 == 0 {
                continue;
            }
            let kind = if active {
                Kind::Entries { entry_at, step: 8, copied: entry & COPIED != 0 }
            } else {
                Kind::Meta
            };
            if self.name(visitor, l2, cluster, kind, entry_at) {
                self.table(visitor, l2, active)?;
            }
        }
        Ok(())
    }

    fn table(&mut self, visitor: &mut dyn Visitor, l2: u64, active: bool) -> Result<(), Failure> {
        let shape = self.header.shape;
        let bytes = self.read(l2, shape.cluster_bytes())?;
        let step = shape.entry_bytes();
        let mut next = 0;
        while next < shape.l2_entries() {
            let number = next;
            next += 1;
            let within = index(number * step);
            let (word, entry_at) = (be64(&bytes, within), l2 + number * step);
            let bitmap = if shape.extended { be64(&bytes, within + 8) } else { 0 };
            if word == 0 && bitmap == 0 {
                continue;
            }
            match shape.cluster(word, bitmap, entry_at) {
                Err(corruption) => visitor.wrong(corruption),
                Ok(Cluster::Plain { host: 0, .. }) => {}
                Ok(Cluster::Plain { host, copied, .. }) => {
                    let count = self.run_of_entries(&bytes, within, host);
                    next = number + count;
                    let kind = if active { Kind::Entries { entry_at, step, copied } } else { Kind::Meta };
                    self.name(visitor, host, count << shape.cluster_bits, kind, entry_at);
                }
                Ok(Cluster::Packed { offset_bytes, bytes }) => {
                    let first = offset_bytes >> shape.cluster_bits;
                    let last = (offset_bytes + u64::from(bytes) - 1) >> shape.cluster_bits;
                    if last >= self.end {
                        Walk::wrong(visitor, "compressed cluster beyond the end of the file", entry_at);
                    } else {
                        visitor.reference(first, last - first + 1, Kind::Packed);
                    }
                }
            }
        }
        Ok(())
    }

    /// How many entries from a plain one on name one cluster after the other, all of them in the file.
    fn run_of_entries(&self, bytes: &[u8], within: usize, host: u64) -> u64 {
        let shape = self.header.shape;
        if shape.extended {
            return 1;
        }
        let first = be64(bytes, within);
        let most = self.end.saturating_sub(host >> shape.cluster_bits).max(1);
        let words = bytes.get(within..).unwrap_or_default().chunks_exact(8).map(|word| be64(word, 0));
        let expected = core::iter::successors(Some(first), |word| word.checked_add(shape.cluster_bytes()));
        let count = words.zip(expected).take_while(|(word, expected)| word == expected).count();
        crate::bytes::wide(count).clamp(1, most)
    }

    fn snapshots(&mut self, visitor: &mut dyn Visitor) -> Result<(), Failure> {
        let start = self.header.snapshots_offset;
        let mut at = start;
        for _ in 0..self.header.snapshots {
            if at / self.header.shape.cluster_bytes() >= self.end {
                Walk::wrong(visitor, "snapshot table beyond the end of the file", 64);
                return Ok(());
            }
            let entry = self.read(at, 40)?;
            let (l1, entries) = (be64(&entry, 0), be32(&entry, 8));
            let names = u64::from(be16(&entry, 12)) + u64::from(be16(&entry, 14));
            let length = 40 + u64::from(be32(&entry, 36)) + names;
            if length > 1 << 20 || u64::from(entries) * 8 > L1_BYTES_MAX || at - start > 64 << 20 {
                Walk::wrong(visitor, "snapshot table entry", at);
                return Ok(());
            }
            if self.name(visitor, l1, u64::from(entries) * 8, Kind::Meta, at) {
                self.tree(visitor, l1, entries, false)?;
            }
            at += length.next_multiple_of(8);
        }
        if at > start {
            self.name(visitor, start, at - start, Kind::Meta, 64);
        }
        Ok(())
    }

    /// Bitmaps that are not to be trusted are leaks, as with qemu, which drops them.
    fn bitmaps(&mut self, visitor: &mut dyn Visitor) -> Result<(), Failure> {
        let Some(bitmaps) = self.header.trusted_bitmaps() else { return Ok(()) };
        let at = bitmaps.directory_offset;
        if !self.name(visitor, at, bitmaps.directory_bytes, Kind::Meta, at) {
            return Ok(());
        }
        let directory = self.read(at, bitmaps.directory_bytes)?;
        let cluster = self.header.shape.cluster_bytes();
        for (entry, _) in bitmap_entries(&directory, bitmaps.count, at)? {
            let (table, entries) = (be64(&directory, entry), be32(&directory, entry + 8));
            if u64::from(entries) * 8 > L1_BYTES_MAX {
                Walk::wrong(visitor, "bitmap table length", at + entry as u64);
                continue;
            }
            let length = u64::from(entries) * 8;
            if entries == 0 || !self.name(visitor, table, length, Kind::Meta, at + entry as u64) {
                continue;
            }
            for word in self.read(table, length)?.chunks_exact(8).map(|word| be64(word, 0)) {
                if word & OFFSET != 0 {
                    self.name(visitor, word & OFFSET, cluster, Kind::Meta, table);
                }
            }
        }
        Ok(())
    }
}
