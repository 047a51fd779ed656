//! Where a sector's data are: leaf first, then parents; and the merged map that makes this cost the same at any depth.
//!
//! A line of the map is a page of the cache with an entry for each of 512 units of the leaf. What an entry does not know, or
//! what changes within a unit, is looked up image by image.

use super::flight::Flight;
use super::{Actor, Disk, bytes_of};
use crate::error::Failure;
use crate::format::{Step, Wait};
use crate::pages::{Found, Key, PAGE_BYTES, PageRef, Pages};
use crate::{Extent, Place, Run, SECTOR_BYTES};

/// A look-up that waits for a page: how deep it has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Descent {
    layer: usize,
    /// Of the extent, what the images above leave to the next: 0 before anyone was asked.
    sectors: u64,
    version: u64,
    /// The extent's first sector; another one begins anew.
    sector: u64,
}

/// What the map knows of the first sector of an extent.
enum Known {
    Nothing,
    /// Its unit is not uniform.
    Mixed,
    Uniform(Run, usize),
}

const ENTRIES: u64 = PAGE_BYTES as u64 / 8;

/// An entry: 0 unknown; else kind (bits 0–1), image's place in the chain (2–8), offset in sectors (9–63).
const DATA: u64 = 1;
const ZERO: u64 = 2;
const MIXED: u64 = 3;

fn entry_of(run: &Run, layer: usize) -> u64 {
    match run.place {
        Place::Data { offset_bytes } if offset_bytes % SECTOR_BYTES == 0 => {
            DATA | (layer as u64) << 2 | (offset_bytes / SECTOR_BYTES) << 9
        }
        Place::Zero | Place::Parent => ZERO,
        _ => MIXED,
    }
}

impl Disk {
    /// The place of the first part of an extent, and whose it is. Never [`Place::Parent`].
    pub(super) fn resolve(
        &mut self,
        pages: &mut Pages,
        extent: Extent,
        descent: &mut Descent,
    ) -> Step<(Run, usize)> {
        if self.layers.len() <= 1 {
            return self.ask(pages, 0, |leaf, cx| leaf.map(cx, extent)).map(|run| (run, 0));
        }
        let unit = (self.unit_bytes() / SECTOR_BYTES).max(1);
        let mixed = match self.look_up(pages, extent, unit) {
            Known::Uniform(run, layer) => return Ok((run, layer)),
            Known::Mixed => true,
            Known::Nothing => false,
        };
        let first = extent.sector - extent.sector % unit;
        let skipped = extent.sector - first;
        // Whole units enter the map, so whole units are looked up; one that is not uniform is then looked up as asked.
        let rounded = (skipped + extent.sectors).next_multiple_of(unit).min(self.sectors - first);
        let exact = mixed || descent.sectors > 0 && descent.sector != first;
        if !exact {
            let (run, layer) = self.descend(pages, Extent { sector: first, sectors: rounded }, descent)?;
            if descent.version == self.version {
                self.remember(pages, first, unit, &run, layer);
            }
            *descent = Descent::default();
            if run.sectors > skipped {
                return Ok((cut(&run, skipped, extent.sectors), layer));
            }
        }
        let found = self.descend(pages, extent, descent)?;
        *descent = Descent::default();
        Ok(found)
    }

    /// The leaf's unit, within what a line can hold.
    fn unit_bytes(&self) -> u64 {
        self.layers.first().map_or(SECTOR_BYTES, |leaf| leaf.format.unit_bytes().max(SECTOR_BYTES))
    }

    /// Asks image by image, from where an earlier try has come to.
    fn descend(&mut self, pages: &mut Pages, extent: Extent, descent: &mut Descent) -> Step<(Run, usize)> {
        if descent.sectors == 0 || descent.sector != extent.sector {
            *descent =
                Descent { layer: 0, sectors: extent.sectors, version: self.version, sector: extent.sector };
        }
        descent.sectors = descent.sectors.min(extent.sectors);
        loop {
            let layer = descent.layer;
            let end = self.layers.get(layer).map_or(0, |layer| layer.sectors);
            if extent.sector >= end {
                // Below the chain's last image, and behind the end of a shorter one, there is nothing.
                return Ok((Run { place: Place::Zero, sectors: descent.sectors }, 0));
            }
            let sectors = descent.sectors.min(end - extent.sector);
            let asked = Extent { sector: extent.sector, sectors };
            let run = self.ask(pages, layer, |image, cx| image.map(cx, asked))?;
            descent.sectors = run.sectors.min(sectors);
            if run.place != Place::Parent {
                return Ok((Run { sectors: descent.sectors, ..run }, layer));
            }
            descent.layer += 1;
        }
    }

    fn line(&self, unit_index: u64) -> Key {
        Key {
            disk: self.shared.disk,
            image: Key::MAP,
            offset_bytes: unit_index / ENTRIES * PAGE_BYTES as u64,
        }
    }

