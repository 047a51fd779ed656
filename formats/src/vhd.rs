//! VHD: fixed, dynamic and differencing. `docs/design/vhd.md` has the layout, the order of writes and the dialects.

mod batmap;
pub mod change;
pub mod check;
pub mod create;
mod footer;
mod headers;
mod layout;
pub mod map;
mod open;
mod reserve;
mod space;
mod write;

use crate::bytes::{be32, index};
use crate::error::{Corruption, Failure};
use crate::format::{Context, Format, Payout, Prepared, Step, Wait, Zeroed};
use crate::ledger::Tick;
use crate::{Extent, Geometry, Place, Run, SECTOR_BYTES};

pub use footer::{Flaw, Footer, Kind};
pub use headers::{Batmap, Footers, Headers, ParentPath, Region, read_headers};
pub use layout::{BLOCK_BYTES, BatmapHeader, DISK_BYTES_MAX, Header, Locator};
pub use space::Planted;

use batmap::Full;
use layout::NO_BLOCK;
use space::Space;

/// Page of metadata: a bitmap of a block of 2 MiB.
const PAGE: u32 = 512;
/// Sectors whose bits one page holds.
const PAGE_BITS: u64 = PAGE as u64 * 8;
/// Unit of the merged map.
const UNIT_BYTES: u64 = 4096;

/// An open VHD.
#[derive(Debug)]
pub struct Vhd {
    kind: Kind,
    footer: Footer,
    sectors: u64,
    /// Where the BAT lies.
    table_bytes: u64,
    block_sectors: u64,
    bitmap_sectors: u64,
    length_bytes: u64,
    /// What is no block.
    regions: alloc::vec::Vec<Region>,
    end_of_metadata: u64,
    full: Full,
    /// Of an image that is written: where new blocks go.
    space: Option<Space>,
    corruption: Option<Corruption>,
}

/// Where a sector of a dynamic image is looked for.
#[derive(Clone, Copy, Debug)]
struct Spot {
    block: u32,
    /// Sector within the block.
    within: u64,
    /// Sectors of the asked extent that lie in the block.
    sectors: u64,
}

impl Vhd {
    /// Whether a QCOW2 image may have this one as its parent, under the name `vpc`. Not a differencing one: qemu opens those as dynamic
    /// ones, and would read something else from the same files.
    #[must_use]
    pub fn may_be_below_qcow2(&self) -> bool {
        self.kind != Kind::Differencing
    }

    /// Which kind of image it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Leaves out an order, for tests that must notice.
    pub fn plant(&mut self, planted: Planted) {
        if let Some(space) = &mut self.space {
            space.planted = planted;
        }
    }

    /// Saves the batmap whenever so many blocks have become full or vanished, instead of 256.
    pub fn save_batmap_after(&mut self, blocks: u32) {
        if let Some(space) = &mut self.space {
            space.save_after = blocks.max(1);
        }
    }

    /// Identity of the image, by which children name it.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.footer.uuid()
    }

    fn check(&self, extent: Extent) -> Step<()> {
        let inside = extent.sectors > 0 && extent.sector < self.sectors && extent.end() <= self.sectors;
        if inside { Ok(()) } else { Err(Wait::Failed(Failure::OutOfRange)) }
    }

    fn spot(&self, extent: Extent) -> Spot {
        let within = extent.sector % self.block_sectors;
        Spot {
            block: crate::bytes::narrow(extent.sector / self.block_sectors),
            within,
            sectors: extent.sectors.min(self.block_sectors - within),
        }
    }

    fn entry_bytes(&self, block: u32) -> u64 {
        self.table_bytes + u64::from(block) * 4
    }

    /// Sectors from the first of a block's bitmap to the last of its data.
    fn stride(&self) -> u64 {
        self.bitmap_sectors + self.block_sectors
    }

    /// Where a block's bitmap begins, if the block is there.
    fn entry(&self, cx: &mut Context<'_>, block: u32) -> Step<Option<u32>> {
        let (page, at) = cx.page(self.entry_bytes(block))?;
        match be32(cx.bytes(page), at) {
            NO_BLOCK => Ok(None),
            start => match self.contradiction(start) {
                None => Ok(Some(start)),
                Some(what) => Err(Corruption { what, at_bytes: self.entry_bytes(block) }.into()),
            },
        }
    }

    /// What is wrong with a BAT entry, if something is. A block may end behind the file: then a crash came before its data, which
    /// read as zero.
    fn contradiction(&self, start: u32) -> Option<&'static str> {
        let from = u64::from(start) * SECTOR_BYTES;
        let length_bytes = self.space.as_ref().map_or(0, |space| space.length_bytes).max(self.length_bytes);
        if from.saturating_add(self.bitmap_sectors * SECTOR_BYTES) > length_bytes {
            return Some("a BAT entry past the end of the image");
        }
        if from >= self.end_of_metadata {
            return None;
        }
        let to = from + self.stride() * SECTOR_BYTES;
        let hit = self.regions.iter().any(|region| region.from < to && from < region.to);
        hit.then_some("a BAT entry inside metadata")
    }

    fn data_bytes(&self, start: u32, within: u64) -> u64 {
        (u64::from(start) + self.bitmap_sectors + within) * SECTOR_BYTES
    }

    /// Whether the first sector of a spot is in its block, and for how many sectors that stays so.
    fn present(&self, cx: &mut Context<'_>, start: u32, spot: Spot) -> Step<(bool, u64)> {
        if self.full.has(spot.block) {
            return Ok((true, spot.sectors));
        }
        let first = spot.within - spot.within % PAGE_BITS;
        let (page, at) = cx.page(u64::from(start) * SECTOR_BYTES + first / 8)?;
        let bits = cx.bytes(page).get(at..at + PAGE as usize).unwrap_or_default();
        let from = spot.within - first;
        let to = (from + spot.sectors).min(PAGE_BITS);
        Ok(run_of_bits(bits, from, to))
    }

    /// A run of blocks that are not there, as far as one page of the BAT says it.
    fn hole(&self, cx: &mut Context<'_>, extent: Extent, spot: Spot) -> Step<u64> {
        let (page, at) = cx.page(self.entry_bytes(spot.block))?;
        let bytes = cx.bytes(page).get(at..PAGE as usize).unwrap_or_default();
        let holes = bytes.chunks_exact(4).take_while(|entry| be32(entry, 0) == NO_BLOCK).count();
        let sectors = (holes as u64).max(1) * self.block_sectors - spot.within;
        Ok(sectors.min(extent.sectors))
    }

    fn nowhere(&self) -> Place {
        if self.kind == Kind::Differencing { Place::Parent } else { Place::Zero }
    }
}

