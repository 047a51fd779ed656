//! Writes that change the map: where new data land, and what becomes zero.

use crate::bytes::index;
use crate::format::{Before, Context, Payout, Prepared, Step, Wait, Zeroed};
use crate::ledger::Tick;
use crate::qcow2::entries::At;
use crate::qcow2::shape::Cluster;
use crate::qcow2::{Qcow2, bytes_of};
use crate::{Extent, Place, SECTOR_BYTES};

/// The ticket of a payout into clusters that were taken from the reserve; of others, 0.
const NEW: u64 = 1;

impl Qcow2 {
    /// See [`crate::Format::prepare`].
    pub(super) fn prepare_write(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Prepared> {
        let guest = bytes_of(extent.sector);
        let at = self.own_entry(cx, guest)?;
        let whole = self.shape.cluster_bytes();
        let within = guest % whole;
        let wanted = bytes_of(extent.sectors);
        let first = self.cluster(cx, at, 0)?;
        if let Some((offset_bytes, sectors)) = self.own_run(cx, at, &first, extent)? {
            return Ok(Prepared::InPlace { offset_bytes, sectors });
        }
        match first {
            Cluster::Plain { host, copied: true, data, .. } => Ok(self.fill_subclusters(host, data, extent)),
            Cluster::Plain { host: 0, zero, .. } => {
                let before = if zero == 0 { Before::Parent } else { Before::Zero };
                let mut count = (within + wanted).div_ceil(whole).min(at.entries_left);
                for further in 1..count {
                    let same = matches!(self.cluster(cx, at, further), Ok(Cluster::Plain { host: 0, zero: other, .. }) if (other == 0) == (zero == 0));
                    if !same {
                        count = further;
                        break;
                    }
                }
                // Subclusters may differ within a cluster: then nothing is known of them all.
                let mixed = zero != 0 && zero != self.shape.all();
                let before = if mixed { Before::Parent } else { before };
                self.new_clusters(cx, extent, count, before)
            }
            Cluster::Plain { host, data: 0, zero, .. } if host != 0 && zero == self.shape.all() => {
                self.new_clusters(cx, extent, 1, Before::Zero)
            }
            Cluster::Plain { .. } | Cluster::Packed { .. } => {
                let aligned =
                    Extent { sector: (guest - within) / SECTOR_BYTES, sectors: self.shape.cluster_sectors() };
                self.new_clusters(cx, aligned, 1, Before::Data)
            }
        }
    }

    /// See [`crate::Format::in_place`].
    pub(super) fn in_place_write(&self, cx: &mut Context<'_>, extent: Extent) -> Step<Option<(u64, u64)>> {
        let guest = bytes_of(extent.sector);
        let l1 = self.l1(cx, guest)?;
        if l1.table == 0 || !l1.copied {
            return Ok(None);
        }
        let at = self.l2_at(cx, l1, guest)?;
        let first = self.cluster(cx, at, 0)?;
        self.own_run(cx, at, &first, extent)
    }

    /// Where an extent begins in data that only this tree has, and for how many sectors that is so.
    fn own_run(&self, cx: &Context<'_>, at: At, first: &Cluster, extent: Extent) -> Step<Option<(u64, u64)>> {
        let Cluster::Plain { copied: true, .. } = *first else { return Ok(None) };
        let run = self.run_at(cx, at, first, extent);
        let Place::Data { offset_bytes } = run.place else { return Ok(None) };
        let within = self.shape.within(bytes_of(extent.sector));
        let length = self.copied_bytes(cx, at, within, bytes_of(run.sectors))?;
        Ok(Some((offset_bytes, length / SECTOR_BYTES)))
    }

    /// The entry for a byte of the disk, in a table that is this tree's own.
    fn own_entry(&mut self, cx: &mut Context<'_>, guest: u64) -> Step<At> {
        let l1 = self.l1(cx, guest)?;
        let l1 = if l1.table == 0 || !l1.copied { self.own_table(cx, l1, guest)? } else { l1 };
        self.l2_at(cx, l1, guest)
    }

    /// Of a run of data, how much is only this tree's.
    fn copied_bytes(&self, cx: &Context<'_>, at: At, within: u64, length: u64) -> Step<u64> {
        let bits = self.shape.cluster_bits;
        for further in 1..=(within + length - 1) >> bits {
            let own = matches!(self.cluster(cx, at, further)?, Cluster::Plain { copied: true, .. });
            if !own {
                return Ok((further << bits) - within);
            }
        }
        Ok(length)
    }

    /// Space for subclusters that have none of their data in a cluster that is there.
    fn fill_subclusters(&self, host: u64, data: u32, extent: Extent) -> Prepared {
        let (whole, unit) = (self.shape.cluster_bytes(), self.shape.subcluster_bytes());
        let within = bytes_of(extent.sector) % whole;
        let end = (within + bytes_of(extent.sectors)).min(whole).div_ceil(unit);
        let first = within / unit;
        let mut last = first + 1;
        while last < end && data >> last & 1 == 0 {
            last += 1;
        }
        let sector = (bytes_of(extent.sector) - within + first * unit) / SECTOR_BYTES;
        Prepared::Allocated(Payout {
            extent: Extent { sector, sectors: (last - first) * unit / SECTOR_BYTES },
            locked: Extent {
                sector: (bytes_of(extent.sector) - within) / SECTOR_BYTES,
                sectors: self.shape.cluster_sectors(),
            },
            offset_bytes: host + first * unit,
            reads_zero: false,
            before: Before::Parent,
            ticket: 0,
        })
    }

    /// New clusters for an extent that begins in the first of `count`.
    fn new_clusters(
        &mut self,
        cx: &mut Context<'_>,
        extent: Extent,
        count: u64,
        before: Before,
    ) -> Step<Prepared> {
        let (whole, unit) = (self.shape.cluster_bytes(), self.shape.subcluster_bytes());
        let (first, got, reads_zero) = self.take(cx, count)?;
        let guest = bytes_of(extent.sector);
        let within = guest % whole;
        let from = within / unit * unit;
        let to = (within + bytes_of(extent.sectors)).next_multiple_of(unit).min(got * whole);
        // More clusters than the extent needs are never asked for, so `to` lies in the last.
        Ok(Prepared::Allocated(Payout {
            extent: Extent {
                sector: (guest - within + from) / SECTOR_BYTES,
                sectors: (to - from) / SECTOR_BYTES,
            },
            offset_bytes: (first << self.shape.cluster_bits) + from,
            locked: Extent {
                sector: (guest - within) / SECTOR_BYTES,
                sectors: to.div_ceil(whole) * self.shape.cluster_sectors(),
            },
            reads_zero,
            before,
            ticket: NEW,
        }))
    }

    /// See [`crate::Format::commit`].
    pub(super) fn commit_write(&mut self, cx: &mut Context<'_>, payout: &Payout, after: Tick) -> Step<()> {
        let whole = self.shape.cluster_bytes();
        let unit = self.shape.subcluster_bytes();
        let (guest, length) = (bytes_of(payout.extent.sector), bytes_of(payout.extent.sectors));
        let within = guest % whole;
        let count = (within + length).div_ceil(whole);
        let l1 = self.l1(cx, guest)?;
        let at = self.l2_at(cx, l1, guest)?;
        if count > at.entries_left || l1.table == 0 {
            return Err(self.corrupt("L2 entries of a write", at.at_bytes));
        }
        let base = payout.offset_bytes - within % whole;
        for further in 0..count {
            let old = self.cluster(cx, at, further)?;
            let from = if further == 0 { within / unit } else { 0 };
            let to = ((within + length) - further * whole).min(whole) / unit;
            let mask = self.shape.mask(from, to);
            let host = base + further * whole;
            let (data, zero) = match old {
                Cluster::Plain { data, zero, host: was, .. }
                    if was == host || was == 0 || self.shape.extended =>
                {
                    (data | mask, zero & !mask)
                }
                _ => (mask, 0),
            };
            let (data, zero) = if self.shape.extended { (data, zero) } else { (1, 0) };
            self.set_entry(cx, at, further, (host, data, zero), after);
            self.unlink(cx, old, host);
        }
        Ok(())
    }

    /// Writes an entry: host, data and zero subclusters.
    fn set_entry(&self, cx: &mut Context<'_>, at: At, further: u64, entry: (u64, u32, u32), after: Tick) {
        let within = at.within + index(further * self.shape.entry_bytes());
        let (word, bitmap) = self.shape.entry(entry.0, entry.1, entry.2);
        cx.put(at.page, within, &word.to_be_bytes(), after);
        if self.shape.extended {
            cx.put(at.page, within + 8, &bitmap.to_be_bytes(), after);
        }
    }

    /// The space of a replaced entry is to be given back, unless the new one has the same.
    fn unlink(&mut self, cx: &Context<'_>, old: Cluster, kept: u64) {
        match old {
            Cluster::Plain { host, .. } if host != 0 && host != kept => {
                self.space.free(cx, host >> self.shape.cluster_bits, 1);
            }
            Cluster::Plain { .. } => {}
            Cluster::Packed { offset_bytes, bytes } => {
                let first = offset_bytes >> self.shape.cluster_bits;
                let last = (offset_bytes + u64::from(bytes) - 1) >> self.shape.cluster_bits;
                self.space.free(cx, first, last - first + 1);
            }
        }
    }

    /// See [`crate::Format::release`].
    pub(super) fn release_write(&mut self, payout: &Payout) {
        if payout.ticket != NEW {
            return;
        }
        let first = payout.offset_bytes >> self.shape.cluster_bits;
        let end =
            (payout.offset_bytes + bytes_of(payout.extent.sectors)).div_ceil(self.shape.cluster_bytes());
        self.space.give_back(first, end - first);
    }

    /// See [`crate::Format::zero`].
    pub(super) fn zero_write(&mut self, cx: &mut Context<'_>, extent: Extent, discard: bool) -> Step<Zeroed> {
        let guest = bytes_of(extent.sector);
        let whole = self.shape.cluster_bytes();
        let l1 = self.l1(cx, guest)?;
        if l1.table == 0 && (discard || !self.has_parent) {
            let covers = self.shape.l2_covers_bytes();
            let sectors = ((covers - guest % covers) / SECTOR_BYTES).min(extent.sectors);
            return Ok(Zeroed::Done { sectors });
        }
        let at = self.own_entry(cx, guest)?;
        let within = guest % whole;
        let left = bytes_of(extent.sectors);
        // The disk may end within its last cluster: nobody reads what lies behind.
        let to_end = extent.end() >= self.sectors;
        let mut count = (within + left) / whole;
        if to_end {
            count = (within + left).div_ceil(whole);
        }
        if within > 0 || count == 0 {
            return self.zero_part(cx, at, extent, discard);
        }
        let mut done = 0;
        while done < count.min(at.entries_left) {
            match self.zero_cluster(cx, at, done, discard) {
                Ok(true) => done += 1,
                Ok(false) | Err(Wait::Busy) if done > 0 => break,
                Ok(false) => {
                    let sectors = extent.sectors.min(self.shape.cluster_sectors());
                    return Ok(Zeroed::Write { sectors });
                }
                Err(wait) => return Err(wait),
            }
        }
        Ok(Zeroed::Done { sectors: (done * self.shape.cluster_sectors()).min(extent.sectors) })
    }

    /// Makes a whole cluster read as zero, if an entry can say so. A discard that cannot be done is left.
    fn zero_cluster(&mut self, cx: &mut Context<'_>, at: At, further: u64, discard: bool) -> Step<bool> {
        self.space.room_for_frees()?;
        let old = self.cluster(cx, at, further)?;
        let all = self.shape.all();
        let shows_parent = self.has_parent && !self.planted.discard_shows_parent;
        let zero = if shows_parent { all } else { 0 };
        match old {
            Cluster::Plain { host: 0, zero: 0, .. } if discard || !self.has_parent => return Ok(true),
            Cluster::Plain { host: 0, zero, .. } if zero == all => return Ok(true),
            Cluster::Plain { data: 0, zero, .. } if zero == all && !discard => return Ok(true),
            _ => {}
        }
        if shows_parent && self.shape.version < 3 {
            return Ok(discard);
        }
        self.set_entry(cx, at, further, (0, 0, zero), Tick::NONE);
        self.unlink(cx, old, 0);
        Ok(true)
    }

    /// Makes a part of a cluster read as zero.
    fn zero_part(&mut self, cx: &mut Context<'_>, at: At, extent: Extent, discard: bool) -> Step<Zeroed> {
        let (whole, unit) = (self.shape.cluster_bytes(), self.shape.subcluster_bytes());
        let within = bytes_of(extent.sector) % whole;
        let end = (within + bytes_of(extent.sectors)).min(whole);
        let sectors = (end - within) / SECTOR_BYTES;
        let old = self.cluster(cx, at, 0)?;
        if discard && !self.shape.extended {
            return Ok(Zeroed::Done { sectors });
        }
        let Cluster::Plain { host, copied, data, zero } = old else {
            return Ok(if discard { Zeroed::Done { sectors } } else { Zeroed::Write { sectors } });
        };
        let (from, to) = (within.div_ceil(unit), end / unit);
        if self.shape.extended && within.is_multiple_of(unit) && from < to {
            let mask = self.shape.mask(from, to);
            let sectors = (to - from) * unit / SECTOR_BYTES;
            let (data, zero) = (data & !mask, zero | mask);
            // An entry whose space others share keeps saying so.
            if host != 0 && !copied {
                return Ok(if discard { Zeroed::Done { sectors } } else { Zeroed::Write { sectors } });
            }
            self.set_entry(cx, at, 0, (host, data, zero), Tick::NONE);
            return Ok(Zeroed::Done { sectors });
        }
        // Up to the end of the subcluster, as others may differ.
        let sectors = ((within / unit + 1) * unit).min(end).saturating_sub(within) / SECTOR_BYTES;
        let bit = within / unit;
        let is_zero = zero >> bit & 1 == 1 || (data >> bit & 1 == 0 && !self.has_parent);
        Ok(match data >> bit & 1 {
            _ if is_zero || discard => Zeroed::Done { sectors },
            1 if copied => Zeroed::InPlace { offset_bytes: host + within, sectors },
            _ => Zeroed::Write { sectors },
        })
    }
}
