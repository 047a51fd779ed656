//! What an image holds, from end to end: for `map`, without a cache and with little memory.

use alloc::vec::Vec;

use super::footer::Kind;
use super::headers::Headers;
use super::layout::NO_BLOCK;
use super::{Vhd, run_of_bits};
use crate::bytes::{be32, index};
use crate::error::{Corruption, Failure, Unsupported};
use crate::map::{Cursor, for_each_run};
use crate::medium::Medium;
use crate::{Extent, Place, Run, SECTOR_BYTES};

/// Bytes of the BAT that are kept: 32 GiB of disk.
const CHUNK: u64 = 64 << 10;

/// Headers, a part of the BAT, and the bitmap that was looked at last.
#[derive(Debug)]
pub struct Blocks {
    vhd: Vhd,
    blocks: u32,
    chunk: Vec<u8>,
    chunk_at: u64,
    bitmap: Vec<u8>,
    bitmap_of: u32,
}

impl Blocks {
    /// The disk of an image.
    #[must_use]
    pub fn new(headers: &Headers) -> Blocks {
        let vhd = Vhd::of_headers(headers);
        let bitmap = alloc::vec![0; index(vhd.bitmap_sectors * SECTOR_BYTES)];
        Blocks { vhd, blocks: headers.blocks(), chunk: Vec::new(), chunk_at: 0, bitmap, bitmap_of: NO_BLOCK }
    }

    /// The BAT's entry for a block.
    fn entry(&mut self, medium: &mut dyn Medium, block: u32) -> Result<u32, Failure> {
        let at = u64::from(block) * 4;
        let chunk_at = at / CHUNK * CHUNK;
        if self.chunk.is_empty() || chunk_at != self.chunk_at {
            let length = (u64::from(self.blocks) * 4).saturating_sub(chunk_at).min(CHUNK);
            self.chunk.clear();
            self.chunk.resize(index(length), 0xff);
            self.chunk_at = chunk_at;
            if let Err(failure) = medium.read(self.vhd.table_bytes + chunk_at, &mut self.chunk) {
                self.chunk.clear();
                return Err(failure);
            }
        }
        Ok(be32(&self.chunk, index(at - chunk_at)))
    }

    /// Blocks that are not there, from one on, as far as is known.
    fn holes(&self, block: u32) -> u64 {
        let from = index(u64::from(block) * 4 - self.chunk_at);
        let entries = self.chunk.get(from..).unwrap_or_default().chunks_exact(4);
        crate::bytes::wide(entries.take_while(|entry| be32(entry, 0) == NO_BLOCK).count()).max(1)
    }
}

impl Cursor for Blocks {
    fn run(&mut self, medium: &mut dyn Medium, extent: Extent) -> Result<Run, Unsupported> {
        if self.vhd.check(extent).is_err() {
            return Err(Unsupported::Io(0));
        }
        if self.vhd.kind == Kind::Fixed {
            let place = Place::Data { offset_bytes: extent.sector * SECTOR_BYTES };
            return Ok(Run { place, sectors: extent.sectors });
        }
        let spot = self.vhd.spot(extent);
        let start = self.entry(medium, spot.block)?;
        if start == NO_BLOCK {
            let sectors = self.holes(spot.block) * self.vhd.block_sectors - spot.within;
            return Ok(Run { place: self.vhd.nowhere(), sectors: sectors.min(extent.sectors) });
        }
        if let Some(what) = self.vhd.contradiction(start) {
            let at_bytes = self.vhd.entry_bytes(spot.block);
            return Err(Unsupported::Malformed(Corruption { what, at_bytes }));
        }
        let data = Place::Data { offset_bytes: self.vhd.data_bytes(start, spot.within) };
        if self.vhd.full.has(spot.block) {
            return Ok(Run { place: data, sectors: spot.sectors });
        }
        if self.bitmap_of != start {
            self.bitmap_of = NO_BLOCK;
            medium.read(u64::from(start) * SECTOR_BYTES, &mut self.bitmap)?;
            self.bitmap_of = start;
        }
        let (present, sectors) = run_of_bits(&self.bitmap, spot.within, spot.within + spot.sectors);
        Ok(Run { place: if present { data } else { self.vhd.nowhere() }, sectors })
    }
}

/// Calls `found` for every run of the disk in turn, as long as possible: with its first sector, and where it lies.
///
/// # Errors
/// What is wrong with the image, or what the medium says.
pub fn map(
    medium: &mut dyn Medium,
    headers: &Headers,
    found: &mut dyn FnMut(u64, Run),
) -> Result<(), Unsupported> {
    let mut blocks = Blocks::new(headers);
    let sectors = blocks.vhd.sectors;
    for_each_run(&mut blocks, medium, sectors, found)
}
