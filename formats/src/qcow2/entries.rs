//! From a byte of the disk to its L2 entry, and from entries to runs.

use crate::bytes::{be64, index};
use crate::error::Corruption;
use crate::format::{Context, Step};
use crate::pages::PageRef;
use crate::qcow2::shape::{COPIED, Cluster, OFFSET};
use crate::qcow2::{Qcow2, Table, bytes_of};
use crate::{Extent, Place, Run, SECTOR_BYTES};

/// What L1 says of a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L1 {
    pub(super) index: u64,
    /// The L2 table; 0 for none.
    pub(super) table: u64,
    /// It is this tree's own.
    pub(super) copied: bool,
}

/// A place in an L2 table, with its page at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub(super) page: PageRef,
    /// Byte of the page where the entry is.
    pub(super) within: usize,
    /// Entries from this one to the page's end.
    pub(super) entries_left: u64,
    /// Where the entry lies in the file.
    pub(super) at_bytes: u64,
}

impl Qcow2 {
    /// The L1 entry for a byte of the disk.
    pub(super) fn l1(&self, cx: &mut Context<'_>, guest: u64) -> Step<L1> {
        let number = guest >> self.shape.l2_covers_bits();
        if let Some(recent) = self.recent.get()
            && recent.index == number
        {
            return Ok(recent);
        }
        let at_bytes = self.l1.offset_bytes + number * 8;
        if number >= self.l1.entries {
            return Err(Corruption { what: "beyond the L1 table", at_bytes }.into());
        }
        let (page, within) = cx.page(at_bytes)?;
        let entry = be64(cx.bytes(page), within);
        let table = entry & OFFSET;
        if entry & !(OFFSET | COPIED) != 0 {
            return Err(Corruption { what: "reserved bits of an L1 entry", at_bytes }.into());
        }
        if table == 0 && entry != 0 {
            return Err(
                Corruption { what: "L1 entry without offset, marked as the only one", at_bytes }.into()
            );
        }
        if table != 0 {
            self.check_host(table, self.shape.cluster_bytes(), at_bytes)?;
        }
        let found = L1 { index: number, table, copied: entry & COPIED != 0 };
        self.recent.set(Some(found));
        Ok(found)
    }

    /// Checks that space which an entry names lies within the file, and not over what is always there.
    pub(super) fn check_host(&self, host: u64, length: u64, at_bytes: u64) -> Result<(), Corruption> {
        let wrong = |what| Err(Corruption { what, at_bytes });
        let end = host.saturating_add(length);
        if self.shape.within(host) != 0 {
            return wrong("offset not aligned to a cluster");
        }
        if host >= self.space.end_bytes(&self.shape) {
            return wrong("offset beyond the end of the file");
        }
        let covers = |from: u64, to: u64| host < to && from < end;
        let cluster = self.shape.cluster_bytes();
        let up = |bytes: u64| (bytes + cluster - 1) & !(cluster - 1);
        let over = |table: &Table| covers(table.offset_bytes, table.offset_bytes + up(table.entries * 8));
        if covers(0, cluster) || over(&self.l1) || over(&self.reftable) {
            return wrong("offset within the header, the L1 table or the refcount table");
        }
        Ok(())
    }

    /// The L2 entry for a byte of the disk, in the table that L1 names.
    pub(super) fn l2_at(&self, cx: &mut Context<'_>, l1: L1, guest: u64) -> Step<At> {
        let number = (guest >> self.shape.cluster_bits) & (self.shape.l2_entries() - 1);
        let at_bytes = l1.table + (number << self.shape.entry_bits());
        let (page, within) = cx.page(at_bytes)?;
        let left = (u64::from(self.shape.page_bytes()) - within as u64) >> self.shape.entry_bits();
        Ok(At { page, within, entries_left: left, at_bytes })
    }

