//! From what an image says about itself to an image that is read or written.

use alloc::vec::Vec;

use super::Vhd;
use super::batmap::{Full, Saver, Stage};
use super::footer::Kind;
use super::headers::{Headers, read_headers};
use super::layout::{BLOCK_BYTES, Header, NO_BLOCK, next_start};
use super::space::{FREE_MAX, Space};
use crate::SECTOR_BYTES;
use crate::bytes::{be32, index, wide};
use crate::error::{Corruption, Unsupported};
use crate::format::Facts;
use crate::medium::Medium;

/// Bytes of the BAT that are read at a time.
const CHUNK: u64 = 64 << 10;

impl Vhd {
    /// Opens an image for reading (as a parent, for example). Of the BAT nothing is read before it is needed.
    ///
    /// # Errors
    /// [`Unsupported`].
    pub fn open(medium: &mut dyn Medium) -> Result<Vhd, Unsupported> {
        Ok(Vhd::of_headers(&read_headers(medium)?))
    }

    /// Opens an image for writing: the whole BAT is looked at, and refused where it contradicts itself.
    ///
    /// # Errors
    /// [`Unsupported`].
    pub fn open_to_write(medium: &mut dyn Medium, facts: Facts) -> Result<Vhd, Unsupported> {
        let headers = read_headers(medium)?;
        let mut vhd = Vhd::of_headers(&headers);
        if headers.footer.kind() == Kind::Fixed {
            vhd.space = Some(Space::of_fixed());
            return Ok(vhd);
        }
        if headers.block_bytes() != BLOCK_BYTES {
            return Err(Unsupported::Refused(
                "a VHD whose blocks are not of 2 MiB is opened for reading only",
            ));
        }
        if !facts.grows && headers.end_of_metadata() > facts.length_bytes.saturating_sub(512) {
            return Err(Unsupported::Malformed(Corruption {
                what: "a footer inside metadata",
                at_bytes: facts.length_bytes.saturating_sub(512),
            }));
        }
        let mut layout = vhd.scan(medium, headers.blocks(), facts)?;
        let saver = saver(&headers, &layout);
        layout.find_gaps(saver.as_ref().map_or(0, Saver::end).div_ceil(SECTOR_BYTES));
        if facts.grows && headers.footers.end {
            // What another tool left free before its footer stays free.
            layout.end_sector = layout.end_sector.max(facts.length_bytes / SECTOR_BYTES - 1);
        }
        let exact = headers.footer.kind() == Kind::Differencing || !facts.grows || !facts.new_space_is_zero;
        let mut full = Full::new(vhd.full.bytes().to_vec(), u64::from(headers.blocks()).div_ceil(8));
        let mut changes = 0;
        for &block in &layout.absent {
            changes += u32::from(full.set(block, false));
        }
        vhd.full = full;
        let mut space = Space::new(&headers, facts, &layout, exact, saver);
        if let Some(saver) = &mut space.saver {
            saver.changes += changes;
        }
        vhd.space = Some(space);
        Ok(vhd)
    }

    pub(super) fn of_headers(headers: &Headers) -> Vhd {
        let map = headers.batmap.as_ref().map_or_else(Vec::new, |batmap| batmap.map.clone());
        Vhd {
            kind: headers.footer.kind(),
            footer: headers.footer,
            sectors: headers.disk_bytes / SECTOR_BYTES,
            table_bytes: headers.header.as_ref().map_or(0, Header::table_bytes),
            block_sectors: headers.block_bytes() / SECTOR_BYTES,
            bitmap_sectors: headers.bitmap_sectors(),
            length_bytes: headers.length_bytes,
            regions: headers.regions.clone(),
            end_of_metadata: headers.end_of_metadata(),
            full: Full::new(map, 0),
            space: None,
            corruption: None,
        }
    }

    /// Looks at every entry of the BAT that the disk uses.
    fn scan(&self, medium: &mut dyn Medium, blocks: u32, facts: Facts) -> Result<Layout, Unsupported> {
        let mut layout = Layout::new(self.stride(), self.end_of_metadata.div_ceil(SECTOR_BYTES));
        let limit = if facts.grows { u64::MAX } else { facts.length_bytes.saturating_sub(SECTOR_BYTES) };
        for_each_entry(medium, self.table_bytes, blocks, |block, start| {
            let at_bytes = self.entry_bytes(block);
            if start == NO_BLOCK {
                if self.full.has(block) {
                    layout.absent.push(block);
                }
                return Ok(());
            }
            let what = self.contradiction(start).or_else(|| layout.take(start));
            let end = (u64::from(start) + self.stride()) * SECTOR_BYTES;
            match what.or_else(|| (end > limit).then_some("a block that reaches into the footer")) {
                None => Ok(()),
                Some(what) => Err(Unsupported::Malformed(Corruption { what, at_bytes })),
            }
        })?;
        Ok(layout)
    }
}