/// The first bit's value, and how many bits from it on have it. Bits count from the highest of each byte.
fn run_of_bits(bits: &[u8], from: u64, to: u64) -> (bool, u64) {
    let bit = |at: u64| bits.get(index(at / 8)).is_some_and(|byte| byte << (at % 8) & 0x80 != 0);
    let first = bit(from);
    let uniform = if first { 0xff } else { 0 };
    let mut at = from;
    while at < to {
        if at.is_multiple_of(8) && bits.get(index(at / 8)) == Some(&uniform) {
            at += 8;
        } else if bit(at) == first {
            at += 1;
        } else {
            break;
        }
    }
    (first, at.min(to) - from)
}

impl Format for Vhd {
    fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors }
    }

    fn page_bytes(&self) -> u32 {
        PAGE
    }

    fn unit_bytes(&self) -> u64 {
        UNIT_BYTES.min(self.block_sectors * SECTOR_BYTES)
    }

    fn map(&self, cx: &mut Context<'_>, extent: Extent) -> Step<Run> {
        self.check(extent)?;
        if self.kind == Kind::Fixed {
            let place = Place::Data { offset_bytes: extent.sector * SECTOR_BYTES };
            return Ok(Run { place, sectors: extent.sectors });
        }
        let spot = self.spot(extent);
        let Some(start) = self.entry(cx, spot.block)? else {
            return Ok(Run { place: self.nowhere(), sectors: self.hole(cx, extent, spot)? });
        };
        let (present, sectors) = self.present(cx, start, spot)?;
        let offset_bytes = self.data_bytes(start, spot.within);
        let place = if present { Place::Data { offset_bytes } } else { self.nowhere() };
        Ok(Run { place, sectors })
    }

    fn prepare(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Prepared> {
        self.prepare_write(cx, extent)
    }

    fn in_place(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Option<(u64, u64)>> {
        self.in_place_write(cx, extent)
    }

    fn commit(&mut self, cx: &mut Context<'_>, payout: &Payout, after: Tick) -> Step<()> {
        self.commit_write(cx, payout, after)
    }

    fn release(&mut self, cx: &mut Context<'_>, payout: &Payout) {
        self.release_write(cx, payout);
    }

    fn zero(&mut self, cx: &mut Context<'_>, extent: Extent, discard: bool) -> Step<Zeroed> {
        self.zero_some(cx, extent, discard)
    }

    fn work(&mut self, cx: &mut Context<'_>) -> Step<()> {
        self.go_on(cx)
    }

    fn answered(&mut self, _: &mut Context<'_>, tag: u64, result: Result<&[u8], Failure>) {
        if let Some(space) = &mut self.space {
            space.answered(tag, result.map(|_| ()));
        }
    }

    fn close(&mut self, cx: &mut Context<'_>) -> Step<()> {
        self.close_some(cx)
    }

    fn corruption(&self) -> Option<Corruption> {
        self.corruption
    }
}

#[cfg(test)]
mod tests {
    use super::run_of_bits;

    #[test]
    fn runs_of_bits_end_where_the_bits_change() {
        let bits = [0b0001_1111, 0xff, 0xff, 0b1100_0000, 0];
        for (from, to, run) in [
            (0, 40, (false, 3)),
            (3, 40, (true, 23)),
            (3, 20, (true, 17)),
            (26, 40, (false, 14)),
            (25, 26, (true, 1)),
            (39, 40, (false, 1)),
        ] {
            assert_eq!(run_of_bits(&bits, from, to), run, "{from}..{to}");
        }
    }
}