    /// What the entry `further` behind `at` says. `further` is less than [`At::entries_left`].
    pub(super) fn cluster(&self, cx: &Context<'_>, at: At, further: u64) -> Result<Cluster, Corruption> {
        let skip = further * self.shape.entry_bytes();
        let within = at.within + index(skip);
        let bytes = cx.bytes(at.page);
        let bitmap = if self.shape.extended { be64(bytes, within + 8) } else { 0 };
        let at_bytes = at.at_bytes + skip;
        let cluster = self.shape.cluster(be64(bytes, within), bitmap, at_bytes)?;
        match cluster {
            Cluster::Plain { host: 0, .. } => {}
            Cluster::Plain { host, .. } => self.check_host(host, self.shape.cluster_bytes(), at_bytes)?,
            Cluster::Packed { offset_bytes, bytes } => {
                let end = offset_bytes.saturating_add(u64::from(bytes));
                // The last sector of the last packed cluster may be a part of one.
                if offset_bytes < self.shape.cluster_bytes() || end > self.space.end_bytes(&self.shape) {
                    return Err(Corruption {
                        what: "compressed cluster beyond the end of the file",
                        at_bytes,
                    });
                }
            }
        }
        Ok(cluster)
    }

    /// See [`crate::Format::map`].
    pub(super) fn find_run(&self, cx: &mut Context<'_>, extent: Extent) -> Step<Run> {
        let guest = bytes_of(extent.sector);
        let l1 = self.l1(cx, guest)?;
        if l1.table == 0 {
            let covers = self.shape.l2_covers_bytes();
            let sectors = (covers - guest % covers) / SECTOR_BYTES;
            return Ok(Run { place: Place::Parent, sectors: sectors.min(extent.sectors) });
        }
        let at = self.l2_at(cx, l1, guest)?;
        Ok(self.run_at(cx, at, &self.cluster(cx, at, 0)?, extent))
    }

    /// The run that an extent begins with, whose first entry is at hand: `first` is what that says.
    pub(super) fn run_at(&self, cx: &Context<'_>, at: At, first: &Cluster, extent: Extent) -> Run {
        let guest = bytes_of(extent.sector);
        let within = self.shape.within(guest);
        let (place, end) = self.place_in(first, within);
        if let Place::Compressed { .. } = place {
            let sectors = (end - within) / SECTOR_BYTES;
            return Run { place, sectors: sectors.min(extent.sectors) };
        }
        let wanted = bytes_of(extent.sectors);
        let (mut length, mut further) = (end - within, 0);
        while length < wanted {
            let begins = self.shape.within(within + length);
            if begins == 0 {
                further += 1;
            }
            if further >= at.entries_left {
                break;
            }
            // What is wrong with a later entry is said when it is asked for.
            let Ok(next) = self.cluster(cx, at, further) else { break };
            let (other, other_end) = self.place_in(&next, begins);
            if !follows(&place, length, &other) {
                break;
            }
            length += other_end - begins;
        }
        Run { place, sectors: (length / SECTOR_BYTES).min(extent.sectors) }
    }

    /// The place of a byte of a cluster, and the byte of the cluster where its run of subclusters ends.
    fn place_in(&self, cluster: &Cluster, within: u64) -> (Place, u64) {
        let whole = self.shape.cluster_bytes();
        match *cluster {
            Cluster::Packed { offset_bytes, bytes } => {
                let skip_bytes = crate::bytes::narrow(within);
                (Place::Compressed { offset_bytes, bytes, skip_bytes }, whole)
            }
            Cluster::Plain { host, data, zero, .. } => {
                let unit_bits = self.shape.subcluster_bits();
                let mut bit = within >> unit_bits;
                let state = |bit: u64| (data >> bit & 1, zero >> bit & 1);
                let first = state(bit);
                while bit < u64::from(self.shape.subclusters()) && state(bit) == first {
                    bit += 1;
                }
                let place = match first {
                    (1, _) => Place::Data { offset_bytes: host + within },
                    (_, 1) => Place::Zero,
                    _ => Place::Parent,
                };
                (place, bit << unit_bits)
            }
        }
    }
}

/// Whether `next` continues `first` after `length` bytes.
fn follows(first: &Place, length: u64, next: &Place) -> bool {
    match (first, next) {
        (Place::Data { offset_bytes }, Place::Data { offset_bytes: next }) => offset_bytes + length == *next,
        (Place::Zero, Place::Zero) | (Place::Parent, Place::Parent) => true,
        _ => false,
    }
}