/// Reads a BAT piece by piece.
pub(super) fn for_each_entry(
    medium: &mut dyn Medium,
    table_bytes: u64,
    blocks: u32,
    mut take: impl FnMut(u32, u32) -> Result<(), Unsupported>,
) -> Result<(), Unsupported> {
    let length = u64::from(blocks) * 4;
    let mut bytes = alloc::vec![0; index(length.min(CHUNK))];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(CHUNK);
        let Some(chunk) = bytes.get_mut(..index(part)) else { break };
        medium.read(table_bytes + done, chunk)?;
        for (at, entry) in chunk.chunks_exact(4).enumerate() {
            take(crate::bytes::narrow(done / 4 + wide(at)), be32(entry, 0))?;
        }
        done += part;
    }
    Ok(())
}

/// Which sectors of a file blocks take.
#[derive(Debug)]
pub(super) struct Layout {
    stride: u64,
    /// The block that begins in each stretch of one stride: there can be one at most.
    starts: Vec<u32>,
    first_sector: u64,
    /// The sector behind the last block.
    pub(super) end_sector: u64,
    /// Where the first block begins.
    pub(super) lowest: u64,
    /// Room between blocks.
    pub(super) gaps: Vec<u32>,
    /// Blocks that a batmap calls full and that are not there.
    pub(super) absent: Vec<u32>,
}

impl Layout {
    pub(super) fn new(stride: u64, first_sector: u64) -> Layout {
        let (gaps, absent) = (Vec::new(), Vec::new());
        Layout {
            stride,
            starts: Vec::new(),
            first_sector,
            end_sector: first_sector,
            lowest: u64::MAX,
            gaps,
            absent,
        }
    }

    /// Enters a block. Says what is wrong with it. Memory is 4 bytes for each 2 MiB of the file, as starts lie inside it.
    pub(super) fn take(&mut self, start: u32) -> Option<&'static str> {
        let start64 = u64::from(start);
        let at = index(start64 / self.stride);
        if self.starts.len() <= at {
            self.starts.resize(at + 1, NO_BLOCK);
        }
        let own = self.starts.get(at).copied().unwrap_or(NO_BLOCK);
        if own == start {
            return Some("two blocks in one place");
        }
        let before =
            at.checked_sub(1).and_then(|at| self.starts.get(at)).copied().filter(|&other| other != NO_BLOCK);
        let behind = self.starts.get(at + 1).copied().unwrap_or(NO_BLOCK);
        let overlaps = own != NO_BLOCK
            || before.is_some_and(|other| u64::from(other) + self.stride > start64)
            || u64::from(behind) < start64 + self.stride;
        if overlaps {
            return Some("blocks that overlap");
        }
        if let Some(place) = self.starts.get_mut(at) {
            *place = start;
        }
        self.end_sector = self.end_sector.max(start64 + self.stride);
        self.lowest = self.lowest.min(start64);
        None
    }

    /// Finds room for blocks between blocks, from a sector on that other things leave free.
    fn find_gaps(&mut self, first_sector: u64) {
        let mut end = self.first_sector.max(first_sector);
        self.end_sector = self.end_sector.max(end);
        for &start in self.starts.iter().filter(|&&start| start != NO_BLOCK) {
            while self.gaps.len() < FREE_MAX && next_start(end) + self.stride <= u64::from(start) {
                self.gaps.push(crate::bytes::narrow(next_start(end)));
                end = next_start(end) + self.stride;
            }
            end = end.max(u64::from(start) + self.stride);
        }
        self.starts = Vec::new();
    }
}

/// The batmap's places: the one it has, and the one that images of ours keep beside it, if nothing else lies there.
fn saver(headers: &Headers, layout: &Layout) -> Option<Saver> {
    let batmap = headers.batmap.as_ref()?;
    let room = u64::from(batmap.header.map_sectors()) * 512;
    let first = batmap.at_bytes + 512;
    let own = batmap.header.map_bytes();
    let other = if own == first { first + room } else { first };
    let end = (other + room).max(own + room);
    let taken = headers.regions.iter().any(|region| region.from < other + room && other < region.to);
    let free = !taken && end <= layout.lowest.saturating_mul(SECTOR_BYTES) && end <= headers.length_bytes;
    Some(Saver {
        header: batmap.header,
        header_bytes: batmap.at_bytes,
        used_bytes: super::layout::batmap_used_bytes(headers.footer.current_bytes()),
        places: [own, if free { other } else { own }],
        room_bytes: room,
        changes: u32::from(batmap.map.is_empty()),
        stage: Stage::Idle,
    })
}