    /// What the map knows of an extent.
    fn look_up(&mut self, pages: &mut Pages, extent: Extent, unit: u64) -> Known {
        let index = extent.sector / unit;
        let Found::Ready(line) = pages.find(self.line(index)) else { return Known::Nothing };
        let bytes = pages.bytes(line);
        let entry = entry_at(bytes, index);
        let (kind, layer) = (entry & 3, crate::bytes::index(entry >> 2 & 0x7f));
        match kind {
            0 => return Known::Nothing,
            MIXED => return Known::Mixed,
            _ => {}
        }
        let skipped = extent.sector % unit;
        let mut sectors = unit - skipped;
        let step = if kind == DATA { unit << 9 } else { 0 };
        let (mut next, mut expected) = (index + 1, entry.wrapping_add(step));
        while sectors < extent.sectors && next % ENTRIES != 0 && entry_at(bytes, next) == expected {
            sectors += unit;
            next += 1;
            expected = expected.wrapping_add(step);
        }
        let place = match kind {
            DATA => Place::Data { offset_bytes: bytes_of((entry >> 9) + skipped) },
            _ => Place::Zero,
        };
        Known::Uniform(Run { place, sectors: sectors.min(extent.sectors) }, layer)
    }

    /// Enters what was found about the units from `first` on.
    fn remember(&mut self, pages: &mut Pages, first: u64, unit: u64, run: &Run, layer: usize) {
        if layer > 0x7f {
            return;
        }
        let whole = run.sectors / unit;
        let last_is_cut = first + run.sectors >= self.sectors && !run.sectors.is_multiple_of(unit);
        let count = whole + u64::from(last_is_cut);
        let Some(line) = self.claim_line(pages, first / unit) else { return };
        let bytes = pages.bytes_mut(line);
        if count == 0 {
            return put_entry(bytes, first / unit, MIXED);
        }
        let entry = entry_of(run, layer);
        let step = if entry & 3 == DATA { unit << 9 } else { 0 };
        for at in 0..count {
            let index = first / unit + at;
            if at > 0 && index.is_multiple_of(ENTRIES) {
                break;
            }
            put_entry(bytes, index, entry.wrapping_add(at.wrapping_mul(step)));
        }
    }

    fn claim_line(&self, pages: &mut Pages, index: u64) -> Option<PageRef> {
        let key = self.line(index);
        match pages.find(key) {
            Found::Ready(line) => Some(line),
            Found::Reading(_) => None,
            Found::Absent => {
                let line = pages.claim(key)?;
                pages.fill(line, &[]);
                Some(line)
            }
        }
    }

    /// The leaf's map of an extent has changed.
    pub(super) fn remap(&mut self, pages: &mut Pages, extent: Extent) {
        self.version += 1;
        if self.layers.len() <= 1 {
            return;
        }
        let unit = (self.unit_bytes() / SECTOR_BYTES).max(1);
        let (mut index, last) = (extent.sector / unit, extent.end().saturating_sub(1) / unit);
        while index <= last {
            let Found::Ready(line) = pages.find(self.line(index)) else {
                index = (index / ENTRIES + 1) * ENTRIES;
                continue;
            };
            put_entry(pages.bytes_mut(line), index, 0);
            index += 1;
        }
    }

    /// Sees to it that the unpacker holds a unit: `Ok` when it does.
    pub(super) fn unpack_for(
        &mut self,
        actor: Actor,
        layer: usize,
        offset_bytes: u64,
        bytes: u32,
    ) -> Step<()> {
        let image = self.layers.get(layer).map_or(0, |layer| layer.image);
        if self.unpacker.busy {
            return Err(Wait::Busy);
        }
        if self.unpacker.holds == Some((image, offset_bytes)) {
            return Ok(());
        }
        self.unpacker.busy = true;
        self.unpacker.holds = None;
        let within = offset_bytes % SECTOR_BYTES;
        let from = offset_bytes - within;
        let length_bytes = (within + u64::from(bytes)).next_multiple_of(SECTOR_BYTES);
        let cut = (crate::bytes::index(within), crate::bytes::index(within + u64::from(bytes)));
        self.read_own(
            Flight::UnitIn { for_whom: actor, layer, offset_bytes, cut },
            image,
            from,
            length_bytes,
        );
        Err(Wait::Busy)
    }

    /// A packed unit was read: unpacks it. One unit at a time, so that a turn has at most one to unpack.
    pub(super) fn unit_read(
        &mut self,
        layer: usize,
        offset_bytes: u64,
        cut: (usize, usize),
        result: Result<&[u8], Failure>,
    ) -> Result<(), Failure> {
        self.unpacker.busy = false;
        let packed = result?.get(cut.0..cut.1).unwrap_or_default();
        let Some(layer) = self.layers.get_mut(layer) else { return Ok(()) };
        layer.format.unpack(offset_bytes, packed, &mut self.unpacker.unit)?;
        self.unpacker.holds = Some((layer.image, offset_bytes));
        Ok(())
    }
}

/// A run without its first sectors, and no longer than asked.
fn cut(run: &Run, skipped: u64, sectors: u64) -> Run {
    let place = match run.place {
        Place::Data { offset_bytes } => Place::Data { offset_bytes: offset_bytes + bytes_of(skipped) },
        Place::Compressed { offset_bytes, bytes, skip_bytes } => {
            let skip_bytes = skip_bytes.saturating_add(crate::bytes::narrow(bytes_of(skipped)));
            Place::Compressed { offset_bytes, bytes, skip_bytes }
        }
        place => place,
    };
    Run { place, sectors: (run.sectors - skipped).min(sectors) }
}

fn entry_at(bytes: &[u8], index: u64) -> u64 {
    crate::bytes::be64(bytes, crate::bytes::index(index % ENTRIES * 8))
}

fn put_entry(bytes: &mut [u8], index: u64, entry: u64) {
    crate::bytes::put(bytes, crate::bytes::index(index % ENTRIES * 8), &entry.to_be_bytes());
}
